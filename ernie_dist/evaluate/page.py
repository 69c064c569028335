"""comparison.html: question, reference and answers side by side. Self-contained: nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from ernie_dist.evaluate.bootstrap import Estimate
from ernie_dist.evaluate.results import FEW, estimate_text


def render(found: dict[str, Any]) -> str:
    """`found` is results.json. The rows travel as JSON inside the page and are written as text, never as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    environment.filters.update(span=_span)
    return environment.get_template("comparison.html").render(
        found=found,
        both="base" in found["models"],
        few=FEW,
    )


def _span(estimate: dict[str, float | None] | None, metric: str, signed: bool = False) -> str:
    if estimate is None or estimate["value"] is None:
        return "–"
    return estimate_text(metric, Estimate(**estimate), signed=signed)  # type: ignore[arg-type]
