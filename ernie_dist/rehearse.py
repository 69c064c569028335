"""A few real steps of a job's model on random tokens, on this rank's device: their time, and the memory they take.

torchrun ... -m ernie_dist.rehearse JOB.json RESULT.json --stage NAME --vocabulary N --steps N
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ernie_dist.batch import Batch, Row, stack
from ernie_dist.engine.base import Engine
from ernie_dist.engine.select import build_engine
from ernie_dist.memory import memory_of
from ernie_dist.model.build import build_model, layer_options
from ernie_dist.model.loss import summed_loss
from ernie_dist.spec.curriculum import StageSpec
from ernie_dist.spec.errors import ErnieError
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.training import ModelSpec
from ernie_dist.world import World

ENOUGH = 20.0
"""seconds of steps after which no further pair is begun"""


def rehearse(job: JobSpec, stage: StageSpec, vocab_size: int, steps: int, world: World) -> dict[str, Any]:
    """Steps of one micro-batch and of two, in turns: what a micro-batch and what an update takes, in seconds.

    `memory`: the most bytes that any rank held during steps like the stage's own, from before the model was built on;
    `process` is what there was by then. After a first step, which is not counted, at least one pair of steps is made,
    and more until there are `steps` of them or ENOUGH seconds are over.
    """
    world.connect()
    plan = job.batch_plan(stage, world.size)
    _page_in(job, stage, world)
    held = memory_of(world.device)
    before = held.now()
    engine = _engine(job, stage, vocab_size, world)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    peak, began = 0, time.perf_counter()
    for number, count in enumerate([1, *[1, 2] * steps]):
        batch = _batch(job, stage, plan.micro_batch_size, count, vocab_size, number, world)
        world.barrier()
        held.begin()
        started = time.perf_counter()
        engine.step(batch, 1e-6)
        if number == 0:  # the optimizer's states are there now, and what is loaded at first use
            continue
        seconds[count].append(time.perf_counter() - started)
        if count <= plan.gradient_accumulation_steps:
            peak = max(peak, held.peak() - before)
        if world.is_main:
            print(f"  {count} micro-batch{'es' * (count > 1)}: {seconds[count][-1]:.2f} s", flush=True)
        if count == 2 and world.from_main(time.perf_counter() - began > ENOUGH):
            break
    peaks = world.gather((peak, held.process))
    one, two = median(seconds[1]), median(seconds[2])
    precision = engine.precision
    engine.close()
    return {
        "micro_batch": max(two - one, 0.1 * one),  # of steps so short that chance decides, something that is not 0
        "update": max(2 * one - two, 0.0),
        "memory": max(memory for memory, _ in peaks),
        "process": max(process for _, process in peaks),
        "precision": precision,
        **_device(world),
    }


def _engine(job: JobSpec, stage: StageSpec, vocab_size: int, world: World) -> Engine:
    build = partial(build_model, job.model, vocab_size, job.seed, **layer_options(job.engine))
    origin = {"pretrained": job.model.from_pretrained is not None, "adapter": job.model.adapter is not None}
    freezes = [stage.freeze] if stage.freeze else []
    engine = build_engine(job.engine, job.optimizer, freezes, build, summed_loss, world, **origin)
    engine.freeze(stage.freeze)
    return engine


def _device(world: World) -> dict[str, Any]:
    if world.device.type != "cuda":
        return {"device": "CPU", "device_memory": 0}
    return {"device": torch.cuda.get_device_name(), "device_memory": torch.cuda.get_device_properties(0).total_memory}


def _batch(
    job: JobSpec, stage: StageSpec, rows: int, micro_batches: int, vocab_size: int, number: int, world: World
) -> Batch:
    """This rank's part of a batch: one document in every sequence, a label at every position."""
    length = stage.sequence_length
    chance = np.random.default_rng([job.seed, number, world.rank])

    def row() -> Row:
        tokens = chance.integers(0, vocab_size, length)
        return Row(tokens, np.roll(tokens, -1), np.arange(length), np.array([length]))

    sequences = rows * micro_batches * world.size
    parts = tuple(stack([row() for _ in range(rows)]) for _ in range(micro_batches))
    return Batch(number, stage.name, parts, np.zeros((sequences, 2), np.int64), sequences * length)


def _page_in(job: JobSpec, stage: StageSpec, world: World) -> None:
    """A step of a tiny model: what is loaded at first use belongs to the process, not to the model."""
    vocabulary = 64
    model = ModelSpec(preset="ernie-4.5-tiny", override={"vocab_size": vocabulary})
    tiny = job.model_copy(update={"model": model})
    short = stage.model_copy(update={"sequence_length": 8, "freeze": ()})
    engine = _engine(tiny, short, vocabulary, world)
    engine.step(_batch(tiny, short, 1, 1, vocabulary, 0, world), 1e-6)
    engine.close()
    del engine
    gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ernie_dist.rehearse", description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    job = JobSpec.model_validate_json(options.job.read_text(encoding="utf-8"))
    stage = next(stage for stage in job.curriculum if stage.name == options.stage)
    world = World.from_environment()
    try:
        found = rehearse(job, stage, options.vocabulary, options.steps, world)
    except ErnieError as error:
        print(f"ernie: {error}", file=sys.stderr)
        return error.exit_code
    if world.is_main:
        options.result.write_text(json.dumps(found), encoding="utf-8")
    world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
