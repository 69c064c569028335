"""Python's garbage collector, kept out of the steps: left alone it runs inside one whenever enough objects were made,
on every rank at another moment, and all ranks wait for the one that it holds up."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY = 100
"""steps between two looks at young objects"""


@contextmanager
def importing() -> Iterator[None]:
    """Looks for no garbage where modules are made, which stay, and at what they hold never again: together a tenth of
    the processor time of a rank's start."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


class Garbage:
    """Collects between steps, the same ones on all ranks. What is there at the start is not looked at again."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def after(self, step: int) -> None:
        if step % _EVERY == 0:
            gc.collect(1)

    def close(self) -> None:
        """Python collects by itself again."""
        gc.enable()
        gc.unfreeze()
