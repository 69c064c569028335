"""How it is trained: model, optimizer, schedule, engine, checkpoints, evaluation and tracking."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ernie_dist.spec.quantity import Count, Interval, Quantity, Span, Unit
from ernie_dist.spec.strict import Strict

Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS: tuple[Linear, ...] = get_args(Linear)
"""every linear layer of a block; the router of experts is none"""
ATTENTION = LINEARS[:4]


class AdapterSpec(Strict):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): the weights stay, and products of two thin matrices are added to them.

    Defaults as in ERNIEKit, targets as in the LoRA paper.
    """

    rank: int = Field(32, ge=1, le=4096, description="inner dimension of the thin matrices")
    alpha: float | None = Field(None, gt=0, description="scale; 2 x rank, and 4 with rslora, if not given")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs that is dropped in training")
    targets: Literal["all-linear"] | Annotated[tuple[Linear, ...], Field(min_length=1)] = Field(
        ("q_proj", "v_proj"), description="which layers get an adapter: all-linear, or a list of names"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (arXiv:2312.03732) instead of alpha / rank")
    dora: bool = Field(False, description="learn the magnitude of each output apart (arXiv:2402.09353)")
    quantize: Literal["none", "nf4"] = Field(
        "none", description="nf4: the frozen weights in 4 bits (arXiv:2305.14314); needs bitsandbytes and a GPU"
    )

    def modules(self, *, experts: bool) -> tuple[Linear, ...]:
        """Names of the layers that get an adapter; with a mixture of experts only attention's can.

        Raises ValueError for others there.
        """
        if self.targets == "all-linear":
            return ATTENTION if experts else LINEARS
        if experts and (others := [name for name in self.targets if name not in ATTENTION]):
            raise ValueError(f"experts get no adapter: leave {', '.join(others)} out of adapter.targets")
        return tuple(dict.fromkeys(self.targets))

    @property
    def scale(self) -> float:
        """What `alpha` comes to: LoraConfig's lora_alpha."""
        return self.alpha or (4.0 if self.rslora else 2.0 * self.rank)


class ModelSpec(Strict):
    """Exactly one of: a preset from scratch, a config file from scratch, or pretrained weights."""

    from_pretrained: str | None = Field(None, description="hub id or folder with weights")
    revision: str | None = Field(None, description="hub revision of from_pretrained")
    preset: str | None = Field(None, description="a named shape, initialised at random: ernie-4.5-0.3b")
    config: str | None = Field(None, description="a transformers config.json, initialised at random")
    override: dict[str, Any] = Field({}, description="config values to change, e.g. {num_hidden_layers: 4}")
    adapter: AdapterSpec | None = Field(None, description="train a LoRA adapter, and leave the weights as they are")

    @field_validator("from_pretrained", "config")
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        return os.path.expanduser(os.path.expandvars(value)) if value else value

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        given = [name for name in ("from_pretrained", "preset", "config") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of from_pretrained, preset, config; got {' and '.join(given) or 'none'}"
            )
        if self.from_pretrained and self.override:
            raise ValueError("override changes the shape, which pretrained weights do not allow; use preset or config")
        if self.adapter and self.adapter.quantize != "none" and not self.from_pretrained:
            raise ValueError("adapter.quantize is for pretrained weights: use from_pretrained, or leave it out")
        return self

    @property
    def base(self) -> ModelSpec:
        """The model without its adapter."""
        return self.model_copy(update={"adapter": None})


class TrainTokenizerSpec(Strict):
    """A byte-level BPE tokenizer learnt from the job's own sources, for people without a network."""

    vocab_size: int = Field(ge=300, le=200_000, description="entries, special tokens included")


class TokenizerSpec(Strict):
    """`tokenizer: {train: {vocab_size: 8000}}`; a plain string is a hub id or a folder."""

    train: TrainTokenizerSpec


class OptimizerSpec(Strict):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), with ERNIE 4.5's published values as defaults."""

    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the first and second moment, each in [0, 1)")
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices only; norms and biases have none")


class ScheduleSpec(Strict):
    """Learning rate over the stages that share this schedule."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    peak: float = Field(gt=0, lt=10, description="highest learning rate")
    minimum: float = Field(0.0, ge=0, description="learning rate at the end")
    warmup: Span = Field(Quantity(0, Unit.TOKENS), description="'500M tokens', '2000 steps' or '1 %'")
    decay: Span | None = Field(None, description="length of wsd's decay: '3B tokens', '500 steps' or '10 %'")

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleSpec:
        if self.minimum > self.peak:
            raise ValueError(f"minimum {self.minimum:g} is above peak {self.peak:g}")
        if self.kind != "wsd" and self.decay is not None:
            raise ValueError(f"decay belongs to wsd; a {self.kind} schedule has none")
        if self.kind == "wsd" and self.decay is None and self.minimum:
            raise ValueError(f"minimum {self.minimum:g} is reached by wsd's decay: give decay, e.g. 10 %")
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if value is not None and value.unit is Unit.PERCENT and value.amount > 100:
                raise ValueError(f"{name} is more than 100 %")
        return self


class EngineSpec(Strict):
    """What runs the model. Batch size, precision and clipping come from here, never from the DeepSpeed file."""

    kind: Literal["deepspeed", "plain"] = Field("deepspeed", description="plain is single-device torch")
    ds_config: str = Field("zero2", description="zero0 to zero3, zero2_offload, zero3_offload, or a JSON file")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: bf16 on a GPU, fp32 without")
    micro_batch_size: int = Field(1, ge=1, description="sequences per rank and forward pass, at most")
    gradient_checkpointing: Literal["none", "full"] | int = Field(
        "none", description="none, full, or n to recompute every n-th layer"
    )
    mlp_tiles: int = Field(1, ge=1, description="parts in which a sequence goes through each MLP, each recomputed")
    compile: bool = Field(False, description="torch.compile of every layer: a slow first step, faster later ones")
    deterministic: bool = Field(
        False, description="only operations that give the same bits each time; slower attention on a GPU"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients above this norm are scaled down to it")
    memory: Literal["manual", "auto"] = Field(
        "manual", description="auto: recompute and offload as much as resources.device needs, and no more"
    )

    @model_validator(mode="after")
    def _possible(self) -> EngineSpec:
        if isinstance(self.gradient_checkpointing, int) and self.gradient_checkpointing < 1:
            raise ValueError("gradient_checkpointing must be none, full or a number of at least 1")
        if self.compile and self.mlp_tiles > 1:
            raise ValueError("compile takes a layer as a whole, mlp_tiles cuts it: leave one of them out")
        return self


class CheckpointSpec(Strict):
    every: Interval = Field(Quantity(500, Unit.STEPS), description="'1B tokens' or '500 steps'")
    keep_last: int = Field(3, ge=1, description="complete checkpoints kept")


ALL_SOURCES = "mean"
"""evaluate.best: the mean over all sources that have held-out documents, each counting the same"""


class EarlyStopSpec(Strict):
    """When a run ends before its time, because its held-out loss does not fall any more."""

    patience: int = Field(ge=1, description="evaluations in a row without a lower loss")
    min_delta: float = Field(0.0, ge=0, description="nats by which a loss must be lower to count as lower")


class EvaluateSpec(Strict):
    every: Interval | None = Field(None, description="besides the start and the stage ends: '2B tokens', '500 steps'")
    sequence_length: int | None = Field(None, ge=8, description="of held-out sequences; default: the longest stage's")
    max_tokens: Count = Field(1 << 20, description="held-out tokens per source")
    best: str | None = Field(
        None, description="a source, or mean: the checkpoint with its lowest held-out loss is kept, and exported"
    )
    early_stop: EarlyStopSpec | None = Field(None, description="end the run once the loss of `best` ceases to fall")

    @model_validator(mode="after")
    def _early_stop_has_a_measure(self) -> EvaluateSpec:
        if self.early_stop is not None and (self.best is None or self.every is None):
            raise ValueError("early_stop looks at evaluations of one loss: give best (a source, or mean) and every")
        return self


class WandbSpec(Strict):
    project: str
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = Field("offline", description="offline keeps the run in RUN_DIR/wandb")


class TrackSpec(Strict):
    wandb: WandbSpec | None = None
    tensorboard: bool = False
