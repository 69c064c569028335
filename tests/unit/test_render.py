"""Conversations: one meaning in every layout; prompts as generation sees them; only answers in the loss."""

from pathlib import Path
from typing import Any

import pytest

from ernie_dist.data import render
from ernie_dist.data.documents import BadRow, Turn, document_maker
from ernie_dist.data.render import ChatFrame, Encoder
from ernie_dist.data.tokenizer import PublishedTokenizer, publish_pretrained
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import DataError

SAID = [("user", "一加一？"), ("assistant", "二。"), ("user", "Why?"), ("assistant", "By counting.")]
CONVERSATION = (Turn("system", "你是助手", False), *(Turn(role, text, role == "assistant") for role, text in SAID))


def source(**fields: Any) -> SourceSpec:
    return SourceSpec(path="x", **fields)


def test_every_layout_gives_the_same_conversation() -> None:
    names = {"user": "human", "assistant": "gpt"}
    rows = {
        "messages": {
            "messages": [{"role": "system", "content": "你是助手"}, *({"role": r, "content": c} for r, c in SAID)]
        },
        "sharegpt": {"system": "你是助手", "conversations": [{"from": names[r], "value": c} for r, c in SAID]},
        "erniekit": {"system": "你是助手", "src": ["一加一？", "Why?"], "tgt": ["二。", "By counting."]},
        "alpaca": {
            "system": "你是助手",
            "history": [["一加一？", "二。"]],
            "instruction": "Why?",
            "input": "",
            "output": "By counting.",
        },
    }
    for layout, row in rows.items():
        assert document_maker(source(conversation=layout))(row) == CONVERSATION, layout
    single = document_maker(source(prompt="q", response="a"))({"q": "Why?", "a": "By counting."})
    assert single == document_maker(source(conversation="erniekit"))({"src": "Why?", "tgt": "By counting."})
    assert single == document_maker(source(conversation="alpaca"))({"instruction": "Why?", "output": "By counting."})


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        ("messages", {"messages": [{"role": "assistant", "content": "hi"}]}, "turn 1 is by assistant"),
        ("messages", {"messages": [{"role": "user", "content": "q"}]}, "last turn must be by assistant"),
        ("messages", {"messages": []}, "no turns"),
        ("messages", {"messages": "hi"}, "is text, expected a list"),
        ("messages", {"messages": [{"role": "tool", "content": "q"}]}, "by 'tool'"),
        ("messages", {"messages": [{"role": "user"}]}, "is null, expected text"),
        ("messages", {"messages": ["q"]}, "message 1 is text"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]}, "is empty"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}] * 2}, "turn 2 is by user"),
        ("erniekit", {"src": ["q", "q"], "tgt": ["a"]}, "2 turns and tgt has 1"),
        ("erniekit", {"src": ["q"], "tgt": ["a"], "label": [0]}, "no answer counts"),
        ("erniekit", {"src": ["q"], "tgt": ["a"], "label": [2]}, "label is"),
        ("erniekit", {"src": ["q"]}, "no field 'tgt'"),
        ("alpaca", {"instruction": "q", "output": 3}, "is a number"),
        ("alpaca", {"instruction": "q", "output": ""}, "is empty"),
    ],
)
def test_a_conversation_out_of_order_is_a_bad_row_with_its_reason(layout: str, row: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        document_maker(source(conversation=layout))(row)


@pytest.fixture(scope="module")
def ernie(shared_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> PublishedTokenizer:
    return publish_pretrained(str(shared_tokenizer), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoder(ernie: PublishedTokenizer) -> Encoder:
    return Encoder(ernie.folder / "tokenizer.json", ernie.stop_id, ernie.frame)


@pytest.fixture(scope="module")
def reference(ernie: PublishedTokenizer) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ernie.folder)


def test_ernies_tokenizer_gets_ernies_template(ernie: PublishedTokenizer, tmp_path: Path) -> None:
    assert (ernie.vocab_size, ernie.stop_id, ernie.label_replacements) == (101_304, 2, {100_272: 2})
    # what was published is itself a tokenizer folder, and publishing it changes nothing
    assert publish_pretrained(str(ernie.folder), tmp_path).fingerprint == ernie.fingerprint


def test_tokens_are_the_template_and_the_prompt_is_what_generation_sees(encoder: Encoder, reference: Any) -> None:
    answers = ["二。", " leading space", "The end", "\n换行\n", " 　 1 2  3 😀", "a<b>c</b> <s"]
    conversations = [
        (Turn("user", question, False), Turn("assistant", answer, True))
        for question in ("一加一？", " spaces ", "line\nbreak\n", "English question?")
        for answer in answers
    ]
    encoded = encoder.encode_conversations([*conversations, CONVERSATION])
    start = 0
    for conversation, length in zip([*conversations, CONVERSATION], encoded.lengths.tolist(), strict=True):
        tokens, mask = encoded.tokens[start : start + length], encoded.mask[start : start + length]
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
        assert reference.decode(tokens) == reference.apply_chat_template(messages, tokenize=False)
        if len(messages) == 2:
            prompt = reference.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
            assert tokens[: len(prompt)].tolist() == prompt
            assert mask.tolist() == [0] * len(prompt) + [2] * (length - len(prompt))
        start += length


def test_answers_with_their_end_of_turn_count_and_documents_end_in_the_stop_token(
    encoder: Encoder, reference: Any
) -> None:
    encoded = encoder.encode_conversations([CONVERSATION])
    learnt = {value: reference.decode(encoded.tokens[encoded.mask == value]) for value in (1, 2)}
    assert learnt == {1: "二。<|end_of_sentence|>", 2: "By counting.<|end_of_sentence|>"}
    assert encoder.encode_text(["天地", "玄黃"]).tokens[[-1]].tolist() == [2]
    assert (encoder.encode_text(["天地", "玄黃"]).tokens == 2).sum() == 2

    row = {"src": ["q1", "q2", "q3"], "tgt": ["a1", "a2", "a3"], "label": [1, 1, 0]}
    encoded = encoder.encode_conversations([document_maker(source(conversation="erniekit"))(row)])
    learnt = {value: reference.decode(encoded.tokens[encoded.mask == value]) for value in (1, 2)}
    assert learnt == {1: "a1<|end_of_sentence|>", 2: "a2<|end_of_sentence|>"}


CONTROL = ["</s>", "<|end_of_sentence|>", "<|begin_of_sentence|>", "<mask:1>", "<|LOC_7|>", "<|IMAGE_PLACEHOLDER|>"]


def test_text_never_becomes_a_control_token(encoder: Encoder, reference: Any) -> None:
    controls = set(reference.added_tokens_decoder)
    for written in CONTROL:
        encoded = encoder.encode_text([f"before {written} after"])
        assert not controls & set(encoded.tokens[:-1].tolist()), written
        assert reference.decode(encoded.tokens[:-1]) == f"before {written} after"
        with pytest.raises(BadRow, match="control token"):
            encoder.check((Turn("user", f"say {written}", False), Turn("assistant", "no", True)))
    encoder.check((Turn("user", "<b>bold</b> <mask> <|x", False), Turn("assistant", "ok", True)))


def test_a_long_text_is_encoded_in_parts_to_the_same_tokens(encoder: Encoder, monkeypatch) -> None:
    text = "\n".join(f"第{n}条　为了保护民事主体的合法权益，{'調整' * (n % 9)}。" for n in range(500))
    whole = encoder.encode_text([text, "short"])
    monkeypatch.setattr(render, "_PART", 300)
    parts = encoder.encode_text([text, "short"])
    assert parts.tokens.tolist() == whole.tokens.tolist() and parts.lengths.tolist() == whole.lengths.tolist()


def chatml(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content'].strip()}<|im_end|>\n" for m in messages)
    return turns + "<|im_start|>assistant\n" * add_generation_prompt


def test_other_templates_are_followed_or_refused() -> None:
    frame = ChatFrame.derive(chatml, lambda token: token == "<|im_end|>")
    conversation = (Turn("user", " q ", False), Turn("assistant", " a\n", True))
    segments = frame.segments(conversation)
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
    assert "".join(text for text, _ in segments) == chatml(messages, False)
    assert segments[0] == (chatml(messages[:1], True), 0) and segments[1] == ("a<|im_end|>", 2)

    def forgetful(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return chatml(messages[-2:], add_generation_prompt)

    def reminding(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return chatml(messages, add_generation_prompt) + "<think>\n" * add_generation_prompt

    def endless(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return chatml(messages, add_generation_prompt).replace("<|im_end|>", "")

    for template, message in ((forgetful, "leaves out"), (reminding, "not the beginning"), (endless, "special token")):
        with pytest.raises(DataError, match=message):
            ChatFrame.derive(template, lambda token: token == "<|im_end|>")
