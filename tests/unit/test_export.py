"""What is exported loads with transformers alone, computes what was trained, and replaces nothing it did not write."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ernie_dist.batch import Batch, Row, stack
from ernie_dist.checkpoint import CheckpointStore
from ernie_dist.data.tokenizer import train_and_publish
from ernie_dist.engine.select import build_engine
from ernie_dist.export.transformers_folder import export_model
from ernie_dist.model.attention import documents_of
from ernie_dist.model.build import build_model
from ernie_dist.model.loss import summed_loss
from ernie_dist.progress import Progress
from ernie_dist.spec.errors import CheckpointError
from ernie_dist.spec.job import parse_job
from ernie_dist.spec.resolve import PackedLength, ResolvedJob, ResolvedSource, ResolvedTokenizer, resolve
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.spec.training import ModelSpec
from ernie_dist.world import World
from launcher.cli import main

torch.set_num_threads(1)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
SPARSE = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    **{"moe_layer_start_index": 1, "moe_layer_end_index": 1, "vocab_size": 448},
}
MODELS = {
    "dense": {"preset": "ernie-4.5-tiny", "override": SMALL},
    "untied": {"preset": "ernie-4.5-tiny", "override": {**SMALL, "tie_word_embeddings": False}},
    "experts": {"preset": "ernie-4.5-21b-a3b", "override": SPARSE},
}
LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ResolvedTokenizer:
    texts = iter([f"the {number}th crane crosses the river 大江" for number in range(200)])
    published = train_and_publish(texts, 400, tmp_path_factory.mktemp("tokenizer"))
    return ResolvedTokenizer(folder=str(published.folder), fingerprint="t", vocab_size=published.vocab_size)


class Trained:
    """A run of a few steps with two checkpoints, as its directory and its engine have it."""

    def __init__(self, root: Path, tokenizer: ResolvedTokenizer, model: dict[str, Any]) -> None:
        raw = {
            "name": "t",
            "model": model,
            "tokenizer": tokenizer.folder,
            "tokens_per_batch": 2 * LENGTH,
            "sources": {"web": {"path": "web.jsonl", "text": "text"}},
            "curriculum": [{"name": "a", "duration": "4 steps", "sequence_length": LENGTH, "mixture": {"web": 1.0}}],
            "schedule": {"kind": "constant", "peak": 1e-2},
            "engine": {"kind": "plain", "precision": "fp32"},
        }
        facts = {"fingerprint": "f", "kind": "text", "packed": {LENGTH: PackedLength(sequences=99, tokens=2000)}}
        source = ResolvedSource(folder="web", held_out=False, **facts)
        self.job: ResolvedJob = resolve(parse_job(raw, "test"), tokenizer, {"web": source})
        self.files = RunFiles(root)
        root.mkdir()
        self.job.write(self.files.job)
        spec = self.job.spec
        build = partial(build_model, spec.model, tokenizer.vocab_size, spec.seed)
        self.engine: Any = build_engine(spec.engine, spec.optimizer, [], build, summed_loss, World())
        store, progress = CheckpointStore(self.files.checkpoints, self.job, World()), Progress.start()
        self.logits = []
        for step in range(4):
            if step % 2 == 0:
                self.logits.append(logits(self.engine.model))
            rows = np.random.default_rng(step).integers(3, tokenizer.vocab_size, (2, LENGTH))
            micro = stack([Row(row, np.roll(row, -1), np.arange(LENGTH), np.array([LENGTH])) for row in rows])
            self.engine.step(Batch(step, "a", (micro,), np.zeros((2, 2), np.int64), 2 * LENGTH), 1e-2)
            progress = progress.after(np.zeros((2, 2), np.int64))
            if step % 2:
                store.save(self.engine, progress)
                store.finish()
        self.logits.append(logits(self.engine.model))
        """before the first step, at step 2, at step 4"""
        self.checkpoints = [self.files.checkpoints / f"step_{step:08d}" for step in (2, 4)]


TOKENS = torch.arange(3, 3 + LENGTH)[None]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """[T, V] of one document, by the attention we train with."""
    model.eval()
    ends = torch.tensor([0, LENGTH], dtype=torch.int32)
    documents = documents_of(ends, LENGTH, 1, LENGTH, torch.float32)
    positions = torch.arange(LENGTH)[None]
    hidden = model.model(input_ids=TOKENS, position_ids=positions, use_cache=False, documents=documents)
    return model.lm_head(hidden.last_hidden_state)[0]


@pytest.fixture(scope="module", params=MODELS)
def run(request: Any, tokenizer: ResolvedTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp(request.param) / "run", tokenizer, MODELS[request.param])


def test_an_export_loads_with_transformers_alone_and_computes_what_was_trained(run: Trained, tmp_path: Path) -> None:
    folder = export_model(run.job, run.checkpoints[1], tmp_path / "made" / "export")
    assert folder == tmp_path / "made" / "export" and list(folder.parent.iterdir()) == [folder]
    assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".py")]
    for path in folder.glob("*.json"):
        assert "ernie_dist" not in path.read_text(), f"{path.name} leads back to us"

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), "nothing missing, unexpected or mismatched"
    assert model.dtype == torch.float32
    with torch.no_grad():
        found = model.eval()(input_ids=TOKENS).logits[0]
    torch.testing.assert_close(found, run.logits[2], rtol=1e-5, atol=1e-5)
    assert (run.logits[2] - run.logits[1]).abs().max() > 0.01 < (run.logits[1] - run.logits[0]).abs().max()


def test_the_tokenizer_its_template_and_the_generation_config_come_with_it(run: Trained, tmp_path: Path) -> None:
    folder = export_model(run.job, run.checkpoints[1], tmp_path / "export")
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (run.job.tokenizer.folder, folder))
    text = "the crane crosses 大江"
    assert theirs(text).input_ids == ours(text).input_ids
    messages = [{"role": "user", "content": "who?"}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|begin_of_sentence|>User: who?\nAssistant: "

    config = GenerationConfig.from_pretrained(folder)
    assert config.eos_token_id == theirs.convert_tokens_to_ids("</s>") == theirs.eos_token_id == 2
    assert (config.bos_token_id, config.pad_token_id) == (theirs.bos_token_id, theirs.pad_token_id)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size).requires_grad_(False)
    model.lm_head.weight.zero_()
    model.lm_head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(2), model.config.vocab_size))
    given = theirs(prompt, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**given, max_new_tokens=5)[0, given.input_ids.shape[1] :]
    assert answer.tolist() == [2], "a model that says the stop token stops"


def test_any_checkpoint_can_be_exported_and_trained_on(run: Trained, tmp_path: Path) -> None:
    for number, checkpoint in enumerate((None, *run.checkpoints)):
        folder = export_model(run.job, checkpoint, tmp_path / "export")  # over the one before
        again = build_model(ModelSpec(from_pretrained=str(folder)), run.job.tokenizer.vocab_size, seed=99)
        torch.testing.assert_close(logits(again), run.logits[number], rtol=1e-6, atol=1e-6)
    rows = torch.arange(3, 3 + LENGTH).numpy()
    micro = stack([Row(rows, np.roll(rows, -1), np.arange(LENGTH), np.array([LENGTH]))])
    assert summed_loss(again, micro).item() == pytest.approx(summed_loss(run.engine.model, micro).item(), rel=1e-5)


def test_a_folder_that_is_no_export_is_left_alone(run: Trained, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"mine: exists and is not an export; give another folder"):
        export_model(run.job, run.checkpoints[1], mine)
    (mine / "config.json").write_text("{}")  # many things have one
    with pytest.raises(CheckpointError, match=r"mine: exists and is not an export; give another folder"):
        export_model(run.job, run.checkpoints[1], mine)
    with pytest.raises(CheckpointError, match=r"thesis\.txt: exists"):
        export_model(run.job, run.checkpoints[1], mine / "thesis.txt")
    assert (mine / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert export_model(run.job, None, tmp_path / "empty").is_dir()


def test_weights_that_do_not_fit_leave_the_export_before_as_it_was(run: Trained, tmp_path: Path) -> None:
    folder = export_model(run.job, run.checkpoints[0], tmp_path / "export")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = run.job.spec.model.model_copy(update={"override": {**run.job.spec.model.override, "num_hidden_layers": 3}})
    job = run.job.model_copy(update={"spec": run.job.spec.model_copy(update={"model": other})})
    with pytest.raises(CheckpointError, match=r"step_00000004: weights do not fit the model: \['model\.layers\.2"):
        export_model(job, run.checkpoints[1], folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_exports_the_newest_or_the_one_asked_for_and_nothing_damaged(
    run: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def weights(*more: str) -> torch.Tensor:
        to = tmp_path / "out"
        assert main(["export", str(run.files.root), "--to", str(to), *more]) == 0
        assert capfd.readouterr().out.strip().endswith(str(to))
        return logits(build_model(ModelSpec(from_pretrained=str(to)), run.job.tokenizer.vocab_size, seed=1))

    torch.testing.assert_close(weights(), run.logits[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights("--step", "2"), run.logits[1], rtol=1e-6, atol=1e-6)
    assert main(["export", str(run.files.root), "--to", str(tmp_path / "no"), "--step", "3"]) == 2
    assert "no such checkpoint; there are: 4, 2" in capfd.readouterr().err

    state = run.checkpoints[1] / "engine" / "state.pt"
    whole = state.read_bytes()
    try:
        state.write_bytes(whole[:-1])
        assert main(["export", str(run.files.root), "--to", str(tmp_path / "no")]) == 2
    finally:
        state.write_bytes(whole)
    said = capfd.readouterr().err
    assert "step_00000004: cannot be trusted: engine/state.pt has" in said and "--step" in said
    assert not (tmp_path / "no").exists()


def test_sparse_weights_are_stored_per_expert_as_published(tokenizer: ResolvedTokenizer, tmp_path: Path) -> None:
    job = Trained(tmp_path / "run", tokenizer, MODELS["experts"]).job
    folder = export_model(job, None, tmp_path / "export")
    header = (folder / "model.safetensors").read_bytes()
    names = set(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]))
    for expert in range(4):
        assert f"model.layers.1.mlp.experts.{expert}.gate_proj.weight" in names
