"""Sources -> tokenised, split and packed data on disk: once, in parallel, resumable. The door to data/ for a job.

    survey    inputs --sha256--> fingerprints --> PreparedJob (where everything is, or will be)
    prepare   survey --> tokenizer --> shards --> splits --> packs
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ernie_dist.data import shard, tokenizer
from ernie_dist.data.index import plan_missing_packs, write_index
from ernie_dist.data.inputs import HashCache
from ernie_dist.data.readers import Input, find_inputs
from ernie_dist.data.shard import InputRecord, Manifest, PreparedSource, read_manifest, read_shards
from ernie_dist.data.tokenise import Workers, bad_rows_error, stored_bad_rows, tokenise
from ernie_dist.data.tokenizer import PublishedTokenizer
from ernie_dist.data.vocabulary import training_texts
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import DataError, EnvironmentProblem
from ernie_dist.spec.job import JobSpec, fingerprint

log = logging.getLogger(__name__)

_SMALL = 8 << 20
"""bytes of input below which starting processes costs more than it gains"""
_TOKENS_FIELDS = {"encoding", "text", "prompt", "response", "system", "conversation", "triples", "dataset_split", "subset"}
"""what of a SourceSpec decides the tokens; the rest decides which documents are used, or nothing"""


@dataclass(frozen=True)
class PreparedJob:
    """Where the data of a job lies. Two of them tell whether inputs changed in between: see `differences`."""

    tokenizer_folder: Path
    tokenizer_fingerprint: str
    """empty in a survey, while a tokenizer is still to be trained"""
    vocab_size: int
    """highest token id + 1"""
    sources: dict[str, Path]
    """folder for PreparedSource.open; its name is the source's fingerprint"""
    inputs: dict[str, tuple[InputRecord, ...]] = field(default_factory=dict, repr=False)
    """files of each source, as they are now"""


@dataclass(frozen=True)
class _Planned:
    """A source of a job, and the folders that its inputs and settings lead to."""

    name: str
    source: SourceSpec
    inputs: list[Input]
    records: tuple[InputRecord, ...]
    tokens_folder: Path
    folder: Path

    @property
    def is_complete(self) -> bool:
        return (self.folder / "manifest.json").exists()


def prepare(job: JobSpec, *, workers: int | None = None, show_progress: bool = True) -> PreparedJob:
    """Tokenises, splits and packs what is not yet, with `workers` processes (default: one per core).

    What is done stays done: an interrupted run goes on after the last finished shard, and a run with nothing to do
    takes no time. Raises DataError, with everything finished so far kept.
    """
    data_dir = Path(os.path.expanduser(os.path.expandvars(job.data_dir)))
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data_dir {data_dir}: cannot be made ({error.strerror}); choose another") from None
    with _locked(data_dir):
        hashes, inputs = _hash_inputs(job, data_dir, show_progress)
        published = _find_or_publish_tokenizer(job, data_dir, hashes, inputs)
        planned = _plan(job, data_dir, hashes, inputs, published)
        missing = [item for item in planned if not item.is_complete]
        if missing:
            _check_disk_space(data_dir, missing, published.vocab_size)
            _tokenise_missing(job, missing, published, hashes, workers, show_progress)
        for item in planned:
            _finish(job, item)
        return _prepared_job(published, planned)


def survey(job: JobSpec) -> PreparedJob:
    """Where the data of a job would be, from its inputs as they are now; tokenises nothing.

    Compare it to what a run recorded to find out whether its data changed. The folders need not be there yet.
    """
    data_dir = Path(os.path.expanduser(os.path.expandvars(job.data_dir)))
    hashes, inputs = _hash_inputs(job, data_dir, show_progress=False)
    published = _find_tokenizer(job, data_dir, hashes, inputs)
    if published is None:
        nothing = PublishedTokenizer(data_dir / "tokenizer", "", 0, 0, None, {})
        return _prepared_job(nothing, _plan(job, data_dir, hashes, inputs, nothing))
    return _prepared_job(published, _plan(job, data_dir, hashes, inputs, published))


def differences(recorded: PreparedJob, current: PreparedJob) -> list[str]:
    """What changed between two looks at a job's data: for each source and the tokenizer, which file, old and new hash."""
    found = []
    if recorded.tokenizer_fingerprint != current.tokenizer_fingerprint:
        now = current.tokenizer_fingerprint or "one still to be trained, since its texts changed"
        found.append(f"tokenizer: was {recorded.tokenizer_fingerprint}, is {now}")
    for name in sorted({*recorded.sources, *current.sources}):
        before, after = recorded.sources.get(name), current.sources.get(name)
        if before is None or after is None:
            found.append(f"sources.{name}: was {'absent' if before is None else before.name}, is {'absent' if after is None else after.name}")
        elif before.name != after.name:
            files = list(_changed_files(_inputs_of(recorded, name), _inputs_of(current, name)))
            found += [f"sources.{name}: {line}" for line in files]
            if not files:
                found.append(f"sources.{name}: prepared as {before.name}, now {after.name}: its settings or the tokenizer changed")
    return found


def _inputs_of(job: PreparedJob, name: str) -> dict[str, str]:
    records = job.inputs.get(name)
    if records is None:
        try:
            records = read_manifest(job.sources[name]).inputs
        except DataError:
            records = ()
    return {record.path: record.sha256 for record in records}


def _changed_files(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    if sorted(before.values()) == sorted(after.values()):
        return  # moved or renamed at most
    for path in sorted({*before, *after}):
        if before.get(path) != after.get(path):
            yield f"{path}: sha256 was {before.get(path, 'absent')}, is {after.get(path, 'absent')}"


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """One prepare at a time in a folder; a second one waits, and then finds the work done."""
    with (data_dir / ".lock").open("w") as lock:
        with suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("another prepare is at work in %s; waiting for it", data_dir)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _hash_inputs(job: JobSpec, data_dir: Path, show_progress: bool) -> tuple[HashCache, dict[str, tuple[list[Input], list[str]]]]:
    """The files of every source with their hashes, in order."""
    cache = HashCache(data_dir / "inputs.json")
    found = {name: find_inputs(name, source) for name, source in job.sources.items()}
    files = [file for inputs in found.values() for item in inputs for file in item.files]
    hashes = cache.hash_all(dict.fromkeys(files))
    if data_dir.is_dir():
        cache.save()
    return cache, {
        name: (inputs, [hashes[file] for item in inputs for file in item.files]) for name, inputs in found.items()
    }


def _tokenizer_key(job: JobSpec, hashes: HashCache, inputs: dict[str, tuple[list[Input], list[str]]]) -> str:
    """Names what a tokenizer is made from, so that the same is not made twice."""
    if isinstance(job.tokenizer, str):
        name, files = tokenizer.find_tokenizer(job.tokenizer)
        made_from: Any = sorted(hashes.hash_all(files).values()) if files else name
    else:
        made_from = {
            "train": job.tokenizer.model_dump(mode="json"),
            "sources": {
                name: [values, _tokens_settings(job.sources[name], items), _split(job, name).model_dump(mode="json")]
                for name, (items, values) in inputs.items()
            },
        }
    return fingerprint({"format": tokenizer.FORMAT, "made_from": made_from})


def _find_tokenizer(
    job: JobSpec, data_dir: Path, hashes: HashCache, inputs: dict[str, tuple[list[Input], list[str]]]
) -> PublishedTokenizer | None:
    root = data_dir / "tokenizer"
    note = root / f"from-{_tokenizer_key(job, hashes, inputs)}"
    return tokenizer.load_published(root, note.read_text().strip()) if note.exists() else None


def _find_or_publish_tokenizer(
    job: JobSpec, data_dir: Path, hashes: HashCache, inputs: dict[str, tuple[list[Input], list[str]]]
) -> PublishedTokenizer:
    published = _find_tokenizer(job, data_dir, hashes, inputs)
    if published is None:
        root = data_dir / "tokenizer"
        root.mkdir(exist_ok=True)
        if isinstance(job.tokenizer, str):
            published = tokenizer.publish_pretrained(tokenizer.find_tokenizer(job.tokenizer)[0], root)
        else:
            log.info("training a tokenizer of %d entries", job.tokenizer.train.vocab_size)
            texts = training_texts([(source, inputs[name][0], _split(job, name)) for name, source in job.sources.items()])
            published = tokenizer.train_and_publish(texts, job.tokenizer.train.vocab_size, root)
        (root / f"from-{_tokenizer_key(job, hashes, inputs)}").write_text(published.fingerprint + "\n")
        hashes.save()
    for name, source in job.sources.items():
        if source.kind == "chat":
            published.require_chat(name)
    return published


def _split(job: JobSpec, name: str) -> Any:
    return job.sources[name].split or job.split


def _tokens_settings(source: SourceSpec, inputs: list[Input]) -> dict[str, Any]:
    settings = source.model_dump(mode="json", include=_TOKENS_FIELDS)
    return {**settings, "formats": [item.format for item in inputs]}


def _plan(
    job: JobSpec,
    data_dir: Path,
    hashes: HashCache,
    inputs: dict[str, tuple[list[Input], list[str]]],
    published: PublishedTokenizer,
) -> list[_Planned]:
    planned = []
    for name, source in job.sources.items():
        items, values = inputs[name]
        files = [file for item in items for file in item.files]
        tokens = fingerprint([shard.FORMAT, values, published.fingerprint, _tokens_settings(source, items)])
        overlong = source.overlong if source.kind == "chat" else None
        whole = fingerprint([shard.FORMAT, tokens, _split(job, name).model_dump(mode="json"), source.dedupe, overlong])
        planned.append(
            _Planned(
                name=name,
                source=source,
                inputs=items,
                records=tuple(
                    InputRecord(path=str(file), bytes=file.stat().st_size, sha256=value)
                    for file, value in zip(files, values, strict=True)
                ),
                tokens_folder=data_dir / name / f"tokens-{tokens}",
                folder=data_dir / name / whole,
            )
        )
    return planned


def _prepared_job(published: PublishedTokenizer, planned: list[_Planned]) -> PreparedJob:
    return PreparedJob(
        tokenizer_folder=published.folder,
        tokenizer_fingerprint=published.fingerprint,
        vocab_size=published.vocab_size,
        sources={item.name: item.folder for item in planned},
        inputs={item.name: item.records for item in planned},
    )


def _check_disk_space(data_dir: Path, missing: list[_Planned], vocab_size: int) -> None:
    """Raises DataError if what is to be written would hardly fit. Chinese text has up to one token in 2.5 bytes."""
    needed = 0
    for item in missing:
        ratio = 4 if item.inputs[0].format == "parquet" else 1
        for record in item.records:
            unpacked = record.bytes * (4 if record.path.endswith((".gz", ".zst")) else ratio)
            per_token = (2 if vocab_size <= 1 << 16 else 4) + (item.source.kind == "chat")
            needed += int(unpacked / 2.5 * per_token)
        done = read_shards(item.tokens_folder)
        if done:
            needed = 0 if done[-1].last else needed  # an interrupted one is counted in full: better too much
    available = shutil.disk_usage(data_dir).free
    if needed > available:
        raise DataError(
            f"data_dir {data_dir}: preparing {', '.join(item.name for item in missing)} needs about {needed:,} bytes, and "
            f"{available:,} are available; free some, or set data_dir to a larger disk"
        )


def _tokenise_missing(
    job: JobSpec,
    missing: list[_Planned],
    published: PublishedTokenizer,
    hashes: HashCache,
    count: int | None,
    show_progress: bool,
) -> None:
    total = sum(record.bytes for item in missing for record in item.records)
    count = count or (1 if total < _SMALL else len(os.sched_getaffinity(0)))
    token_type = "uint16" if published.vocab_size <= 1 << 16 else "uint32"
    with Workers(count, published) as workers, _Progress(total, show_progress) as progress:
        for item in missing:
            try:
                advance = progress.start(item.name)
                records = tokenise(item.name, item.source, item.inputs, item.tokens_folder, token_type, workers, advance)
            except OSError as error:
                raise EnvironmentProblem(
                    f"{item.tokens_folder}: cannot be written ({error.strerror}); finished shards are kept: "
                    f"start again once it can ({shutil.disk_usage(item.tokens_folder.parent).free:,} bytes are free)"
                ) from None
            changed = [record.path for record in item.records if not hashes.is_unchanged(Path(record.path))]
            if changed:
                shutil.rmtree(item.tokens_folder)
                raise DataError(f"{changed[0]}: changed while it was read; start again once it is complete")
            write_index(item.folder, item.tokens_folder, records, item.source, _split(job, item.name), _manifest(item, published, token_type))
            progress.finish(sum(record.bytes for record in item.records))


def _manifest(item: _Planned, published: PublishedTokenizer, token_type: str) -> Any:
    def make(**counts: Any) -> Manifest:
        return Manifest.model_validate(
            {
                "name": item.name,
                "kind": item.source.kind,
                "fingerprint": item.folder.name,
                "tokenizer_fingerprint": published.fingerprint,
                "vocab_size": published.vocab_size,
                "token_type": token_type,
                "label_replacements": published.label_replacements if item.source.kind == "chat" else {},
                "inputs": item.records,
                "versions": {name: version(name) for name in ("tokenizers", "numpy")},
                **counts,
            }
        )

    return make


def _finish(job: JobSpec, item: _Planned) -> None:
    """Checks a prepared source against what this job wants of it, and packs it to this job's sequence lengths."""
    prepared = PreparedSource.open(item.folder)
    manifest = prepared.manifest
    if manifest.quarantined and item.source.on_bad_row == "fail":
        rows = stored_bad_rows(item.tokens_folder, read_shards(item.tokens_folder))
        raise bad_rows_error(item.name, item.inputs, rows)
    if not manifest.splits["train"].documents:
        what = f"{manifest.rows:,} rows, {manifest.quarantined:,} of them bad, {manifest.documents:,} documents"
        raise DataError(
            f"sources.{item.name}: no documents to train on ({what}); look at {item.records[0].path}, and at the split"
        )
    wanted = [("train", length) for length in job.sequence_lengths(item.name)]
    wanted += [(split, job.evaluation_length) for split in ("validation", "test") if manifest.splits[split].documents]
    plan_missing_packs(prepared, item.source.overlong, wanted)


class _Progress:
    """A bar over the bytes of all sources, with rows/s, tokens/s and the time left."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None if shown else True, mininterval=0.5
        )
        self._before = self._rows = self._tokens = 0

    def start(self, name: str) -> Any:
        self._bar.set_description(f"preparing {name}", refresh=False)

        def advance(consumed: int, rows: int, tokens: int) -> None:
            self._rows, self._tokens = self._rows + rows, self._tokens + tokens
            seconds = max(self._bar.format_dict["elapsed"], 1e-3)
            speed = f"{self._rows / seconds:,.0f} rows/s, {self._tokens / seconds:,.0f} tokens/s"
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.update(self._before + consumed - self._bar.n)

        return advance

    def finish(self, size: int) -> None:
        self._before += size
        self._bar.update(self._before - self._bar.n)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
