"""What every benchmark needs: the facts of the machine, measurements in turns, a table and a result file.

{name: measure} --in turns--> {name: [value, ...]} --median--> table on the terminal, results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("ernie_dist", "torch", "deepspeed", "transformers", "accelerate", "tokenizers", "numpy")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with --quick. `description`: the module's docstring."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a short run to see that it works; its figures are not kept")
    return made


def in_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measures each once per round, in alternating order, so that a busy machine disturbs all of them alike."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        names = list(measures)
        for name in names if number % 2 == 0 else reversed(names):
            values[name].append(measures[name]())
            say(f"  round {number + 1}/{rounds}  {name}: {values[name][-1]:.4g}")
    return values


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median, quartiles and extremes, to `digits` significant digits."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    named = {"median": middle, "quartiles": [low, high], "range": [min(values), max(values)]}
    return {**_rounded(named, digits), "measurements": len(values)}


def show(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table, its numbers aligned to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        say("  ".join([first.ljust(widths[0]), *padded]))


def keep(name: str, result: Mapping[str, Any], *, quick: bool) -> None:
    """Writes results/NAME.json with the facts of the machine; not after a quick run."""
    if quick:
        say("a quick run: these figures mean little and are not kept")
        return
    _write(RESULTS / f"{name}.json", _with_machine(result))


def keep_run(name: str, result: Mapping[str, Any], *, quick: bool) -> None:
    """Adds a run to the list in results/NAME.json: it replaces only one of the same device and settings."""
    if quick:
        say("a quick run: these figures mean little and are not kept")
        return
    path = RESULTS / f"{name}.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    own = json.loads(json.dumps(_with_machine(result)))
    others = [run for run in runs if (run["device"], run["settings"]) != (own["device"], own["settings"])]
    _write(path, [*others, own])


def peak_resident_bytes() -> int:
    """The most memory this process ever held. Not getrusage: its maximum goes on from the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def say(text: str) -> None:
    """Progress, seen at once even through a pipe, and even where sys.stdout was pointed elsewhere."""
    print(text, flush=True, file=sys.__stdout__)


def _with_machine(result: Mapping[str, Any]) -> dict[str, Any]:
    return {**_rounded(result, 6), "machine": _machine(), "versions": _versions()}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        # At the end, with the benchmark's own share in it: far above the number of cores, others were at work.
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _rounded(value: Any, digits: int) -> Any:
    """Floats to so many significant digits: more of them would be noise."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item, digits) for item in value]
    return value
