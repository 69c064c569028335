"""Causal attention that never crosses a document: one function, two implementations, no mask to get wrong.

q [B, H, T, D], k and v [B, KV, T, D], document_ends [documents + 1] over the flattened B*T positions
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

log = logging.getLogger(__name__)

NAME = "ernie_dist_packed"
"""under which transformers knows it: `attn_implementation`"""
_NEWER = (
    ("FA4", 10, "flash_attn.cute"),  # Blackwell
    ("FA3", 9, "flash_attn_interface"),  # Hopper
    ("FA4", 9, "flash_attn.cute"),
)
"""flash attention's versions beyond the 2 that torch brings: torch's name, major compute capability, their module"""


@dataclass(frozen=True)
class Documents:
    """Where documents end, in the form that the chosen implementation reads. Made once per micro-batch."""

    ends: torch.Tensor
    longest: torch.Tensor
    """empty, [positions of the longest, 0]: a compiled layer takes it that a tensor's length changes, not a number"""
    same_document_BTT: torch.Tensor | None
    """bool [B, 1, T, T], causal within each document; None where variable-length flash attention runs"""


def documents_of(document_ends: torch.Tensor, longest: int, rows: int, length: int, dtype: torch.dtype) -> Documents:
    """Prepares attention for one micro-batch of `rows` sequences of `length` tokens."""
    lengths = torch.empty(max(2, longest), 0)  # of 0 and 1 compilers make special cases
    for changing in (document_ends, lengths):
        torch._dynamo.maybe_mark_dynamic(changing, 0)
    if uses_flash(document_ends.device, dtype):
        return Documents(document_ends, lengths, None)
    positions = torch.arange(rows * length, device=document_ends.device)
    document_BT = torch.bucketize(positions, document_ends[1:].long(), right=True).view(rows, length)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return Documents(document_ends, lengths, same_BTT.tril_()[:, None])


def uses_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Variable-length flash attention runs on CUDA in half precision, from Ampere on."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def activate_newest_flash(capability: tuple[int, int]) -> str | None:
    """Puts the newest flash attention that is installed and made for the device behind torch's own functions.

    Its name; None where that stays torch's own, version 2.
    """
    for name, major, module in _NEWER:
        if capability[0] == major and _installed(module):
            try:
                torch.nn.attention.activate_flash_attention_impl(name)
            except (AttributeError, ImportError, RuntimeError) as error:  # another torch or build than it was made for
                log.warning("%s is installed but cannot be used, torch's own flash attention is: %s", module, error)
                return None
            return name
    return None


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it would be a part of
        return False


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    documents: Documents,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The signature transformers calls. Returns [B, T, H, D]."""
    rows, heads, length, width = query.shape
    if documents.same_document_BTT is None:
        from torch.nn.attention.varlen import varlen_attn  # CUDA only

        flat = [x.transpose(1, 2).reshape(rows * length, -1, width) for x in (query, key, value)]
        out = varlen_attn(
            *flat,
            documents.ends,
            documents.ends,
            documents.longest.shape[0],
            documents.longest.shape[0],
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=key.shape[1] != heads,
        )
        return out.view(rows, length, heads, width), None
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=documents.same_document_BTT,
        scale=scaling,
        enable_gqa=key.shape[1] != heads,
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
