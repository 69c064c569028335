"""The order of the data knows nothing of ranks, and what a model is asked to predict is what it should learn to say."""

import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ernie_dist.batch import IGNORED, Batch
from ernie_dist.data.loader import BatchLoader, load_batches
from ernie_dist.data.prepare import prepare
from ernie_dist.data.resolve import resolve_prepared
from ernie_dist.data.shard import PreparedSource
from ernie_dist.progress import Progress
from ernie_dist.spec.errors import DataError
from ernie_dist.spec.job import parse_job
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.world import World

LENGTH, END_OF_TURN, STOP = 96, "<|end_of_sentence|>", "</s>"
SHARES = {"poems": 0.3, "chat": 0.7}


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(
        rng.choice(("moon", "river", "salt", "crane", "月亮", "大江", "stone", "lamp")) for _ in range(words)
    )


def conversations() -> list[list[tuple[str, str]]]:
    """Question and answer, one to three times: no two conversations are the same."""
    rng = random.Random(5)
    return [
        [(f"{number} {sentence(rng, 2)}", f"{turn} {sentence(rng, 2)}") for turn in range(1 + number % 3)]
        for number in range(61)
    ]


def messages(conversation: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for pair in conversation
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ResolvedJob:
    folder = tmp_path_factory.mktemp("order")
    rng = random.Random(3)
    poems = [{"text": f"{number} {sentence(rng, rng.choice((3, 20, 20, 150)))}"} for number in range(400)]
    chat = [{"messages": messages(conversation)} for conversation in conversations()]
    for name, rows in (("poems", poems), ("chat", chat)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    sft: dict[str, Any] = {"sequence_length": LENGTH, "mixture": {"chat": 1.0}}
    raw = {
        "name": "order",
        "model": {"preset": "ernie-4.5-tiny"},
        "tokenizer": {"train": {"vocab_size": 500}},
        "tokens_per_batch": 8 * LENGTH,
        "sources": {
            "poems": {"path": str(folder / "poems.jsonl"), "text": "text", "repeat": True},
            "chat": {"path": str(folder / "chat.jsonl"), "conversation": "messages", "repeat": True},
        },
        "split": {"train": 1.0, "validation": 0.0},
        "curriculum": [
            {"name": "mixed", "duration": "40 steps", "sequence_length": LENGTH, "mixture": SHARES},
            {"name": "sft", "duration": "3 epochs", "micro_batch_size": 4, **sft},
            {"name": "last", "duration": "1 epochs", "loss": "last_answer", "tokens_per_batch": 4 * LENGTH, **sft},
            {"name": "all", "duration": "1 epochs", "loss": "all", "neftune_alpha": 5, **sft},
        ],
        "schedule": {"kind": "constant", "peak": 1e-3},
        "engine": {"micro_batch_size": 1},
        "data_dir": str(folder / "prepared"),
    }
    spec = parse_job(raw, "test")
    return resolve_prepared(spec, prepare(spec, workers=1, show_progress=False))


@pytest.fixture(scope="module")
def tokenizer(job: ResolvedJob) -> Any:
    return AutoTokenizer.from_pretrained(job.tokenizer.folder)


def rows(*batches: Batch) -> torch.Tensor:
    """int64 [sequences, 3, T]: tokens, labels and positions, in the order in which they are fed."""
    micros = [micro for batch in batches for micro in batch.micro_batches]
    parts = [torch.stack([micro.tokens_BT, micro.labels_BT, micro.positions_BT], dim=1) for micro in micros]
    return torch.cat(parts)


def seeds(batch: Batch) -> list[int]:
    return [seed for micro in batch.micro_batches if micro.chance for seed in micro.chance.seeds]


def documents(batch: Batch) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Tokens, labels and positions of each document, by the ends that attention goes by; padding is one too."""
    for micro in batch.micro_batches:
        flat = [part.flatten() for part in (micro.tokens_BT, micro.labels_BT, micro.positions_BT)]
        ends = micro.document_ends.tolist()
        assert ends[0] == 0 and ends[-1] == micro.tokens_BT.numel()
        assert micro.longest == max(np.diff(ends))
        for first, end in itertools.pairwise(ends):
            tokens, labels, positions = (part[first:end].tolist() for part in flat)
            yield tokens, labels, positions


def stage(job: ResolvedJob, name: str) -> list[Batch]:
    found = next(stage for stage in job.stages if stage.name == name)
    loader = BatchLoader(job, World())
    return [loader[index] for index in range(found.first_batch, found.end_batch)]


def is_padding(tokens: list[int]) -> bool:
    return set(tokens) == {0}  # <unk>, which byte-level tokens never are


def test_the_global_batch_is_the_same_on_1_2_and_4_ranks(job: ResolvedJob) -> None:
    alone = BatchLoader(job, World())
    for size in (2, 4):
        ranks = [BatchLoader(job, World(rank=rank, size=size)) for rank in range(size)]
        progress, expected = [Progress.start()] * size, Progress.start()
        for index in range(job.total_batches):
            whole, parts = alone[index], [loader[index] for loader in ranks]
            assert torch.equal(rows(*parts), rows(whole)), f"batch {index} on {size} ranks"
            assert [seed for part in parts for seed in seeds(part)] == seeds(whole), "the same noise on any ranks"
            assert len(set(seeds(whole))) == (8 if whole.stage == "all" else 0)
            assert len({len(part.micro_batches) for part in parts}) == 1, "ranks would wait for one another"
            assert {(part.tokens, part.stage, part.index) for part in parts} == {(whole.tokens, whole.stage, index)}
            progress = [one.after(part.sequence_ids) for one, part in zip(progress, parts, strict=True)]
            expected = expected.after(whole.sequence_ids)
        assert set(progress) == {expected}
    assert expected.step == job.total_batches and expected.batch_hash != Progress.start().batch_hash


def test_micro_batches_are_cut_as_the_stage_says(job: ResolvedJob) -> None:
    loader = BatchLoader(job, World())
    assert [micro.tokens_BT.shape for micro in loader[0].micro_batches] == [(1, LENGTH)] * 8
    assert [micro.tokens_BT.shape for micro in loader[40].micro_batches] == [(4, LENGTH)] * 2
    on_four = BatchLoader(job, World(rank=3, size=4))[40]
    assert [micro.tokens_BT.shape for micro in on_four.micro_batches] == [(2, LENGTH)]


def test_any_batch_is_read_as_if_all_before_it_had_been(job: ResolvedJob) -> None:
    in_order = list(load_batches(BatchLoader(job, World()), 0, job.total_batches))
    assert [batch.index for batch in in_order] == list(range(job.total_batches))
    for index in random.Random(1).sample(range(job.total_batches), 12):
        alone = BatchLoader(job, World())[index]
        assert torch.equal(rows(alone), rows(in_order[index])) and alone.stage == in_order[index].stage
        assert np.array_equal(alone.sequence_ids, in_order[index].sequence_ids)
    middle = list(load_batches(BatchLoader(job, World()), 37, 44))
    assert torch.equal(rows(*middle), rows(*in_order[37:44]))


@pytest.mark.parametrize("name", ["poems", "chat"])
def test_many_pieces_are_read_as_each_one_is(job: ResolvedJob, name: str) -> None:
    source = PreparedSource.open(Path(job.sources[name].folder))
    starts, lengths = (column.astype(np.int64) for column in source.documents("train"))
    by_length = np.argsort(lengths, kind="stable")
    for chosen in (by_length[:30], by_length[-30:][::-1]):  # short and long ones are copied in different ways
        ids, mask = source.gather(starts[chosen], lengths[chosen])
        spans = zip(starts[chosen].tolist(), lengths[chosen].tolist(), strict=True)
        each_ids, each_mask = zip(*(source.read(*span) for span in spans), strict=True)
        assert np.array_equal(ids, np.concatenate(each_ids))
        assert (mask is None and name == "poems") or np.array_equal(mask, np.concatenate(each_mask))


def test_a_stage_in_epochs_sees_every_document_once_in_each_pass(job: ResolvedJob, tokenizer: Any) -> None:
    batches, size = stage(job, "sft"), job.sources["chat"].packed[LENGTH].sequences
    fed = [row for batch in batches for row in rows(batch)[:, 0].tolist()]
    assert 3 * size <= len(fed) < 3 * size + 8
    given = Counter(
        tokenizer.apply_chat_template(messages(conversation), tokenize=False) for conversation in conversations()
    )
    whole = [[tuple(row) for row in fed[number * size : (number + 1) * size]] for number in range(3)]
    for one in whole:
        # a document begins at <|begin_of_sentence|>
        text = "".join(tokenizer.decode([token for token in row if token]) for row in one)
        begin = tokenizer.cls_token
        assert Counter(begin + part for part in text.split(begin) if part) == given
    assert whole[0] != whole[1] != whole[2] != whole[0], "each pass is shuffled afresh"


@pytest.mark.parametrize("name", ["sft", "last", "all"])
def test_the_labels_of_a_conversation_are_what_the_model_should_say(
    job: ResolvedJob, tokenizer: Any, name: str
) -> None:
    answers = {
        tokenizer.apply_chat_template(messages(conversation), tokenize=False): [answer for _, answer in conversation]
        for conversation in conversations()
    }
    end_of_turn, stop = tokenizer.convert_tokens_to_ids([END_OF_TURN, STOP])
    seen = Counter()
    for tokens, labels, positions in (document for batch in stage(job, name) for document in documents(batch)):
        assert positions == list(range(len(tokens)))
        if is_padding(tokens):
            assert set(labels) == {IGNORED}
            seen["padding"] += 1
            continue
        said = answers[tokenizer.decode(tokens)]  # KeyError: not a whole conversation
        seen[len(said)] += 1
        assert tokens[-1] == end_of_turn and labels[-1] == IGNORED, "the end of a document predicts nothing"
        assert tokens.count(end_of_turn) == len(said) and end_of_turn not in labels
        follows = [stop if token == end_of_turn else token for token in tokens[1:]]
        assert all(label in (IGNORED, token) for label, token in zip(labels[:-1], follows, strict=True))
        learnt = tokenizer.decode([label for label in labels if label != IGNORED])
        if name == "all":
            assert labels[:-1] == follows
        elif name == "last":
            assert learnt == said[-1] + STOP
        else:
            assert learnt == "".join(answer + STOP for answer in said)
    assert min(seen[what] for what in (1, 2, 3, "padding")) > 0


def test_every_token_of_plain_text_is_learnt_and_its_end_too(job: ResolvedJob, tokenizer: Any) -> None:
    stop, poems, cut = tokenizer.convert_tokens_to_ids(STOP), 0, 0
    for batch in stage(job, "mixed"):
        text = [tokens for tokens, _, _ in documents(batch)]
        for tokens, labels, positions in documents(batch):
            if is_padding(tokens) or END_OF_TURN in tokenizer.decode(tokens):
                continue
            assert labels == [*tokens[1:], IGNORED] and positions == list(range(len(tokens)))
            poems, cut = poems + (tokens[-1] == stop), cut + (len(tokens) == LENGTH and tokens[-1] != stop)
        assert sum(map(len, text)) == 8 * LENGTH
    assert poems > 100 and cut > 10, "long texts are split over sequences"


def test_the_weights_of_a_mixture_are_shares_of_tokens_without_padding(job: ResolvedJob) -> None:
    tokens: Counter[int] = Counter()
    sequences: Counter[int] = Counter()
    for batch in stage(job, "mixed"):
        for source, row in zip(batch.sequence_ids[:, 0].tolist(), rows(batch)[:, 0], strict=True):
            tokens[source] += int((row != 0).sum())
            sequences[source] += 1
    share, of_sequences = (counter[0] / counter.total() for counter in (tokens, sequences))
    assert share == pytest.approx(SHARES["chat"], abs=0.015)  # sources are numbered in the order of their names
    assert of_sequences > SHARES["chat"] + 0.03, "conversations leave padding, so it takes more sequences of them"


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.timeout(30)  # a lost error leaves the loop waiting
def test_an_error_while_reading_ahead_reaches_the_loop_in_its_turn(job: ResolvedJob, tmp_path: Path) -> None:
    mixed, sft = job.stages[:2]
    stages = (
        mixed.model_copy(update={"mixture": {"poems": 1.0}, "batches": 3}),
        sft.model_copy(update={"first_batch": 3}),
    )
    gone = job.sources["chat"].model_copy(update={"folder": str(tmp_path / "gone")})
    sources = {**job.sources, "chat": gone}
    broken = ResolvedJob(spec=job.spec, tokenizer=job.tokenizer, sources=sources, stages=stages)
    read = []
    with pytest.raises(DataError, match=r"gone: not a complete prepared source"):
        for batch in load_batches(BatchLoader(broken, World()), 0, broken.total_batches):
            read.append(batch.index)
    assert read == [0, 1, 2]
    assert threads() == []


def test_a_loop_that_stops_early_leaves_no_thread_behind(job: ResolvedJob) -> None:
    batches = load_batches(BatchLoader(job, World()), 0, job.total_batches, ahead=1)
    assert next(batches).index == 0 and threads() == ["loader"]
    batches.close()
    assert threads() == []
