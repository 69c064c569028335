"""Numbers as people read them, and text cut to the columns of a terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence


def human_count(number: float) -> str:
    """1234 -> 1.23K, in powers of 1000."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def human_bytes(number: float) -> str:
    """2048 -> 2.0 KiB, in powers of 1024, as free disk space is reported."""
    if number < 1024:
        return f"{number:.0f} B"
    for suffix in ("KiB", "MiB", "GiB"):
        number /= 1024
        if number < 1024:
            return f"{number:.1f} {suffix}"
    return f"{number / 1024:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """3725 -> 1:02:05; days in front where there are any."""
    days, rest = divmod(max(0, round(seconds)), 86400)
    hours, minutes, seconds = rest // 3600, rest % 3600 // 60, rest % 60
    if not days and not hours:
        return f"{minutes}:{seconds:02d}"
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"


def network_text(latency: float, bandwidth: float) -> str:
    """0.00021 s, 1.3e9 bytes/s -> what a preflight measured, in the units of nccl-tests."""
    return f"all-reduce in {1e3 * latency:.2g} ms, bus bandwidth {bandwidth / 1e9:.3g} GB/s"


def names_text(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is too large for a float."""
    return math.exp(loss) if not loss > 700 else math.inf


def perplexity_text(loss: float) -> str:
    """As many digits as tell two models apart."""
    value = perplexity(loss)
    if not value < 1e7:  # NaN too
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def display_width(text: str) -> int:
    """Columns on a terminal: Chinese characters take two, combining ones none."""
    return sum(_columns(character) for character in text)


def cut(text: str, width: int) -> str:
    """The beginning of `text` that fits into `width` columns, its end marked where something is left out."""
    if display_width(text) <= width:
        return text
    used, kept = 1, ""  # the mark takes one
    for character in text:
        used += _columns(character)
        if used > width:
            break
        kept += character
    return kept + "…" if width > 0 else ""


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Cc", "Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
