"""What counts as a bad number, that a restart judges the same, and that skipped batches leave a job right."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from ernie_dist.data.loader import load_batches
from ernie_dist.engine.replicas import difference, digest
from ernie_dist.events.history import read_metrics, replayed_steps
from ernie_dist.guard import Guard, Recent
from ernie_dist.progress import Progress
from ernie_dist.rewind import check_position
from ernie_dist.spec.errors import CheckpointError, RunDirError
from ernie_dist.spec.resilience import BadNumbersSpec
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.spec.skips import SkippedWindow, Skips

SPEC = BadNumbersSpec(sigma=6.0, window=32)
INF, NAN = math.inf, math.nan


def trained(losses: list[float], norms: list[float] | None = None, stage: str = "a") -> Recent:
    recent = Recent()
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        recent = recent.after(SPEC, stage, loss, norm)
    return recent


chance = random.Random(3)
NOISY = [2.0 + chance.gauss(0, 0.1) for _ in range(32)]
FALLING = [8.0 * 0.9**step + 2 for step in range(32)]
TABLE = {
    # what: (last losses, last norms, stage, loss, grad_norm, what the reason says or None)
    "nothing known yet": ([], None, "a", 11.0, 500.0, None),
    "nan, nothing known yet": ([], None, "a", NAN, 1.0, "the loss is nan"),
    "infinite loss": (NOISY, None, "a", INF, 1.0, "the loss is inf"),
    "nan gradient under a finite loss": (NOISY, None, "a", 2.0, NAN, "the gradient norm is nan"),
    "infinite gradient": (NOISY, None, "a", 2.0, INF, "the gradient norm is inf"),
    "an ordinary step": (NOISY, None, "a", 2.2, 1.2, None),
    "three deviations": (NOISY, None, "a", 2.35, 1.0, None),
    "a spike": (NOISY, None, "a", 3.5, 1.0, "the loss is 3.5, more than 6 standard deviations"),
    "far below": (NOISY, None, "a", 0.1, 0.0, None),
    "a spike with too few steps before it": (NOISY[:15], None, "a", 30.0, 99.0, None),
    "a spike with just enough": (NOISY[:16], None, "a", 30.0, 1.0, "the loss is 30"),
    "the same in a new stage": (NOISY, None, "b", 30.0, 99.0, None),
    "nan in a new stage": (NOISY, None, "b", NAN, 1.0, "the loss is nan"),
    "constant, and a last digit": ([2.0] * 32, None, "a", 2.0 + 1e-6, 1.0 + 1e-6, None),
    "constant, and a real rise": ([2.0] * 32, None, "a", 2.2, 1.0, "the loss is 2.2"),
    "constant at zero, and next to nothing": ([0.0] * 32, [0.0] * 32, "a", 1e-3, 0.0, None),
    "learnt by heart, and one hard batch": ([1e-3] * 32, None, "a", 0.05, 1.0, None),
    "a loss that falls, then stays": (FALLING, None, "a", FALLING[-1], 1.0, None),
    "a norm four times the usual": (NOISY, [0.3] * 32, "a", 2.0, 1.19, None),
    "a norm ten times the usual": (NOISY, [0.3] * 32, "a", 2.0, 3.0, "the gradient norm is 3,"),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_is_refused_and_what_is_not(case: str) -> None:
    losses, norms, stage, loss, norm, expected = TABLE[case]
    reason = trained(losses, norms).problem(SPEC, stage, loss, norm)
    assert (reason is None) == (expected is None), reason
    assert reason is None or expected in reason


def test_what_is_refused_is_not_looked_back_on_and_a_restart_decides_the_same_to_the_last_bit() -> None:
    noise = random.Random(5)
    numbers = [(2 + noise.gauss(0, 0.3), abs(noise.gauss(1, 0.2))) for _ in range(200)]
    for at in (40, 41, 90):
        numbers[at] = (NAN, NAN)
    numbers[120] = (50.0, 1.0)
    straight, restarted = Guard(SPEC, Recent(), loss_scaling=False), Guard(SPEC, Recent(), loss_scaling=False)
    refused = []
    for step, (loss, norm) in enumerate(numbers):
        stage = "first" if step < 150 else "second"
        saved = json.dumps(restarted.recent.to_json(), indent=1)
        restarted = Guard(SPEC, Recent.from_json(json.loads(saved)), loss_scaling=False)
        applied = straight.accepts(stage, loss, norm)
        assert restarted.accepts(stage, loss, norm) == applied
        reason = straight.look(stage, loss, norm, applied=applied)
        assert restarted.look(stage, loss, norm, applied=applied) == reason
        assert restarted.recent == straight.recent
        assert (reason is None) == applied
        refused += [] if applied else [step]
    assert refused == [40, 41, 90, 120]
    assert len(straight.recent.losses) == SPEC.window


def test_an_engine_that_skips_by_itself_is_judged_and_loss_scaling_is_not() -> None:
    for scaling, loss, norm, refused in (
        (False, 2.0, INF, True),
        (False, NAN, INF, True),
        (True, 2.0, INF, False),
        (True, 2.0, NAN, False),
        (True, NAN, INF, True),
    ):
        guard = Guard(SPEC, trained(NOISY), loss_scaling=scaling)
        assert (guard.look("a", loss, norm, applied=False) is not None) == refused, (scaling, loss, norm)
        assert guard.recent == trained(NOISY), "a step that changed nothing is not looked back on"


def test_where_batches_are_uneven_only_what_is_not_finite_is_refused() -> None:
    guard = Guard(SPEC, trained(NOISY), loss_scaling=False, uneven=["a"])
    assert guard.accepts("a", 30.0, 99.0) and not guard.accepts("a", NAN, 1.0)
    assert not Guard(SPEC, trained(NOISY), loss_scaling=False).accepts("a", 30.0, 99.0)


def window(first: int, end: int, *, step: int = 0, attempt: int = 1) -> SkippedWindow:
    return SkippedWindow(first=first, end=end, step=step, attempt=attempt, reason="nan", sequence_ids=((0, 1),))


def test_skipped_batches_are_neither_read_nor_counted_wherever_they_lie(tmp_path) -> None:
    file = RunFiles(tmp_path).skipped_batches
    assert Skips.read(file) == Skips()
    Skips((window(3, 5), window(2, 7), window(9, 10))).write(file)  # the second goes over the first
    skips = Skips.read(file)
    assert [index for index in range(12) if index in skips] == [2, 3, 4, 5, 6, 9]
    assert [skips.next(index) for index in (0, 2, 4, 7, 9, 10)] == [0, 7, 7, 7, 10, 10]
    assert [skips.before(index) for index in (2, 4, 7, 9, 12)] == [0, 2, 5, 5, 6]
    assert [skips.behind(index) for index in (0, 2, 3, 7, 8, 10)] == [0, 2, 2, 2, 8, 9]
    reader = list(range(12))
    for ahead in (0, 2):
        assert list(load_batches(reader, 1, 12, ahead=ahead, without=skips)) == [1, 7, 8, 10, 11]
    check_position(Progress(3, 8, ""), skips, "c")
    for step, batch in ((8, 8), (4, 8), (2, 8)):
        with pytest.raises(CheckpointError, match=rf"skipped {batch - step} batch.* up to batch 8, and .* says 5"):
            check_position(Progress(step, batch, ""), skips, "c")
    for broken in ("[{", '[{"first": 1}]', "{}"):
        file.write_text(broken)
        with pytest.raises(RunDirError, match=r"skipped_batches\.json: cannot be read"):
            Skips.read(file)


def test_steps_that_a_run_went_back_behind_are_no_steps_of_it(tmp_path) -> None:
    files = RunFiles(tmp_path)
    attempts = [(1, range(1, 7)), (2, range(3, 5))]  # attempt 1 was refused at 5 and 6, the last of the job
    lines = [{"step": step, "attempt": attempt, "loss": 1.0} for attempt, steps in attempts for step in steps]
    files.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["step"] for line in read_metrics(files.metrics)] == [1, 2, 3, 4, 5, 6]
    Skips((window(4, 6, step=5, attempt=1),)).write(files.skipped_batches)
    assert [line["step"] for line in read_metrics(files.metrics)] == [1, 2, 3, 4]
    with files.metrics.open("a") as file:
        file.write(json.dumps({"step": 5, "attempt": 2, "loss": 2.0}) + "\n")
    assert [line["step"] for line in read_metrics(files.metrics)] == [1, 2, 3, 4, 5]
    assert [replay.step for replay in replayed_steps(files.metrics)] == [3, 4], "5 is another batch"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_one_bit_anywhere_or_two_elements_that_change_places_change_the_digest(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator).to(kind) for shape in ((3, 5), (1 << 20,), (7,), (700, 1500))]
    before = digest(tensors)
    assert before == digest([tensor.clone() for tensor in tensors])
    integer = {2: torch.int16, 4: torch.int32}[tensors[0].element_size()]
    places = [(number, place) for number, tensor in enumerate(tensors) for place in (0, tensor.numel() - 1)]
    seen = {before}
    for number, place in places:
        for bit in (0, 7, 8 * tensors[0].element_size() - 1):
            bits = tensors[number].view(-1).view(integer)
            kept = bits[place].clone()
            bits[place] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(integer)
            seen.add(digest(tensors))
            bits[place] = kept
    assert len(seen) == 1 + 3 * len(places)
    tensors[3][[0, -1]] = tensors[3][[-1, 0]]
    assert digest(tensors) not in seen


def test_the_rank_in_the_minority_is_named() -> None:
    assert difference(["a", "a"]) is None
    assert difference([None, None]) is None
    assert "rank 1 differ" in difference(["a", "b", "a"])
    assert "rank 0 and rank 3 differ" in difference(["b", "a", "a", "c", "a"])
    assert "rank 0 and rank 1 hold different" in difference(["a", "b"])
