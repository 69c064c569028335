"""Pairs of answers: from rows of either layout to packed sequences, and the loss that compares them."""

import io
import json
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer, PreTrainedModel

from ernie_dist.batch import IGNORED, Batch, MicroBatch, stack
from ernie_dist.data.documents import BadRow, document_maker
from ernie_dist.data.loader import SequenceReader
from ernie_dist.data.prepare import prepare
from ernie_dist.data.resolve import resolve_prepared
from ernie_dist.data.shard import PreparedSource
from ernie_dist.engine.select import build_engine
from ernie_dist.events.history import read_events, read_metrics
from ernie_dist.heartbeat import Heartbeat, Phase
from ernie_dist.model.build import build_model
from ernie_dist.model.loss import answer_log_probabilities, summed_loss
from ernie_dist.references import References
from ernie_dist.spec.curriculum import SourceSpec
from ernie_dist.spec.errors import CheckpointError, SpecError
from ernie_dist.spec.job import JobSpec, parse_job
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.stop_file import StopNote, ask
from ernie_dist.spec.training import EngineSpec, OptimizerSpec
from ernie_dist.train import train
from ernie_dist.world import World
from launcher.run_dir import RunDir

torch.set_num_threads(1)

ROWS = [
    {"prompt": f"第{n}味药治什么？", "chosen": f"治{'头痛' * (1 + n % 4)}。", "rejected": "不知道" * (n % 3 + 1)}
    for n in range(40)
]
ROWS += [{**row, "rejected": "我也不知道"} for row in ROWS[:20]]
LENGTH = 256


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ResolvedJob:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8"
    )
    spec = parse_job(raw_job(folder), "test")
    return resolve_prepared(spec, prepare(spec, workers=1, show_progress=False))


def raw_job(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "pairs",
        "model": {"preset": "ernie-4.5-tiny", "override": {"num_hidden_layers": 2, "hidden_size": 64}},
        "tokenizer": {"train": {"vocab_size": 400}},
        "tokens_per_batch": 4 * LENGTH,
        "sources": {"pairs": {"path": str(folder / "pairs.jsonl"), "preference": "pairs", "repeat": True}},
        "split": {"train": 0.8, "validation": 0.2, "test": 0.0},
        "curriculum": [
            {"name": "prefer", "duration": "5 steps", "sequence_length": LENGTH, "mixture": {"pairs": 1.0}, "dpo": {}}
        ],
        "schedule": {"kind": "constant", "peak": 1e-3},
        "engine": {"kind": "plain", "precision": "fp32", "micro_batch_size": 2},
        "resources": {"gpus_per_node": 1},
        "data_dir": str(folder / "prepared"),
        **changes,
    }


def reader_of(job: ResolvedJob) -> SequenceReader:
    source = PreparedSource.open(Path(job.sources["pairs"].folder))
    return SequenceReader(source, source.packs("train", LENGTH), "answers")


def test_both_layouts_give_the_same_pair_and_every_mistake_is_named() -> None:
    pairs = document_maker(SourceSpec(path="x", preference="pairs"))
    erniekit = document_maker(SourceSpec(path="x", preference="erniekit"))
    history = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]
    kit = {"system": "良", "src": ["一", "三"], "tgt": ["二"], "response": [["坏"], ["好"]], "sort": [0, 1]}
    whole = [{"role": "system", "content": "良"}, *history, {"role": "user", "content": "三"}]
    expected = pairs({"prompt": whole, "chosen": "好", "rejected": "坏"})
    assert erniekit(kit) == expected
    assert erniekit({**kit, "response": ["好", "坏"], "sort": [1, 0]}) == expected
    texts = {"chosen": "好", "rejected": "坏"}
    sides = {side: [*whole, {"role": "assistant", "content": text}] for side, text in texts.items()}
    assert pairs(sides) == expected
    assert pairs({"prompt": whole, **sides}) == expected, "answers may begin with the prompt"
    assert pairs({"prompt": whole[1:], **sides}) == expected, "or with a system prompt before it"
    plain = {side: [{**one, "name": "n"} for one in turns[1:]] for side, turns in sides.items()}
    assert pairs({"system": "良", "prompt": whole[1:], **plain}) == expected, "or without it, and have more fields"
    short = {side: [turns[3], turns[4]] for side, turns in sides.items()}
    assert pairs({"prompt": "三", **short}) == pairs({"prompt": "三", **texts})
    assert [turn.counts for turn in expected.chosen] == [False, False, False, False, True]

    question = {"prompt": "问"}
    for make, row, said in (
        (pairs, {**question, "chosen": "好"}, "no field 'rejected'"),
        (pairs, {**question, "chosen": "好", "rejected": " "}, "turn 2 (assistant) is empty"),
        (pairs, {**question, "chosen": "好", "rejected": "好"}, "the same answer"),
        (pairs, {"prompt": "别的", **short}, "does not begin with the prompt"),
        (pairs, {**sides, "rejected": [*whole[1:], sides["rejected"][-1]]}, "different conversations"),
        (erniekit, {**kit, "sort": [1, 1]}, "two different numbers in sort"),
        (erniekit, {**kit, "response": [["好"]]}, "two responses"),
        (erniekit, {**kit, "tgt": ["二", "四"]}, "tgt must lack the last answer"),
    ):  # fmt: skip
        with pytest.raises(BadRow, match=said.replace("(", r"\(").replace(")", r"\)")):
            make(row)


def test_packs_hold_whole_pairs_and_only_answers_count(job: ResolvedJob) -> None:
    reader = reader_of(job)
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer.folder)
    seen = []
    for row in reader.rows(np.arange(len(reader))):
        ends = np.cumsum(row.documents)[: 2 * len(row.pairs)]
        parts = np.split(np.stack([row.tokens, row.labels, row.positions]), ends, axis=1)[: len(ends)]
        assert all((part[2] == np.arange(part.shape[1])).all() for part in parts), "no answer attends to the other"
        texts = [tokenizer.decode(part[0], skip_special_tokens=True).strip() for part in parts]
        answers = [tokenizer.decode(part[1][part[1] != IGNORED], skip_special_tokens=True) for part in parts]
        assert all(part[1][part[1] != IGNORED][-1] == tokenizer.eos_token_id for part in parts)
        seen += list(zip(texts[::2], texts[1::2], answers[::2], answers[1::2], strict=True))
    question = "User: {prompt}\nAssistant: "
    forms = (question + "{chosen}", question + "{rejected}", "{chosen}", "{rejected}")
    wanted = {tuple(form.format(**row) for form in forms) for row in ROWS}
    assert len(seen) == len(set(seen)) > 20 and set(seen) < wanted
    assert len(seen) > len(reader), "several pairs share a sequence"
    trained, known = (Counter(first.split("\n")[0] for first, *_ in found) for found in (seen, wanted))
    assert all(known[question] == count for question, count in trained.items()), "all pairs of a question, or none"
    assert {1, 2} == set(trained.values())


def build(job: ResolvedJob, seed: int) -> PreTrainedModel:
    return build_model(job.spec.model, job.tokenizer.vocab_size, seed)


def one_by_one(model: PreTrainedModel, micro: MicroBatch) -> torch.Tensor:
    """log p of each document's labels, as any transformers user would compute it."""
    flat, ends = torch.stack([micro.tokens_BT.flatten(), micro.labels_BT.flatten()]), micro.document_ends.tolist()
    found = []
    for first, end in pairwise(ends):
        tokens, labels = flat[:, first:end]
        log_p = model(input_ids=tokens[None]).logits[0].log_softmax(dim=-1)
        found.append(log_p[labels != IGNORED].gather(1, labels[labels != IGNORED][:, None]).sum())
    return torch.stack(found)


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_the_loss_is_dpo_of_each_pair_by_itself_gradients_included(job: ResolvedJob, sft_weight: float) -> None:
    micro = stack(reader_of(job).rows(np.arange(2)))
    policy, reference = build(job, 1), build(job, 2)
    plain = [build_model(job.spec.model, job.tokenizer.vocab_size, seed, attn_implementation="sdpa") for seed in (1, 2)]
    ours, theirs = one_by_one(plain[0], micro), one_by_one(plain[1], micro).detach()
    chosen = micro.pairs.chosen_P
    margins = 0.5 * ((ours[chosen] - ours[chosen + 1]) - (theirs[chosen] - theirs[chosen + 1]))
    documents = np.split(micro.labels_BT.flatten().numpy(), micro.document_ends[1:-1])
    counts = torch.tensor([int((labels != IGNORED).sum()) for labels in documents])
    expected = -logsigmoid(margins) - sft_weight * ours[chosen] / counts[chosen]
    expected.sum().backward()
    assert len(expected) > 3 and expected.std() > 0.1, "something to compare"

    with torch.no_grad():
        measured = answer_log_probabilities(reference, micro)
    torch.testing.assert_close(measured, theirs, rtol=1e-5, atol=1e-4)
    ratio = measured[chosen] - measured[chosen + 1]
    pairs = type(micro.pairs)(chosen, micro.pairs.ids_P2, ratio, 0.5, sft_weight)
    sums = summed_loss(policy, type(micro)(**{**vars(micro), "pairs": pairs}))
    sums[0].backward()
    wanted = torch.stack([expected.sum(), (margins > 0).sum(), margins.sum()])
    torch.testing.assert_close(sums, wanted.detach(), rtol=1e-4, atol=1e-4)
    for (name, parameter), other in zip(policy.named_parameters(), plain[0].parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_references_are_the_models_own_until_it_learns_and_survive_a_restart_unless_damaged(
    job: ResolvedJob, tmp_path: Path
) -> None:
    stage, folder = job.stages[0], tmp_path / "references" / "prefer"
    spec = EngineSpec(kind="plain", precision="fp32")
    engine = build_engine(spec, OptimizerSpec(), [], partial(build, job, 1), summed_loss, World())
    measure = partial(References.measure, job, stage, engine, World(), answer_log_probabilities)
    assert measure(lambda *_: True) is None, "a stop comes first"
    told: list[tuple[str, int, int]] = []
    references = measure(lambda *told_of: bool(told.append(told_of)))
    assert told[0][0] == "pairs" and told[-1][1] == told[-1][2]
    references.write(folder)
    references.write(folder)  # a stage that begins again
    again = References.read(folder, stage)
    count = len(PreparedSource.open(Path(job.sources["pairs"].folder)).packs("validation", LENGTH))
    assert again.hold("pairs", LENGTH, count)
    assert not again.hold("pairs", 2 * LENGTH, count), "held-out pairs cut otherwise have other numbers"
    rows = reader_of(job).rows(np.arange(4))
    batch = Batch(0, "prefer", (stack(rows[:2]), stack(rows[2:])), np.zeros((4, 2), np.int64), 4 * LENGTH)
    results = [engine.step(again.of_batch(batch), 2e-3) for _ in range(6)]
    first, last = results[0], results[-1]
    assert (first.loss, first.figures) == (pytest.approx(np.log(2)), (0.0, 0.0))
    assert first.loss_tokens == sum(micro.weight for micro in batch.micro_batches) > 4
    assert last.loss < 0.6 and last.figures[0] > 0.8 and last.figures[1] > 0.2

    damaged = next(folder.glob("*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"bytes instead of .* cannot go on without"):
        References.read(folder, stage)


def test_a_stop_while_pairs_are_asked_about_costs_no_checkpoint_and_each_stage_begins_at_its_own_reference(
    job: ResolvedJob, tmp_path: Path
) -> None:
    first = {**raw_job(tmp_path)["curriculum"][0], "duration": "3 steps"}
    stages = [first, {**first, "name": "again", "sequence_length": 2 * LENGTH}]
    folder, rare = Path(job.spec.data_dir).parent, {"every": "3 steps", "keep_last": 1}
    spec = parse_job(raw_job(folder, curriculum=stages, checkpoint=rare), "test")
    run_dir = RunDir(tmp_path / "run")
    run_dir.freeze(resolve_prepared(spec, prepare(spec, workers=1, show_progress=False)))
    files = run_dir.files

    class Stops(Heartbeat):
        evaluations = 0

        def enter(self, phase: Phase, step: int) -> None:
            super().enter(phase, step)
            self.evaluations += (phase, step) == (Phase.EVALUATE, 3)
            if self.evaluations == 2:  # at the end of one stage, and before the other
                ask(files.stop, StopNote("a test"))

    assert not train(run_dir.root, run_dir.new_attempt(), World(), io.StringIO(), Stops())
    files.stop.unlink()
    assert train(run_dir.root, run_dir.new_attempt(), World(), io.StringIO())
    told = read_events(files.events)
    assert [event["step"] for event in told if event["event"] == "CheckpointSaved"] == [3, 6], "none was written twice"
    measured = [(event["step"], event["stage"]) for event in told if event["event"] == "Evaluated"]
    assert measured == [(3, "prefer"), (6, "again")]
    losses = [step["loss"] for step in read_metrics(files.metrics)]
    assert [losses[0], losses[3]] == pytest.approx([np.log(2)] * 2, abs=1e-5) and losses[2] != losses[3]


def test_a_stage_and_its_sources_must_agree(tmp_path: Path) -> None:
    job = raw_job(tmp_path)
    parse_job(job, "test")
    text = {"path": "x.jsonl", "text": "text"}
    tokens = {"name": "read", "duration": "5 steps", "sequence_length": LENGTH, "mixture": {"texts": 1.0}}
    mixed = {"sources": {**job["sources"], "texts": text}, "curriculum": [tokens, *job["curriculum"]]}
    parse_job({**job, **mixed}, "test")
    for change, said in (
        ({"sources": {"pairs": text}}, "say preference: pairs or erniekit"),
        ({"curriculum": [{key: value for key, value in job["curriculum"][0].items() if key != "dpo"}]}, "add dpo: {}"),
        ({"sources": {"pairs": {**job["sources"]["pairs"], "overlong": "truncate"}}}, "half a pair of answers"),
        ({"curriculum": [{**job["curriculum"][0], "loss": "all"}]}, "only the last answer counts: leave loss out"),
        ({**mixed, "evaluate": {"best": "mean"}}, "losses of pairs and of tokens have no common mean"),
        ({"sources": {**job["sources"], "mean": job["sources"]["pairs"]}}, "give this one another name"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=said):
            parse_job({**job, **change}, "test")
    assert isinstance(parse_job({**job, "evaluate": {"best": "mean"}}, "test"), JobSpec), "all of them are pairs"
