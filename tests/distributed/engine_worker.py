"""Run under torchrun: trains a few steps with one engine after another on the same batches, and prints what came out.

arguments: JSON with `steps`, `scratch` and `cases`: EngineSpec fields plus `micro`, `adapter` (AdapterSpec fields),
`base` (a folder with weights), `each` (the loss of documents) and `becomes` (a ds_config that the converted checkpoint
goes on with)
"""

import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ernie_dist.batch import IGNORED, Batch, MicroBatch, Row, stack
from ernie_dist.engine.base import Engine
from ernie_dist.engine.select import build_engine, convert, read_weights
from ernie_dist.model.build import build_model, layer_options
from ernie_dist.model.loss import answer_log_probabilities, summed_loss
from ernie_dist.spec.training import AdapterSpec, EngineSpec, ModelSpec, OptimizerSpec
from ernie_dist.trusted_files import write_state
from ernie_dist.world import World

VOCABULARY, LENGTH, SEQUENCES = 128, 32, 8
MODEL = ModelSpec(
    preset="ernie-4.5-tiny", override={"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": VOCABULARY}
)
FREEZE = ("model.embed_tokens.*", "model.layers.0.*")
OF_ADAPTER = ("model.layers.0.*",)
NOT_OF_ENGINE = ("micro", "adapter", "base", "becomes", "each")


def row(generator: np.random.Generator, labelled: float):
    """A packed sequence of two documents and some padding; about `labelled` of its positions are in the loss."""
    cut, end = int(generator.integers(5, 15)), int(generator.integers(20, LENGTH))
    tokens = generator.integers(5, VOCABULARY, LENGTH)
    labels = np.where(generator.random(LENGTH) < labelled, np.roll(tokens, -1), IGNORED)
    labels[[cut - 1, *range(end - 1, LENGTH)]] = IGNORED
    lengths = np.array([cut, end - cut, LENGTH - end])
    return Row(tokens, labels, np.concatenate([np.arange(n) for n in lengths]), lengths)


def batch(step: int, world: World, micro: int) -> Batch:
    """The same global batch however it is cut: sequence i has about i/8 of its positions in the loss."""
    rows = [row(np.random.default_rng([step, i]), i / SEQUENCES) for i in range(SEQUENCES)]
    mine = rows[world.rank * SEQUENCES // world.size : (world.rank + 1) * SEQUENCES // world.size]
    cut = tuple(stack(mine[i : i + micro]) for i in range(0, len(mine), micro))
    return Batch(step, "stage", cut, np.zeros((SEQUENCES, 2), np.int64), SEQUENCES * LENGTH)


class HostReads(TorchDispatchMode):
    """After each of these the host knows what the device has computed, and has waited for it."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += str(operation.overloadpacket) in ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero")
        return operation(*args, **(kwargs or {}))


def host_reads(step: Callable[[], object]) -> int:
    with HostReads() as reads:
        step()
    return reads.count


def each_loss(model: torch.nn.Module, rows: MicroBatch) -> torch.Tensor:
    """The same sum as summed_loss, the other way round: what each document's answers are worth, as preferences do."""
    return -answer_log_probabilities(model, rows).sum()


def run(case: dict, steps: int, world: World, scratch: Path) -> dict:
    spec = EngineSpec(**{key: value for key, value in case.items() if key not in NOT_OF_ENGINE})
    model = ModelSpec(from_pretrained=case["base"]) if "base" in case else MODEL
    if "adapter" in case:
        model = model.model_copy(update={"adapter": AdapterSpec(**case["adapter"])})
    build = partial(build_model, model, VOCABULARY, 17, **layer_options(spec))
    freeze, pretrained = OF_ADAPTER if model.adapter else FREEZE, "base" in case
    make = partial(build_engine, optimizer=OptimizerSpec(), freezes=[freeze], build=build, world=world)
    make = partial(make, pretrained=pretrained, adapter=model.adapter is not None)
    poison = [1.0]
    summed = each_loss if "each" in case else summed_loss
    engine = make(spec, loss=lambda model, rows: summed(model, rows) * poison[0])
    micro, results = case["micro"], []
    for step in range(steps):
        engine.freeze(freeze if step == 1 else ())
        results.append(engine.step(batch(step, world, micro), 1e-2))
        if step == steps // 2 - 1:
            folder = world.from_main(scratch / re.sub(r"[^\w,]", "", json.dumps(case)))
            folder.mkdir(parents=True, exist_ok=True)
            world.barrier()
            for name, state in engine.snapshot().items():
                write_state(folder / name, state)
            world.barrier()
    leave = {"learning_rate": 0.0, "accepts": lambda *numbers: False}
    reads = [host_reads(lambda cut=cut: engine.step(batch(steps, world, cut), **leave)) for cut in (4, 1)]
    held_out: list[MicroBatch] = list(batch(99, world, micro).micro_batches)
    loss, tokens = engine.evaluate(held_out)
    poison[0] = math.inf
    overflow = engine.step(batch(steps, world, micro), 1e-2, accepts=lambda *numbers: all(map(math.isfinite, numbers)))
    poison[0] = 1.0
    seen: list[tuple[float, float]] = []
    refused = engine.step(
        batch(steps, world, micro),
        1e-2,
        accepts=lambda *numbers: bool(seen.append(numbers)),
        flag=lambda: world.rank == world.size - 1,
    )
    trained = engine.model if spec.kind == "plain" else engine._engine.module.model
    training = trained.training
    after_refusals = list(engine.evaluate(held_out))
    engine.close()

    def replay_from(load: Callable[[Engine], None], **changes: str) -> list[float]:
        again = make(spec.model_copy(update=changes), loss=summed)
        load(again)
        again.freeze(())
        losses = [again.step(batch(step, world, micro), 1e-2).loss for step in range(steps // 2, steps)]
        again.close()
        return losses

    replay = replay_from(lambda engine: engine.load(folder))
    converted = replay
    if spec.precision == "bf16" or "becomes" in case:
        to = folder.with_name(f"{folder.name} converted")
        if world.is_main:
            convert("deepspeed", folder, to)
        world.barrier()
        becomes = case.get("becomes", spec.ds_config)
        converted = replay_from(lambda engine: engine.load_converted(to), ds_config=becomes)
    weights = read_weights(spec.kind, folder) if world.is_main else {}
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "tokens": [result.loss_tokens for result in results],
        "applied": all(result.applied for result in results),
        "replay": replay,
        "converted": converted,
        "trainable": [engine.trainable, engine.parameters],
        "bytes": sum(path.stat().st_size for path in folder.rglob("*.pt")) if world.is_main else 0,
        "training": training,
        "refusals_applied": overflow.applied or refused.applied,
        "judged_by": seen == [(refused.loss, refused.grad_norm)],
        "flags": [overflow.flagged, refused.flagged],
        "after_refusals": after_refusals,
        "held_out": [loss, tokens],
        "reads": reads,
        "compiler": "torch._inductor.compile_fx" in sys.modules,
        "weights": {name: float(tensor.double().abs().sum()) for name, tensor in sorted(weights.items())},
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    world = World.from_environment()
    if world.size > 1:
        world.connect()
    for case in request["cases"]:
        result = run(case, request["steps"], world, Path(request["scratch"]))
        if world.is_main:
            print("RESULT " + json.dumps({"case": case, **result}), flush=True)
    world.close()
