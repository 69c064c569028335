"""The language-model head together with its loss: logits of a few rows at a time, never of all of them.

hidden [N, D], labels [N] --chunks of rows--> logits [C, V] --> losses, and where they are wanted gradients at once
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
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
                return _each(hidden, weight, bias, labels_N)
            return _Summed.apply(hidden, weight, bias, labels_N, torch.is_grad_enabled())


def with_loss_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its head replaced by a LossHead of the same weights."""
    old = model.get_output_embeddings()
    head = LossHead(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    head.weight, head.bias = old.weight, old.bias
    model.set_output_embeddings(head.train(old.training))
    return model


class _Summed(torch.autograd.Function):
    """The gradients, of a sum and so known but for one factor, wait for the backward in place of [N, V] logits.
    Those of the weights add up in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        training: bool,
    ) -> torch.Tensor:
        wanted = [training and needed for needed in ctx.needs_input_grad[:3]]
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        d_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
        d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] and bias_V is not None else None
        for rows in _chunks(hidden_ND, weight_VD):
            logits_CV = linear(hidden_ND[rows], weight_VD, bias_V).float()
            total += _losses_and_gradients(logits_CV, labels_N[rows]).sum()
            gradient_CV = logits_CV.to(weight_VD.dtype)
            if d_hidden_ND is not None:
                torch.mm(gradient_CV, weight_VD, out=d_hidden_ND[rows])
            if d_bias_V is not None:
                d_bias_V += logits_CV.sum(0)
            if d_weight_VD is not None and gradient_CV is logits_CV:
                d_weight_VD.addmm_(gradient_CV.t(), hidden_ND[rows])
            elif d_weight_VD is not None:
                d_weight_VD += gradient_CV.t() @ hidden_ND[rows]
        ctx.gradients = [d_hidden_ND, d_weight_VD, d_bias_V]
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        scaled = [None if one is None else one.mul_(scale).to(ctx.dtype) for one in ctx.gradients]
        ctx.gradients = None
        return (*scaled, None, None)


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


def _each(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor
) -> torch.Tensor:
    def losses(hidden_CD: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
        return cross_entropy(linear(hidden_CD, weight_VD, bias_V).float(), labels_C, reduction="none")

    found = [
        checkpoint(losses, hidden_ND[rows], labels_N[rows], use_reentrant=False, preserve_rng_state=False)
        for rows in _chunks(hidden_ND, weight_VD)
    ]
    # Without a row there is still a graph: under ZeRO every rank has to reach every weight.
    return torch.cat(found) if found else linear(hidden_ND, weight_VD, bias_V).float().sum(1)


def _chunks(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS[hidden_ND.device.type] // len(weight_VD))
    return (slice(start, start + size) for start in range(0, len(hidden_ND), size))
