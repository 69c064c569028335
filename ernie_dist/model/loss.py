"""The loss of packed sequences; only positions with a label go through the language-model head.

labelled positions --cross entropy--> losses [N] --sum--> next-token loss
                                                 --sum per document--> log p(answer) --pairs--> preference loss
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import logsigmoid, pad

from ernie_dist.batch import IGNORED, MicroBatch, Pairs
from ernie_dist.model.attention import documents_of

_AT_ONCE = 1 << 21
"""logits worked on in one go: few enough to stay in a processor's cache"""


def summed_loss(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Sum over labelled positions of -log p(label), fp32, in nats; where there are none, a zero that has gradients.

    Of a batch of pairs three sums over pairs, [3]: the loss; how many prefer the chosen answer; their margins.
    """
    if batch.pairs is None:
        return _losses(model, batch).sum()
    return _preference_loss(answer_log_probabilities(model, batch), batch.pairs)


def answer_log_probabilities(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """log p of the labelled positions of each document together, fp32 [documents], in nats."""
    before = pad((batch.labels_BT.flatten() != IGNORED).cumsum(0), (1, 0))
    lengths = before[batch.document_ends.long()].diff()
    # In the order of the positions, on every device: index_add sums as its threads happen to come.
    return -torch.segment_reduce(_losses(model, batch), "sum", lengths=lengths, unsafe=True)


def _preference_loss(log_probabilities: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Sums of -log sigmoid(margin), of positive margins, and of margins: beta x how much further apart the model puts
    the two answers than the reference does (Rafailov et al. 2023, arXiv:2305.18290, equation 7)."""
    assert pairs.reference_P is not None
    ratio_P = log_probabilities[pairs.chosen_P] - log_probabilities[pairs.chosen_P + 1]
    margin_P = pairs.beta * (ratio_P - pairs.reference_P)
    return torch.stack([-logsigmoid(margin_P).sum(), (margin_P.detach() > 0).sum(), margin_P.detach().sum()])


def _losses(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """-log p(label) of every labelled position, fp32 [N], in nats."""
    rows, length = batch.tokens_BT.shape
    dtype = next(model.parameters()).dtype
    if batch.chance:
        torch.manual_seed(batch.chance.seeds[0])  # dropout draws from it
    hidden_BTD = model.model(
        **_inputs(model, batch),
        position_ids=batch.positions_BT,
        use_cache=False,
        documents=documents_of(batch.document_ends, batch.longest, rows, length, dtype),
    ).last_hidden_state
    labelled = batch.labels_BT != IGNORED
    logits_NV = model.lm_head(hidden_BTD[labelled])
    return _CrossEntropy.apply(logits_NV.float(), batch.labels_BT[labelled])


def _inputs(model: nn.Module, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Tokens; or with NEFTune (Jain et al. 2023, arXiv:2310.05914) their embeddings, with uniform noise of at most
    alpha / sqrt(L D), L the length of the document a position is in, D the width of the model."""
    if batch.chance is None or not batch.chance.neftune_alpha:
        return {"input_ids": batch.tokens_BT}
    embedded_BTD = model.get_input_embeddings()(batch.tokens_BT)
    rows, length, width = embedded_BTD.shape
    device = embedded_BTD.device
    noise_BTD = torch.empty(rows, length, width, device=device)
    for noise_TD, seed in zip(noise_BTD, batch.chance.seeds, strict=True):
        noise_TD.uniform_(-1, 1, generator=torch.Generator(device).manual_seed(seed))
    lengths = batch.document_ends.diff()
    lengths_BT = lengths.repeat_interleave(lengths, output_size=rows * length).view(rows, length)
    noise_BTD *= batch.chance.neftune_alpha / (lengths_BT * width).sqrt()[..., None]
    return {"inputs_embeds": embedded_BTD + noise_BTD.to(embedded_BTD.dtype)}


class _CrossEntropy(torch.autograd.Function):
    """logsumexp(logits) - logits[label] of each row. The gradient is made in the logits' own memory:
    with a vocabulary of 100,000 every further [N, V] tensor costs more than the layers below."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        normalisers_N = torch.cat([part.logsumexp(dim=1) for part in logits_NV.split(_rows_at_once(logits_NV))])
        ctx.save_for_backward(logits_NV, labels_N, normalisers_N)
        return normalisers_N - logits_NV.gather(1, labels_N[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, scale_N: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        logits_NV, labels_N, normalisers_N = ctx.saved_tensors
        rows = _rows_at_once(logits_NV)
        parts = (logits_NV.split(rows), normalisers_N.split(rows), scale_N.split(rows))
        for part, normalisers, scale in zip(*parts, strict=True):
            part.sub_(normalisers[:, None]).exp_().mul_(scale[:, None])
        gradient_NV = logits_NV.scatter_add_(1, labels_N[:, None], -scale_N[:, None])
        return gradient_NV, None


def _rows_at_once(logits_NV: torch.Tensor) -> int:
    return max(1, _AT_ONCE // logits_NV.shape[1])
