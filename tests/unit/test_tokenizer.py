"""A published tokenizer is complete: plain transformers loads it, and special ids lie where ERNIE has them."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ernie_dist.data.inputs import Input
from ernie_dist.data.render import Encoder
from ernie_dist.data.split import SPLITS, digest, split_of
from ernie_dist.data.tokenizer import find_tokenizer, load_published, publish_pretrained, train_and_publish
from ernie_dist.data.vocabulary import training_texts
from ernie_dist.spec.curriculum import SourceSpec, SplitSpec
from ernie_dist.spec.errors import DataError

TEXTS = [f"问：第{n}條河有多長？\n答：{n * 100} 公里, or {n} miles. " * 3 for n in range(200)]


def test_training_is_repeatable_and_plain_transformers_loads_the_result(tmp_path: Path) -> None:
    published = train_and_publish(iter(TEXTS), 500, tmp_path)
    assert train_and_publish(iter(TEXTS), 500, tmp_path / "again").fingerprint == published.fingerprint
    assert train_and_publish(iter(TEXTS[:50]), 500, tmp_path / "less").fingerprint != published.fingerprint
    assert load_published(tmp_path, published.fingerprint) == published

    tokenizer = AutoTokenizer.from_pretrained(published.folder)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, published.stop_id) == (2, 0, 2)
    assert len(tokenizer) == published.vocab_size == 500
    text = "  任何 bytes\t\r\n😀 \u0000 ok  "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    asked = [{"role": "user", "content": "你好"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|begin_of_sentence|>User: 你好\nAssistant: "
    end_of_turn = tokenizer.convert_tokens_to_ids("<|end_of_sentence|>")
    assert published.label_replacements == {end_of_turn: 2}
    encoder = Encoder(published.folder / "tokenizer.json", published.stop_id, published.frame)
    assert encoder.encode_text(["河</s>"]).tokens.tolist().count(2) == 1  # only the one that ends the document


def test_only_training_documents_are_trained_on(tmp_path: Path) -> None:
    path, split = tmp_path / "a.jsonl", SplitSpec(train=0.5, validation=0.5)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "{broken\n")
    source = SourceSpec(path=str(path), text="text")
    seen = set(training_texts([(source, [Input(str(path), "jsonl", (path,))], split)]))
    marks = [digest(text.encode()) for text in TEXTS]
    train = {text for text, part in zip(TEXTS, split_of(np.array(marks, np.uint64), split), strict=True) if part == 0}
    assert seen == train and 60 < len(train) < 140 and SPLITS[0] == "train"


def test_without_a_template_only_text_can_be_prepared_and_without_an_end_nothing(tmp_path: Path) -> None:
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "bare")
    published = publish_pretrained(str(tmp_path / "bare"), tmp_path / "published")
    assert published.frame is None and published.label_replacements == {}
    with pytest.raises(DataError, match=r"sources\.qa .*chat_template"):
        published.require_chat("qa")
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>").save_pretrained(tmp_path / "endless")
    with pytest.raises(DataError, match="no eos_token"):
        publish_pretrained(str(tmp_path / "endless"), tmp_path / "published")


def test_a_tokenizer_that_is_not_there_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "no such folder"), ("empty", "holds no tokenizer")):
        with pytest.raises(DataError, match=message):
            find_tokenizer(str(tmp_path / name))
    assert find_tokenizer("baidu/ERNIE-4.5-0.3B-PT") == ("baidu/ERNIE-4.5-0.3B-PT", [])
