"""Triples: which are left out and why, and what a held-out share of entities or of wordings really holds out."""

import csv
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_dist.data.documents import BadRow, LeftOut, Marked, row_reader
from ernie_dist.data.prepare import prepare
from ernie_dist.data.shard import PreparedSource
from ernie_dist.data.split import SPLITS, split_of
from ernie_dist.data.tokenizer import train_and_publish
from ernie_dist.spec.curriculum import SourceSpec, SplitSpec
from ernie_dist.spec.job import parse_job

SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


def reader(**triples: Any) -> Any:
    return row_reader(SourceSpec(path="x", triples={"make": "qa", **triples}))


def row(entity: Any, attribute: Any, value: Any) -> dict[str, Any]:
    return {"实体": entity, "属性": attribute, "值": value}


@pytest.mark.parametrize(
    ("triple", "reason"),
    [
        (("长江", "全长", ""), "no value"),
        (("长江", "全长", None), "no value"),
        (("长江", " ", "6300"), "no entity or attribute"),
        (("长江", "全长", "——"), "only punctuation"),
        (("长江", "全长", "暂无。"), "value says nothing"),
        (("长江", "全长", "N/A"), "value says nothing"),
        (("长江", "全长", "NA"), "value says nothing"),
        (("长江", "别名", "长江"), "value repeats the entity or attribute"),
        (("长江", "图片", "https://a.b/c.jpg"), "link or markup"),
        (("长江", "全长", "<br>6300公里"), "link or markup"),
        (("长江", "简介", "大" * 101), "too long"),
    ],
)
def test_what_says_nothing_is_left_out_with_its_reason(triple: tuple, reason: str) -> None:
    read = reader(filter=True, longest=100)
    with pytest.raises(LeftOut, match=f"^{reason}$"):
        read(row(*triple))
    assert read(row("钠", "化学符号", "Na"))


def test_without_a_filter_only_what_is_empty_is_refused_and_nothing_changes() -> None:
    assert len(reader()(row("长江", "图片", "https://a.b/c.jpg"))) == 1
    with pytest.raises(BadRow, match="'值' is empty"):
        reader()(row("长江", "全长", ""))
    plain = row_reader(SourceSpec(path="x", triples="qa"))(row("长江", "全长", "6300公里"))
    assert reader()(row("长江", "全长", "6300公里")) == plain
    assert reader(phrasings=4)(row("长江", "全长", "6300公里"))[:1] == plain
    assert plain[0].digest == 0xF1C640863AB04EED, "prepared data of jobs written before must stay what it was"


def test_tidying_takes_out_marks_and_line_breaks_and_no_more() -> None:
    read = row_reader(SourceSpec(path="x", triples={"make": "text", "tidy": True, "phrasings": 6}))
    made = read(row("红楼梦[古典小说]", "作者", "[[曹雪芹|曹霑]]、\r\n [[高鹗]][1][2,3]"))
    assert len(made) == len({one.document for one in made}) == 5, "as many wordings as there are"
    assert all("红楼梦[古典小说]" in one.document and "曹霑、 高鹗" in one.document for one in made)
    assert len(reader(phrasings=6)(row("Yangtze", "length", "6300 km"))) == 3
    for empty in (("长江", "全长", "[1]"), ("长江", "[[x|]]", "6300")):
        with pytest.raises(LeftOut, match=r"^no "):
            read(row(*empty))


def held_out(read: Any, triples: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], list[tuple[str, Marked]]]:
    """triple -> (split, document) of each of its wordings"""
    found = defaultdict(list)
    for triple in triples:
        made = read(row(*triple))
        which = split_of(np.array([one.digest for one in made], np.uint64), SplitSpec(**SHARES))
        found[triple] = [(SPLITS[number], one) for number, one in zip(which, made, strict=True)]
    return found


def test_held_out_entities_are_never_trained_on_and_held_out_wordings_are_of_known_facts() -> None:
    triples = [(f"河{n}", attribute, str(100 + n)) for n in range(300) for attribute in ("全长", "流域", "支流")]
    by_entity = defaultdict(set)
    for triple, made in held_out(reader(phrasings=3, hold_out="entities"), triples).items():
        by_entity[triple[0]] |= {split for split, _ in made}
    assert all(len(splits) == 1 for splits in by_entity.values())
    shares = Counter(split for splits in by_entity.values() for split in splits)
    assert [shares[name] / 300 for name in SPLITS] == pytest.approx(list(SHARES.values()), abs=0.08)

    seen: dict[str, set[str]] = defaultdict(set)
    for made in held_out(reader(phrasings=5, hold_out="phrasings"), triples).values():
        assert Counter(split for split, _ in made) == {"train": 3, "validation": 1, "test": 1}
        for split, one in made:
            seen[split].add(
                "".join(one.document[0].content.split("河")).translate({ord(d): None for d in "0123456789"})
            )
    assert seen["train"] == seen["test"], "every question is heard in training, of other facts"


def test_a_table_is_prepared_with_what_was_left_out_counted_by_reason(tmp_path: Path) -> None:
    rows = [(f"河{n}", "全长", f"{n + 1}公里") for n in range(100)]
    rows += [
        *rows[:10],
        ("长江", "图片", "www.a.b"),
        ("长江", "别名", "无"),
        ("长江", "别名", "-"),
        ("黄河", "别名", "-"),
    ]
    with (tmp_path / "own.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("实体", "属性", "值"), *rows])
    folder = train_and_publish(("".join(row) for row in rows), 300, tmp_path / "tokenizer").folder
    options = {"make": "qa", "phrasings": 5, "filter": True, "hold_out": "phrasings"}
    job = parse_job(
        {
            "name": "t",
            "model": {"preset": "ernie-4.5-tiny"},
            "tokenizer": str(folder),
            "tokens_per_batch": 4096,
            "sources": {"own": {"path": str(tmp_path / "own.csv"), "triples": options, "dedupe": True}},
            "split": SHARES,
            "curriculum": [{"name": "a", "duration": "1 epochs", "sequence_length": 256, "mixture": {"own": 1.0}}],
            "schedule": {"kind": "constant", "peak": 1e-3},
            "data_dir": str(tmp_path / "prepared"),
        },
        "test",
    )
    manifest = PreparedSource.open(prepare(job, show_progress=False).sources["own"]).manifest
    assert (manifest.rows, manifest.documents, manifest.duplicates, manifest.quarantined) == (114, 550, 50, 0)
    assert manifest.left_out == {"only punctuation": 2, "link or markup": 1, "value says nothing": 1}
    assert {name: count.documents for name, count in manifest.splits.items()} == {
        "train": 300,
        "validation": 100,
        "test": 100,
    }
