"""What comes from elsewhere is data and never runs; what is secret is refused where it would be copied."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ernie_dist.data.tokenizer import publish_pretrained
from ernie_dist.model.build import build_model
from ernie_dist.spec.errors import DataError, SpecError
from ernie_dist.spec.job import load_job
from ernie_dist.spec.training import ModelSpec

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
SCRATCH = ModelSpec(preset="ernie-4.5-tiny", override={**TINY, "vocab_size": 64})
JOB = {
    "name": "tiny",
    "model": {"preset": "ernie-4.5-tiny"},
    "tokenizer": {"train": {"vocab_size": 300}},
    "tokens_per_batch": 128,
    "sources": {"stories": {"path": "stories.jsonl", "text": "text"}},
    "curriculum": [{"name": "general", "duration": "2 steps", "sequence_length": 64, "mixture": {"stories": 1.0}}],
    "schedule": {"kind": "constant", "peak": 1e-3},
    "engine": {"kind": "plain"},
    "resources": {"gpus_per_node": 1},
}


class Bomb:
    """Reading it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    folder = tmp_path / "pretrained"
    build_model(SCRATCH, 64, 0, attn_implementation="sdpa").save_pretrained(folder)
    return folder


def plan(folder: Path, job: dict, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    command = [sys.executable, "-m", "launcher", "plan", "job.yaml", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("decoy", [False, True], ids=["alone", "beside_the_index_of_a_missing_file"])
def test_pickled_weights_are_refused_and_never_read(tmp_path, pretrained, decoy):
    (pretrained / "model.safetensors").unlink()
    (pretrained / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    if decoy:
        (pretrained / "nothing.safetensors").write_bytes(b"")
    with pytest.raises(SpecError, match="safetensors"):
        build_model(ModelSpec(from_pretrained=str(pretrained)), 64, 0)
    if not decoy:
        done = plan(tmp_path, {**JOB, "model": {"from_pretrained": str(pretrained)}})
        assert done.returncode == 2 and "pytorch_model.bin" in done.stderr and "save_pretrained" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "exploded").exists()
    pickle.loads((pretrained / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "exploded").exists()  # so it was a bomb


def test_code_beside_a_model_or_tokenizer_is_never_run(tmp_path, pretrained):
    """Without a question at the terminal, whatever its config asks for."""
    mark = tmp_path / "ran"
    (pretrained / "theirs.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    config = yaml.safe_load((pretrained / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (pretrained / "config.json").write_text(yaml.safe_dump(config, default_flow_style=True, width=100_000))
    with pytest.raises(SpecError, match="cannot be built"):
        build_model(ModelSpec(from_pretrained=str(pretrained)), 64, 0)
    own = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.T", "theirs.T"]}}
    (pretrained / "tokenizer_config.json").write_text(yaml.safe_dump(own, default_flow_style=True, width=100_000))
    with pytest.raises(DataError, match="cannot be loaded"):
        publish_pretrained(str(pretrained), tmp_path / "published")
    assert not mark.exists()


SECRETS = {
    "track.wandb.tags.0": "wandb_v1_" + "Ab1" * 12,
    "track.wandb.api_key": "0123456789abcdef" * 2 + "01234567",
    "sources.stories.dataset": "https://person:hunter2@example.org/data",
    "model.from_pretrained": "${HF_TOKEN}",
    "tokenizer": "hf_" + "Ab1" * 11,
}


@pytest.mark.parametrize("field", SECRETS)
def test_secret_in_a_job_is_refused_without_showing_it(tmp_path, field):
    job = {**JOB, "track": {"wandb": {"project": "p", "tags": ["a"]}}}
    done = plan(tmp_path, job, "--set", f"{field}={SECRETS[field]}")
    assert done.returncode == 2 and field in done.stderr and "environment variable" in done.stderr
    assert SECRETS[field] not in done.stdout + done.stderr


def test_what_only_resembles_a_secret_is_none(tmp_path):
    job = {**JOB, "model": {"from_pretrained": "baidu/ERNIE-4.5-0.3B-PT", "revision": "0123456789" * 4}}
    job["sources"] = {"stories": {"path": "$DATA/hf_stories.jsonl", "text": "{a}: $TOKEN"}}
    job["tokenizer"] = "$ERNIE_TOKENIZER/snapshots/" + "0123456789" * 4
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert load_job(tmp_path / "job.yaml").model.revision == "0123456789" * 4
