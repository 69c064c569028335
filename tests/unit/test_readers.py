"""Every format gives the same documents, from any position; what cannot be read is named by file and line."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ernie_dist.data import readers
from ernie_dist.data.documents import BadRow, canonical, document_maker, row_reader
from ernie_dist.data.readers import Broken, find_inputs, line_encoding, parse_block, read_blocks
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import DataError

TEXTS = [f"第{n}篇：天地玄黃，“宇宙”洪荒, and {n} words\n第二行 {'長' * (n % 7)}" for n in range(60)]


def lines(encoding: str = "utf-8") -> bytes:
    rows = [json.dumps({"text": text, "id": n}, ensure_ascii=False) for n, text in enumerate(TEXTS)]
    return ("\n".join(rows) + "\n\n").encode(encoding)


def table(delimiter: str, encoding: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(TEXTS))
    return out.getvalue().encode(encoding)


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "id": range(len(TEXTS))}), path, row_group_size=17)


FORMATS = {
    "a.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "a.jsonl.zst": lambda path: path.write_bytes(
        b"".join(zstandard.compress(part) for part in (lines()[:1000], lines()[1000:]))  # two frames
    ),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=2), encoding="utf-8"),
    "lines.json": lambda path: path.write_bytes(lines()),
    "a.csv": lambda path: path.write_bytes(table(",", "gb18030")),
    "utf16.csv": lambda path: path.write_bytes(table(",", "utf-16")),
    "a.tsv": lambda path: path.write_bytes(table("\t", "utf-8")),
    "big5.jsonl": lambda path: path.write_bytes(lines("gb18030")),
    "utf16.jsonl": lambda path: path.write_bytes(lines("utf-16")),
    "a.txt": lambda path: path.write_text("\n\n" + "\n \n\n".join(TEXTS) + "\n", encoding="utf-8", newline="\r\n"),
    "*.md": lambda path: [path.with_name(f"{n:03d}.md").write_text(text, "utf-8") for n, text in enumerate(TEXTS)],
    "a.parquet": write_parquet,
}
ENCODINGS = {"a.csv": "gb18030", "utf16.csv": "utf-16", "big5.jsonl": "gb18030", "utf16.jsonl": "utf-16"}


def read_rows(source: SourceSpec, start: readers.Position = readers.Position()) -> list[readers.Located]:  # noqa: B008
    inputs = find_inputs("web", source)
    return [row for block in read_blocks(source, inputs, start) for row in parse_block(block, line_encoding(source))]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents_from_any_block(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 700)
    FORMATS[name](tmp_path / name)
    source = SourceSpec(path=str(tmp_path / name), encoding=ENCODINGS.get(name, "utf-8"), text="text")
    assert [located.row["text"] for located in read_rows(source)] == TEXTS

    blocks = list(read_blocks(source, find_inputs("web", source)))
    assert len(blocks) > 3
    for number, block in enumerate(blocks):  # a resume reads exactly the blocks that were left
        assert list(read_blocks(source, find_inputs("web", source), block.end)) == blocks[number + 1 :]


def test_a_saved_dataset_gives_the_same_documents(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": rows, "dev": rows.select(range(3))}).save_to_disk(tmp_path / "saved")
    source = SourceSpec(dataset=str(tmp_path / "saved"), text="text")
    assert [located.row["text"] for located in read_rows(source)] == TEXTS
    assert len(read_rows(source.model_copy(update={"dataset_split": "dev"}))) == 3
    assert [row.row["text"] for row in read_rows(source, readers.Position(0, 58, 1))] == TEXTS[58:]


def outcome(source: SourceSpec) -> list[tuple[int, str]]:
    """Line and text, or line and reason, of every row."""
    make, result = document_maker(source), []
    for located in read_rows(source):
        try:
            if isinstance(located.row, Broken):
                raise BadRow(located.row.reason)
            document = make(located.row)
            canonical(document)
            result.append((located.line, document))
        except BadRow as error:
            result.append((located.line, f"BAD {error}"))
    return result


def test_bad_rows_of_jsonl_are_named_by_line(tmp_path: Path) -> None:
    rows = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b"",
        b'{"title": "no text"}',
        b'{"text": 7}',
        b'{"text": " \\n"}',
        b'{"text": "\xff\xfe"}',
        b"[1, 2]",
        b'{"text": "\\ud800 half"}',
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    found = outcome(SourceSpec(path=str(tmp_path / "a.jsonl"), text="text"))
    assert [line for line, _ in found] == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    expected = [
        *("good", "not valid JSON", "no field 'text'; it has 'title'", "'text' is a number", "text is empty"),
        *("byte 10 is not utf-8", "not a JSON object", "surrogate", "not valid JSON", "last"),
    ]
    for (line, got), wanted in zip(found, expected, strict=True):
        assert wanted in got and got.startswith("BAD") == (line not in (1, 11)), (line, got)


def test_bad_rows_of_csv_are_named_by_line_after_quoted_newlines(tmp_path: Path) -> None:
    text = 'ask,answer\n"two\nlines",good\nonly one\nask,\nquote "in" it,fine\n"bad" quote,x\n'.encode("gb18030")
    (tmp_path / "a.csv").write_bytes(text + b"\x81\xff,undecodable\n" + '好,"never closed\n'.encode("gb18030"))
    found = outcome(SourceSpec(path=str(tmp_path / "a.csv"), encoding="gb18030", text="{ask}/{answer}"))
    assert [(line, text.startswith("BAD")) for line, text in found] == [
        *((2, False), (4, True), (5, True), (6, False), (7, True), (8, True), (9, True))
    ]
    expected = ("two\nlines/good", "columns", "'answer' is empty", 'quote "in" it/fine', "CSV", "undecodable", "quote")
    assert all(wanted in got for wanted, (_, got) in zip(expected, found, strict=True)), found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(lines())[:-20], "ends too early"),
        ("a.jsonl.gz", b"not gzip at all", "Not a gzipped file"),
        ("a.jsonl.zst", zstandard.compress(lines())[:-20], "ends too early"),
        ("a.jsonl.zst", b"not zstd at all", "damaged"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"},\n{"text": }]', "a.json:3"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}', "a.json:2"),
        ("a.json", b'[{"text": "a"}]\n{"text": "b"}', "more after the end"),
        ("a.csv", b"a,b,a\n1,2,3\n", "different name for each column"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_rows(SourceSpec(path=str(tmp_path / name), text="text"))
    assert name in str(error.value)


def test_what_is_not_there_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    (tmp_path / "a.xml").write_text("<a/>")
    for path, message in {
        str(tmp_path / "none.jsonl"): "no such file",
        str(tmp_path / "*.jsonl"): "no file matches",
        "${NO_SUCH_VARIABLE}/a.jsonl": "not set",
        str(tmp_path): r"is a folder .*; write .*\*\.jsonl",
        str(tmp_path / "a.xml"): r"\.xml.*format",
    }.items():
        with pytest.raises(DataError, match=message):
            find_inputs("web", SourceSpec(path=path, text="text"))


def test_templates_read_fields_by_name_and_nothing_else() -> None:
    make = document_maker(SourceSpec(path="x", text="问：{问题}\n{{{a.b}}} {n}"))
    assert make({"问题": "何？", "a.b": "x", "n": 1.5}) == "问：何？\n{x} 1.5"
    with pytest.raises(BadRow, match="no field 'n'"):
        make({"问题": "何？", "a.b": "x"})
    for template in ("{}", "{a!r}", "{a:>3}"):
        with pytest.raises(DataError, match="by their name alone"):
            document_maker(SourceSpec(path="x", text=template))


def test_triples_always_get_the_same_phrasing_but_not_all_the_same_one() -> None:
    for kind in ("text", "qa"):
        read = row_reader(SourceSpec(path="x", triples=kind))
        documents = [read({"实体": f"河{n}", "属性": "全长", "值": n})[0].document for n in range(40)]
        again = [read({"entity": f"河{n}", "attribute": "全长", "value": str(n)})[0].document for n in range(40)]
        assert documents == again
        contents = [canonical(document).decode() for document in documents]
        assert all(f"河{n}" in text and str(n) in text and "全长" in text for n, text in enumerate(contents))
        assert len({text.replace(str(n), "#") for n, text in enumerate(contents)}) > 2
    with pytest.raises(BadRow, match="attribute"):
        read({"实体": "a", "值": "b"})


def test_the_real_gb18030_table_and_array_are_read_whole(shared_data: Path) -> None:
    medical = SourceSpec(path=str(shared_data / "medical_qa.gb18030.csv"), encoding="gb18030", text="{ask}\n{answer}")
    found = outcome(medical)
    assert len(found) == 7000 and not any(text.startswith("BAD") for _, text in found)
    assert found[0][1].startswith("我今年35岁了")
    assert len(read_rows(SourceSpec(path=str(shared_data / "xiehouyu.json"), text="riddle"))) == 14_032
