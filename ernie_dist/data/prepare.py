"""Sources -> tokenised, split and packed data on disk: once, in parallel, resumable. The door to data/ for a job.

survey: files, hashes, folders --> tokenizer --> tokens-CONTENT/ shards --> FINGERPRINT/ splits --> packs/
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from ernie_dist.data import tokenizer
from ernie_dist.data.index import plan_missing_packs, write_index
from ernie_dist.data.inputs import unpacked_bytes
from ernie_dist.data.shard import Manifest, PreparedSource, read_shards
from ernie_dist.data.survey import PlannedSource, PreparedJob, Survey, data_dir_of, differences, prepared_job, survey
from ernie_dist.data.tokenise import Pool, Workers, bad_rows_error, stored_bad_rows, tokenise
from ernie_dist.data.tokenizer import PublishedTokenizer
from ernie_dist.data.vocabulary import training_texts
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import DataError, EnvironmentProblem
from ernie_dist.spec.job import JobSpec

__all__ = ["MakePool", "PreparedJob", "differences", "prepare", "survey"]

log = logging.getLogger(__name__)

_SMALL = 8 << 20
"""bytes of input below which starting processes costs more than it gains"""
_DOCUMENT, _TRIPLE = 24, 50
"""bytes: what is noted of a document besides its tokens; the row of a triple, as ownthink's are on average"""
MakePool = Callable[[PublishedTokenizer], Pool]


def prepare(
    job: JobSpec, *, workers: int | None = None, pool: MakePool | None = None, show_progress: bool = True
) -> PreparedJob:
    """Tokenises, splits and packs what is not yet, with `workers` processes (default: one per core), or on the `pool`.

    What is done stays done: an interrupted run goes on after its last finished shard, and a run with nothing to do
    takes no time. Raises DataError; what was finished before is kept.
    """
    data_dir = data_dir_of(job)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with _locked(data_dir):
            return _prepare(job, data_dir, workers, pool, show_progress)
    except OSError as error:
        free = f"{shutil.disk_usage(data_dir).free:,} bytes free" if data_dir.exists() else "no such folder"
        raise EnvironmentProblem(
            f"{error.filename or data_dir}: {error.strerror or error} (data_dir {data_dir}: {free}); what is finished "
            "is kept: make room or choose another data_dir, and start again"
        ) from None


def _prepare(
    job: JobSpec, data_dir: Path, workers: int | None, pool: MakePool | None, show_progress: bool
) -> PreparedJob:
    found = Survey(job)
    published = found.find_tokenizer() or _publish_tokenizer(found)
    for name, source in job.sources.items():
        if source.kind != "text":
            published.require_chat(name)
    planned = found.plan(published)
    missing = [item for item in planned if not item.is_complete]
    for item in planned:
        if item.is_complete:
            _finish(job, item)
    if missing:
        _check_disk_space(data_dir, missing, published.vocab_size)
        count = workers or (1 if sum(item.size for item in missing) < _SMALL else len(os.sched_getaffinity(0)))
        _prepare_missing(found, missing, published, pool or partial(Workers, count), show_progress)
    return prepared_job(published, planned)


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """One prepare at a time in a folder; a second one waits, and then finds the work done."""
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that is only read needs no lock, and some network file systems have none
            lock = stack.enter_context((data_dir / ".lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("another prepare is at work in %s; waiting for it", data_dir)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _publish_tokenizer(found: Survey) -> PublishedTokenizer:
    root = found.data_dir / "tokenizer"
    root.mkdir(exist_ok=True)
    if isinstance(found.job.tokenizer, str):
        published = tokenizer.publish_pretrained(found.tokenizer_name, root)
    else:
        size = found.job.tokenizer.train.vocab_size
        log.info("training a tokenizer of %d entries", size)
        sources = [(source, found.inputs[name], found.split(name)) for name, source in found.job.sources.items()]
        published = tokenizer.train_and_publish(training_texts(sources), size, root)
    found.note_tokenizer(published)
    return published


def _check_disk_space(data_dir: Path, missing: list[PlannedSource], vocab_size: int) -> None:
    """Raises DataError if what is to be written would hardly fit."""
    needed = 0
    for item in missing:
        done = read_shards(item.tokens_folder)
        if done and done[-1].last:
            continue
        size = sum(unpacked_bytes(Path(record.path)) for record in item.records)
        needed += int(size * _written_per_byte(item.source, vocab_size))
    available = shutil.disk_usage(data_dir).free
    if needed > available:
        names = ", ".join(item.name for item in missing)
        raise DataError(
            f"data_dir {data_dir}: preparing {names} needs about {needed:,} bytes, and {available:,} are available; "
            "free some, or set data_dir to a folder on a larger disk"
        )


def _written_per_byte(source: SourceSpec, vocab_size: int) -> float:
    """Bytes written for a byte of input, at most: Chinese text has up to one token in 2.5 bytes."""
    tokens = ((2 if vocab_size <= 1 << 16 else 4) + (source.kind != "text")) / 2.5
    if source.kind == "preference":
        return 2 * tokens  # the question stands before either answer
    if source.triples is None:
        return tokens
    phrasings = 1 if isinstance(source.triples, str) else source.triples.phrasings
    return phrasings * (tokens + _DOCUMENT / _TRIPLE)


def _prepare_missing(
    found: Survey, missing: list[PlannedSource], published: PublishedTokenizer, pool: MakePool, show_progress: bool
) -> None:
    total = sum(item.size for item in missing)
    token_type = "uint16" if published.vocab_size <= 1 << 16 else "uint32"
    with pool(published) as workers, _Progress(total, show_progress) as progress:
        for item in missing:
            began, advance = time.monotonic(), progress.start(item.name)
            records = tokenise(item.name, item.source, item.inputs, item.tokens_folder, token_type, workers, advance)
            changed = [record.path for record in item.records if not found.hashes.is_unchanged(Path(record.path))]
            if changed:
                shutil.rmtree(item.tokens_folder)
                raise DataError(f"{changed[0]}: changed while it was read; start again once nobody writes to it")
            make = _manifest_maker(item, published, token_type)
            manifest = write_index(item.folder, item.tokens_folder, records, item.source, item.split, make)
            _finish(found.job, item)
            progress.finish(item.size)
            log.info(
                *("prepared %s: %d rows, %d quarantined, %d duplicates, %d tokens, in %.1f s", item.name),
                *(manifest.rows, manifest.quarantined, manifest.duplicates, manifest.tokens, time.monotonic() - began),
            )


def _manifest_maker(item: PlannedSource, published: PublishedTokenizer, token_type: str) -> Callable[..., Manifest]:
    def make(**counts: Any) -> Manifest:
        return Manifest.model_validate(
            {
                "name": item.name,
                "kind": item.source.kind,
                "fingerprint": item.folder.name,
                "tokenizer_fingerprint": published.fingerprint,
                "vocab_size": published.vocab_size,
                "token_type": token_type,
                "label_replacements": published.label_replacements if item.source.kind != "text" else {},
                "inputs": item.records,
                "versions": {name: version(name) for name in ("tokenizers", "numpy")},
                **counts,
            }
        )

    return make


def _finish(job: JobSpec, item: PlannedSource) -> None:
    """Checks a prepared source against what this job wants of it, and packs it to this job's sequence lengths."""
    prepared = PreparedSource.open(item.folder)
    manifest = prepared.manifest
    if manifest.quarantined and item.source.on_bad_row == "fail":
        rows = stored_bad_rows(item.tokens_folder, read_shards(item.tokens_folder))
        raise bad_rows_error(item.name, item.inputs, rows)
    if not manifest.splits["train"].documents:
        what = f"{manifest.rows:,} rows, {manifest.quarantined:,} of them bad, {manifest.duplicates:,} duplicates"
        raise DataError(
            f"sources.{item.name}: no documents to train on ({what}); look at {item.records[0].path} and at the split"
        )
    wanted = [("train", length) for length in job.sequence_lengths(item.name)]
    wanted += [(split, job.evaluation_length) for split in ("validation", "test") if manifest.splits[split].documents]
    plan_missing_packs(prepared, item.source.overlong, wanted)


class _Progress:
    """A bar over the bytes of all sources, with rows/s, tokens/s and the time left."""

    def __init__(self, total: int, shown: bool) -> None:
        # disable=None: no bar where the output is not a terminal
        self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=None if shown else True, mininterval=0.5)
        self._before = self._rows = self._tokens = 0

    def start(self, name: str) -> Callable[[int, int, int], None]:
        """The function that takes (bytes of this source consumed so far, rows and tokens done now)."""
        self._bar.set_description(f"preparing {name}", refresh=False)

        def advance(consumed: int, rows: int, tokens: int) -> None:
            if self._bar.disable:
                return
            done = self._before + consumed - self._bar.n
            if rows == 0:  # what an earlier run did says nothing about the time left
                self._bar.initial += done
            self._rows, self._tokens = self._rows + rows, self._tokens + tokens
            seconds = max(time.monotonic() - self._began, 1e-3)
            speed = f"{self._rows / seconds:,.0f} rows/s, {self._tokens / seconds:,.0f} tokens/s"
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.update(done)

        return advance

    def finish(self, size: int) -> None:
        """The source is done, however many of its bytes were read."""
        self._before += size
        self._bar.update(self._before - self._bar.n)

    def __enter__(self) -> _Progress:
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()
