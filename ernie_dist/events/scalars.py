"""The curves of a run under the names every tracker shows them by: area/quantity. Their x axis is the step."""

from __future__ import annotations

from ernie_dist.events.event import Evaluated, Event, StepFinished, TimeSpent
from ernie_dist.events.goodput import goodput
from ernie_dist.events.wording import perplexity


def scalars(event: Event) -> dict[str, float]:
    """The points an event adds; none for what is not a measurement."""
    if isinstance(event, StepFinished):
        points = {
            "train/loss": event.loss,
            "train/consumed_tokens": float(event.consumed_tokens),
            "optim/lr": event.learning_rate,
            "optim/grad_norm": event.grad_norm,
            "perf/tokens_per_second": event.tokens_per_second,
        }
        if event.mfu is not None:
            points["perf/mfu"] = event.mfu
        if event.rank_imbalance is not None:
            points["perf/rank_imbalance"] = event.rank_imbalance
        return points
    if isinstance(event, TimeSpent):
        return {"perf/goodput": goodput(event.seconds)}
    if isinstance(event, Evaluated):
        return {f"eval/{event.source}/loss": event.loss, f"eval/{event.source}/perplexity": perplexity(event.loss)}
    return {}
