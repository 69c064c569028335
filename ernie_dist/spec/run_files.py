"""Names of what lies in a run directory: the single source of truth about a run.

RUN_DIR/
  job.json             the resolved job
  submission/          what a scheduler was given: the job as it was then, the script; its handle and its log
  attempts/0001/       launch.json, one log per rank, error.json, end.json, stacks_rank_00000.txt after a hang
  metrics.jsonl        one line per optimizer step; of a step written twice the later attempt counts
  events.jsonl         everything else that happened
  skipped_batches.json what was passed over after refused updates; only grows
  references/STAGE/    what the model said of a preference stage's pairs when it began
  checkpoints/step_00000120/
  export/              the model at the end
  report.html  loss_curve.png  wandb/  tensorboard/
  lease/               who holds the run
  stop                 exists while a stop is requested; holds the reason
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPLETE, PROGRESS = "COMPLETE", "progress.json"
"""files of a checkpoint that are read without opening the rest of it"""
EXPORTED = "ernie_dist.json"
"""says where an export comes from; only a folder that has it is ever replaced"""


@dataclass(frozen=True)
class RunFiles:
    """Paths inside one run directory."""

    root: Path

    @property
    def job(self) -> Path:
        return self.root / "job.json"

    @property
    def stop(self) -> Path:
        return self.root / "stop"

    @property
    def lease(self) -> Path:
        return self.root / "lease"

    @property
    def submission(self) -> Path:
        return self.root / "submission"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def skipped_batches(self) -> Path:
        """The batches that are passed over: see spec/skips.py. Missing where there are none."""
        return self.root / "skipped_batches.json"

    def references(self, stage: str) -> Path:
        """What the model said of the pairs of a preference stage when it began."""
        return self.root / "references" / stage

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def loss_curve(self) -> Path:
        return self.root / "loss_curve.png"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    def attempt(self, number: int) -> Path:
        return self.attempts / f"{number:04d}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        return self.attempt(attempt) / f"rank_{rank:05d}.log"

    def node(self, attempt: int, node_rank: int) -> Path:
        """Which machine a node of an attempt is: JSON with its host and ranks, and why it is unhealthy, if it is."""
        return self.attempt(attempt) / "nodes" / f"{node_rank:04d}.json"

    def node_log(self, attempt: int, node_rank: int) -> Path:
        """What torchrun says on a node."""
        return self.attempt(attempt) / f"node_{node_rank:04d}.log"

    def process(self, attempt: int) -> Path:
        """Process group of an attempt on this machine."""
        return self.attempt(attempt) / "process"

    def error(self, attempt: int) -> Path:
        """What the first rank that failed left behind."""
        return self.attempt(attempt) / "error.json"

    def stacks(self, attempt: int, rank: int) -> Path:
        """Where a rank was when the watchdog ended the attempt."""
        return self.attempt(attempt) / f"stacks_rank_{rank:05d}.txt"

    def nccl_trace(self, attempt: int, rank: int) -> Path:
        """NCCL's flight recorder of a rank, as torch names it."""
        return self.attempt(attempt) / f"nccl_trace_rank_{rank}"

    def outcome(self, attempt: int) -> Path:
        """How an attempt ended, where it ended by itself."""
        return self.attempt(attempt) / "outcome.json"

    def end(self, attempt: int) -> Path:
        """How far an attempt came, as its launcher recorded it."""
        return self.attempt(attempt) / "end.json"

    def signalled(self, attempt: int) -> Path:
        """The stop file of one attempt: a signal reached one of its ranks."""
        return self.attempt(attempt) / "stop"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first. Nothing is said yet about their content."""
    found = [path for path in folder.glob("step_*") if path.suffix == "" and (path / COMPLETE).is_file()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def checkpoint_step(folder: Path) -> int:
    """step_00000120 -> 120"""
    return int(folder.name.removeprefix("step_"))


def read_state(folder: Path) -> dict[str, Any]:
    """progress.json of a committed checkpoint: the progress, and the stages begun with their fingerprints."""
    return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
