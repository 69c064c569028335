"""What a run left behind, for notebooks: its curve as a DataFrame, its events, its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_dist.events.history import read_events, read_metrics
from ernie_dist.spec.errors import RunDirError
from ernie_dist.spec.run_files import RunFiles

if TYPE_CHECKING:
    import pandas

    from ernie_dist.inference import ChatModel


class Run:
    """A run directory. It may still be running: every call reads the files as they are then."""

    def __init__(self, run_dir: str | Path) -> None:
        """Raises RunDirError if it is none."""
        self.files = RunFiles(Path(run_dir))
        if not self.files.job.is_file():
            raise RunDirError(f"{run_dir}: is not a run directory (no job.json); `ernie launch` makes one")

    def metrics(self) -> pandas.DataFrame:
        """One row per optimizer step, indexed by `step`; of a step executed twice the later attempt counts.

        Columns as in metrics.jsonl: stage, loss, learning_rate, grad_norm, tokens_per_second, ...
        """
        import pandas

        steps = pandas.DataFrame(read_metrics(self.files.metrics))
        return steps if steps.empty else steps.set_index("step")

    def events(self) -> list[dict[str, Any]]:
        """Everything else that happened, in order; "event" names its kind: CheckpointSaved, Evaluated, Finished, ..."""
        return read_events(self.files.events)

    def load(self, **options: Any) -> ChatModel:
        """The model at the end, ready to answer; `options` are those of `ernie_dist.load`."""
        from ernie_dist.loading import load

        return load(self.files.root, **options)

    def __repr__(self) -> str:
        return f"Run({str(self.files.root)!r})"
