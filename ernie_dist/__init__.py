"""The training job: everything that runs inside a rank; and the doors to it from Python.

    from ernie_dist import Run, generate, load

They are opened when they are used: `import ernie_dist` loads neither torch nor pandas.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ernie_dist.inference import generate
    from ernie_dist.loading import load
    from ernie_dist.run import Run

__all__ = ["Run", "generate", "load"]

_ROOMS = {"Run": "ernie_dist.run", "generate": "ernie_dist.inference", "load": "ernie_dist.loading"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
