"""The head fused with its loss, against logits of all positions at once, and against torch's own fused function.

    python -m benchmarks.head [--quick]

Forward and backward of the language-model head alone, in fp32 on the CPU: hidden states in, loss and both gradients
out. Each side runs in a process of its own, whose peak resident memory is taken above what it held before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import in_turns, keep, parser, peak_resident_bytes, say, show, spread

if TYPE_CHECKING:
    import torch

SIDES = ("all logits", "torch fused", "ours")
WIDTH, VOCABULARY = 256, 103424


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--positions", type=int, default=2048, help="labelled positions (2048)")
    command.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    arguments = command.parse_args()
    positions, rounds, times = (64, 1, 1) if arguments.quick else (arguments.positions, 5, 2)
    if arguments.worker:
        _serve(arguments.worker, positions, times)
        return
    sides = {name: _Side(name, sys.argv[1:]) for name in SIDES}
    say(f"{positions:,} positions x {WIDTH}, vocabulary {VOCABULARY:,}; seconds of a forward and backward")
    seconds = in_turns({name: side.seconds for name, side in sides.items()}, rounds)
    ends = {name: side.end() for name, side in sides.items()}
    losses = [end["loss"] for end in ends.values()]
    if max(losses) - min(losses) > 1e-5 * max(losses):
        sys.exit(f"benchmarks.head: the sides disagree about the loss: {losses}")
    plain = SIDES[0]
    ratios = {
        name: {
            "seconds": spread([own / other for own, other in zip(seconds[name], seconds[plain], strict=True)]),
            "peak_memory": ends[name]["bytes"] / ends[plain]["bytes"],
        }
        for name in SIDES[1:]
    }
    show(
        ("", "s", "peak MiB"),
        [(n, f"{spread(seconds[n])['median']:.2f}", f"{ends[n]['bytes'] / 2**20:,.0f}") for n in SIDES],
    )
    result = {
        "what": "forward and backward of head and loss, over the same with all logits in memory",
        "over_all_logits": ratios,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "peak_bytes": {name: end["bytes"] for name, end in ends.items()},
        "settings": {"positions": positions, "width": WIDTH, "vocabulary": VOCABULARY, "dtype": "fp32"},
    }
    keep("head", result, quick=arguments.quick)


class _Side:
    """One side, in a process that waits between its turns."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        words = [sys.executable, "-m", "benchmarks.head", "--worker", name, *arguments]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask("ready")

    def seconds(self) -> float:
        return float(self._ask("run")["seconds"])

    def end(self) -> dict[str, Any]:
        last = self._ask("end")
        self._process.wait()
        return last

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit("benchmarks.head: one side ended before its time; see above")
        return json.loads(answer)


def _serve(name: str, positions: int, times: int) -> None:
    import torch

    from ernie_dist.model.head import LossHead

    torch.manual_seed(1)
    head = LossHead(WIDTH, VOCABULARY, bias=False)
    hidden, labels = torch.randn(positions, WIDTH), torch.randint(0, VOCABULARY, (positions,))
    loss = _loss(name, head)

    def run() -> float:
        head.weight.grad = None
        total = loss(hidden.clone().requires_grad_(), labels)
        total.backward()
        return total.item()

    before, found = 0, 0.0
    for word in sys.stdin:
        began = time.perf_counter()
        if word.strip() == "ready":
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from now on
            before = peak_resident_bytes()
            found = run()
        elif word.strip() == "run":
            for _ in range(times):
                run()
        seconds, peak = (time.perf_counter() - began) / times, peak_resident_bytes() - before
        print(json.dumps({"seconds": seconds, "loss": found, "bytes": peak}), flush=True)
        if word.strip() == "end":
            return


def _loss(name: str, head: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    from torch import nn
    from torch.nn.functional import cross_entropy, linear_cross_entropy

    if name == "ours":
        return head
    if name == "all logits":
        return lambda hidden, labels: cross_entropy(nn.Linear.forward(head, hidden), labels, reduction="sum")
    options = nn.LinearCrossEntropyOptions()
    return lambda hidden, labels: linear_cross_entropy(hidden, head.weight, labels, reduction="sum", options=options)


if __name__ == "__main__":
    main()
