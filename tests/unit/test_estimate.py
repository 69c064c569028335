"""What a plan says before a GPU is touched, worked out by hand."""

import math

import pytest

from ernie_dist.spec.curriculum import DpoSpec
from ernie_dist.spec.job import JobSpec, parse_job
from ernie_dist.spec.shape import ModelShape, config_values
from launcher.cli import main
from launcher.estimate import (
    ASSUMED_HIDDEN,
    ASSUMED_LINK_SHARE,
    ASSUMED_MFU,
    Cluster,
    Speed,
    estimate_pace,
    estimate_saves,
    estimate_traffic,
    work_per_token,
)
from launcher.memory import estimate_memory

SIZE = 360_748_032


def job_of(ds_config: str, **model: object) -> JobSpec:
    return parse_job(
        {
            "name": "plan",
            "model": {"preset": "ernie-4.5-0.3b", **model},
            "tokenizer": "tokenizer",
            "tokens_per_batch": "128K",
            "sources": {"web": {"path": "web.jsonl", "text": "text"}},
            "curriculum": [{"name": "only", "duration": "100 steps", "sequence_length": 4096, "mixture": {"web": 1.0}}],
            "schedule": {"kind": "constant", "peak": 1e-3},
            "engine": {"ds_config": ds_config, "precision": "bf16", "micro_batch_size": 2},
            "resources": {"gpus_per_node": 4},
        },
        "job.yaml",
    )


def shape_of(job: JobSpec) -> ModelShape:
    values = config_values(job.model)
    assert values is not None
    return ModelShape.from_config(values)


@pytest.mark.parametrize(
    ("ds_config", "sizes"),
    [
        ("zero0", 2),  # one all-reduce of the gradients
        ("zero1", 2 + 1),  # and the updated weights gathered
        ("zero2", 4 * 2 + 1),  # an all-reduce after each of 4 micro-batches
        ("zero3", 4 * (1 + 1)),  # for each micro-batch weights gathered once, gradients scattered
    ],
)
def test_bytes_on_the_wire_are_model_sizes_times_what_goes_around_the_ring(ds_config: str, sizes: int) -> None:
    job = job_of(ds_config)  # 32 sequences: 4 ranks x 4 micro-batches x 2
    sent = estimate_traffic(job, job.curriculum[0], shape_of(job), 4)
    assert sent.total == pytest.approx(sizes * 2 * SIZE * 3 / 4)
    assert estimate_traffic(job, job.curriculum[0], shape_of(job), 1).total == 0


def test_an_adapter_sends_its_own_gradients_and_nothing_of_the_frozen_base() -> None:
    job = job_of("zero2", adapter={"rank": 32})
    assert estimate_traffic(job, job.curriculum[0], shape_of(job), 4).total == pytest.approx(9 * 2 * 2_506_752 * 3 / 4)


def test_a_model_too_large_to_stay_gathered_is_gathered_for_every_use_and_holds_no_more_than_may_stay() -> None:
    job = job_of("zero3")
    large = ModelShape.from_config({**(config_values(job.model) or {}), "num_hidden_layers": 180})
    assert large.parameters > 1e9
    sent = estimate_traffic(job, job.curriculum[0], large, 4)
    embeddings = 4 * 2 * 103_424 * 1024 * 3 / 4  # tied: used as the head as well
    assert sent.weights == pytest.approx(2 * sent.gradients + 2 * embeddings)
    memory = estimate_memory(job, job.curriculum[0], large, 4)
    assert memory.weights == pytest.approx(2 * large.parameters / 4)
    assert memory.communication == pytest.approx(2e9 + 2 * 50e6), "and the bucket that its file asks for"


def test_pace_is_compute_and_what_of_the_wire_shows() -> None:
    job = job_of("zero2")
    stage, shape = job.curriculum[0], shape_of(job)
    alone = estimate_pace(job, stage, shape, Cluster.parse("1xA100-80G"))
    flops = 6 * (SIZE - 37 * 1024) + 12 * 18 * 2048 * 4096  # norms are no matrices
    assert alone.tokens_per_second == pytest.approx(ASSUMED_MFU * 312e12 / flops) and alone.waiting == 0
    four = estimate_pace(job, stage, shape, Cluster.parse("4xA100-80G"))
    computing = 131_072 / (4 * alone.tokens_per_second)
    wire = 9 * 2 * SIZE * 3 / 4 / (ASSUMED_LINK_SHARE * 300e9)
    assert 131_072 / four.tokens_per_second == pytest.approx(computing + (1 - ASSUMED_HIDDEN) * wire)
    across = Cluster.parse("16xA100-80G")
    assert (across.nodes, across.link) == (2, ASSUMED_LINK_SHARE * 25e9), "between nodes the network decides"


def test_what_is_computed_once_more_takes_its_time() -> None:
    job = job_of("zero2")
    stage, shape = job.curriculum[0], shape_of(job)
    layers = 18 * (1024 * (2 * 2048 + 2 * 256) + 3 * 1024 * 3072)
    forward, head = 2 * layers + 4 * 18 * 2048 * 4096, 2 * 103424 * 1024
    once = work_per_token(job, stage, shape)
    assert once == 3 * (forward + head)
    for changes, more in (
        ({"gradient_checkpointing": "full"}, forward),
        ({"gradient_checkpointing": 2}, forward / 2),
        ({"mlp_tiles": 4}, 2 * 18 * 3 * 1024 * 3072),
    ):
        changed = job.model_copy(update={"engine": job.engine.model_copy(update=changes)})
        assert work_per_token(changed, stage, shape) == pytest.approx(once + more)
    compared = stage.model_copy(update={"dpo": DpoSpec()})
    assert work_per_token(job, compared, shape) == once + head


def test_a_measured_speed_takes_the_place_of_the_assumed_one_and_of_the_wire_it_was_measured_with() -> None:
    job = job_of("zero2")
    stage, shape, four = job.curriculum[0], shape_of(job), Cluster.parse("4xCPU")
    speed = Speed(flops=50e9, update=2e-9, ranks=4)
    computing = 131_072 * shape.flops_per_token(4096) / (4 * 50e9) + 2e-9 * SIZE / 4  # each updates its quarter
    found = estimate_pace(job, stage, shape, four, speed)
    assert found.tokens_per_second == pytest.approx(131_072 / computing) and found.waiting == 0
    alone = Speed(flops=50e9, update=2e-9, ranks=1)
    assert estimate_pace(job, stage, shape, four, alone).waiting > 0, "one rank sent nothing when it was measured"


def test_saves_are_as_often_as_young_and_daly_say() -> None:
    job = job_of("zero2")
    saves = estimate_saves(job, shape_of(job), Cluster.parse("16xA100-80G"), node_lifetime=30 * 86400)
    assert saves.size == 14 * SIZE and saves.between_failures == 15 * 86400
    assert saves.every == pytest.approx(math.sqrt(2 * 14 * SIZE / 16 / 10e9 * 15 * 86400))


def test_the_whole_plan_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    devices = ["--gpus", "32xA100-80G", "--price", "2", "--mtbf", "30d", "--scaling"]
    assert main(["plan", "four-nodes-0.3b", *devices]) == 0
    said = capsys.readouterr().out
    for words in ("over InfiniBand", "waiting for the wire", "GPU hours", "at 2 an hour", "kWh", "(Young, Daly)"):
        assert words in said
    assert "not on 128, 256, 512, 1,024: the batch cannot be dealt out evenly" in said
    (alone, *more) = [line.split() for line in said.splitlines() if line.lstrip().split(" ")[0] in ("1", "2", "64")]
    assert "100%" in alone and len(more) == 2 and all("100%" not in line for line in more[1:])
    assert main(["plan", "four-nodes-0.3b", "--price", "2"]) == 2
    assert "name them with --gpus" in capsys.readouterr().err
