"""What `throughput` holds side by side: training loops over the same rows, each in a process of its own.

parent --[warm-up steps, steps]--> Pace --lets the loop run so far--> seconds, losses, peak memory --> parent
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from typing import IO, TYPE_CHECKING, Any

from benchmarks.harness import peak_resident_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from ernie_dist.batch import Row

RATE = 1e-4
POOL = 8
"""different batches, which a loop goes through again and again"""
NO_LABEL = -100


@dataclass(frozen=True)
class Case:
    """One model on rows of one length: what all sides have in common."""

    device: str
    precision: str
    model: dict[str, Any]
    """of a job: preset, override"""
    vocabulary: int
    zero: str
    sequence_length: int
    micro_batch: int
    """rows in a step"""
    mean_document: int
    """tokens, geometrically distributed; 0: every row is one document"""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        return cls(**json.loads(text))


# ------------------------------------------------------------------------------------------------------------- the rows


def document_lengths(case: Case) -> Iterator[int]:
    """The same endless sequence on every side."""
    import numpy as np

    chance, length = np.random.default_rng(17), case.sequence_length
    while True:
        yield length if not case.mean_document else int(min(length, max(8, chance.geometric(1 / case.mean_document))))


def packed_lengths(case: Case) -> list[list[int]]:
    """Documents of each row in the pool; the last of a row is cut so that no position is left."""
    lengths, rows = document_lengths(case), []
    for _ in range(POOL * case.micro_batch):
        row: list[int] = []
        while (left := case.sequence_length - sum(row)) > 0:
            row.append(min(left, next(lengths)))
        rows.append(row)
    return rows


def padded_lengths(case: Case) -> list[int]:
    """The document of each row in the pool."""
    lengths = document_lengths(case)
    return [next(lengths) for _ in range(POOL * case.micro_batch)]


def _tokens(case: Case, chance: np.random.Generator, size: int) -> np.ndarray:
    """Numbers with frequencies like words' (1 / rank): there is something to learn, so that losses fall."""
    import numpy as np

    return np.minimum(case.vocabulary ** chance.random(size), case.vocabulary - 1).astype(np.int64)


def _packed_rows(case: Case) -> list[Row]:
    import numpy as np

    from ernie_dist.batch import IGNORED, Row

    chance, rows = np.random.default_rng(18), []
    for lengths in packed_lengths(case):
        tokens = _tokens(case, chance, case.sequence_length)
        labels = np.roll(tokens, -1)
        labels[np.cumsum(lengths) - 1] = IGNORED
        positions = np.concatenate([np.arange(length) for length in lengths])
        rows.append(Row(tokens, labels, positions, np.array(lengths)))
    return rows


def _for_transformers(case: Case) -> list[dict[str, np.ndarray]]:
    """The packed rows as its models take them: they shift the labels, and find documents by positions that restart.
    Rows of one document go without positions, which lets them take attention's quickest path."""
    import numpy as np

    rows = []
    for row in _packed_rows(case):
        labels = np.roll(row.labels, 1)
        labels[0] = NO_LABEL
        given = {"input_ids": row.tokens, "labels": labels}
        rows.append(given if not case.mean_document else {**given, "position_ids": row.positions})
    return rows


def _padded_rows(case: Case) -> list[dict[str, np.ndarray]]:
    import numpy as np

    chance, rows = np.random.default_rng(18), []
    for length in padded_lengths(case):
        tokens = _tokens(case, chance, length)
        row = {"input_ids": np.zeros, "labels": partial(np.full, fill_value=NO_LABEL), "attention_mask": np.zeros}
        made = {name: make(case.sequence_length, dtype=np.int64) for name, make in row.items()}
        made["input_ids"][:length], made["labels"][:length], made["attention_mask"][:length] = tokens, tokens, 1
        rows.append(made)
    return rows


# ------------------------------------------------------------------------------------------------------------- the pace


class Pace:
    """Lets a loop run in turns: the loop calls `after_step`, which returns when the next step is wanted."""

    def __init__(self, device: str, answers: IO[str]) -> None:
        self._on_gpu, self._answers = device == "cuda", answers
        self._warm_up = self._left = 0
        self._began = 0.0
        self._losses: list[Any] = []

    def begin(self) -> None:
        """Everything is built: waits for the first turn."""
        self._answer({"ready": True, "device": self._device()})

    def after_step(self, loss: float | torch.Tensor) -> None:
        self._losses.append(loss)
        if self._warm_up:
            self._warm_up -= 1
            if not self._warm_up:
                self._began = self._now()
            return
        self._left -= 1
        if self._left:
            return
        seconds = self._now() - self._began
        losses = [float(one) for one in self._losses]
        self._answer({"seconds": seconds, "losses": losses, "peak_bytes": self._peak()})

    def _answer(self, found: dict[str, Any]) -> None:
        """Tells the parent, and waits until it wants more; ends the process when it wants nothing."""
        if self._on_gpu:  # the next side finds the GPU's memory free
            import torch

            torch.cuda.empty_cache()
        print(json.dumps(found), file=self._answers, flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            os._exit(0)  # out of the middle of somebody's training loop
        self._warm_up, self._left = json.loads(line)
        self._losses.clear()
        if not self._warm_up:
            self._began = self._now()

    def _now(self) -> float:
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak(self) -> int:
        if self._on_gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        return peak_resident_bytes()

    def _device(self) -> str:
        if self._on_gpu:
            import torch

            return torch.cuda.get_device_name()
        return "cpu"


# ------------------------------------------------------------------------------------------------------------ the sides


def ours(case: Case, pace: Pace, kind: str, *, compiled: bool = False) -> None:
    """An engine's step, as the training loop calls it."""
    import numpy as np

    from ernie_dist.batch import Batch, stack
    from ernie_dist.engine.select import build_engine
    from ernie_dist.model.build import build_model
    from ernie_dist.model.loss import summed_loss
    from ernie_dist.spec.training import EngineSpec, ModelSpec, OptimizerSpec
    from ernie_dist.world import World

    world, rows, size = World(), _packed_rows(case), case.micro_batch
    world.connect()
    spec = EngineSpec(kind=kind, ds_config=case.zero, precision=case.precision, micro_batch_size=size)
    build = partial(build_model, ModelSpec(**case.model), case.vocabulary, 0, compiled=compiled)
    engine = build_engine(spec, OptimizerSpec(), [], build, summed_loss, world)
    micros = [stack(rows[first : first + size]) for first in range(0, len(rows), size)]
    if case.device == "cuda":  # as the loader's thread does
        micros = [micro.pinned_for(world.device) for micro in micros]
    ids, tokens = np.zeros((size, 2), np.int64), size * case.sequence_length
    pace.begin()
    for index in count():
        batch = Batch(index, "only", (micros[index % POOL],), ids, tokens)
        pace.after_step(engine.step(batch, RATE).loss)


def bare(case: Case, pace: Pace) -> None:
    """What one writes with torch and a transformers model alone: logits of all positions, cross entropy, AdamW."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    model = _transformers_model(case).to(case.device).train()
    optimizer = torch.optim.AdamW(_groups(model), lr=RATE, betas=_adamw().betas, eps=_adamw().eps, fused=True)
    rows, size = _for_transformers(case), case.micro_batch
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    batches = [{name: torch.from_numpy(np.stack([row[name] for row in part])) for name in part[0]} for part in parts]
    if case.device == "cuda":
        batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
    half = torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16")
    pace.begin()
    for index in count():
        batch = {name: one.to(case.device, non_blocking=True) for name, one in batches[index % POOL].items()}
        labels = batch.pop("labels")[:, 1:]
        with half:
            logits = model(**batch, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pace.after_step(loss.detach())


def trainer(case: Case, pace: Pace, *, padded: bool, deepspeed: bool) -> None:
    """transformers.Trainer, its settings as close to ours as they go."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = _padded_rows(case) if padded else _for_transformers(case)

    class Rows:
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return rows[index % len(rows)]

    class InOrder(Trainer):
        loss: Any = None

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *given: Any, **named: Any) -> Any:
            self.loss = super().training_step(*given, **named)
            return self.loss

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pace.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace.after_step(trained.loss)

    arguments = TrainingArguments(
        output_dir=os.path.join(os.getcwd(), "trainer"),
        per_device_train_batch_size=case.micro_batch,
        max_steps=10**8,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=_adamw().weight_decay,
        adam_beta1=_adamw().betas[0],
        adam_beta2=_adamw().betas[1],
        adam_epsilon=_adamw().eps,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        bf16=case.precision == "bf16",
        use_cpu=case.device == "cpu",
        dataloader_pin_memory=case.device == "cuda",
        deepspeed=_deepspeed_settings(case) if deepspeed else None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = _transformers_model(case)
    model.config.use_cache = False
    trained = InOrder(model=model, args=arguments, train_dataset=Rows(), callbacks=[Turns()])
    trained.train()


def _deepspeed_settings(case: Case) -> dict[str, Any]:
    """The same file as ours; what the Trainer knows it fills in itself."""
    from ernie_dist.spec.ds_config import read_ds_config

    settings = {
        **read_ds_config(case.zero),
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
    }
    if case.precision == "bf16" and settings.get("zero_optimization", {}).get("stage", 0) > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}  # as ours
    return settings


def _transformers_model(case: Case) -> PreTrainedModel:
    """The same weights, with the attention that transformers takes by itself."""
    from ernie_dist.model.build import build_model
    from ernie_dist.spec.training import ModelSpec

    return build_model(ModelSpec(**case.model), case.vocabulary, 0, attn_implementation="sdpa")


def _adamw() -> Any:
    from ernie_dist.spec.training import OptimizerSpec

    return OptimizerSpec()


def _groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    matrices, others = ([one for one in model.parameters() if (one.ndim >= 2) == wanted] for wanted in (True, False))
    return [{"params": matrices, "weight_decay": _adamw().weight_decay}, {"params": others, "weight_decay": 0.0}]


@dataclass(frozen=True)
class Side:
    """A way to train. `run` never returns: its process ends when the parent wants no more turns."""

    what: str
    run: Callable[[Case, Pace], None]
    padded: bool = False
    deepspeed: bool = False


SIDES = {
    "ours": Side("our engine on DeepSpeed, packed rows", partial(ours, kind="deepspeed"), deepspeed=True),
    "compiled": Side("the same with engine.compile", partial(ours, kind="deepspeed", compiled=True), deepspeed=True),
    "bf16": Side(
        "the same in bf16", lambda case, pace: ours(replace(case, precision="bf16"), pace, "deepspeed"), deepspeed=True
    ),
    "plain": Side("our plain engine, packed rows: what losses are held to", partial(ours, kind="plain")),
    "trainer": Side(
        "transformers.Trainer, a document a row, padded", partial(trainer, padded=True, deepspeed=False), padded=True
    ),
    "trainer-packed": Side(
        "transformers.Trainer, packed rows with positions that restart", partial(trainer, padded=False, deepspeed=False)
    ),
    "trainer-deepspeed": Side(
        "the same with DeepSpeed, the same ZeRO file as ours",
        partial(trainer, padded=False, deepspeed=True),
        deepspeed=True,
    ),
    "bare": Side("a bare torch loop, packed rows, logits of all positions", bare),
}


def run_side(name: str, case: Case) -> None:
    """In a process of its own: answers on what was its standard output, and says everything else elsewhere."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    side = SIDES[name]
    if side.deepspeed and case.device == "cpu":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for nothing
    try:
        side.run(case, Pace(case.device, answers))
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}), file=answers)
        raise
