"""Fixtures for every test: the real data and tokenizer, when they are there.

They are looked for in $ERNIE_TEST_DATA, or else in a folder `shared` beside the checkout: data/*.jsonl ..., tokenizer/.
"""

import os
import signal
from pathlib import Path

import pytest

# What a shell starts in the background ignores Ctrl-C, and so would the runs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


def find_shared(name: str) -> Path:
    """The folder `name` of the shared material; skips the test without it, or fails it where it is required."""
    folder = Path(os.environ.get("ERNIE_TEST_DATA") or ROOT.parent / "shared") / name
    if folder.is_dir():
        return folder.resolve()
    reason = f"no folder {folder}: set ERNIE_TEST_DATA to the folder that holds data/ and tokenizer/"
    if os.environ.get("ERNIE_REQUIRE_DATA") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with general.jsonl, law.jsonl, medical_qa.gb18030.csv, instructions.erniekit.jsonl, xiehouyu.json."""
    return find_shared("data")


@pytest.fixture(scope="session")
def shared_tokenizer() -> Path:
    """Folder with ERNIE's SentencePiece model and its added tokens, as transformers loads them."""
    return find_shared("tokenizer")
