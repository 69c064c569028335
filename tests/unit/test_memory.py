"""What `ernie plan` says of memory is what autograd keeps and torch allocates; and what follows from it for a job."""

import mmap
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ernie_dist.batch import Batch, MicroBatch, Row, stack
from ernie_dist.engine.select import build_engine
from ernie_dist.memory import Peaks
from ernie_dist.model import head
from ernie_dist.model.build import build_model, layer_options
from ernie_dist.model.loss import summed_loss
from ernie_dist.spec.curriculum import StageSpec
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.hardware import DEVICES, Device, cpu
from ernie_dist.spec.job import JobSpec, parse_job
from ernie_dist.spec.shape import ModelShape
from ernie_dist.world import World
from launcher import calibrate, memory
from launcher.cli import main
from launcher.estimate import shape_of
from launcher.fit import settled
from launcher.memory import FULL, Policy, estimate_memory, largest_micro_batch, layer_activations

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LENGTH, ROWS = 128, 4


def job_of(engine: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    return parse_job(
        {
            "name": "memory",
            "model": {"preset": "ernie-4.5-tiny", "override": SHAPE},
            "tokenizer": {"train": {"vocab_size": SHAPE["vocab_size"]}},
            "tokens_per_batch": LENGTH * ROWS,
            "sources": {"web": {"path": "web.jsonl", "text": "text"}},
            "curriculum": [{"name": "only", "duration": "9 steps", "sequence_length": LENGTH, "mixture": {"web": 1.0}}],
            "schedule": {"kind": "constant", "peak": 1e-3},
            "engine": {"kind": "plain", "precision": "fp32", "micro_batch_size": ROWS, **(engine or {})},
            **changes,
        },
        "job.yaml",
    )


def known_shape(job: JobSpec) -> ModelShape:
    shape = shape_of(job)
    assert shape is not None
    return shape


def micro_batch() -> MicroBatch:
    chance = np.random.default_rng(1)

    def row() -> Row:
        tokens = chance.integers(0, SHAPE["vocab_size"], LENGTH)
        return Row(tokens, np.roll(tokens, -1), np.arange(LENGTH), np.array([LENGTH]))

    return stack([row() for _ in range(ROWS)])


def test_a_phase_s_peak_is_its_own() -> None:
    peaks, size = Peaks(World()), 64 << 20
    peaks.ended("before")
    with mmap.mmap(-1, size) as fresh:  # an allocator might give back what it had kept
        fresh.write(bytes(1) * size)
    peaks.ended("large")  # gone again by the time anybody looks
    peaks.ended("after")
    held = {phase: most for phase, (most, rank) in peaks.fullest().items() if rank == 0}
    assert held["large"] - held["before"] > 0.9 * size
    assert held["large"] - held["after"] > 0.9 * size
    assert 0 < held["large"] < peaks.device


def kept_by_autograd(layers: int) -> int:
    """Bytes of all tensors that are saved for the backward pass, each memory counted once, weights left out."""
    job = job_of(model={"preset": "ernie-4.5-tiny", "override": {**SHAPE, "num_hidden_layers": layers}})
    model = build_model(job.model, SHAPE["vocab_size"], 1)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict[int, torch.Tensor] = {}  # kept, so that no address is given twice

    def see(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        summed_loss(model.train(), micro_batch())
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_a_layer_keeps_what_autograd_saves() -> None:
    job, device = job_of(), cpu(1)
    each = layer_activations(job, known_shape(job), Policy.of(job, device), LENGTH, device)
    assert (kept_by_autograd(4) - kept_by_autograd(2)) / 2 == pytest.approx(LENGTH * ROWS * each, rel=0.002)


def most_allocated(job: JobSpec) -> int:
    """Bytes of all tensors together at the fullest moment of two steps, from before the model was built on."""
    batch = Batch(0, "only", (micro_batch(),), np.zeros((ROWS, 2), np.int64), ROWS * LENGTH)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        build = partial(build_model, job.model, SHAPE["vocab_size"], 1, **layer_options(job.engine))
        engine = build_engine(job.engine, job.optimizer, [()], build, summed_loss, World())
        engine.step(batch, 1e-6)
        engine.step(batch, 1e-6)  # with the optimizer's states
    engine.close()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_the_plan_counts_on_the_chunks_of_logits_that_the_head_makes() -> None:
    assert {
        on_cpu: head.CHUNK_LOGITS["cpu" if on_cpu else "cuda"] for on_cpu in (True, False)
    } == memory._LOGITS_AT_ONCE
    assert memory._LOGITS_IN_CACHE == head._IN_CACHE


@pytest.mark.parametrize(("checkpointing", "tiles"), [("none", 1), (2, 1), ("full", 1), ("none", 4)])
def test_the_fullest_moment_holds_what_torch_allocates(checkpointing: str | int, tiles: int) -> None:
    job = job_of({"gradient_checkpointing": checkpointing, "mlp_tiles": tiles})
    planned = estimate_memory(job, job.curriculum[0], known_shape(job), 1, cpu(1))
    assert planned.tensors == pytest.approx(most_allocated(job), rel=0.05)


def large(engine: dict[str, Any], **changes: Any) -> JobSpec:
    stage = {"name": "only", "duration": "9 steps", "sequence_length": 4096, "mixture": {"web": 1.0}}
    whole = {"ds_config": "zero2", "precision": "bf16", "kind": "deepspeed", "micro_batch_size": 2, **engine}
    model = {"preset": "ernie-4.5-0.3b"}
    return job_of(whole, model=model, tokens_per_batch=48 * 4096, curriculum=[stage], **changes)


def test_the_largest_micro_batch_fits_and_divides_the_batch_and_the_next_one_does_not_fit() -> None:
    job, device = large({}), DEVICES["A100-40G"]
    stage, shape = job.curriculum[0], known_shape(job)
    size, memory = largest_micro_batch(job, stage, shape, 1, device)
    assert 48 % size == 0 and memory.total < FULL * device.memory
    after = next(larger for larger in range(size + 1, 49) if 48 % larger == 0)
    more = estimate_memory(job, stage.model_copy(update={"micro_batch_size": after}), shape, 1, device)
    assert more.total > FULL * device.memory
    narrow = ModelShape.from_config({**SHAPE, "hidden_size": 40_960, "num_hidden_layers": 400})
    assert largest_micro_batch(job, stage, narrow, 1, device)[0] == 0


def test_memory_auto_cuts_mlps_before_it_offloads_and_on_a_cpu_it_only_recomputes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = {"name": "only", "duration": "9 steps", "sequence_length": 131_072, "mixture": {"web": 1.0}}
    long = large({}, resources={"device": "A100-40G"}).model_copy(update={"tokens_per_batch": 131_072})
    long = long.model_copy(update={"curriculum": (StageSpec(**stage),)})

    def chosen(job: JobSpec, name: str, device: Device, **needs: Any) -> tuple[Any, ...]:
        """On a device that has just enough memory for `job` if its engine is as `needs`."""
        engine = job.engine.model_copy(update={"micro_batch_size": 1, **needs})
        enough = job.model_copy(update={"engine": engine})
        total = estimate_memory(enough, enough.curriculum[0], known_shape(job), 1, device).total
        fitting = replace(device, memory=int(total / FULL) + 1)
        monkeypatch.setitem(DEVICES, "A100-40G", fitting)
        monkeypatch.setattr("launcher.estimate.cpu", lambda ranks: fitting)
        auto = job.engine.model_copy(update={"micro_batch_size": 1, "memory": "auto"})
        resources = job.resources.model_copy(update={"device": name})
        plain, _ = settled(job.model_copy(update={"engine": auto, "resources": resources}))
        return plain.engine.ds_config, plain.engine.gradient_checkpointing, plain.engine.mlp_tiles

    gpu = DEVICES["A100-40G"]
    assert chosen(long, "A100-40G", gpu, gradient_checkpointing="full") == ("zero2", "full", 1)
    assert chosen(long, "A100-40G", gpu, gradient_checkpointing="full", mlp_tiles=8) == ("zero2", "full", 8)
    offloaded = {"ds_config": "zero2_offload", "gradient_checkpointing": "full", "mlp_tiles": 8}
    assert chosen(long, "A100-40G", gpu, **offloaded) == ("zero2_offload", "full", 8)
    on_cpu = large({"precision": "fp32"})
    assert chosen(on_cpu, "CPU", cpu(1), gradient_checkpointing=2) == ("zero2", 2, 1)
    with pytest.raises(SpecError, match="nothing fits CPU"):
        chosen(on_cpu, "CPU", cpu(1), precision="bf16", gradient_checkpointing="full", mlp_tiles=8)


def test_memory_auto_recomputes_and_offloads_no_more_than_the_device_needs() -> None:
    def chosen(micro: int, device: str) -> tuple[str | int, str]:
        job = large({"memory": "auto", "micro_batch_size": micro}, resources={"device": device})
        plain, said = settled(job)
        assert plain.engine.memory == "manual" and said and device in said
        return plain.engine.gradient_checkpointing, plain.engine.ds_config

    assert chosen(1, "A100-80G") == ("none", "zero2")
    assert chosen(24, "A100-80G") == (2, "zero2")
    assert chosen(48, "A100-80G") == ("full", "zero2")
    huge = large({"memory": "auto"}, resources={"device": "A100-40G"})
    tall = {**SHAPE, "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 12}
    offloaded, _ = settled(huge.model_copy(update={"model": huge.model.model_copy(update={"override": tall})}))
    assert offloaded.engine.ds_config in ("zero2_offload", "zero3_offload")
    with pytest.raises(SpecError, match=r"nothing fits V100-16G.*lower engine.micro_batch_size"):
        chosen(48, "V100-16G")
    with pytest.raises(SpecError, match=r"resources\.device"):
        large({"memory": "auto"})
    manual = large({})
    assert settled(manual) == (manual, None)


def test_a_calibrated_plan_says_what_was_measured_and_the_next_one_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    job = tmp_path / "job.yaml"
    job.write_text(job_of().model_dump_json(), encoding="utf-8")
    assert main(["plan", str(job), "--gpus", "1xCPU"]) == 0
    assert "add --calibrate" in capfd.readouterr().out
    assert main(["plan", str(job), "--calibrate"]) == 0
    said = capfd.readouterr().out
    assert "2 micro-batches:" in said and "per rank above the process itself; planned" in said
    assert str(calibrate.speeds_file()) in said and "by the measured speed of 1 x CPU" in said
    assert main(["plan", str(job), "--gpus", "1xCPU"]) == 0
    assert "by the measured speed of 1 x CPU in job memory" in capfd.readouterr().out
    assert main(["plan", str(job), "--gpus", "1xCPU", "--set", "engine.kind=deepspeed"]) == 0
    assert "add --calibrate" in capfd.readouterr().out, "another engine has another speed"


def test_steps_that_cannot_be_made_are_told_of_in_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    job = tmp_path / "job.yaml"
    job.write_text(job_of({"precision": "fp16"}).model_dump_json(), encoding="utf-8")
    assert main(["plan", str(job), "--calibrate"]) == 2
    said = capfd.readouterr().err
    assert "--calibrate: the steps could not be made" in said and "fp16" in said and "Traceback" not in said
