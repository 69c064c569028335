"""comparison.html: question, reference and answers side by side. Self-contained: nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ernie_dist.evaluate.bootstrap import Estimate
from ernie_dist.evaluate.results import FEW, estimate_text
from ernie_dist.pages import template


def render(found: dict[str, Any]) -> str:
    """`found` is results.json. The rows travel as JSON inside the page and are written as text, never as HTML."""
    page = template(Path(__file__).with_name("comparison.html"), span=_span)
    return page.render(found=found, both="base" in found["models"], few=FEW)


def _span(estimate: dict[str, float | None] | None, metric: str, signed: bool = False) -> str:
    if estimate is None or estimate["value"] is None:
        return "–"
    return estimate_text(metric, Estimate(**estimate), signed=signed)  # type: ignore[arg-type]
