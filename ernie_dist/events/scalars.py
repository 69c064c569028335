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
        if event.preference_accuracy is not None and event.preference_margin is not None:
            points["preference/accuracy"] = event.preference_accuracy
            points["preference/margin"] = event.preference_margin
        return points
    if isinstance(event, TimeSpent):
        return {"perf/goodput": goodput(event.seconds)}
    if isinstance(event, Evaluated):
        area = f"eval/{event.source}"
        return {
            f"{area}/loss": event.loss,
            **({} if event.pairs else {f"{area}/perplexity": perplexity(event.loss)}),
        }
    return {}
