"""The language-model head together with its loss: logits of a few rows at a time, never of all of them.

hidden [N, D], labels [N] --chunks of rows--> logits [C, V] --> losses, and where they are wanted gradients at once
What happens to a chunk's logits is a function of its own: torch's operators one by one, or compiled into one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

CHUNK_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""logits alive at once, by kind of device: enough rows for a matrix unit; never by what memory is free, since sums
depend on it in their last bits"""
SAME_SUMS = {"deterministic": True}
"""what torch.compile is told: no kernel is chosen by which of several was faster this time"""
_ROW_BY_ROW = {"split_reductions": False}
_IN_CACHE = 1 << 21
"""logits that a CPU goes through several times without fetching them from memory again"""


Chunk = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(logits [C, V], labels [C], scale [C] or None, gradients wanted) -> losses fp32 [C], gradients [C, V] in the logits'
dtype: softmax(logits) - one_hot(label), each row times its scale"""


class LossHead(nn.Linear):
    """A model's `lm_head`; given labels it returns losses in their place. Being a module's forward, ZeRO-3 gathers its
    weights for it."""

    _chunk: Chunk

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._chunk = _one_by_one

    def compile_loss(self) -> None:
        """The logits of a chunk are read twice and their gradients written once, in the precision of the weights.

        One kernel for any number of rows, and each row summed by one thread block: whatever came before, after a resume
        too, a row has the same sums.
        """
        self._chunk = torch.compile(_as_one, fullgraph=True, dynamic=True, options={**SAME_SUMS, **_ROW_BY_ROW})

    def forward(self, hidden: torch.Tensor, labels_N: torch.Tensor | None = None, *, each: bool = False) -> Any:
        """Logits; with labels the sum of -log p(label), fp32, in nats; with `each` one for every row, fp32 [N].

        hidden is [N, D] where labels are given. Gradients of the sum are made on the way, while the logits are there;
        for those of each loss a chunk's logits are made once more.
        """
        if labels_N is None:
            return super().forward(hidden)
        if torch.is_autocast_enabled(hidden.device.type):  # once, not for every chunk
            dtype = torch.get_autocast_dtype(hidden.device.type)
            weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
            hidden = hidden.to(dtype)
        else:
            weight, bias = self.weight, self.bias
        with torch.autocast(hidden.device.type, enabled=False):
            if each:
                return _Each.apply(hidden, weight, bias, labels_N, self._chunk)
            return _Summed.apply(hidden, weight, bias, labels_N, self._chunk, torch.is_grad_enabled())


def with_loss_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its head replaced by a LossHead of the same weights."""
    old = model.get_output_embeddings()
    head = LossHead(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    head.weight, head.bias = old.weight, old.bias
    model.set_output_embeddings(head.train(old.training))
    return model


class _Summed(torch.autograd.Function):
    """The gradients, of a sum and so known but for one factor, wait for the backward in place of [N, V] logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        chunk: Chunk,
        training: bool,
    ) -> torch.Tensor:
        inputs = (hidden_ND, weight_VD, bias_V)
        gradients = _Gradients(*inputs, [training and needed for needed in ctx.needs_input_grad[:3]])
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for rows in _chunks(hidden_ND, weight_VD):
            losses_C, d_logits_CV = chunk(_logits(*inputs, rows), labels_N[rows], None, gradients.wanted)
            total += losses_C.sum()
            gradients.add(rows, d_logits_CV)
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        found = ctx.gradients.times(scale)
        ctx.gradients = None
        return (*found, None, None, None)


class _Each(torch.autograd.Function):
    """What a loss will count is not known while its logits are there: they are made once more in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        chunk: Chunk,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N)
        ctx.chunk = chunk
        losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        for rows in _chunks(hidden_ND, weight_VD):
            losses_N[rows], _ = chunk(_logits(hidden_ND, weight_VD, bias_V, rows), labels_N[rows], None, False)
        return losses_N

    @staticmethod
    def backward(ctx: Any, scale_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        *inputs, labels_N = ctx.saved_tensors
        gradients = _Gradients(*inputs, ctx.needs_input_grad[:3])
        for rows in _chunks(*inputs[:2]):
            _, d_logits_CV = ctx.chunk(_logits(*inputs, rows), labels_N[rows], scale_N[rows], True)
            gradients.add(rows, d_logits_CV)
        return (*gradients.times(None), None, None)


class _Gradients:
    """Of head and hidden states, chunk by chunk; those of the weights add up in fp32."""

    def __init__(
        self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, wanted: Sequence[bool]
    ) -> None:
        self.wanted = any(wanted)
        self._hidden_ND, self._weight_VD = hidden_ND, weight_VD
        self._d_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        self._d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
        self._d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] and bias_V is not None else None

    def add(self, rows: slice, d_logits_CV: torch.Tensor) -> None:
        """Of these rows, whose logits have this gradient."""
        hidden_CD = self._hidden_ND[rows]
        if self._d_hidden_ND is not None:
            torch.mm(d_logits_CV, self._weight_VD, out=self._d_hidden_ND[rows])
        if self._d_bias_V is not None:
            self._d_bias_V += d_logits_CV.sum(0, dtype=torch.float32)
        if self._d_weight_VD is not None and d_logits_CV.dtype == torch.float32:
            self._d_weight_VD.addmm_(d_logits_CV.t(), hidden_CD)
        elif self._d_weight_VD is not None:
            self._d_weight_VD += d_logits_CV.t() @ hidden_CD

    def times(self, scale: torch.Tensor | None) -> list[torch.Tensor | None]:
        """All of them, in the dtype of the weights."""
        found = (self._d_hidden_ND, self._d_weight_VD, self._d_bias_V)
        scaled = (one if one is None or scale is None else one.mul_(scale) for one in found)
        return [None if one is None else one.to(self._weight_VD.dtype) for one in scaled]


def _logits(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, rows: slice) -> torch.Tensor:
    return linear(hidden_ND[rows], weight_VD, bias_V)


def _one_by_one(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, scale_C: torch.Tensor | None, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """In the logits' own memory where they are fp32."""
    wide_CV, losses = logits_CV.float(), []
    on_cpu = logits_CV.device.type == "cpu"
    at_once = max(1, _IN_CACHE // logits_CV.shape[1]) if on_cpu else max(1, len(logits_CV))
    for first in range(0, len(logits_CV), at_once):
        part_PV, labels_P1 = wide_CV[first : first + at_once], labels_C[first : first + at_once, None]
        normalisers_P1 = part_PV.logsumexp(dim=1, keepdim=True)
        losses.append((normalisers_P1 - part_PV.gather(1, labels_P1))[:, 0])
        if gradients:
            part_PV.sub_(normalisers_P1).exp_()
            part_PV.scatter_add_(1, labels_P1, part_PV.new_full(labels_P1.shape, -1.0))
            if scale_C is not None:
                part_PV.mul_(scale_C[first : first + at_once, None])
    return torch.cat(losses), wide_CV.to(logits_CV.dtype) if gradients else logits_CV


def _as_one(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, scale_C: torch.Tensor | None, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a compiler, which keeps what is fp32 out of memory: no step in place, no scatter."""
    wide_CV, labels_C1 = logits_CV.float(), labels_C[:, None]
    normalisers_C1 = wide_CV.logsumexp(dim=1, keepdim=True)
    losses_C = (normalisers_C1 - wide_CV.gather(1, labels_C1))[:, 0]
    if not gradients:
        return losses_C, logits_CV
    at_label_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == labels_C1
    d_logits_CV = (wide_CV - normalisers_C1).exp() - at_label_CV.float()
    if scale_C is not None:
        d_logits_CV = d_logits_CV * scale_C[:, None]
    return losses_C, d_logits_CV.to(logits_CV.dtype)


def _chunks(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS[hidden_ND.device.type] // len(weight_VD))
    return (slice(start, start + size) for start in range(0, len(hidden_ND), size))
