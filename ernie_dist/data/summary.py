"""What became of the rows of each source, as lines of text: nothing is left out, cut or set aside in silence."""

from __future__ import annotations

from ernie_dist.data.prepare import PreparedJob
from ernie_dist.data.shard import Manifest, PreparedSource
from ernie_dist.data.split import SPLITS
from ernie_dist.spec.job import JobSpec


def describe_data(job: JobSpec, prepared: PreparedJob) -> list[str]:
    """A line of counts for each source of a prepared job, and one for whatever not all of it was used."""
    lines = ["data"]
    for name, folder in prepared.sources.items():
        source = PreparedSource.open(folder)
        lines.append(f"  {name}: {_counts(source.manifest)}")
        lines += [f"    {line}" for line in [*_left_out(source.manifest), *_overlong(job, source)]]
    return lines


def _counts(manifest: Manifest) -> str:
    splits = ", ".join(f"{name} {manifest.splits[name].documents:,}" for name in SPLITS)
    return f"{manifest.rows:,} rows, {manifest.documents:,} documents ({splits}), {manifest.tokens:,} tokens"


def _left_out(manifest: Manifest) -> list[str]:
    found = []
    if manifest.quarantined:
        found.append(f"{manifest.quarantined:,} bad rows set aside: quarantine.jsonl in {manifest.fingerprint}")
    if manifest.left_out:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.left_out.items())
        found.append(f"{sum(manifest.left_out.values()):,} rows left out: {reasons}")
    if manifest.duplicates:
        found.append(f"{manifest.duplicates:,} duplicates left out")
    return found


def _overlong(job: JobSpec, source: PreparedSource) -> list[str]:
    """Conversations that are longer than a sequence, by split and sequence length."""
    found = []
    packed = [("train", length) for length in job.sequence_lengths(source.name)]
    packed += [(split, job.evaluation_length) for split in SPLITS[1:] if source.manifest.splits[split].documents]
    for split, length in packed:
        packs, documents = source.packs(split, length), source.manifest.splits[split].documents
        what = f"of {documents:,} {split} conversations are longer than {length:,} tokens"
        if packs.truncated:
            found.append(f"{packs.truncated:,} {what} and cut: they lack their end, and the token to stop at")
        if packs.dropped:
            found.append(f"{packs.dropped:,} {what} and are left out")
    return found
