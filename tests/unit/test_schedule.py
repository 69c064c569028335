"""The learning rate is a pure function of the job and of where the run is, and has the shape its name promises."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_dist.progress import Progress
from ernie_dist.schedule import learning_rate
from ernie_dist.spec.job import parse_job
from ernie_dist.spec.resolve import PackedLength, ResolvedJob, ResolvedSource, ResolvedTokenizer, resolve

PEAK, MINIMUM, BATCH = 1e-2, 1e-4, 64


def make_job(schedule: dict[str, Any] | None, *stages: tuple[int, dict[str, Any]]) -> ResolvedJob:
    """One stage of 100 steps, or stages of so many steps with what is special about each."""
    raw = {
        "name": "t",
        "model": {"preset": "ernie-4.5-tiny"},
        "tokenizer": "folder",
        "tokens_per_batch": BATCH,
        "sources": {"web": {"path": "web.jsonl", "text": "text", "repeat": True}},
        "curriculum": [
            {"name": f"s{n}", "duration": f"{steps} steps", "sequence_length": 32, "mixture": {"web": 1.0}, **more}
            for n, (steps, more) in enumerate(stages or ((100, {}),))
        ],
        "schedule": schedule and {"peak": PEAK, "minimum": MINIMUM, **schedule},
    }
    facts = {"fingerprint": "f", "kind": "text", "packed": {32: PackedLength(sequences=99, tokens=3000)}}
    source = ResolvedSource(folder="web", held_out=False, **facts)
    tokenizer = ResolvedTokenizer(folder="t", fingerprint="t", vocab_size=64)
    return resolve(parse_job(raw, "test"), tokenizer, {"web": source})


def rates(job: ResolvedJob) -> list[float]:
    """The rate of every step."""
    return [learning_rate(job, Progress(step, step, "")) for step in range(job.total_batches)]


def test_wsd_warms_up_stays_and_decays_along_one_minus_sqrt() -> None:
    found = rates(make_job({"kind": "wsd", "warmup": "10 steps", "decay": "40 steps"}))
    assert found[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert set(found[10:60]) == {PEAK}
    decay = [MINIMUM + (PEAK - MINIMUM) * (1 - math.sqrt((step + 1) / 40)) for step in range(40)]
    assert found[60:] == pytest.approx(decay)


def test_cosine_and_linear_fall_from_the_peak_to_the_minimum() -> None:
    cosine, linear = (rates(make_job({"kind": kind, "warmup": "20 steps"})) for kind in ("cosine", "linear"))
    for found in (cosine, linear):
        assert found[19] == PEAK == max(found) and found[99] == pytest.approx(MINIMUM)
        assert found[:20] == pytest.approx(np.linspace(PEAK / 20, PEAK, 20))
        assert found[59] == pytest.approx((PEAK + MINIMUM) / 2), "half way"
        assert all(later < earlier for earlier, later in pairwise(found[19:]))
    assert np.diff(linear[19:]) == pytest.approx((MINIMUM - PEAK) / 80)
    quarter = MINIMUM + (PEAK - MINIMUM) * (1 + math.cos(math.pi / 4)) / 2
    assert cosine[39] == pytest.approx(quarter)


def test_constant_stays_at_the_peak() -> None:
    found = rates(make_job({"kind": "constant", "warmup": "4 steps"}))
    assert found[:4] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK]) and set(found[4:]) == {PEAK}


@given(
    kind=st.sampled_from(["wsd", "cosine", "linear", "constant"]),
    steps=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    warmup=st.integers(0, 120),
    decay=st.integers(1, 120),
)
def test_every_shape_is_above_zero_continuous_and_ends_where_it_says(
    kind: str, steps: list[int], warmup: int, decay: int
) -> None:
    total = sum(steps)
    schedule = {"kind": kind, "warmup": f"{warmup} steps"} | ({"decay": f"{decay} steps"} if kind == "wsd" else {})
    found = rates(make_job(schedule, *((count, {}) for count in steps)))
    assert all(0 < rate <= PEAK for rate in found)
    if kind != "constant" and warmup < total:
        assert found[-1] == pytest.approx(MINIMUM)
    rising = min(warmup, total)
    assert all(later > earlier for earlier, later in pairwise(found[:rising]))
    assert all(later <= earlier for earlier, later in pairwise(found[max(0, rising - 1) :]))
    falling = min(decay, total - rising) if kind == "wsd" else total - rising
    steepest = {"wsd": lambda n: n**-0.5, "cosine": lambda n: math.pi / 2 / n, "linear": lambda n: 1 / n}
    bound = steepest[kind](falling) if falling and kind != "constant" else 0
    jump = PEAK * max(1 / warmup if warmup else 0, bound)
    assert all(abs(later - earlier) <= jump * 1.0001 for earlier, later in pairwise(found))


def test_spans_in_steps_tokens_and_percent_are_the_same_span() -> None:
    spans = [("10 steps", "40 steps"), (f"{10 * BATCH} tokens", f"{40 * BATCH} tokens"), ("10 %", "40 %")]
    found = [rates(make_job({"kind": "wsd", "warmup": warmup, "decay": decay})) for warmup, decay in spans]
    assert found[0] == pytest.approx(found[1]) and found[0] == pytest.approx(found[2])


def test_stages_of_other_batches_share_one_stretch_in_tokens() -> None:
    job = make_job({"kind": "linear"}, (10, {}), (5, {"tokens_per_batch": 4 * BATCH}), (10, {}))
    found = rates(job)
    tokens = np.cumsum([BATCH] * 10 + [4 * BATCH] * 5 + [BATCH] * 10)
    assert found == pytest.approx(PEAK + (MINIMUM - PEAK) * tokens / (40 * BATCH))
    assert job.total_tokens == 40 * BATCH


def test_a_stage_with_its_own_schedule_re_warms_and_cuts_the_stretch() -> None:
    own = {"kind": "cosine", "peak": 5e-3, "minimum": 0.0, "warmup": "50 %"}
    job = make_job({"kind": "linear", "warmup": "5 steps"}, (20, {}), (20, {}), (10, {"schedule": own}), (20, {}))
    found = rates(job)
    alone = rates(make_job({"kind": "linear", "warmup": "5 steps"}, (40, {})))
    assert found[:40] == pytest.approx(alone), "neighbours without a schedule are one stretch"
    assert found[40:45] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3]) and found[49] == pytest.approx(0)
    assert found[50:] == pytest.approx(rates(make_job({"kind": "linear", "warmup": "5 steps"}, (20, {}))))


def test_the_rate_depends_on_the_data_consumed_and_on_nothing_else() -> None:
    job = make_job({"kind": "cosine", "warmup": "20 steps"})
    in_order = rates(job)
    backwards = [learning_rate(job, Progress(0, index, "some hash")) for index in reversed(range(100))]
    assert backwards[::-1] == in_order
    assert rates(ResolvedJob.model_validate_json(job.model_dump_json())) == in_order, "what every rank reads"


def test_spans_in_steps_mean_the_batches_at_the_end_they_lie_at() -> None:
    stages = (50, {}), (50, {"tokens_per_batch": 4 * BATCH})
    found = rates(make_job({"kind": "wsd", "warmup": "20 steps", "decay": "10 steps"}, *stages))
    assert found[19] == PEAK and set(found[19:90]) == {PEAK}, "no second warm-up where batches become larger"
    assert found[90] < PEAK and found[99] == pytest.approx(MINIMUM)
