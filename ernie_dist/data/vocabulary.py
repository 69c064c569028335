"""Texts that a tokenizer is trained on: a sample of the training documents of a job's sources."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ernie_dist.data.documents import BadRow, canonical, document_maker, turns
from ernie_dist.data.inputs import Input
from ernie_dist.data.readers import Broken, line_encoding, parse_block, read_blocks
from ernie_dist.data.split import SPLITS, digest, split_of
from ernie_dist.spec.curriculum import SourceSpec, SplitSpec

SAMPLED_BYTES = 1 << 27
"""about so much text is enough for any vocabulary, and fits in memory"""


def training_texts(sources: list[tuple[SourceSpec, list[Input], SplitSpec]]) -> Iterator[str]:
    """Texts and turns of training documents; of large sources a sample, chosen by content hash. Bad rows are left out.

    Held-out documents are not seen: the tokenizer is a part of what is measured on them.
    """
    total = sum(item.size for _, inputs, _ in sources for item in inputs)
    sampled = int(min(1.0, SAMPLED_BYTES / max(total, 1)) * 2**32)
    for source, inputs, split in sources:
        make = document_maker(source)
        for block in read_blocks(source, inputs):
            for located in parse_block(block, line_encoding(source)):
                if isinstance(located.row, Broken):
                    continue
                try:
                    document = make(located.row)
                    value = digest(canonical(document))
                except BadRow:
                    continue
                if (value & 0xFFFFFFFF) >= sampled:
                    continue
                if SPLITS[int(split_of(np.array([value], np.uint64), split)[0])] == "train":
                    yield from (document,) if isinstance(document, str) else (turn.content for turn in turns(document))
