"""Pictures of a run: SVG for the page, in colours that the page's theme decides, and one PNG.

matplotlib is imported when a chart is drawn, and without pyplot: no display, no global state.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie_dist.report.data import RunSummary, StageSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 1200
"""of a curve: more cannot be seen, and would make the page heavy"""
ROLES = ("ink", "muted", "grid", "train", "raw", "restart", *(f"source-{number}" for number in range(8)))
"""The page defines a colour for each, for light and for dark."""
LIGHT = {
    "ink": "#1b2430",
    "muted": "#667085",
    "grid": "#e4e7ec",
    "train": "#1d4ed8",
    "raw": "#b6c8f5",
    "restart": "#b42318",
    "source-0": "#d97706",
    "source-1": "#0f9d74",
    "source-2": "#a21caf",
    "source-3": "#0891b2",
    "source-4": "#be123c",
    "source-5": "#65a30d",
    "source-6": "#6d28d9",
    "source-7": "#854d0e",
}
DARK = {
    "ink": "#e6eaf0",
    "muted": "#98a2b3",
    "grid": "#2b3340",
    "train": "#7ea6ff",
    "raw": "#33456e",
    "restart": "#ff8a80",
    "source-0": "#fbbf24",
    "source-1": "#4ade9f",
    "source-2": "#e879f9",
    "source-3": "#4dd0e6",
    "source-4": "#ff7a93",
    "source-5": "#a3e635",
    "source-6": "#b79cff",
    "source-7": "#d6a869",
}
_SENTINELS = {role: f"#00fe{number:02x}" for number, role in enumerate(ROLES)}
"""Colours drawn into an SVG and then replaced by the page's variables."""


@dataclass(frozen=True)
class Scale:
    """Token axis in the unit that suits its length."""

    divisor: float
    label: str

    @classmethod
    def of(cls, tokens: int) -> Scale:
        for divisor, name in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
            if tokens >= 2 * divisor:
                return cls(divisor, f"{name}tokens")
        return cls(1.0, "tokens")


def loss_svg(run: RunSummary, *, narrow: bool) -> str:
    """Train and held-out loss over tokens."""
    with _figure((4.6, 4.4) if narrow else (10.6, 4.3), _SENTINELS, "narrow" if narrow else "wide") as figure:
        _draw_loss(run, figure.add_subplot(), _SENTINELS, narrow=narrow)
        return _svg(figure)


def stage_svg(run: RunSummary, stage: StageSummary) -> str:
    """The same of one stage and its own sources, on scales of its own."""
    end = stage.first_token + stage.tokens
    mixture = next(one.mixture for one in run.job.stages if one.name == stage.name)
    within = {  # the others stay, empty: a source has one colour on the whole page
        source: [(x, y) for x, y in points if source in mixture and stage.first_token <= x <= end]
        for source, points in run.held_out.items()
    }
    part = replace(
        run,
        metrics=[step for step in run.metrics if step["stage"] == stage.name],
        held_out=within,
        stages=[stage],
        restarts=[tokens for tokens in run.restarts if stage.first_token <= tokens <= end],
        best=run.best if run.best and stage.first_token < _tokens_at(run, run.best["step"]) <= end else None,
    )
    with _figure((4.2, 3.2), _SENTINELS, f"stage-{stage.name}") as figure:
        _draw_loss(part, figure.add_subplot(), _SENTINELS, narrow=True)
        return _svg(figure)


def line_svg(run: RunSummary, name: str, label: str) -> str:
    """One column of the metrics over tokens, e.g. learning_rate."""
    with _figure((3.9, 2.3), _SENTINELS, name) as figure:
        _draw_line(run, figure.add_subplot(), _SENTINELS, name, label)
        return _svg(figure)


def loss_png(run: RunSummary) -> bytes:
    """Loss over tokens with the learning rate below it, on white."""
    with _figure((10.6, 6.2), LIGHT, "png") as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw_loss(run, above, LIGHT, label=False)
        _draw_line(run, below, LIGHT, "learning_rate", "learning rate")
        figure.suptitle(run.job.spec.name, x=0.01, ha="left", fontsize=12, fontweight="bold")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150, facecolor="white")
        return picture.getvalue()


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` values around each one, over fewer near the ends so that it never leans to one side."""
    count = len(values)
    finite = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(count)
    reach = np.minimum(window // 2, np.minimum(index, count - 1 - index))
    first, end = index - reach, index + reach + 1
    with np.errstate(invalid="ignore"):  # a window without a finite value is not drawn
        return (totals[end] - totals[first]) / (counts[end] - counts[first])


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points that keep every peak: the lowest and the highest of each block, in order."""
    if len(x) <= most:
        return x, y
    blocks = np.array_split(np.arange(len(x)), most // 2)
    filled = np.where(np.isfinite(y), y, 0.0)
    kept = sorted({int(block[pick(filled[block])]) for block in blocks for pick in (np.argmin, np.argmax)})
    return x[kept], y[kept]


def _draw_loss(
    run: RunSummary, axes: Axes, colours: dict[str, str], *, narrow: bool = False, label: bool = True
) -> None:
    """`narrow`: for a phone. `label`: whether the token axis is named here, or by the axes below."""
    scale = Scale.of(run.tokens)
    tokens = _column(run, "consumed_tokens") / scale.divisor
    losses = _column(run, "loss")
    few = len(losses) < 2
    if len(losses):
        # A stage has a loss level of its own: smoothing across a boundary would draw a slope that never was.
        window = max(3, len(losses) // 30)
        stages = [step["stage"] for step in run.metrics]
        starts = [index for index in range(len(stages)) if index == 0 or stages[index] != stages[index - 1]]
        axes.plot(*thin(tokens, losses), color=colours["raw"], linewidth=0.9, marker="o" if few else "", zorder=2)
        for begin, end in zip(starts, [*starts[1:], len(losses)], strict=True):
            part = slice(begin, end)
            axes.plot(
                *thin(tokens[part], smooth(losses[part], window)),
                color=colours["train"],
                linewidth=1.8,
                marker="o" if few else "",
                label="train" if begin == 0 else None,
                zorder=3,
            )
    for number, (source, points) in enumerate(run.held_out.items()):
        if not points:
            continue
        axes.plot(
            [x / scale.divisor for x, _ in points],
            [y for _, y in points],
            color=colours[f"source-{number % 8}"],
            linestyle="-" if number < 8 else "--",
            linewidth=1.3,
            marker="o",
            markersize=4,
            label=f"held-out {source}",
            zorder=4,
        )
        if len(points) > 2:
            lowest = min(points, key=lambda point: point[1])
            axes.plot(
                *([lowest[0] / scale.divisor], [lowest[1]]),
                color=colours[f"source-{number % 8}"],
                marker="o",
                markersize=10,
                markerfacecolor="none",
                zorder=4,
            )
    if run.best is not None:
        axes.axvline(
            _tokens_at(run, run.best["step"]) / scale.divisor,
            color=colours["ink"],
            linewidth=1.0,
            label=f"best: step {run.best['step']:,}",
            zorder=1,
        )
    shown = [*losses[np.isfinite(losses)], *(y for points in run.held_out.values() for _, y in points)]
    if shown and min(shown) > 0 and max(shown) / min(shown) > 30:
        axes.set_yscale("log")
    _draw_stages(run, axes, colours, scale, names=True)
    _draw_restarts(run, axes, colours, scale, label=True)
    axes.set_xlabel(scale.label if label else "")
    axes.set_ylabel("loss (nats per token)")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if narrow else min(6, len(labels))
        below = (-0.16 if narrow else -0.15) if label else -0.03
        axes.legend(loc="upper left", bbox_to_anchor=(0, below), ncols=columns, frameon=False, borderpad=0)
    if not shown:
        _say(axes, colours, "no step has been made yet")


def _draw_line(run: RunSummary, axes: Axes, colours: dict[str, str], name: str, label: str) -> None:
    scale = Scale.of(run.tokens)
    values = _column(run, name)
    tokens = _column(run, "consumed_tokens") / scale.divisor
    axes.plot(*thin(tokens, values), color=colours["train"], linewidth=1.4, marker="o" if len(values) < 2 else "")
    axes.set_ylim(bottom=0)
    _draw_stages(run, axes, colours, scale, names=False)
    _draw_restarts(run, axes, colours, scale, label=False)
    axes.set_xlabel(scale.label)
    axes.set_ylabel(label)
    if not len(values):
        _say(axes, colours, "no step has been made yet")


def _draw_stages(run: RunSummary, axes: Axes, colours: dict[str, str], scale: Scale, *, names: bool) -> None:
    first, end = run.stages[0].first_token, run.tokens or run.job.total_tokens
    axes.set_xlim(first / scale.divisor, (first + (end - first) * 1.01) / scale.divisor)
    begun = [stage for stage in run.stages if stage.steps]
    for index, stage in enumerate(begun):
        left = stage.first_token / scale.divisor
        if index:
            axes.axvline(left, color=colours["muted"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        if names:
            middle = left + stage.tokens / scale.divisor / 2
            axes.annotate(
                stage.name,
                (middle, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 5 + 11 * _row(run, index, begun)),
                textcoords="offset points",
                ha="center",
                color=colours["muted"],
                fontsize=9,
            )


def _row(run: RunSummary, index: int, begun: Sequence[Any]) -> int:
    """Names of narrow stages are written on two rows, in turn."""
    narrow = any(stage.tokens < 0.12 * run.tokens for stage in begun)
    return index % 2 if narrow else 0


def _draw_restarts(run: RunSummary, axes: Axes, colours: dict[str, str], scale: Scale, *, label: bool) -> None:
    for number, tokens in enumerate(run.restarts):
        axes.axvline(
            tokens / scale.divisor,
            color=colours["restart"],
            linewidth=1.0,
            linestyle=(0, (1, 2)),
            label="went on from a checkpoint" if label and number == 0 else None,
            zorder=1,
        )


def _tokens_at(run: RunSummary, step: int) -> int:
    return next((line["consumed_tokens"] for line in run.metrics if line["step"] == step), run.tokens)


def _say(axes: Axes, colours: dict[str, str], text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=colours["muted"])


def _column(run: RunSummary, name: str) -> np.ndarray:
    return np.array([math.nan if step[name] is None else step[name] for step in run.metrics], dtype=float)


@contextmanager
def _figure(size: tuple[float, float], colours: dict[str, str], salt: str) -> Iterator[Figure]:
    """A figure of `size` inches whose axes are drawn plainly in `colours`."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "axes.edgecolor": colours["grid"],
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.labelcolor": colours["muted"],
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.facecolor": "none",
        "axes.formatter.use_mathtext": False,
        "axes.formatter.limits": (-3, 6),
        "axes.xmargin": 0.01,
        "figure.facecolor": "none",
        "font.size": 9,
        "grid.color": colours["grid"],
        "grid.linewidth": 0.8,
        "legend.labelcolor": colours["ink"],
        "svg.fonttype": "none",  # text stays text: the reader's fonts know Chinese
        "svg.hashsalt": salt,  # ids differ between the charts of one page, and not between two builds
        "text.color": colours["ink"],
        "xtick.color": colours["grid"],
        "xtick.labelcolor": colours["muted"],
        "ytick.color": colours["grid"],
        "ytick.labelcolor": colours["muted"],
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield Figure(figsize=size, layout="constrained")


def _svg(figure: Figure) -> str:
    """The bare <svg> element, its colours those of the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows what <svg> is
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    for role, sentinel in _SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{role})")
    return svg
