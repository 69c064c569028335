"""A checkpoint that is not whole is never loaded, the one before it is, and a run never starts over in silence."""

import errno
import json
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ernie_dist.batch import Batch, Row, stack
from ernie_dist.checkpoint import CheckpointStore, verify
from ernie_dist.engine.select import build_engine
from ernie_dist.engine.snapshot import HostCopy
from ernie_dist.model.build import build_model
from ernie_dist.model.loss import summed_loss
from ernie_dist.progress import Progress
from ernie_dist.spec.errors import CheckpointError, CheckpointWriteError
from ernie_dist.spec.job import parse_job
from ernie_dist.spec.resolve import PackedLength, ResolvedJob, ResolvedSource, ResolvedTokenizer, resolve
from ernie_dist.spec.run_files import best_checkpoint, checkpoint_step, complete_checkpoints
from ernie_dist.trusted_files import entry, write_state
from ernie_dist.world import World

torch.set_num_threads(1)

STATE = "engine/state.pt"


def make_job(*, steps: tuple[int, int] = (6, 6), every: str = "2 steps", **more: Any) -> ResolvedJob:
    raw = {
        "name": "t",
        "model": {"preset": "ernie-4.5-tiny", "override": {"hidden_size": 16, "num_hidden_layers": 1}},
        "tokenizer": "folder",
        "tokens_per_batch": 64,
        "sources": {"web": {"path": "web.jsonl", "text": "text"}},
        "curriculum": [
            {"name": name, "duration": f"{count} steps", "sequence_length": 32, "mixture": {"web": 1.0}}
            for name, count in zip(("first", "second"), steps, strict=True)
        ],
        "schedule": {"kind": "constant", "peak": 1e-3},
        "engine": {"kind": "plain", "precision": "fp32"},
        "checkpoint": {"every": every, "keep_last": 3},
        **more,
    }
    source = ResolvedSource(
        folder="web", fingerprint="f", kind="text", packed={32: PackedLength(sequences=99, tokens=3000)}, held_out=False
    )
    return resolve(
        parse_job(raw, "test"), ResolvedTokenizer(folder="t", fingerprint="t", vocab_size=64), {"web": source}
    )


def ids(step: int) -> np.ndarray:
    return np.array([[0, 2 * step], [0, 2 * step + 1]])


class Run:
    """An engine and a store over one folder, as an attempt has them."""

    def __init__(self, folder: Path, job: ResolvedJob | None = None) -> None:
        self.job, self.folder = job or make_job(), folder
        spec = self.job.spec
        build = partial(build_model, spec.model, 64, spec.seed)
        self.engine: Any = build_engine(spec.engine, spec.optimizer, [], build, summed_loss, World())
        self.store = CheckpointStore(folder, self.job, World())
        self.progress = Progress.start()

    def train(self, steps: int) -> "Run":
        """So many steps, saving where a checkpoint is due."""
        for _ in range(steps):
            generator = np.random.default_rng(self.progress.step)
            tokens = generator.integers(0, 64, (2, 32))
            row = [Row(one, np.roll(one, -1), np.arange(32), np.array([32])) for one in tokens]
            self.engine.step(Batch(self.progress.step, "s", (stack(row),), ids(self.progress.step), 64), 1e-2)
            self.progress = self.progress.after(ids(self.progress.step))
            if self.store.due(self.progress):
                self.save()
        return self

    def save(self) -> None:
        self.store.save(self.engine, self.progress)
        self.saved = self.store.finish()[-1]

    def restore(self) -> Any:
        restored = self.store.restore(self.engine)
        self.progress = restored.progress if restored else Progress.start()
        return restored

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.engine.model.parameters()])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Trained for 4 steps, with checkpoints at 2 and 4."""
    return Run(tmp_path / "checkpoints").train(4)


def test_what_is_restored_goes_on_exactly(run: Run) -> None:
    again = Run(run.folder)
    restored = again.restore()
    assert restored.progress == run.progress and restored.refused == () and restored.folder.name == "step_00000004"
    assert torch.equal(again.weights(), run.weights())
    again.train(1), run.train(1)
    assert torch.equal(again.weights(), run.weights()), "the optimizer's state is part of it"
    assert again.progress == run.progress
    sizes = [path.stat().st_size for path in restored.folder.rglob("*") if path.is_file()]
    assert 0.9 * sum(sizes) < run.saved.bytes <= sum(sizes)


def test_without_any_checkpoint_a_run_begins(tmp_path: Path) -> None:
    fresh = Run(tmp_path / "new" / "checkpoints")
    before = fresh.weights()
    assert fresh.restore() is None and torch.equal(fresh.weights(), before)


def truncate(folder: Path) -> None:
    os.truncate(folder / STATE, (folder / STATE).stat().st_size - 1)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / STATE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / STATE).write_bytes(content)


def rewrite_progress(folder: Path) -> None:
    text = (folder / "progress.json").read_text()
    (folder / "progress.json").write_text(text.replace('"batch_index": 4', '"batch_index": 5'))


def manifest(content: str | bytes) -> Callable[[Path], Any]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / "manifest.json").write_bytes(data)


DAMAGE = {
    "not complete": lambda folder: (folder / "COMPLETE").unlink(),
    "truncated": truncate,
    "one bit flipped": flip_a_bit,
    "file missing": lambda folder: (folder / STATE).unlink(),
    "other progress": rewrite_progress,
    "no progress": lambda folder: (folder / "progress.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty manifest": manifest(""),
    "manifest without files": manifest("{}"),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 30),
    "manifest of zeros": manifest(b"\0" * 200),
    "manifest not utf-8": manifest(b"\xff\xfe\xfa"),
    "manifest of another kind": manifest("[]"),
    "manifest of no files": manifest('{"files": {}}'),
    "manifest with other hashes": manifest('{"files": {"engine/state.pt": {"bytes": 5, "blake2b": "00"}}}'),
    "manifest with a list": manifest('{"files": ["engine/state.pt"]}'),
    "manifest without hashes": manifest('{"files": {"engine/state.pt": {}}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said_so(run: Run, damage: str) -> None:
    before = Run(run.folder.parent / "reference").train(2)
    DAMAGE[damage](run.folder / "step_00000004")
    again = Run(run.folder)
    restored = again.restore()
    assert again.progress == before.progress and torch.equal(again.weights(), before.weights())
    if damage != "not complete":  # that one was never a checkpoint
        [(folder, reason)] = restored.refused
        assert folder.name == "step_00000004" and reason
    # the run writes over it
    again.train(2)
    assert verify(run.folder / "step_00000004") is None and again.progress == run.progress


def test_when_all_are_bad_the_run_does_not_start_over(run: Run) -> None:
    for folder in complete_checkpoints(run.folder):
        flip_a_bit(folder)
    again = Run(run.folder)
    before = again.weights()
    with pytest.raises(CheckpointError) as error:
        again.restore()
    assert str(error.value).count(f"{STATE} differs from what was written") == 2
    assert "step_00000002" in str(error.value) and "step_00000004" in str(error.value)
    assert "copy" in str(error.value) and "move them away" in str(error.value)
    assert torch.equal(again.weights(), before), "nothing of a bad checkpoint reaches the engine"


def test_a_bad_newer_checkpoint_never_pushes_out_a_good_one(run: Run) -> None:
    flip_a_bit(run.folder / "step_00000004")
    again = Run(run.folder, make_job(checkpoint={"every": "100 steps", "keep_last": 1}))
    again.restore()
    again.train(1)
    again.save()
    last = Run(run.folder)
    assert last.restore().progress == again.progress and torch.equal(last.weights(), again.weights())


def test_a_past_under_another_description_is_refused_and_a_new_future_is_not(run: Run) -> None:
    for other in (make_job(seed=18), make_job(schedule={"kind": "constant", "peak": 2e-3}), make_job(steps=(7, 6))):
        stranger = Run(run.folder, other)
        before = stranger.weights()
        with pytest.raises(
            CheckpointError, match=r"step_00000004: stage 0 \(first\).*another description.*past cannot"
        ):
            stranger.restore()
        assert torch.equal(stranger.weights(), before)
    assert Run(run.folder, make_job(steps=(6, 20))).restore().progress == run.progress
    run.train(4)  # into the second stage
    with pytest.raises(CheckpointError, match=r"step_00000008: stage 1 \(second\)"):
        Run(run.folder, make_job(steps=(6, 20))).restore()


def test_the_last_step_of_a_stage_does_not_begin_the_next(run: Run) -> None:
    run.train(2)
    state = json.loads((run.folder / "step_00000006" / "progress.json").read_text())
    assert [name for name, _ in state["stages"]] == ["first"]
    assert Run(run.folder, make_job(steps=(6, 20))).restore().progress == run.progress


def test_another_engine_is_refused_with_both_named(run: Run) -> None:
    here = Run(run.folder)
    before = here.weights()
    for theirs in ({"precision": "fp32"}, {"kind": "plain", "precision": "auto"}):
        store = CheckpointStore(run.folder, make_job(engine=theirs), World())
        resolved = "bf16" if theirs["precision"] == "auto" else "fp32"  # what auto came to, on another device
        store.save(SimpleNamespace(snapshot=run.engine.snapshot, precision=resolved), run.progress)  # type: ignore[arg-type]
        store.finish()
        with pytest.raises(CheckpointError) as error:
            here.restore()
        said = str(error.value)
        layout = replace(store.job.layout(1), precision=resolved)
        assert "cannot change" in said and f"go on with {layout}" in said
        assert torch.equal(here.weights(), before)


def test_deepspeed_loads_no_adapter_of_other_names(tmp_path: Path) -> None:
    from ernie_dist.engine.deepspeed import _Files

    def adapted(name: str) -> nn.Module:
        return nn.ModuleDict({"base": nn.Linear(2, 2).requires_grad_(False), name: nn.Linear(2, 2)})

    files, module = _Files(adapted("lora_A")), adapted("lora_A")
    files.save({"module": module.state_dict()}, "states.pt")
    write_state(tmp_path / "states.pt", files.kept["states.pt"])
    loaded = files.load(str(tmp_path / "states.pt"))["module"]
    assert loaded.keys() == {"lora_A.weight", "lora_A.bias"} and torch.equal(
        loaded["lora_A.bias"], module["lora_A"].bias
    )
    with pytest.raises(CheckpointError, match=r"do not fit the adapter: \['lora_A\.bias', 'lora_A\.weight', 'lora_B"):
        _Files(adapted("lora_B")).load(str(tmp_path / "states.pt"))


def test_only_the_newest_are_kept(run: Run) -> None:
    run.train(8)
    names = [f"step_{step:08d}" for step in (8, 10, 12)]
    assert sorted(path.name for path in run.folder.iterdir()) == names
    assert [verify(run.folder / name) for name in names] == [None] * 3


def test_the_best_one_is_kept_however_old_until_there_is_a_better_one(run: Run) -> None:
    def save(best: int | None) -> list[int]:
        run.store.save(run.engine, run.progress, {"recent": {}, "best": {"step": best}})
        run.store.finish()
        return [checkpoint_step(path) for path in complete_checkpoints(run.folder)]

    assert save(2) == [4, 2]
    kept = []
    for best in (2, 2, 8, 8):
        run.progress = run.progress.after(ids(run.progress.step)).after(ids(run.progress.step + 1))
        kept.append(save(best))
    assert kept == [[6, 4, 2], [8, 6, 4, 2], [10, 8, 6], [12, 10, 8]]
    assert best_checkpoint(run.folder) == run.folder / "step_00000008"


def test_what_a_killed_save_left_behind_neither_blocks_nor_counts(run: Run) -> None:
    whole, leftover = run.folder / "step_00000004", run.folder / "step_00000006.tmp"
    whole.rename(leftover)  # killed between the last file and the rename
    (run.folder / "step_00000009.tmp").mkdir()
    again = Run(run.folder)
    assert again.restore().folder.name == "step_00000002"
    again.train(4)
    assert sorted(path.name for path in run.folder.iterdir()) == [f"step_{step:08d}" for step in (2, 4, 6)]
    assert Run(run.folder).restore().progress == again.progress


@pytest.mark.parametrize("alone", [False, True], ids=["after others", "in place of the only one"])
def test_killed_at_any_file_of_a_save_there_is_a_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """Every call that makes something visible on disk is the last one, in turn."""

    class Killed(BaseException):
        pass

    def dying(real: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(real)
            if len(calls) > at:
                raise Killed
            return real(*arguments, **options)

        return call

    run.train(1)
    if alone:
        run.save()
        for step in (2, 4):
            shutil.rmtree(run.folder / f"step_{step:08d}")
    survived = 0
    for at in range(40):
        calls: list[Any] = []
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(os, "fsync", dying(os.fsync, at))
            patch.setattr(Path, "rename", dying(Path.rename, at))
            patch.setattr(shutil, "rmtree", dying(shutil.rmtree, at))
            run.save()
            survived = at
        assert Run(run.folder).restore().progress.step in ((5,) if alone else (4, 5))
        if survived:
            break
    assert survived > 5, "the save was never interrupted"
    assert Run(run.folder).restore().progress == run.progress
    assert not [path for path in run.folder.iterdir() if path.suffix], "nothing is left over"


def test_a_copy_of_a_state_holds_values_in_place_of_enums() -> None:
    """Python 3.11.2, Debian 12's, pickles an enum as a call, and a file with a call in it is not read."""
    stage = IntEnum("stage", ["first", "second"])
    assert (
        repr(HostCopy()({"zero_stage": stage.second, "groups": [(stage.first,)]}))
        == "{'zero_stage': 2, 'groups': [(1,)]}"
    )


def test_training_goes_on_during_a_save_and_none_of_it_reaches_the_files(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda handle: disk.wait(20))  # a disk that takes its time
    at, weights = run.progress, run.weights()
    run.store.save(run.engine, at)
    run.train(1)
    assert not torch.equal(run.weights(), weights), "the step did not wait"
    assert run.store.saved() == []
    threading.Timer(0.2, disk.set).start()
    run.save()  # waits for the one under way: there is never more than one, and one copy in memory
    names = [path.name for path in complete_checkpoints(run.folder)]
    assert names == ["step_00000005", "step_00000004", "step_00000002"]
    monkeypatch.undo()
    again = Run(run.folder)
    again.engine.load(run.folder / "step_00000004" / "engine")
    assert torch.equal(again.weights(), weights)


@contextmanager
def no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel refuses to write files of the size of a checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """To root no folder is read-only: this one refuses as a read-only mount does."""

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        yield


@pytest.mark.parametrize(("trouble", "said"), [(no_room, "File too large"), (read_only, "Read-only file system")])
def test_a_save_that_fails_leaves_the_one_before_untouched(
    run: Run, monkeypatch: pytest.MonkeyPatch, trouble: Any, said: str
) -> None:
    contents = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    progress = run.progress
    with trouble(run.folder, monkeypatch), pytest.raises(CheckpointWriteError) as raised:
        run.train(2)
    assert said in str(raised.value) and "before it are untouched" in str(raised.value)
    assert raised.value.exit_code == 1, "there may be room by the next attempt"
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == contents, "nothing is left"
    again = Run(run.folder)
    assert again.restore().progress == progress
    again.train(2)
    assert Run(run.folder).restore().progress.step == 6


def test_a_full_disk_is_said_and_the_next_save_finds_nothing_in_its_way(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not allowed here; the test with a limit on file sizes stands in")
    try:
        run = Run(disk / "checkpoints", make_job(checkpoint={"every": "2 steps", "keep_last": 1}))
        run.train(2)
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
        with pytest.raises(CheckpointWriteError, match="No space left on device"):
            run.train(2)
        assert [path.name for path in run.folder.iterdir()] == ["step_00000002"]
        filler.unlink()
        run.save()
        assert Run(run.folder).restore().progress.step == 4
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Bomb:
    """What a pickle may hold: a call of anything."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return (Path.touch, (self.victim,))


@pytest.mark.parametrize("forged", [False, True], ids=["as it was found", "with a manifest to match"])
def test_a_pickle_bomb_never_goes_off(run: Run, tmp_path: Path, forged: bool) -> None:
    file, victim = run.folder / "step_00000004" / STATE, tmp_path / "bombed"
    torch.save({"model": Bomb(victim)}, file)
    if forged:
        manifest = file.parents[1] / "manifest.json"
        listed = json.loads(manifest.read_text())
        listed["files"][STATE] = entry(file)
        manifest.write_text(json.dumps(listed))
        with pytest.raises(CheckpointError, match="more than data"):
            Run(run.folder).restore()
    else:
        assert Run(run.folder).restore().folder.name == "step_00000002"
    assert not victim.exists()


def test_a_disk_error_while_verifying_is_a_reason_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / "progress.json").write_text("{}")
    listed = {"progress.json": entry(folder / "progress.json")}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))

    real = Path.open

    def failing(path: Path, mode: str = "r", *rest, **options):
        if path.name == "progress.json":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", failing)
    assert "Input/output error" in (verify(folder) or "")
