"""`engine.memory: auto`: the cheapest way to run a job that, by the plan, fits the device it names.

as written -> recompute every second layer -> all -> MLPs in tiles -> optimizer states in host memory -> weights too
"""

from __future__ import annotations

from collections.abc import Iterator

from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.shape import ModelShape
from launcher.estimate import Cluster, shape_of
from launcher.memory import FULL, Policy, estimate_memory

_TILES = 8
"""parts of a sequence: of an MLP's activations an eighth is left, which is little beside the rest of a layer"""


def settled(job: JobSpec) -> tuple[JobSpec, str | None]:
    """The job with plain values in place of auto, and a line that says which; the job itself where nothing is auto.

    Raises SpecError where nothing fits, or the model's size is not known.
    """
    if job.engine.memory != "auto":
        return job, None
    name = job.resources.device
    assert name is not None  # the spec asks for it
    shape = shape_of(job)
    if shape is None or not shape.vocab_size:
        raise SpecError("engine.memory = auto: the model's size is not known yet; leave memory out")
    ranks, needed = job.resources.world_size, 0.0
    # The ranks of one node share a CPU's memory; a GPU is what it is in any number.
    device = Cluster.of(job.resources.gpus_per_node, name).device
    for candidate in _candidates(job, shape, on_cpu=device.cpu):
        needed = max(estimate_memory(candidate, stage, shape, ranks, device).total for stage in job.curriculum)
        if needed < FULL * device.memory:
            engine = candidate.engine
            how = f"{engine.ds_config}, " if engine.kind == "deepspeed" else ""
            tiles = f", MLPs in {engine.mlp_tiles} tiles" if engine.mlp_tiles > 1 else ""
            return candidate, (
                f"auto       memory for {ranks} x {name}: {how}gradient checkpointing {engine.gradient_checkpointing}"
                f"{tiles}, estimated to take {needed / device.memory:.0%}"
            )
    raise SpecError(
        f"engine.memory = auto: nothing fits {name}: with all layers recomputed and all that can be offloaded, a rank "
        f"still needs {needed / device.memory:.0%} of it; lower engine.micro_batch_size or sequence_length, or take "
        "more or larger devices"
    )


def _candidates(job: JobSpec, shape: ModelShape, *, on_cpu: bool) -> Iterator[JobSpec]:
    """In order of what they cost in time."""
    engine, zero = job.engine, Policy.of(job).zero
    written = engine.gradient_checkpointing
    recompute = [written, *([2] if written == "none" else []), *(["full"] if written != "full" else [])]
    layers = [(every, engine.mlp_tiles) for every in recompute]
    if not shape.experts and not engine.compile:  # neither can be cut
        layers.append(("full", max(_TILES, engine.mlp_tiles)))
    quantized = job.model.adapter is not None and job.model.adapter.quantize != "none"
    policies = [engine.ds_config]
    if engine.kind == "deepspeed" and not on_cpu:  # there all memory is the host's
        policies += ["zero2_offload"] if zero < 3 else []
        policies += ["zero3_offload"] if not quantized and not engine.compile else []
    for ds_config in dict.fromkeys(policies):
        for every, tiles in dict.fromkeys(layers):
            changed = {"memory": "manual", "ds_config": ds_config, "gradient_checkpointing": every, "mlp_tiles": tiles}
            yield job.model_copy(update={"engine": engine.model_copy(update=changed)})
