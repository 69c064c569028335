"""Learning rate as a pure function of the job and of Progress.

wsd (Hu et al. 2024, arXiv:2404.06395): linear warmup, stable at the peak, then a decay to the minimum along
1 - sqrt (Haegele et al. 2024, arXiv:2405.18392).
"""

from __future__ import annotations

import math

from ernie_dist.progress import Progress
from ernie_dist.spec.quantity import Quantity, Unit
from ernie_dist.spec.resolve import ResolvedJob, ResolvedStage


def learning_rate(job: ResolvedJob, progress: Progress) -> float:
    """The rate for the update that the batch at `progress.batch_index` makes."""
    stage = job.stage_at(progress.batch_index)
    position = job.consumed_tokens(progress.batch_index + 1) - stage.schedule_first_token
    return rate_at(stage, position)


def rate_at(stage: ResolvedStage, position: int) -> float:
    """The rate after `position` tokens of the stretch that shares the stage's schedule; the minimum at its end."""
    schedule, total = stage.schedule, stage.schedule_tokens
    warmup = _tokens(schedule.warmup, stage, stage.schedule_first_batch)
    if position < warmup:
        return schedule.peak * position / warmup
    if schedule.kind == "constant":
        return schedule.peak
    decay = _tokens(schedule.decay, stage, stage.schedule_last_batch) if schedule.decay else 0
    begin = max(warmup, total - decay) if schedule.kind == "wsd" else warmup
    if position <= begin or total <= begin:
        return schedule.peak
    done = min(1.0, (position - begin) / (total - begin))
    left = {
        "wsd": 1 - math.sqrt(done),
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
    }[schedule.kind]
    return schedule.minimum + (schedule.peak - schedule.minimum) * left


def _tokens(span: Quantity, stage: ResolvedStage, tokens_per_batch: int) -> int:
    if span.unit is Unit.PERCENT:
        return round(span.amount / 100 * stage.schedule_tokens)
    return int(span.amount * (tokens_per_batch if span.unit is Unit.STEPS else 1))
