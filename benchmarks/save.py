"""What a checkpoint costs the steps: CheckpointStore, against torch.save with fsync while everything waits.

    python -m benchmarks.save [--quick] [--scratch FOLDER]

One rank, the plain engine, all cores, a state of over 1 GB (weights and AdamW's two moments, fp32). In turns:

  synchronous        torch.save of the engine's state into one file, fsync; nothing is hashed
  hashed             the same with the sha256 of it, as `write_state` writes it, still with everything waiting
  ours               CheckpointStore.save while training goes on: how long the steps stand still

The copy in host memory uses memory kept from the save before, so the first save is not counted. Steps that ran while a
file was being written are set beside the ones in between.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import in_turns, keep, parser, say, show, spread

BLOCKED_GOAL, SLOWER_GOAL = 0.25, 1.10


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--scratch", type=Path, help="where 4 GB are written and removed (a temporary folder)")
    arguments = command.parse_args()
    rounds = 2 if arguments.quick else 7
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        trained = _Trained(Path(name), width=64 if arguments.quick else 512)
        say(f"a state of {trained.state_bytes / 1e9:.2f} GB; the first save is not counted")
        trained.ours()
        trained.between.clear(), trained.during.clear()
        measures = {"synchronous": trained.synchronous, "hashed": trained.hashed, "ours": trained.ours}
        seconds = in_turns(measures, rounds)
        same = trained.same_tensors()
    ratios = [ours / other for ours, other in zip(seconds["ours"], seconds["synchronous"], strict=True)]
    blocked, slower = spread(ratios), statistics.median(trained.during) / statistics.median(trained.between)
    show(("seconds", "median", "least", "most"), [_row(name, values) for name, values in seconds.items()])
    steps = {"step, nothing written": trained.between, "step, file being written": trained.during}
    show(("seconds", "median", "least", "most"), [_row(name, values) for name, values in steps.items()])
    say(f"blocked / synchronous save: {blocked['median']:.3f}; goal: at most {BLOCKED_GOAL}")
    say(f"a step while a file is written: {slower:.3f} of one without; goal: at most {SLOWER_GOAL}")
    result = {
        "what": "seconds that training stands still for a save; and what steps cost while it is written",
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "blocked over synchronous": blocked,
        "blocked goal": BLOCKED_GOAL,
        "step seconds": {name: spread(values) for name, values in steps.items()},
        "step while written over step without": slower,
        "step goal": SLOWER_GOAL,
        "met": blocked["median"] <= BLOCKED_GOAL and slower <= SLOWER_GOAL,
        "files hold the tensors of the step they are named after": same,
        "settings": {"state_bytes": trained.state_bytes, "engine": "plain, fp32", "device": "cpu", "rounds": rounds},
    }
    keep("save", result, quick=arguments.quick)


def _row(name: str, values: list[float]) -> tuple[str, ...]:
    return (name, *(f"{one:.3f}" for one in (statistics.median(values), min(values), max(values))))


class _Trained:
    """An engine at work, and the ways to save it."""

    def __init__(self, scratch: Path, width: int) -> None:
        import numpy as np
        import torch

        from benchmarks.synthetic import one_stage_job, write_source
        from ernie_dist.batch import Batch, Row, stack
        from ernie_dist.checkpoint import CheckpointStore
        from ernie_dist.data.packing import plan_packs
        from ernie_dist.engine.select import build_engine
        from ernie_dist.model.build import build_model
        from ernie_dist.model.loss import summed_loss
        from ernie_dist.progress import Progress
        from ernie_dist.spec.training import EngineSpec, ModelSpec, OptimizerSpec
        from ernie_dist.world import World

        self._scratch, self.between, self.during = scratch, [], []
        model = ModelSpec(preset="ernie-4.5-tiny", override={"hidden_size": width, "num_hidden_layers": 4})
        self._engine: Any = build_engine(
            EngineSpec(kind="plain", precision="fp32"),
            OptimizerSpec(),
            [],
            lambda: build_model(model, 180_000, 17),
            summed_loss,
            World(),
        )
        lengths = np.full(4000, 127)
        packs = plan_packs(np.zeros(4000, np.int64), lengths, 128, overlong="fail")
        job = one_stage_job(write_source(scratch / "source", packs, (4000 * 127,), seed=None), 128, 1000)
        self._store = CheckpointStore(scratch / "checkpoints", job, World())
        tokens = np.random.default_rng(0).integers(0, 180_000, 128)
        row = Row(tokens, np.roll(tokens, -1), np.arange(128), np.array([128]))
        self._batch = Batch(0, "only", (stack([row]),), np.zeros((1, 2), np.int64), 128)
        self._progress = Progress.start()
        torch.manual_seed(0)
        self._step()
        self.state_bytes = sum(tensor.numel() * 4 for tensor in self._tensors())

    def synchronous(self) -> float:
        import torch

        begun, path = time.perf_counter(), self._scratch / "state.pt"
        with path.open("wb") as file:
            torch.save(self._state(), file)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begun
        path.unlink()
        return seconds

    def hashed(self) -> float:
        from ernie_dist.trusted_files import write_state

        begun, path = time.perf_counter(), self._scratch / "state.pt"
        write_state(path, self._state())
        seconds = time.perf_counter() - begun
        path.unlink()
        return seconds

    def ours(self) -> float:
        """Seconds of standing still; steps go on until the checkpoint is on disk, and as many after it."""
        self._store.save(self._engine, self._progress)
        during = []
        while not (done := self._store.saved()):
            during.append(self._step())
        self.during += during[:-1]  # the last one ran partly without
        self.between += [self._step() for _ in during]
        return done[0].blocked

    def same_tensors(self) -> bool:
        """Whether a checkpoint written while steps went on holds what the engine held when it was asked for."""
        import torch

        from ernie_dist.checkpoint import engine_folder

        before = [tensor.clone() for tensor in self._tensors()]
        self._store.save(self._engine, self._progress)
        self._step()
        [saved] = self._store.finish()
        self._engine.load(engine_folder(saved.folder))
        return all(torch.equal(one, other) for one, other in zip(before, self._tensors(), strict=True))

    def _step(self) -> float:
        begun = time.perf_counter()
        self._engine.step(self._batch, 1e-4)
        self._progress = self._progress.after(self._batch.sequence_ids)
        return time.perf_counter() - begun

    def _state(self) -> dict[str, Any]:
        return {"model": self._engine.model.state_dict(), "optimizer": self._engine._optimizer.state_dict()}

    def _tensors(self) -> list[Any]:
        states = self._engine._optimizer.state.values()
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        return [*self._engine.model.parameters(), *moments]


if __name__ == "__main__":
    main()
