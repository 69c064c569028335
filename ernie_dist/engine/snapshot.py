"""A copy of an engine's state in host memory, so that steps can go on while it is written."""

from __future__ import annotations

import copy
from enum import Enum
from typing import Any

import torch
from torch import nn

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def without_frozen(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Of a module's state the weights that require gradients."""
    named = dict(module.named_parameters(remove_duplicate=False))  # a tied one is in `state` under both its names
    return {name: tensor for name, tensor in state.items() if name in named and named[name].requires_grad}


class HostCopy:
    """Copies nested states. Its memory is kept and used again: a copy is good until the next one is taken."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, state: Any) -> Any:
        """The same containers with host tensors. Tensors that share memory share their copy."""
        copied: dict[tuple[Any, ...], torch.Tensor] = {}
        result = self._copy(state, (), copied)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return result

    def _copy(self, value: Any, where: tuple[Any, ...], copied: dict[tuple[Any, ...], torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value.detach(), where, copied)
        if isinstance(value, dict):
            result = copy.copy(value)  # an OrderedDict stays one
            for key, item in value.items():
                result[key] = self._copy(item, (*where, key), copied)
            return result
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self._copy(item, (*where, number), copied) for number, item in enumerate(value))
        if isinstance(value, Enum):  # Python 3.11.0 to 3.11.3 pickle it as a call of getattr, which no reader lets pass
            return value.value
        return value if isinstance(value, _PLAIN) else copy.deepcopy(value)

    def _tensor(
        self, tensor: torch.Tensor, where: tuple[Any, ...], copied: dict[tuple[Any, ...], torch.Tensor]
    ) -> torch.Tensor:
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        if tensor.numel() and memory in copied:
            return copied[memory]
        buffer = self._buffers.get(where)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._buffers[where] = buffer
        buffer.copy_(tensor, non_blocking=True)
        copied[memory] = buffer
        return buffer
