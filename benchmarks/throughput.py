"""Tokens per second of our engine's step, beside what one would train with instead, on a CPU or a GPU.

    python -m benchmarks throughput [--device cuda] [--against trainer trainer-packed trainer-deepspeed bare] [--quick]

All sides train the same model from the same weights on the same made-up tokens, with the same AdamW, clipping and
learning rate, on one device. Each has a process of its own, and they take turns. Rows are in memory and tokens have
frequencies like words': data is no part of this. A step is one micro-batch. On a GPU every length comes twice: with
rows of one document, as published figures have them, and with rows of several, as jobs do. What is counted are tokens
of documents; the padded side has fewer of them in a row. First of all the sides train without being timed, a row of
several documents in a step, and their losses are held against those of our plain engine. A result is added to
results/throughput.json and replaces only one of the same device with the same settings.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from benchmarks.harness import in_turns, keep_run, parser, say, show, spread
from benchmarks.sides import SIDES, Case, packed_lengths, padded_lengths, run_side

OTHERS = ("trainer", "trainer-packed", "trainer-deepspeed", "bare", "plain", "compiled", "bf16")
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""with the vocabulary of ERNIE 4.5: small enough for a CPU, and as heavy in the head as the real ones"""
VOCABULARY = 103424
ON_GPU = {"model": "ernie-4.5-0.3b", "precision": "bf16", "sequence_length": [4096, 2048, 8192], "positions": 16384}
ON_GPU |= {"mean_document": [0, 512], "steps": 5, "rounds": 3, "parity": 100, "against": list(OTHERS[:6])}
ON_CPU = {"model": "small", "precision": "fp32", "sequence_length": [512], "positions": 1024}
ON_CPU |= {"mean_document": [128], "steps": 2, "rounds": 3, "parity": 5, "against": list(OTHERS[:4])}
QUICK = {"steps": 1, "rounds": 1, "parity": 2}
PARITY_DOCUMENT = 256
"""mean tokens of a document while losses are compared: rows of several, which no side may mix up"""


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        run_side(arguments.worker[0], Case.from_json(arguments.worker[1]))
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    settings = {key: value for key, value in vars(arguments).items() if key not in ("worker", "quick", "minutes")}
    result: dict[str, Any] = {
        "what": "tokens of documents per second of training on one device; a ratio is ours over the side's",
        "sides": {name: side.what for name, side in SIDES.items()},
        "settings": settings,
        "cases": [],
    }
    cases, longest = _cases(arguments), 0.0
    result["device"], result["parity"] = _parity(cases[0], arguments, deadline)
    for number, case in enumerate(cases):
        if time.monotonic() + longest > deadline:
            say(f"{len(cases) - number} of {len(cases)} cases left out: --minutes {arguments.minutes:g} would not do")
            break
        began = time.monotonic()
        result["cases"].append(_measured(case, arguments, result["device"], deadline))
        longest = max(longest, time.monotonic() - began)
        keep_run("throughput", result, quick=arguments.quick)  # what has been measured is kept, whatever comes


def _arguments() -> argparse.Namespace:
    command = parser(__doc__)
    command.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if there is one")
    command.add_argument(
        "--against", nargs="+", choices=OTHERS, help="the other sides (CPU: the first four; GPU: all but bf16)"
    )
    command.add_argument("--model", help="a preset, or small (CPU: small; GPU: ernie-4.5-0.3b)")
    command.add_argument("--precision", choices=("bf16", "fp32"), help="CPU: fp32; GPU: bf16")
    command.add_argument("--zero", choices=("zero0", "zero1", "zero2", "zero3"), default="zero2", help="(zero2)")
    command.add_argument("--sequence-length", nargs="+", type=int, help="CPU: 512; GPU: 4096 2048 8192")
    command.add_argument("--micro-batch", type=int, help="rows in a step (CPU: 1024 positions; GPU: 16384)")
    command.add_argument("--mean-document", nargs="+", type=int, help="tokens; 0: a row is one (CPU: 128; GPU: 0 512)")
    command.add_argument("--steps", type=int, help="in a turn, after one that is not timed (CPU: 2; GPU: 5)")
    command.add_argument("--rounds", type=int, help="turns of each side (3)")
    command.add_argument("--parity", type=int, help="steps whose losses are compared (CPU: 5; GPU: 100)")
    command.add_argument("--minutes", type=float, default=7.5, help="begin no case that would end later (7.5)")
    command.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = command.parse_args()
    if arguments.device is None:
        arguments.device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    defaults = ON_CPU if arguments.device == "cpu" else ON_GPU
    if arguments.quick:
        defaults = {**defaults, **QUICK, **({"sequence_length": [128], "positions": 128} if defaults is ON_CPU else {})}
    for name, value in defaults.items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    return arguments


def _cases(arguments: argparse.Namespace) -> list[Case]:
    small = {"preset": "ernie-4.5-0.3b", "override": SMALL}
    return [
        Case(
            device=arguments.device,
            precision=arguments.precision,
            model=small if arguments.model == "small" else {"preset": arguments.model},
            vocabulary=VOCABULARY,
            zero=arguments.zero,
            sequence_length=length,
            micro_batch=arguments.micro_batch or max(1, arguments.positions // length),
            mean_document=mean,
        )
        for length in arguments.sequence_length
        for mean in arguments.mean_document
    ]


# ------------------------------------------------------------------------------------------------------------ measuring


class _Running:
    """A side's process."""

    def __init__(self, name: str, case: Case, folder: Path, deadline: float) -> None:
        self.name, self._deadline, self._log = name, deadline, folder / f"{name}.log"
        own = [sys.executable, "-m", "benchmarks.throughput", "--worker", name, case.to_json()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                own,
                cwd=folder,
                env=_environment(case),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.error = self.device = ""
        self.peak_bytes = 0

    def answer(self) -> dict[str, Any]:
        """What the process says next. A side that cannot go on is no reason to give up the others."""
        output: IO[str] = self._process.stdout  # type: ignore[assignment]
        left = max(1.0, self._deadline + 30 - time.monotonic())
        line = output.readline() if select.select([output], [], [], left)[0] else '{"error": "no answer in time"}'
        said = json.loads(line or '{"error": "its process ended"}')
        if "error" in said:
            self.error = said["error"]
            say(f"  {self.name}: {self.error}\n" + "\n".join(self._log.read_text(errors="replace").splitlines()[-6:]))
            self.end()
        return said

    def turn(self, warm_up: int, steps: int) -> dict[str, Any]:
        if self.error:
            return {"error": self.error}
        with suppress(OSError):  # its answer, or that there is none, says why
            print(json.dumps([warm_up, steps]), file=self._process.stdin, flush=True)
        said = self.answer()
        self.peak_bytes = max(self.peak_bytes, said.get("peak_bytes", 0))
        return said

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def _started(names: Sequence[str], case: Case, deadline: float) -> Iterator[dict[str, _Running]]:
    """The sides, built and waiting; those that could not be built have an error."""
    with tempfile.TemporaryDirectory() as scratch:
        sides = {name: _Running(name, case, Path(scratch), deadline) for name in names}
        try:
            for side in sides.values():
                side.device = side.answer().get("device", "")
            yield sides
        finally:
            for side in sides.values():
                side.end()


def _parity(case: Case, arguments: argparse.Namespace, deadline: float) -> tuple[str, dict[str, Any]]:
    """The device, and the first losses of all sides on the same rows."""
    case = replace(case, micro_batch=1, mean_document=min(PARITY_DOCUMENT, case.sequence_length // 4))
    names = list(dict.fromkeys(["plain", "ours", *(name for name in arguments.against if not SIDES[name].padded)]))
    say(f"losses of {arguments.parity} steps of a row of {case.sequence_length}: starting {', '.join(names)}")
    with _started(names, case, deadline) as sides:
        losses = {name: side.turn(0, arguments.parity).get("losses", []) for name, side in sides.items()}
        device = next((side.device for side in sides.values() if side.device), case.device)
    plain = losses.pop("plain")
    differences = {
        name: {"largest": max(gaps), "mean": sum(gaps) / len(gaps)}
        for name, own in losses.items()
        if (gaps := [abs(a - b) for a, b in zip(own, plain, strict=False)])
    }
    for name, of in differences.items():
        say(f"  loss of {name}: at most {of['largest']:.2g} from the plain engine's, {of['mean']:.2g} on average")
    return device, {
        "steps": arguments.parity,
        "sequence_length": case.sequence_length,
        "mean_document": case.mean_document,
        "first and last loss of the plain engine": [plain[0], plain[-1]] if plain else [],
        "difference from the plain engine": differences,
        "failed": {name: side.error for name, side in sides.items() if side.error},
    }


def _measured(case: Case, arguments: argparse.Namespace, device: str, deadline: float) -> dict[str, Any]:
    names = ["ours", *(name for name in arguments.against if case.mean_document or not SIDES[name].padded)]
    documents = f"documents of {case.mean_document} tokens" if case.mean_document else "one document a row"
    say(f"{case.micro_batch} rows of {case.sequence_length}, {documents}: starting {', '.join(names)}")
    with _started(names, case, deadline) as sides:
        running = {name: side for name, side in sides.items() if not side.error}
        seconds = in_turns({name: _seconds(side, arguments.steps) for name, side in running.items()}, arguments.rounds)
    done = {
        name: [one / arguments.steps for one in values] for name, values in seconds.items() if not sides[name].error
    }
    result = {
        **{key: value for key, value in asdict(case).items() if key not in ("device", "model")},
        **_figures(case, done, sides),
        "failed": {name: side.error for name, side in sides.items() if side.error},
    }
    _show(case, device, result)
    return result


def _seconds(side: _Running, steps: int) -> Callable[[], float]:
    return lambda: side.turn(1, steps).get("seconds", float("nan"))


def _figures(case: Case, seconds: Mapping[str, Sequence[float]], sides: Mapping[str, _Running]) -> dict[str, Any]:
    packed, padded = packed_lengths(case), padded_lengths(case)
    per_row = {True: sum(padded) / len(padded), False: float(case.sequence_length)}
    tokens = {name: case.micro_batch * per_row[SIDES[name].padded] for name in seconds}
    speeds = {name: [tokens[name] / one for one in values] for name, values in seconds.items()}
    if "ours" not in speeds:
        return {"tokens_per_second": {name: spread(values) for name, values in speeds.items()}}
    flops = _flops_per_token(case, [length for row in packed for length in row])
    return {
        "tokens_per_step": tokens,
        "seconds_per_step": {name: spread(values) for name, values in seconds.items()},
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "ratio": {
            name: spread([a / b for a, b in zip(speeds["ours"], values, strict=True)])
            for name, values in speeds.items()
            if name != "ours"
        },
        "peak_memory_bytes": {name: sides[name].peak_bytes for name in seconds},
        "flops_per_token": flops,
    }


def _flops_per_token(case: Case, documents: Sequence[int]) -> dict[str, float]:
    """Of packed rows, each document counted with attention over its own length: nobody needs what lies between."""
    from ernie_dist.spec.shape import ModelShape, config_values
    from ernie_dist.spec.training import ModelSpec

    values = config_values(ModelSpec(**case.model), case.vocabulary)
    assert values is not None
    shape, total = ModelShape.from_config(values), sum(documents)
    return {
        name: sum(length * shape.flops_per_token(length, causal=causal) for length in documents) / total
        for name, causal in (("full attention", False), ("causal attention", True))
    }


def _show(case: Case, device: str, result: dict[str, Any]) -> None:
    """Prints the table, and adds the utilisation where the device's peak is known."""
    from ernie_dist.spec.hardware import peak_flops

    peak, speeds = peak_flops(device), result["tokens_per_second"]
    if peak and "flops_per_token" in result:
        result["mfu"] = {
            name: {how: flops * of["median"] / peak for how, flops in result["flops_per_token"].items()}
            for name, of in speeds.items()
            if not SIDES[name].padded
        }
    rows = []
    for name, of in speeds.items():
        ratio = result.get("ratio", {}).get(name, {}).get("median", "")
        mfu = result.get("mfu", {}).get(name, {})
        memory = result.get("peak_memory_bytes", {}).get(name, 0) / 1e9
        shares = " / ".join(f"{value:.1%}" for value in mfu.values())
        rows.append((name, f"{of['median']:,.0f}", ratio, f"{memory:.2f} GB", shares))
    show(("tokens/s", "median", "ours over it", "peak memory", "MFU full / causal"), rows)


def _environment(case: Case) -> dict[str, str]:
    """Of a side's process: one rank, and one GPU or none. Given several, the Trainer would take them all."""
    one = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    seen = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    if case.device == "cpu":
        seen = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    root = str(Path(__file__).resolve().parents[1])
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
    return {**os.environ, **seen, **path, **one}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    main()
