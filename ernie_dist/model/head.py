"""The language-model head together with its loss: logits of a few rows at a time, never of all of them.

hidden [N, D], labels [N] --chunks of rows--> logits [C, V] --> losses, and where they are wanted gradients at once
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

CHUNK_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""logits alive at once, by kind of device: enough rows for a matrix unit; never by what memory is free, since sums
depend on it in their last bits"""
_IN_CACHE = 1 << 21
"""logits that a CPU goes through several times without fetching them from memory again"""


class LossHead(nn.Linear):
    """A model's `lm_head`; given labels it returns losses in their place. Being a module's forward, ZeRO-3 gathers its
    weights for it."""

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
                return _Each.apply(hidden, weight, bias, labels_N)
            return _Summed.apply(hidden, weight, bias, labels_N, torch.is_grad_enabled())


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
        training: bool,
    ) -> torch.Tensor:
        inputs = (hidden_ND, weight_VD, bias_V)
        gradients = _Gradients(*inputs, [training and needed for needed in ctx.needs_input_grad[:3]])
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for rows in _chunks(hidden_ND, weight_VD):
            logits_CV = _logits(*inputs, rows)
            total += _losses_and_gradients(logits_CV, labels_N[rows]).sum()
            gradients.add(rows, logits_CV)
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        found = ctx.gradients.times(scale)
        ctx.gradients = None
        return (*found, None, None)


class _Each(torch.autograd.Function):
    """What a loss will count is not known while its logits are there: they are made once more in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N)
        losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        for rows in _chunks(hidden_ND, weight_VD):
            losses_N[rows] = _losses_and_gradients(_logits(hidden_ND, weight_VD, bias_V, rows), labels_N[rows])
        return losses_N

    @staticmethod
    def backward(ctx: Any, scale_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        *inputs, labels_N = ctx.saved_tensors
        gradients = _Gradients(*inputs, ctx.needs_input_grad[:3])
        for rows in _chunks(*inputs[:2]):
            logits_CV = _logits(*inputs, rows)
            _losses_and_gradients(logits_CV, labels_N[rows])
            gradients.add(rows, logits_CV.mul_(scale_N[rows, None]))
        return (*gradients.times(None), None)


class _Gradients:
    """Of head and hidden states, chunk by chunk; those of the weights add up in fp32."""

    def __init__(
        self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, wanted: Sequence[bool]
    ) -> None:
        self._hidden_ND, self._weight_VD = hidden_ND, weight_VD
        self._d_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        self._d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
        self._d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] and bias_V is not None else None

    def add(self, rows: slice, d_logits_CV: torch.Tensor) -> None:
        """Of these rows, whose logits have this gradient, in fp32."""
        hidden_CD, weight_VD, narrow_CV = self._hidden_ND[rows], self._weight_VD, d_logits_CV.to(self._weight_VD.dtype)
        if self._d_hidden_ND is not None:
            torch.mm(narrow_CV, weight_VD, out=self._d_hidden_ND[rows])
        if self._d_bias_V is not None:
            self._d_bias_V += d_logits_CV.sum(0)
        if self._d_weight_VD is not None and narrow_CV is d_logits_CV:
            self._d_weight_VD.addmm_(narrow_CV.t(), hidden_CD)
        elif self._d_weight_VD is not None:
            self._d_weight_VD += narrow_CV.t() @ hidden_CD

    def times(self, scale: torch.Tensor | None) -> list[torch.Tensor | None]:
        """All of them, in the dtype of the weights."""
        found = (self._d_hidden_ND, self._d_weight_VD, self._d_bias_V)
        scaled = (one if one is None or scale is None else one.mul_(scale) for one in found)
        return [None if one is None else one.to(self._weight_VD.dtype) for one in scaled]


def _logits(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, rows: slice) -> torch.Tensor:
    """fp32 [C, V]."""
    return linear(hidden_ND[rows], weight_VD, bias_V).float()


def _losses_and_gradients(logits_CV: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
    """logsumexp(logits) - logits[label] of each row, [C]; the logits are overwritten by its gradient,
    softmax(logits) - one_hot(label)."""
    losses = []
    at_once = max(1, _IN_CACHE // logits_CV.shape[1]) if logits_CV.device.type == "cpu" else len(logits_CV)
    for part_PV, labels_P in zip(logits_CV.split(at_once), labels_C[:, None].split(at_once), strict=True):
        normalisers_P1 = part_PV.logsumexp(dim=1, keepdim=True)
        losses.append((normalisers_P1 - part_PV.gather(1, labels_P))[:, 0])
        part_PV.sub_(normalisers_P1).exp_()
        part_PV.scatter_add_(1, labels_P, part_PV.new_full(labels_P.shape, -1.0))
    return torch.cat(losses)


def _chunks(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS[hidden_ND.device.type] // len(weight_VD))
    return (slice(start, start + size) for start in range(0, len(hidden_ND), size))
