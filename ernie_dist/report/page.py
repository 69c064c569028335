"""The page: report.html, self-contained, and loss_curve.png beside it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import yaml

from ernie_dist.events.wording import human_bytes, human_count, human_seconds, perplexity_text
from ernie_dist.pages import put, template
from ernie_dist.report import charts
from ernie_dist.report.data import RunSummary, collect

_PART_COLOURS = {
    "steps": "train",
    "start-up": "source-0",
    "restore": "source-3",
    "evaluation": "source-1",
    "save": "source-5",
    "export": "source-6",
    "lost": "restart",
    "waiting": "muted",
    "other": "grid",
}
MOST_REPLAYS = 12
"""rows of the table of steps executed twice; differing steps come first"""


def build_report(run_dir: Path) -> Path:
    """Writes report.html and loss_curve.png into `run_dir`, of a run finished or not; returns the page.

    Raises RunDirError if `run_dir` is no run directory.
    """
    run = collect(run_dir)
    put(run.files.loss_curve, charts.loss_png(run))
    put(run.files.report, render(run))
    return run.files.report


def render(run: RunSummary) -> str:
    """The page as text."""
    page = template(
        Path(__file__).with_name("template.html"),
        count=human_count,
        bytes=human_bytes,
        duration=human_seconds,
        perplexity=perplexity_text,
        number=_number,
        loss=_loss,
        percent=_percent,
        ppl=lambda value: "–" if value is None else perplexity_text(math.log(value)),
        when=lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)),
        tint=_tint,
    )
    replays = sorted(run.replays, key=lambda replay: (replay.identical, replay.step))
    return page.render(
        run=run,
        spec=run.job.spec,
        light=charts.LIGHT,
        dark=charts.DARK,
        wide=charts.loss_svg(run, narrow=False),
        narrow=charts.loss_svg(run, narrow=True),
        by_stage=[(stage.name, charts.stage_svg(run, stage)) for stage in run.stages if 0 < stage.steps < run.steps],
        learning_rate=charts.line_svg(run, "learning_rate", "learning rate"),
        speed=charts.line_svg(run, "tokens_per_second", "tokens/s"),
        grad_norm=charts.line_svg(run, "grad_norm", "gradient norm"),
        replays=replays[:MOST_REPLAYS],
        same_ranks=len({attempt.world_size for attempt in run.attempts}) <= 1,
        job_yaml=_job_yaml(run),
        versions=_version_columns(run),
        part_colours=_PART_COLOURS,
    )


def _version_columns(run: RunSummary) -> list[tuple[str, dict[str, str]]]:
    """The versions, and from which attempt on: a run may be preempted fifty times without a change."""
    columns: list[tuple[str, dict[str, str]]] = []
    for attempt in run.attempts:
        if not columns or columns[-1][1] != attempt.versions:
            columns.append((f"from attempt {attempt.number}", attempt.versions))
    return columns


def _job_yaml(run: RunSummary) -> str:
    values: dict[str, Any] = run.job.spec.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _tint(change: float | None) -> str:
    """CSS of a cell: green where the loss fell, red where it rose; one nat is full strength."""
    if change is None or abs(change) < 0.005:
        return ""
    strength = round(12 + 48 * min(1.0, abs(change)))
    return f"background: color-mix(in srgb, var(--{'learned' if change < 0 else 'forgotten'}) {strength}%, transparent)"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
