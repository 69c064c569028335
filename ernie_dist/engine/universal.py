"""DeepSpeed's Universal Checkpoint: the parts of all ranks put together, one folder for each parameter.

state/zero_pp_rank_*_optim_states.pt --ds_to_universal--> state/zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ernie_dist.spec.errors import CheckpointError

_GLOBAL = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "ds_version", "zero_stage", "partition_count")
_MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""as ZeRO 1 and 2 look for it, and as ZeRO-3 does"""


def convert_files(source: Path, to: Path, *, read: Callable[[Path], Any]) -> None:
    """Converts a DeepSpeed checkpoint of ZeRO 1, 2 or 3 into one that each of them takes, on any number of ranks.

    DeepSpeed's converter leaves what fits the ZeRO stage it came from: what differs is written anew.
    Raises CheckpointError.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    own = {name: os.environ[name] for name in os.environ if not name.startswith(("RANK", "WORLD_", "MASTER_"))}
    done = subprocess.run(
        [*command, "--input_folder", str(source), "--output_folder", str(to)],
        env={**own, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"{source}: DeepSpeed could not convert this checkpoint ({why})")
    (to.parent / "latest_universal").unlink()
    _write_optimizer_state(source, to, read)
    _give_shapes(to, read)
    _write_model_states(to, read)


def read_step(folder: Path) -> int:
    """Updates made so far, out of a converted folder."""
    return int((folder / "zero" / "step").read_text(encoding="utf-8"))


def _write_optimizer_state(source: Path, to: Path, read: Callable[[Path], Any]) -> None:
    first = next(iter(sorted(source.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))))
    whole = read(first)
    saved = {"ds_version": whole["ds_version"], **whole["optimizer_state_dict"]}  # ZeRO-3 has it outside only
    base = saved.get("base_optimizer_state") or saved["optimizer_state_dict"]
    if not base["state"]:
        raise CheckpointError(f"{source}: no update has been made yet: go on with the ranks and engine that saved it")
    step = int(next(iter(base["state"].values()))["step"])
    groups = base["param_groups"]
    content = {
        **{name: saved[name] for name in _GLOBAL if name in saved},
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": groups},
    }
    torch.save(content, to / "zero" / "optimizer_state.pt")
    (to / "zero" / "step").write_text(f"{step}\n", encoding="utf-8")


def _give_shapes(to: Path, read: Callable[[Path], Any]) -> None:
    """Of ZeRO-3 the converter leaves flat tensors with padding at their end; all others want them whole."""
    settings = read(next(iter(sorted(to.glob("*_model_states.pt")))))
    for name, shape in ((name, shape) for group in settings["param_shapes"] for name, shape in group.items()):
        for path in (to / "zero" / name).glob("*.pt"):
            value = read(path)
            if isinstance(value, torch.Tensor) and value.dim():
                torch.save({"param": value.flatten()[: shape.numel()].reshape(shape).clone()}, path)


def _write_model_states(to: Path, read: Callable[[Path], Any]) -> None:
    """The weights are in zero/: of these files only the settings are read."""
    found = sorted(to.glob("*_model_states.pt"))
    settings = {**read(found[0]), "module": {}, "optimizer": None}
    for path in found:
        path.unlink()
    for name in _MODEL_STATES:
        torch.save(settings, to / name)
