"""`engine.memory: auto`: the cheapest way to run a job that, by the plan, fits the device it names.

as written -> recompute every second layer -> all -> optimizer states in host memory -> weights there as well
"""

from __future__ import annotations

from collections.abc import Iterator

from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.hardware import DEVICES
from ernie_dist.spec.job import JobSpec
from launcher.estimate import shape_of
from launcher.memory import FULL, Policy, estimate_memory


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
    device, ranks = DEVICES[name], job.resources.world_size
    needed = 0.0
    for candidate in _candidates(job):
        needed = max(estimate_memory(candidate, stage, shape, ranks, device).total for stage in job.curriculum)
        if needed < FULL * device.memory:
            engine = candidate.engine
            how = f"{engine.ds_config}, " if engine.kind == "deepspeed" else ""
            return candidate, (
                f"auto       memory for {ranks} x {name}: {how}gradient checkpointing {engine.gradient_checkpointing}, "
                f"estimated to take {needed / device.memory:.0%}"
            )
    raise SpecError(
        f"engine.memory = auto: nothing fits {name}: with all layers recomputed and all that can be offloaded a rank "
        f"still needs {needed / device.memory:.0%} of it; lower engine.micro_batch_size or sequence_length, or take "
        "more or larger devices"
    )


def _candidates(job: JobSpec) -> Iterator[JobSpec]:
    """In order of what they cost in time."""
    written, zero = job.engine.gradient_checkpointing, Policy.of(job).zero
    recompute = [written, *([2] if written == "none" else []), *(["full"] if written != "full" else [])]
    quantized = job.model.adapter is not None and job.model.adapter.quantize != "none"
    policies = [job.engine.ds_config]
    if job.engine.kind == "deepspeed":
        policies += ["zero2_offload"] if zero < 3 else []
        policies += ["zero3_offload"] if not quantized and not job.engine.compile else []
    for ds_config in dict.fromkeys(policies):
        for every in recompute:
            changed = {"memory": "manual", "ds_config": ds_config, "gradient_checkpointing": every}
            yield job.model_copy(update={"engine": job.engine.model_copy(update=changed)})
