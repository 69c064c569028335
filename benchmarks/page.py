"""One page with a figure for every kept result: ours beside its baseline, with machine, date and command.

    python -m benchmarks page [--to docs/speed.html]

results/*.json --figures--> bars --page.html--> one file that needs nothing else
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, parser, say

PAGE = Path(__file__).resolve().parents[1] / "docs" / "speed.html"


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    text: str
    ours: bool
    """or what ours is held against"""


@dataclass(frozen=True)
class Figure:
    """Bars that can be compared: one unit, one run."""

    title: str
    says: str
    """the finding, in a sentence"""
    bars: list[Bar]
    better: str
    """longer or shorter"""
    met: bool | None = None
    """whether a goal was met, where there is one"""
    note: str = ""


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--to", type=Path, default=PAGE, help="(docs/speed.html)")
    arguments = command.parse_args()
    from ernie_dist.pages import put, template
    from ernie_dist.report.charts import DARK, LIGHT

    sections, missing = [], []
    for name, figures in FIGURES.items():
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            missing.append(name)
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        for run in found if isinstance(found, list) else [found]:
            sections.append({"name": name, "figures": list(figures(run)), "where": _where(run)})
    on_gpu = any(run["device"] != "cpu" for run in _runs("throughput"))
    page = template(Path(__file__).with_name("page.html")).render(
        sections=sections, missing=missing, on_gpu=on_gpu, light=LIGHT, dark=DARK
    )
    put(arguments.to, page)
    say(f"written to {arguments.to}")


def _runs(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _where(run: dict[str, Any]) -> str:
    machine, versions = run["machine"], run["versions"]
    device = run.get("device", "cpu")
    facts = [] if device == "cpu" else [device]
    facts += [f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB", machine.get("date", "")]
    facts += [f"{name} {versions[name]}" for name in ("torch", "deepspeed", "transformers") if name in versions]
    return "; ".join(filter(None, facts))


# -------------------------------------------------------------------------------------------------- a figure per result


_SIDES = {
    "trainer": "transformers.Trainer, padded rows",
    "trainer-packed": "the same, packed rows",
    "trainer-deepspeed": "the same on DeepSpeed",
    "bare": "bare torch loop, all logits",
    "compiled": "ours, compiled",
}


def _throughput(run: dict[str, Any]) -> Iterator[Figure]:
    for case in run["cases"]:
        bars = []
        for name, of in case["tokens_per_second"].items():
            memory = case.get("peak_memory_bytes", {}).get(name, 0) / 1e9
            mfu = case.get("mfu", {}).get(name)
            share = f", MFU {mfu['full attention']:.0%}" if mfu else ""
            text = f"{of['median']:,.0f}/s, {memory:.1f} GB{share}"
            bars.append(Bar(_SIDES.get(name, name), of["median"], text, name in ("ours", "compiled")))
        documents = f"documents of {case['mean_document']} tokens" if case["mean_document"] else "one document a row"
        ratios = (f"{name} {of['median']:.2f}" for name, of in case.get("ratio", {}).items())
        failed = (f"{name} could not run: {why}." for name, why in case["failed"].items())
        model = run["settings"]["model"].replace("small", "small model")
        rows = f"{case['micro_batch']} rows in a step, {case['precision']}, on {run['device']}."
        yield Figure(
            f"A training step: {model}, rows of {case['sequence_length']}, {documents}",
            f"Tokens of documents per second, ours over: {', '.join(ratios)}.",
            bars,
            "longer",
            note=" ".join([rows, "Beside the speed, the most memory a side held.", *failed, _parity(run)]),
        )


def _parity(run: dict[str, Any]) -> str:
    parity = run["parity"]
    ours = parity["difference from the plain engine"].get("ours")
    if not ours:
        return ""
    gap = f"at most {ours['largest']:.1g} nats from" if ours["largest"] else "equal to"
    return f"Our loss over {parity['steps']} steps: {gap} plain torch's."


def _head(run: dict[str, Any]) -> Iterator[Figure]:
    over, settings = run["over_all_logits"]["ours"], run["settings"]
    yield Figure(
        f"Head and loss alone: {settings['positions']:,} positions, vocabulary {settings['vocabulary']:,}",
        f"Ours takes {over['seconds']['median']:.2f} of the time and {over['peak_memory']:.2f} of the memory of logits "
        "of all positions at once.",
        [
            Bar(name, of["median"], f"{of['median']:.2f} s, {run['peak_bytes'][name] / 1e9:.2f} GB", name == "ours")
            for name, of in run["seconds"].items()
        ],
        "shorter",
    )


def _trainer(run: dict[str, Any]) -> Iterator[Figure]:
    labels = {"trainer": "transformers.Trainer, padded to 512", "ours": "ours, packed"}
    for name in ("medical", "medical, by title", "riddles"):
        case = run[name]
        yield Figure(
            f"Real questions and answers: {name}, {case['tokens_per_pair']:.0f} tokens a pair",
            f"{case['ratio']['median']:.1f} times the tokens of pairs per second; goal: {case['goal']} times.",
            [
                Bar(labels[side], of["median"], f"{of['median']:,.0f} tokens/s", side == "ours")
                for side, of in case["useful_tokens_per_second"].items()
            ],
            "longer",
            case["met"],
        )


def _overhead(run: dict[str, Any]) -> Iterator[Figure]:
    ratio, settings = run["ratio"], run["settings"]
    labels = {"ours": "our training loop, with events, schedule, stop file", "bare": "a bare DeepSpeed loop"}
    low, high = ratio["quartiles"]
    yield Figure(
        "What the training loop costs",
        f"{ratio['median']:.3f} times the bare loop's time (quartiles {low:.3f} to {high:.3f}); goal: {run['goal']}.",
        [
            Bar(labels[name], of["median"], f"{1000 * of['median']:.0f} ms a step", name == "ours")
            for name, of in run["seconds_per_step"].items()
        ],
        "shorter",
        run["met"],
        f"{settings['ranks']} CPU ranks, {settings['ds_config']}, {ratio['measurements']} pairs of blocks.",
    )


def _scaling(run: dict[str, Any]) -> Iterator[Figure]:
    note = f"One thread a rank; more ranks than {run['machine']['cores']} share the cores. alone: ranks that exchange "
    note += "nothing, so what this machine leaves of one rank's speed. ddp: torch's DistributedDataParallel."
    for scaling, title in (("weak", "as many rows on every rank"), ("strong", "the same rows on more ranks")):
        yield Figure(
            f"Scaling: {title}",
            "Time of a step, and efficiency against one rank.",
            [
                Bar(
                    f"{case['kind']}, {case['ranks']} rank{'s' if case['ranks'] > 1 else ''}",
                    case["seconds_per_step"]["median"],
                    f"{1000 * case['seconds_per_step']['median']:.0f} ms, {case['efficiency']:.0%}",
                    case["kind"].startswith("zero"),
                )
                for case in run["cases"]
                if case["scaling"] == scaling
            ],
            "shorter",
            note=note,
        )


def _startup(run: dict[str, Any]) -> Iterator[Figure]:
    seconds, phases = run["seconds"], run["launch phases"]
    yield Figure(
        "How long one waits for a command",
        "Goals: " + ", ".join(f"{name} {goal} s" for name, goal in run["goals"].items()) + ".",
        [Bar(name, of["median"], f"{of['median']:.2f} s", name.startswith("ernie")) for name, of in seconds.items()],
        "shorter",
        all(run["met"].values()),
    )
    *_, (imports, alone) = ((name, of) for name, of in seconds.items() if name.startswith("import"))
    yield Figure(
        "From ernie launch to the end of the first step",
        f"{run['launch to the first step']['median']:.1f} s in all, on {run['settings']['ranks']} CPU ranks.",
        [
            *(Bar(name, of["median"], f"{of['median']:.2f} s", True) for name, of in phases.items()),
            Bar(f"one process: {imports}", alone["median"], f"{alone['median']:.2f} s", False),
        ],
        "shorter",
    )


def _loader(run: dict[str, Any]) -> Iterator[Figure]:
    for case in (run["long"], run["short"]):
        share, says = case.get("share_of_a_step"), "Token positions per second into one rank's memory."
        if share is not None:
            assumed, goal = (run["settings"][name] for name in ("assumed_tokens_per_second_of_a_gpu", "goal"))
            says = f"{share:.2%} of a step of a GPU that trains on {assumed:,} tokens/s, which is an assumption; "
            says += f"goal: at most {goal:.0%}."
        yield Figure(
            f"Reading batches: documents of {case['mean_document']} tokens",
            says,
            [
                Bar(name, of["median"], f"{of['median'] / 1e6:,.1f} million positions/s", name.startswith("rank"))
                for name, of in case["tokens_per_second"].items()
            ],
            "longer",
            case.get("met"),
            "The slices of a memory map are the ceiling: nothing is done with them.",
        )


def _resume(run: dict[str, Any]) -> Iterator[Figure]:
    labels = {"start": "at the start", "resumed": "30 billion tokens in"}
    labels["resumed, plan in memory"] = "30 billion tokens in, plan in the page cache"
    bars = []
    for name, label in labels.items():
        seconds, memory = (run[name][key]["median"] for key in ("first_batch_seconds", "peak_memory_mb"))
        bars.append(Bar(f"first batch {label}", seconds, f"{seconds:.2f} s, {memory:.0f} MB", True))
    imports = run["start"]["imports_seconds"]["median"]
    yield Figure(
        "The first batch of a long job",
        f"Goal: under {run['goal']:g} s after the imports.",
        [*bars, Bar("the imports, not counted", imports, f"{imports:.2f} s", False)],
        "shorter",
        run["met"],
    )
    if plan := run.get("planning"):
        seconds, memory, goals = plan["seconds"]["median"], plan["peak_memory_mb"]["median"], plan["goals"]
        yield Figure(
            "Planning the packs of 30 billion tokens, once",
            f"{seconds:.1f} s and {memory:,.0f} MB, the memory-mapped files among them; "
            f"goals: {goals['seconds']:g} s and {goals['peak_memory_mb']:,.0f} MB.",
            [
                Bar("seconds", seconds / goals["seconds"], f"{seconds:.1f}", True),
                Bar("seconds: goal", 1.0, f"{goals['seconds']:g}", False),
                Bar("memory", memory / goals["peak_memory_mb"], f"{memory:,.0f} MB", True),
                Bar("memory: goal", 1.0, f"{goals['peak_memory_mb']:,.0f} MB", False),
            ],
            "shorter",
            plan["met"],
        )


def _prepare(run: dict[str, Any]) -> Iterator[Figure]:
    ratios = (f"{name}: {value:.2f}" for name, value in run["ratio"].items())
    yield Figure(
        "Tokenising",
        f"ernie prepare over {', '.join(ratios)}; goal: {run['goal']}.",
        [
            Bar(name, value, f"{value / 1e6:.2f} million tokens/s", name.startswith("prepare"))
            for name, value in run["tokens_per_second"].items()
        ],
        "longer",
        min(run["ratio"].values()) >= run["goal"],
    )


def _save(run: dict[str, Any]) -> Iterator[Figure]:
    labels = {"synchronous": "torch.save and fsync", "hashed": "torch.save, fsync and a hash", "ours": "ours"}
    yield Figure(
        "Steps stand still for a checkpoint",
        f"{run['blocked over synchronous']['median']:.2f} of the time of torch.save; goal: {run['blocked goal']}.",
        [
            Bar(labels[name], of["median"], f"{of['median']:.2f} s", name == "ours")
            for name, of in run["seconds"].items()
        ],
        "shorter",
        run["met"],
        f"{run['settings']['state_bytes'] / 1e9:.1f} GB; a step while the file is written takes "
        f"{run['step while written over step without']:.2f} of one without.",
    )


def _communication(run: dict[str, Any]) -> Iterator[Figure]:
    bars = []
    for row in run["rows"]:
        if row["checkpointing"] == "none" and row["micro_batches"] == 1:
            name, counted, planned = row["ds_config"], row["counted"], row["planned"]
            bars.append(Bar(f"{name}, counted", counted, f"{counted / 1e6:.1f} MB", True))
            bars.append(Bar(f"{name}, by the formula", planned, f"{planned / 1e6:.1f} MB", False))
    yield Figure(
        "Bytes that a rank sends in a step",
        f"At most {run['largest_deviation']:.2%} from what ernie plan says; goal: {run['goal']:.0%}.",
        bars,
        "shorter",
        run["met"],
    )


FIGURES: dict[str, Callable[[dict[str, Any]], Iterator[Figure]]] = {
    "throughput": _throughput,
    "head": _head,
    "trainer": _trainer,
    "overhead": _overhead,
    "scaling": _scaling,
    "startup": _startup,
    "loader": _loader,
    "resume": _resume,
    "prepare": _prepare,
    "save": _save,
    "communication": _communication,
}
"""in the order of the page"""


if __name__ == "__main__":
    main()
