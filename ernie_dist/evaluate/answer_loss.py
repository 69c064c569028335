"""What a model thinks of given answers, without generating: -log p of their tokens, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy, pad

from ernie_dist.batch import IGNORED
from ernie_dist.evaluate.questions import Rendered
from ernie_dist.inference import ChatModel

_LOGITS = 1 << 26
"""made at a time: 256 MiB in fp32"""
_OURS = ("ernie4_5", "ernie4_5_moe")
"""models whose logits are lm_head(hidden), and nothing more"""


@torch.no_grad()
def answer_losses(chat: ChatModel, rows: Sequence[Rendered]) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss (float64 [rows], nats, teacher-forced) and labelled tokens (int64 [rows]), as training counts them.

    Rows are padded on the right, where causal attention does not look.
    """
    device = chat.model.device
    longest = max(len(row.ids) for row in rows)

    def padded(part: Sequence[np.ndarray], value: int) -> torch.Tensor:
        cut = [torch.from_numpy(np.asarray(ids, np.int64)) for ids in part]
        return torch.stack([pad(ids, (0, longest - len(ids)), value=value) for ids in cut]).to(device)

    ids_BT = padded([row.ids for row in rows], 0)
    labels_BT = padded([row.labels for row in rows], IGNORED)
    mask_BT = padded([np.ones(len(row.ids), np.int64) for row in rows], 0)
    losses_BT = losses_of(chat, ids_BT, labels_BT, attention_mask=mask_BT)
    return losses_BT.sum(1).cpu().numpy(), (labels_BT != IGNORED).sum(1).cpu().numpy()


def losses_of(chat: ChatModel, ids_BT: torch.Tensor, labels_BT: torch.Tensor, **inputs: object) -> torch.Tensor:
    """-log p(label) of every position, float64 [B, T], 0 where there is no label."""
    model = causal_model(chat)
    given = {"input_ids": ids_BT, "use_cache": "past_key_values" in inputs, **inputs}
    labelled = labels_BT != IGNORED
    labels_N = labels_BT[labelled]
    if model.config.model_type in _OURS:
        head, found_ND = model.lm_head, model.model(**given).last_hidden_state[labelled]
    else:  # others scale or cap their logits
        head, found_ND = torch.nn.Identity(), model(**given).logits[labelled]
    at_once = max(1, _LOGITS // model.config.get_text_config().vocab_size)
    parts = zip(found_ND.split(at_once), labels_N.split(at_once), strict=True)
    found = [cross_entropy(head(part).float(), labels, reduction="none") for part, labels in parts]
    losses_BT = torch.zeros(labels_BT.shape, dtype=torch.float64, device=labels_BT.device)
    losses_BT[labelled] = torch.cat(found).double()
    return losses_BT


@torch.no_grad()
def label_scores(chat: ChatModel, asked: Sequence[Rendered]) -> np.ndarray:
    """log p of each of the answers `asked` holds to one question, float64 [answers], in nats.

    It is the probability of exactly this answer, its stop token included, so that a label that begins another one has
    no advantage; it is not divided by the length. The question is read once, for all answers.
    """
    prompt = asked[0].prompt
    device, size = chat.model.device, len(prompt)
    # The last token of the prompt predicts the first of the answer: it is read with each answer.
    begun = causal_model(chat)(torch.from_numpy(prompt[None, :-1]).to(device), use_cache=True, logits_to_keep=1)
    cache = begun.past_key_values
    cache.batch_repeat_interleave(len(asked))
    longest = max(len(row.ids) for row in asked) - size + 1

    def padded(part: Sequence[np.ndarray], value: int) -> torch.Tensor:
        cut = [torch.from_numpy(ids[size - 1 :]) for ids in part]
        return torch.stack([pad(ids, (0, longest - len(ids)), value=value) for ids in cut]).to(device)

    ids_LT, labels_LT = padded([row.ids for row in asked], 0), padded([row.labels for row in asked], IGNORED)
    return -losses_of(chat, ids_LT, labels_LT, past_key_values=cache).sum(1).cpu().numpy()


def causal_model(chat: ChatModel) -> torch.nn.Module:
    """The transformers model, with a LoRA adapter inside it if there is one."""
    model = chat.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model
