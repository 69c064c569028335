"""Preparing data over a cluster: one task reads the blocks of a source, many encode them, in order.

read_blocks --Ray Data--> encode_block on every CPU of the cluster --in order--> shards, written by this process
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import pyarrow
import ray
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.data.exceptions import UserCodeException
from ray.exceptions import RayError

from ernie_dist.data.inputs import Input
from ernie_dist.data.readers import BLOCK_BYTES, Block, Position, read_blocks
from ernie_dist.data.tokenise import Encoded, encode_block, start_encoder
from ernie_dist.data.tokenizer import PublishedTokenizer
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import EnvironmentProblem, ErnieError
from launcher.ray import cluster


class RayPool:
    """The CPUs of the cluster encode blocks. The files of a source have to be seen from this node only."""

    def __init__(self, tokenizer: PublishedTokenizer) -> None:
        self._tokenizer = replace(tokenizer, folder=tokenizer.folder.resolve())

    def encode(
        self, source: SourceSpec, inputs: list[Input], start: Position, wanted: Callable[[], bool]
    ) -> Iterator[tuple[Block, Encoded]]:
        """As `Pool`; tokens are made whether they are wanted or not, since nobody asks from afar.

        Raises DataError, and EnvironmentProblem if the cluster fails.
        """
        here = ray.get_runtime_context().get_node_id()
        with DataContext.current(_context()):
            blocks = ray.data.read_datasource(
                _Blocks(source, inputs, start),
                override_num_blocks=1,
                num_cpus=0,  # it waits for disks; and with another number it is not fused with what follows
                label_selector={cluster.NODE_ID: here},
            )
            encoded = blocks.map_batches(
                partial(_encode, tokenizer=self._tokenizer, source=source),
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
            )
            try:
                for row in encoded.iter_rows():
                    yield pickle.loads(row["encoded"])
            except (RayError, UserCodeException) as error:
                raise _ours(error) from None

    def __enter__(self) -> RayPool:
        cluster.connect()
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what is wrong is raised as well
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """The tasks end with the iterator."""


class _Blocks(Datasource):
    """The blocks of one source, pickled, one a row."""

    def __init__(self, source: SourceSpec, inputs: list[Input], start: Position) -> None:
        self._read = partial(_read, os.getcwd(), source, inputs, start)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [ReadTask(self._read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]


def _read(folder: str, source: SourceSpec, inputs: list[Input], start: Position) -> Iterator[pyarrow.Table]:
    os.chdir(folder)  # the paths are relative to it
    for block in read_blocks(source, inputs, start):
        yield pyarrow.table({"block": [pickle.dumps(block)]})


_ready: PublishedTokenizer | None = None


def _encode(rows: pyarrow.Table, tokenizer: PublishedTokenizer, source: SourceSpec) -> pyarrow.Table:
    """Runs in a worker, which keeps its tokenizer for the next blocks."""
    global _ready
    if _ready != tokenizer:
        start_encoder(tokenizer)
        _ready = tokenizer
    blocks = [pickle.loads(row) for row in rows["block"].to_pylist()]
    results = [(replace(block, payload=b""), encode_block(block, source, True)) for block in blocks]
    return pyarrow.table({"encoded": [pickle.dumps(result) for result in results]})


def _ours(error: BaseException) -> ErnieError:
    """What was raised in a worker, out of what Ray puts around it."""
    at: BaseException | None = error
    while at is not None:
        inner = getattr(at, "cause", None)
        if isinstance(inner, ErnieError):
            return inner
        at = at.__cause__
    reason = str(error).strip().splitlines()[-1].strip()
    return EnvironmentProblem(f"the cluster failed: {reason}; what is finished is kept: start again")


def _context() -> DataContext:
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES  # a block of ours is what one task works on
    context.enable_progress_bars = False  # prepare has its own
    context.print_on_execution_start = False
    return context
