"""Thumbs up and down on answers, kept as rows that a job can train on: what the model saw, and what it said.

FILE.jsonl               up: the conversation up to the answer, `conversation: messages`; only that answer counts
FILE.down.jsonl          down: the same kind of row, to be mended by hand before it is trained on
FILE.preferences.jsonl   up, where two models answered the same otherwise: `preference: pairs`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ernie_dist.serve.conversation import Conversation, append_row, training_row
from ernie_dist.spec.errors import DataError


def record(file: Path, sides: Sequence[Conversation], side: int, turn: int, *, liked: bool) -> list[Path]:
    """Keeps what was thought of one side's turn number `turn`; returns the files written.

    Raises DataError, among others for an answer that is liked and was cut off.
    """
    if liked and turn not in sides[side].whole:
        raise DataError(
            "not kept: this answer did not come to its end, because of Stop or max_new_tokens, and would teach the "
            "model to end there; ask again, and let it end"
        )
    liked_one = sides[side].until(turn)
    written = [file if liked else file.with_suffix(f".down{file.suffix}")]
    append_row(written[0], training_row(liked_one, last_only=True))
    for other in sides if liked else ():
        rival = other.until(turn)
        if rival[:-1] == liked_one[:-1] and len(rival) == len(liked_one) and rival != liked_one:
            pair = {"prompt": rival[:-1], "chosen": liked_one[-1]["content"], "rejected": rival[-1]["content"]}
            written.append(file.with_suffix(f".preferences{file.suffix}"))
            append_row(written[-1], pair)
    return written
