"""The loss of packed sequences; only positions with a label go through the language-model head.

labelled positions --head--> sum of -log p(label): next-token loss
                   --head--> losses [N] --sum per document--> log p(answer) --pairs--> preference loss
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import logsigmoid, pad

from ernie_dist.batch import IGNORED, MicroBatch, Pairs
from ernie_dist.model.attention import documents_of


def summed_loss(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Sum over labelled positions of -log p(label), fp32, in nats; where there are none, a zero that has gradients.

    Of a batch of pairs three sums over pairs, [3]: the loss; how many prefer the chosen answer; their margins.
    """
    if batch.pairs is None:
        return model.lm_head(*_labelled(model, batch))
    return _preference_loss(answer_log_probabilities(model, batch), _label_counts(batch), batch.pairs)


def answer_log_probabilities(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """log p of the labelled positions of each document together, fp32 [documents], in nats."""
    losses_N = model.lm_head(*_labelled(model, batch), each=True)
    # In the order of the positions, on every device: index_add sums as its threads happen to come.
    return -torch.segment_reduce(losses_N, "sum", lengths=_label_counts(batch), unsafe=True)


def _label_counts(batch: MicroBatch) -> torch.Tensor:
    """Labelled positions of each document, int64 [documents]."""
    before = pad((batch.labels_BT.flatten() != IGNORED).cumsum(0), (1, 0))
    return before[batch.document_ends.long()].diff()


def _preference_loss(log_probabilities: torch.Tensor, label_counts: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Sums of the loss, of positive margins, and of margins: beta x how much further apart the model puts the two
    answers than the reference does. The loss of a pair is -log sigmoid(margin) (Rafailov et al. 2023, arXiv:2305.18290,
    equation 7) and sft_weight x the chosen answer's mean loss per token (Pang et al. 2024, arXiv:2404.19733)."""
    assert pairs.reference_P is not None
    ratio_P = log_probabilities[pairs.chosen_P] - log_probabilities[pairs.chosen_P + 1]
    margin_P = pairs.beta * (ratio_P - pairs.reference_P)
    loss_P = -logsigmoid(margin_P)
    if pairs.sft_weight:
        loss_P = loss_P - pairs.sft_weight * log_probabilities[pairs.chosen_P] / label_counts[pairs.chosen_P].clamp(
            min=1
        )
    return torch.stack([loss_P.sum(), (margin_P.detach() > 0).sum(), margin_P.detach().sum()])


def _labelled(model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [N, D] and labels [N] of the labelled positions, in their order."""
    rows, length = batch.tokens_BT.shape
    kind = batch.tokens_BT.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(model.parameters()).dtype
    if batch.chance:
        torch.manual_seed(batch.chance.seeds[0])  # dropout draws from it
    hidden_BTD = model.model(
        **_inputs(model, batch),
        position_ids=batch.positions_BT,
        use_cache=False,
        documents=documents_of(batch.document_ends, batch.longest, rows, length, dtype),
    ).last_hidden_state
    # By index: a mask would make the host wait until the device has counted it.
    labels_N = batch.labels_BT.flatten().index_select(0, batch.labelled_N)
    return hidden_BTD.flatten(0, 1).index_select(0, batch.labelled_N), labels_N


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
