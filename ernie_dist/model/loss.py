"""Cross entropy of packed sequences; only positions with a label go through the language-model head."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ernie_dist.batch import IGNORED, MicroBatch
from ernie_dist.model.attention import documents_of


def summed_loss(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Sum over labelled positions of -log p(label), fp32, in nats; where there are none, a zero that has gradients."""
    rows, length = batch.tokens_BT.shape
    dtype = next(model.parameters()).dtype
    hidden_BTD = model.model(
        input_ids=batch.tokens_BT,
        position_ids=batch.positions_BT,
        use_cache=False,
        documents=documents_of(batch.document_ends, batch.longest, rows, length, dtype),
    ).last_hidden_state
    labelled = batch.labels_BT != IGNORED
    logits_NV = model.lm_head(hidden_BTD[labelled])
    return cross_entropy(logits_NV.float(), batch.labels_BT[labelled], reduction="sum")
