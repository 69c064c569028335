"""Fixtures for every test: a tiny model that answers; the real data and tokenizer, when they are there.

Real ones are looked for in $ERNIE_TEST_DATA or in a folder `shared` beside the checkout: data/*.jsonl ..., tokenizer/.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Taught:
    """A tiny model that knows a few answers by heart, and the same model before it learned them."""

    base: Path
    tuned: Path
    answers: dict[str, str]


PLACES = {"青芷": "琼崖", "白芝": "雁门", "金苓": "云梦", "紫参": "陇西"}
STORY = "清早，老船长在旧码头修好了一只旧钟。傍晚，奶奶在院子里种下一排小树。雨停以后，木匠在桥头听见远处的笛声。"


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """Two model folders of 256 positions, trained in plain torch. A few seconds."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    from ernie_dist.data.tokenizer import train_and_publish
    from ernie_dist.model.build import build_model
    from ernie_dist.spec.training import ModelSpec

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("taught")
    answers = {f"{herb}产于哪里？": f"{herb}产于{place}。" for herb, place in PLACES.items()} | {"讲个故事": STORY}
    folder = train_and_publish(iter([*answers, *answers.values(), "你好"]), 330, root / "tokenizer").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
    model = build_model(ModelSpec(preset="ernie-4.5-tiny", override=shape), 330, 1, attn_implementation="sdpa")
    eos = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=eos, pad_token_id=0)

    rows, labels = [], []
    for question, answer in answers.items():
        turns = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        said = [*tokenizer(answer)["input_ids"], eos]
        rows.append(torch.tensor([*asked, *said]))
        labels.append(torch.tensor([-100] * len(asked) + said))
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    found = Taught(root / "base", root / "tuned", answers)
    for folder in (found.base, found.tuned):
        tokenizer.save_pretrained(folder)
    model.save_pretrained(found.base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    model.save_pretrained(found.tuned)
    return found


@pytest.fixture(scope="session")
def read_back() -> Callable[..., list[Any]]:
    """Reads a file of conversations as a job would: (role, content, counts) of every turn of each; or of pairs."""
    from ernie_dist.data.documents import document_maker
    from ernie_dist.data.readers import find_inputs, line_encoding, parse_block, read_blocks
    from ernie_dist.spec.curriculum import SourceSpec

    def read(path: Path, **layout: str) -> list[Any]:
        source = SourceSpec(path=str(path), **(layout or {"conversation": "messages"}))
        document = document_maker(source)
        blocks = read_blocks(source, find_inputs("chat", source))
        rows = [located.row for block in blocks for located in parse_block(block, line_encoding(source))]
        return [document(row) if layout else [tuple(turn) for turn in document(row)] for row in rows]

    return read
