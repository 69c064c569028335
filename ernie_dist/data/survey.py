"""A job's inputs as they are now -> fingerprints -> the folders its prepared data is, or will be, in.

files --sha256--> tokens-CONTENT/ (with the tokenizer and how rows become documents)
                  FINGERPRINT/    (with split, dedupe, overlong on top)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_dist.data import shard, tokenizer
from ernie_dist.data.inputs import HashCache, Input
from ernie_dist.data.readers import find_inputs
from ernie_dist.data.shard import InputRecord, read_manifest
from ernie_dist.data.tokenizer import PublishedTokenizer
from ernie_dist.spec.curriculum import SourceSpec, SplitSpec
from ernie_dist.spec.errors import DataError
from ernie_dist.spec.job import JobSpec, fingerprint

# What of a SourceSpec decides the tokens. The rest decides which documents are used, or nothing.
_TOKENS_FIELDS = {
    *("encoding", "text", "prompt", "response", "system", "conversation", "preference", "triples"),
    *("dataset_split", "subset"),
}


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
    """files of each source; what is not given here is looked up in the manifests"""


@dataclass(frozen=True)
class PlannedSource:
    """A source, its input files, and the folders that they and its settings lead to."""

    name: str
    source: SourceSpec
    split: SplitSpec
    inputs: list[Input]
    records: tuple[InputRecord, ...]
    tokens_folder: Path
    folder: Path

    @property
    def is_complete(self) -> bool:
        """Whether it is tokenised and split; packs may still be missing."""
        return (self.folder / "manifest.json").exists()

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(record.bytes for record in self.records)


def data_dir_of(job: JobSpec) -> Path:
    """data_dir, absolute: ranks may be started elsewhere."""
    return Path(os.path.expanduser(os.path.expandvars(job.data_dir))).absolute()


class Survey:
    """The inputs of a job, found and hashed once. Raises DataError for missing files and unset variables."""

    def __init__(self, job: JobSpec) -> None:
        self.job = job
        self.data_dir = data_dir_of(job)
        self.hashes = HashCache(self.data_dir / "inputs.json")
        self.inputs = {name: find_inputs(name, source) for name, source in job.sources.items()}
        files = {name: [file for item in items for file in item.files] for name, items in self.inputs.items()}
        hashed = self.hashes.hash_all({file: None for several in files.values() for file in several})
        self.records = {
            name: tuple(InputRecord(path=str(file), bytes=file.stat().st_size, sha256=hashed[file]) for file in several)
            for name, several in files.items()
        }
        self._tokenizer_files: list[Path] = []
        self.tokenizer_name = ""
        if isinstance(job.tokenizer, str):
            self.tokenizer_name, self._tokenizer_files = tokenizer.find_tokenizer(job.tokenizer)
        self._tokenizer_hashes = list(self.hashes.hash_all(self._tokenizer_files).values())
        if self.data_dir.is_dir():
            self.hashes.save()

    def split(self, name: str) -> SplitSpec:
        """The shares of a source: its own, or the job's."""
        return self.job.sources[name].split or self.job.split

    def find_tokenizer(self) -> PublishedTokenizer | None:
        """What was published for this job, or None."""
        note = self._tokenizer_note
        return tokenizer.load_published(note.parent, note.read_text().strip()) if note.exists() else None

    def note_tokenizer(self, published: PublishedTokenizer) -> None:
        """Remembers what was published for this job."""
        self._tokenizer_note.write_text(published.fingerprint + "\n")

    @property
    def _tokenizer_note(self) -> Path:
        """A file named by what the tokenizer is made from: the same is not loaded, or trained, twice."""
        made_from: Any = self._tokenizer_hashes or self.tokenizer_name
        if not isinstance(self.job.tokenizer, str):
            made_from = [self.job.tokenizer.model_dump(mode="json")]
            for name in self.inputs:
                made_from += [self._content(name), self.split(name).model_dump(mode="json")]
        return self.data_dir / "tokenizer" / f"from-{fingerprint([tokenizer.FORMAT, made_from])}"

    def _content(self, name: str) -> Any:
        """What decides the documents of a source."""
        settings = self.job.sources[name].model_dump(mode="json", include=_TOKENS_FIELDS)
        if self.job.sources[name].kind == "preference":
            settings["placed_by"] = "question"  # earlier splits went by the whole pair
        formats = [item.format for item in self.inputs[name]]
        return [shard.FORMAT, [record.sha256 for record in self.records[name]], formats, settings]

    def plan(self, published: PublishedTokenizer) -> list[PlannedSource]:
        """The folders of every source with this tokenizer."""
        planned = []
        for name, source in self.job.sources.items():
            content = fingerprint([self._content(name), published.fingerprint])
            split, overlong = self.split(name), None if source.kind == "text" else source.overlong
            whole = fingerprint([content, split.model_dump(mode="json"), source.dedupe, overlong])
            tokens_folder, folder = (self.data_dir / name / part for part in (f"tokens-{content}", whole))
            inputs, records = self.inputs[name], self.records[name]
            planned.append(PlannedSource(name, source, split, inputs, records, tokens_folder, folder))
        return planned


def prepared_job(published: PublishedTokenizer, planned: list[PlannedSource]) -> PreparedJob:
    return PreparedJob(
        tokenizer_folder=published.folder,
        tokenizer_fingerprint=published.fingerprint,
        vocab_size=published.vocab_size,
        sources={item.name: item.folder for item in planned},
        inputs={item.name: item.records for item in planned},
    )


def survey(job: JobSpec) -> PreparedJob:
    """Where the data of a job belongs, by its inputs as they are now. Tokenises nothing; the folders may not exist.

    Compare it to what a run recorded to find out, before any work, whether the run's data changed.
    """
    found = Survey(job)
    published = found.find_tokenizer()
    if published is None:
        published = PublishedTokenizer(found.data_dir / "tokenizer", "", 0, 0, None, {})
    return prepared_job(published, found.plan(published))


def differences(recorded: PreparedJob, current: PreparedJob) -> list[str]:
    """What changed between two looks at a job's data: for each file, and the tokenizer, the old and the new hash."""
    found = []
    if recorded.tokenizer_fingerprint != current.tokenizer_fingerprint:
        now = current.tokenizer_fingerprint or "another, not made yet"
        found.append(f"tokenizer: fingerprint was {recorded.tokenizer_fingerprint}, is {now}")
    for name in sorted({*recorded.sources, *current.sources}):
        before, after = (job.sources[name].name if name in job.sources else "absent" for job in (recorded, current))
        if before == after:
            continue
        changed = list(_changed_files(_hashes(recorded, name), _hashes(current, name)))
        found += [f"sources.{name}: {line}" for line in changed]
        if not changed:
            why = "its settings or the tokenizer changed, its files did not"
            found.append(f"sources.{name}: fingerprint was {before}, is {after}: {why}")
    return found


def _hashes(job: PreparedJob, name: str) -> dict[str, str]:
    """SHA-256 by path; of what was never recorded, nothing."""
    records = job.inputs.get(name, ())
    if not records and name in job.sources:
        try:
            records = read_manifest(job.sources[name]).inputs
        except DataError:
            records = ()
    return {record.path: record.sha256 for record in records}


def _changed_files(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    if list(before.values()) == list(after.values()):
        return  # moved at most
    for path in sorted({*before, *after}):
        was, now = before.get(path, "absent"), after.get(path, "absent")
        if was != now:
            yield f"{path}: sha256 was {was}, is {now}"
