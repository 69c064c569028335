"""Bytes that a rank holds at the fullest moment of an optimizer step, by part.

JobSpec, StageSpec, ModelShape, Device --what each moment holds--> Memory of the fullest one
Derived from what torch and DeepSpeed keep; `python -m benchmarks.planned` holds it against what processes took.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ernie_dist.spec.curriculum import StageSpec
from ernie_dist.spec.ds_config import offloads, read_ds_config, zero_stage
from ernie_dist.spec.hardware import Device
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.shape import ModelShape

ASSUMED_FRAGMENTATION = 0.05
"""of a GPU's tensors: blocks of torch's allocator that are free and too small for what comes"""
ASSUMED_CONTEXT = 0.8e9
"""bytes of a GPU that CUDA, its libraries' workspaces and NCCL take, and torch does not count"""
FULL = 0.95
"""share of a device's memory that a plan may fill"""
CPU_PROCESS = 0.45e9
"""bytes of a CPU rank with all libraries loaded, before there is a model: measured, of DeepSpeed's ranks"""
ASSUMED_HEAP = 0.4
"""of a CPU's tensors: what glibc keeps of freed memory; 0.2 to 0.7 in eight small jobs, docs/plan.md"""

_NF4 = 0.52
"""bytes per weight: 4 bits, and a twice quantised scale for every 64 weights (arXiv:2305.14314)"""
_LOGITS_AT_ONCE = {True: 1 << 25, False: 1 << 28}
"""on a CPU, and on a GPU: as ernie_dist.model.head has it, which imports torch"""
_LOGITS_IN_CACHE = 1 << 21
"""likewise, of a CPU"""
_ALLREDUCE_AT_ONCE = 500_000_000
"""gradients that DeepSpeed flattens and reduces in one go without ZeRO"""
_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size where the file names none"""


@dataclass(frozen=True)
class Policy:
    """How the job's engine spreads a model over ranks."""

    zero: int
    deepspeed: bool
    offloaded: bool
    """whether optimizer states lie in host memory"""
    weights_offloaded: bool
    overlaps: bool
    live: float
    """weights that ZeRO 3 keeps gathered between uses"""
    bucket: float
    """gradients reduced at once"""
    width: int
    """bytes of a weight in forward and backward, and of a gradient on the wire"""

    @classmethod
    def of(cls, job: JobSpec, device: Device | None = None) -> Policy:
        """On no device in particular precision auto means a GPU's."""
        full = job.engine.precision == "fp32" or (
            job.engine.precision == "auto" and device is not None and not device.flash
        )
        width = 4 if full else 2
        if job.engine.kind == "plain":
            return cls(0, False, False, False, overlaps=False, live=0, bucket=0, width=width)
        config = read_ds_config(job.engine.ds_config)
        zero = config["zero_optimization"]
        return cls(
            zero=zero_stage(config),
            deepspeed=True,
            offloaded=offloads(config),
            weights_offloaded="offload_param" in zero,
            overlaps=bool(zero.get("overlap_comm", zero["stage"] == 3)),
            live=zero.get("stage3_max_live_parameters", 1e9),
            bucket=zero.get("reduce_bucket_size", _BUCKET),
            width=width,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes per rank at the fullest moment of a step, by part."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    """two moments of every trained weight, and its fp32 master where the engine has one besides the weight"""
    activations: float = 0.0
    logits: float = 0.0
    """and their gradients: of the head and of what goes into it"""
    communication: float = 0.0
    """buffers in which gradients and weights travel"""
    fragmentation: float = 0.0
    process: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def tensors(self) -> float:
        """Without what lies between tensors and what the process takes."""
        return self.total - self.fragmentation - self.process

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def estimate_memory(
    job: JobSpec, stage: StageSpec, shape: ModelShape, ranks: int, device: Device | None = None
) -> Memory:
    """Per-rank memory of one stage; without a device, that of a GPU with flash attention.

    ZeRO's states after Rajbhandari et al. 2020 (arXiv:1910.02054) and DeepSpeed 0.19's source, activations as
    `layer_activations` says. Raises ValueError where the batch cannot be cut over the ranks.
    """
    policy = Policy.of(job, device)
    plan = job.batch_plan(stage, ranks)
    states = _States.of(job, shape, policy, ranks, on_cpu=device is not None and device.cpu)
    work = _Work.of(job, stage, shape, policy, device, plan.micro_batch_size)
    moments = _moments(shape, job, states, work, width=policy.width, more=plan.gradient_accumulation_steps > 1)
    fullest = max(moments, key=lambda moment: moment.total)
    if device is not None and device.cpu:
        return replace(fullest, fragmentation=ASSUMED_HEAP * fullest.tensors, process=CPU_PROCESS)
    return replace(fullest, fragmentation=ASSUMED_FRAGMENTATION * fullest.tensors, process=ASSUMED_CONTEXT)


def largest_micro_batch(
    job: JobSpec, stage: StageSpec, shape: ModelShape, ranks: int, device: Device
) -> tuple[int, Memory]:
    """The largest micro_batch_size that cuts a batch of this stage evenly and fits, and the memory it takes.

    0, and the memory of 1, where none fits. Raises ValueError where the batch cannot be dealt to the ranks.
    """
    per_rank = job.batch_plan(stage.model_copy(update={"micro_batch_size": 1}), ranks).sequences_per_rank
    for size in (size for size in range(per_rank, 0, -1) if per_rank % size == 0):
        memory = estimate_memory(job, stage.model_copy(update={"micro_batch_size": size}), shape, ranks, device)
        if memory.total < FULL * device.memory:
            return size, memory
    return 0, memory


def layer_activations(job: JobSpec, shape: ModelShape, policy: Policy, length: int, device: Device | None) -> float:
    """Bytes for each position that one layer keeps for its backward pass: what autograd saves, tensor by tensor.

    Counted with torch.autograd.graph.saved_tensors_hooks on Ernie4_5 in fp32 (tests/unit/test_memory.py does it
    again); in half precision from the same code, not counted. Of frozen layers what their adapters need.
    """
    width, hidden = policy.width, shape.hidden_size
    adapter = job.model.adapter
    targets = set(adapter.modules(experts=shape.experts > 0)) if adapter else None
    into_attention, into_mlp = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
    norms = 0.0
    for readers in (into_attention, into_mlp):
        norms += 4 * hidden + 4  # the residual in fp32, and 1/rms
        norms += width * hidden if targets is None else 0  # normalised, for the gradient of the norm's weights
        norms += width * hidden if targets is None or targets & readers else 0  # what the matrices are given
    dense_mask = width * length if not _flash(policy, device) else 0  # a row of it, as floats, in every layer
    whole = 4 * shape.heads * length if device is not None and not device.cpu and dense_mask else 0  # all softmaxes
    rotary = 8 * shape.attention_width / shape.heads  # cosine and sine, fp32
    attention = 2 * width * (shape.attention_width + shape.key_value_width) + 4 * shape.heads + dense_mask + whole
    products = 4 if targets is None or "down_proj" in targets else 3  # gate, its silu, up, and their product
    thin = width * adapter.rank * len(targets) if adapter and targets else 0
    mlp = width * products * _mlp_width(shape) if job.engine.mlp_tiles == 1 else 0  # tiles are computed once more
    return norms + rotary + attention + thin + mlp + _routed(shape, width)


def _mlp_width(shape: ModelShape) -> float:
    """Of the average layer: with experts those of one token together."""
    sparse = (shape.active_experts + shape.shared_experts) * shape.expert_width
    return ((shape.layers - shape.moe_layers) * shape.mlp_width + shape.moe_layers * sparse) / shape.layers


def _routed(shape: ModelShape, width: int) -> float:
    """Each chosen expert's own copy of a position, going in and coming out, and the scores; of the average layer."""
    copies = 2 * width * shape.active_experts * shape.hidden_size + 8 * shape.experts
    return copies * shape.moe_layers / shape.layers


def _flash(policy: Policy, device: Device | None) -> bool:
    return policy.width == 2 and (device is None or device.flash)


def recomputed(job: JobSpec, shape: ModelShape) -> int:
    """How many layers are."""
    every = job.engine.gradient_checkpointing
    return 0 if every == "none" else shape.layers if every == "full" else -(-shape.layers // int(every))


def trained_parameters(job: JobSpec, shape: ModelShape) -> int:
    return shape.adapter_parameters(job.model.adapter) if job.model.adapter else shape.parameters


@dataclass(frozen=True)
class _States:
    """What is there besides activations, in bytes."""

    weights: float
    optimizer: float
    kept: float
    """gradients that lie there from one micro-batch to the next"""
    whole: float
    """gradients at the end of a backward pass, outside of the bucket"""
    reduced: float
    """gradients once they have been summed over ranks"""
    copied: float
    """gradients while the weights are updated"""
    bucket: float = 0.0
    """where gradients go through in the backward pass"""
    early: float = 0.0
    """of it, what is there as soon as the backward pass begins"""
    reducing: float = 0.0
    """copies that travel"""
    gathered: float = 0.0
    """ZeRO 3: weights of other ranks, each kept until it has been used for the last time"""
    always: bool = False
    """ZeRO 3: whether `kept` and the bucket are there from the start"""

    @classmethod
    def of(cls, job: JobSpec, shape: ModelShape, policy: Policy, ranks: int, *, on_cpu: bool) -> _States:
        """As read in DeepSpeed 0.19's source, and seen in what its engines allocate on one and on two CPU ranks."""
        trained, width, adapter = trained_parameters(job, shape), policy.width, job.model.adapter
        half, part = width == 2, trained / ranks
        frozen = 0.0 if adapter is None else shape.parameters * (width if adapter.quantize == "none" else _NF4)
        weights = width * trained + frozen
        if not policy.deepspeed:  # masters in fp32, and autocast's copies
            own = (4 + 2 * half) * trained + frozen
            return cls(own, 8 * trained, 4 * trained, 4 * trained, 4 * trained, 4 * trained)
        if policy.zero == 0:
            gradients = (4 + width * half) * trained
            flat = width * min(_ALLREDUCE_AT_ONCE, trained)
            moments = (8 + 4 * half) * trained
            return cls(weights, moments, gradients, gradients, gradients, gradients, reducing=flat)
        states = 0.0 if policy.offloaded and not on_cpu else 12 * part
        # Memory that nothing was written to is nothing on a CPU, and has its full size on a GPU.
        touched = min(policy.bucket, trained) if on_cpu else policy.bucket
        if policy.zero == 3:
            own = 0.0 if policy.weights_offloaded and not on_cpu else weights / ranks
            gathered = width * min(policy.live, trained + frozen / width) if ranks > 1 or not own else 0.0
            buffer = 4 * part if states else 0.0
            travels = 2 * width * min(policy.bucket, trained)
            bucket = width * touched
            return cls(own, states, buffer, buffer, buffer, 2 * buffer, bucket, bucket, travels, gathered, always=True)
        # Summed up in a copy of the bucket, or, where there is nobody to sum with, just put aside; then made one piece
        # for the update, after which the new weights are gathered in a copy of all of them.
        summed = width * min(policy.bucket, trained) if ranks > 1 else 4 * part
        copied = max(4 * part * (1 if half else 2), width * trained if ranks > 1 else 0.0)
        if policy.zero == 2:
            buckets = touched if on_cpu or not policy.overlaps else 2 * touched
            early = 0.0 if on_cpu else width * buckets
            return cls(weights, states, 4 * part, 0.0, summed, copied, width * buckets, early)
        # ZeRO 1 moves whole gradients into its bucket, one by one, when all are there.
        unused = 0.0 if on_cpu else 4 * touched
        return cls(weights, states, 4 * trained, 4 * trained, 4 * trained + summed, copied, reducing=unused)


def _moments(shape: ModelShape, job: JobSpec, states: _States, work: _Work, *, width: int, more: bool) -> list[Memory]:
    """The loss, when most is kept; its gradients on their way into the last layer; the end of the backward pass;
    the sum over ranks; the update. `more`: after other micro-batches of the same step."""
    embedding = 0 if job.model.adapter else width * shape.vocab_size * shape.hidden_size
    # The two gradients of a matrix that is embedding and head meet at the end, and their sum is a third.
    meeting = embedding * ((2 if shape.tied else 0) + (1 if more else 0))
    before = states.kept if more or states.always else 0.0
    apart = before if not states.whole else 0.0
    always = states.bucket if states.always else 0.0
    last = min(states.gathered, embedding)  # the embedding is the last that is used
    still = Memory(weights=states.weights, optimizer=states.optimizer)

    def moment(communication: float, gradients: float, activations: float = 0.0, logits: float = 0.0) -> Memory:
        named = {"communication": communication, "gradients": gradients}
        return replace(still, activations=activations, logits=logits, **named)

    return [
        moment(states.gathered + always, before, work.kept, work.chunk + work.head),
        moment(states.gathered + max(always, states.early), before, work.kept + work.layer, work.head),
        moment(last + states.bucket, states.whole + apart + meeting, work.least),
        moment(last + states.bucket + states.reducing, states.reduced + (0.0 if states.always else apart)),
        moment(always, states.copied),
    ]


@dataclass(frozen=True)
class _Work:
    """What one micro-batch takes, in bytes."""

    kept: float
    """for the backward pass, by all layers"""
    layer: float
    """more than that while one layer is gone back through"""
    least: float
    """when only the embedding is left"""
    chunk: float
    """logits worked on at once"""
    head: float
    """gradients of the head and of what went into it"""

    @classmethod
    def of(
        cls, job: JobSpec, stage: StageSpec, shape: ModelShape, policy: Policy, device: Device | None, rows: int
    ) -> _Work:
        width, hidden, length = policy.width, shape.hidden_size, stage.sequence_length
        layer, again = layer_activations(job, shape, policy, length, device), recomputed(job, shape)
        shared = 8 * shape.attention_width / shape.heads + (0 if _flash(policy, device) else length)  # rotary, mask
        ends = (4 + 2 * width) * hidden  # the last norm, and the positions with a label
        kept = (shape.layers - again) * layer + again * width * hidden + shared + ends
        # Gradients of gate, up and their product, of the residual, and of what a norm is made of.
        tiles = job.engine.mlp_tiles
        mlp = width * (3 if tiles == 1 else 7) * _mlp_width(shape) / tiles
        backward = mlp + width * 4 * hidden + (layer if again else 0)
        positions, on_cpu = rows * length, device is not None and device.cpu
        at_once = min(positions, max(1, _LOGITS_AT_ONCE[on_cpu] // max(1, shape.vocab_size)))
        logits = at_once * shape.vocab_size
        # A chunk is let go of when the next one is there; of a part of it the exponentials are there as well.
        chunks = (4 + (width if width == 2 else 0)) * logits * (2 if at_once < positions else 1)
        exponentials = 4 * (min(logits, _LOGITS_IN_CACHE) if on_cpu else logits)
        head = 4 * shape.vocab_size * hidden if job.model.adapter is None else 0
        return cls(
            kept=positions * kept,
            layer=positions * backward,
            least=positions * (shared + 2 * width * hidden),
            chunk=max(chunks, chunks / (2 if at_once < positions else 1) + exponentials),
            head=head + positions * width * hidden,
        )
