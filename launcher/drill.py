"""`ernie drill JOB`: a short version of a job, undisturbed and then under faults, and what became of each.

reference run --curve--> loss, batch_hash per step <--compared, every step of every attempt-- runs under faults
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ernie_dist.spec.errors import EnvironmentProblem, RunDirError, SpecError
from ernie_dist.spec.job import load_job
from ernie_dist.spec.run_files import RunFiles
from launcher.base import CRASHED, FINISHED
from launcher.faults import FAULTS, RANKS, Missed, Run
from launcher.plan import table

_MARK = ".ernie_drill"
_PATIENCE = 600.0
"""seconds until a run has to be stepping again"""
_TOLERANCE = 1e-4
"""relative, of the loss: on other ranks sums are added up in another order"""


@dataclass(frozen=True)
class Row:
    """What became of one fault. Times are seconds."""

    round: int
    fault: str
    hit: str
    happened: str
    noticed: float
    """from the fault to the start of the next attempt"""
    start_up: float
    """until its ranks had read the checkpoint"""
    first_step: float
    tokens_lost: int
    ranks_gone: bool
    """whether no rank of the attempt that was hit was left when the next one was stepping"""
    loss_equal: bool
    order_equal: bool

    @property
    def seconds(self) -> float:
        return self.noticed + self.start_up + self.first_step

    @property
    def passed(self) -> bool:
        return self.loss_equal and self.order_equal and self.ranks_gone


class Drill:
    """A reference and runs under faults, all of one short job, each in a folder of its own."""

    def __init__(
        self, job: Path, folder: Path, overrides: Sequence[str], ranks: int | None, steps: int, seed: int
    ) -> None:
        spec = load_job(job, overrides, ranks=ranks)
        self._folder, self._chance = folder, random.Random(seed)
        self._ranks = ranks or spec.resources.world_size
        self.others = [count for count in _possible(spec) if count != self._ranks]
        per_stage = max(4, steps // len(spec.curriculum))
        self._total = per_stage * len(spec.curriculum)
        short = [f"curriculum.{number}.duration={per_stage} steps" for number in range(len(spec.curriculum))]
        short += [f"sources.{name}.repeat=true" for name in spec.sources]  # as many steps as were asked for
        own = ["checkpoint.every=4 steps", "checkpoint.keep_last=3", "evaluate.max_tokens=1K", "track.wandb=null"]
        patient = ["restarts.wait=1s", "restarts.max=1000", "restarts.same_step=1000", "watchdog.step=15s"]
        self._sets = [word for one in (*overrides, *short, *own, *patient) for word in ("--set", one)]
        self._job, self._number = job, 0
        self._run: Run | None = None

    def reference(self) -> None:
        """The run that nothing happens to. Raises EnvironmentProblem if it does not finish."""
        run = self._run = self._launch("reference", self._ranks)
        if run.launch.wait() != FINISHED:
            raise EnvironmentProblem(f"the job does not even finish undisturbed; see {self._log('reference')}")
        self._run = None
        self._curve = {line["step"]: line for line in _lines(run.files)}

    def close(self) -> None:
        """Ends what is still running."""
        if self._run is not None:
            self._run.kill_everything()
        self._run = None

    def rounds(self, count: int, faults: Sequence[str]) -> Iterator[Row]:
        """One fault after another, each kind as often as any other, in random order."""
        order: list[str] = []
        number = 0
        while number < count:
            if not order:
                order = list(faults)
                self._chance.shuffle(order)
            try:
                row = self._other_ranks(number + 1) if order[-1] == RANKS else self._round(number + 1, order[-1])
            except Missed:  # the run came to its end first
                self._end()
                continue
            order.pop()
            number += 1
            yield row
        self._end()

    def _round(self, number: int, name: str) -> Row:
        run = self._run or self._launch(f"run_{self._next():03d}", self._ranks)
        self._run = run
        attempt = self._wait_for_steps(run, self._chance.randint(1, 9))
        if self._total - _last(run.files) < 16:  # too near its end for a fault and what follows
            raise Missed
        before, fault = run.ranks(), FAULTS[name]
        hit = fault.do(run)
        begun = time.time()
        happened = "the launcher started the next attempt"
        if fault.launcher_ends:
            code = run.launch.wait(timeout=_PATIENCE)
            happened = f"launched again, after {'exit code ' + str(code) if code >= 0 else 'signal ' + str(-code)}"
            run = self._run = self._launch(run.files.root.name, self._ranks)
        return self._row(number, name, hit, happened, run, attempt, begun, before)

    def _other_ranks(self, number: int) -> Row:
        """Stops a run, goes on with other ranks, and comes back to its own number."""
        self.close()  # the run so far was good at every step; after other ranks no run is equal to the last bit
        name, there = f"ranks_{self._next():03d}", self._chance.choice(self.others)
        run = self._run = self._launch(name, self._ranks)
        for ranks in (there, self._ranks):
            attempt, before = self._wait_for_steps(run, self._chance.randint(2, 5)), run.ranks()
            run.launch.send_signal(signal.SIGTERM)
            begun = time.time()
            run.launch.wait(timeout=_PATIENCE)
            run = self._run = self._launch(name, ranks)
            hit = f"{self._ranks} -> {there} -> {self._ranks} ranks"
            row = self._row(number, RANKS, hit, "launched with other ranks", run, attempt, begun, before, exact=False)
        self.close()
        return row

    def _row(
        self,
        number: int,
        name: str,
        hit: str,
        happened: str,
        run: Run,
        attempt: int,
        begun: float,
        before: dict[int, int],
        *,
        exact: bool = True,
    ) -> Row:
        later = self._wait_for_steps(run, 1, after=attempt)
        events = [event for event in _json_lines(run.files.events) if event.get("attempt") == later]
        started = next(event["time"] for event in events if event["event"] == "AttemptStarted")
        lost = next((event["lost_tokens"] for event in events if event["event"] == "Restored"), 0)
        launched = json.loads((run.files.attempt(later) / "launch.json").read_text(encoding="utf-8"))["time"]
        lines = _lines(run.files)
        stepped = min(line["time"] for line in lines if line["attempt"] == later)
        refused = [
            event["checkpoint"] for event in _json_lines(run.files.events) if event["event"] == "CheckpointRefused"
        ]
        if name in ("truncate", "flip"):
            happened += f", {refused[-1]} refused" if refused else ", NOTHING REFUSED"
        same = [equal(line, self._curve[line["step"]], exact=exact) for line in lines]
        return Row(
            round=number,
            fault=name,
            hit=f"{hit}, step {max((line['step'] for line in lines if line['attempt'] <= attempt), default=0)}",
            happened=happened,
            noticed=launched - begun,
            start_up=started - launched,
            first_step=stepped - started,
            tokens_lost=lost,
            ranks_gone=run.wait_until_gone(before.values(), seconds=1),
            loss_equal=all(loss for loss, _ in same),
            order_equal=all(order for _, order in same),
        )

    def _wait_for_steps(self, run: Run, steps: int, *, after: int = 0) -> int:
        """Waits until an attempt later than `after` has done so many steps; its number. Raises Missed at the end."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            attempts = [line["attempt"] for line in _lines(run.files)]
            newest = max(attempts, default=0)
            if newest > after and attempts.count(newest) >= steps:
                return newest
            code = run.launch.poll()
            if code == FINISHED and newest > after:
                raise Missed
            if code is not None:
                raise EnvironmentProblem(
                    f"{run.files.root}: the launch ended with exit code {code}; see {self._log(run.files.root.name)}"
                )
            time.sleep(0.02)
        raise EnvironmentProblem(f"{run.files.root}: no step within {_PATIENCE:.0f} s; see its logs")

    def _end(self) -> None:
        """Lets the run under faults come to its end, which has to be the reference's too."""
        run, self._run = self._run, None
        if run is None:
            return
        code = run.launch.wait(timeout=_PATIENCE)
        last = max(_lines(run.files), key=lambda line: (line["step"], line["attempt"]))
        if (
            code != FINISHED
            or last["step"] != self._total
            or equal(last, self._curve[last["step"]], exact=True) != (True, True)
        ):
            raise EnvironmentProblem(
                f"{run.files.root}: ended with exit code {code} at step {last['step']}, not as expected"
            )

    def _launch(self, name: str, ranks: int) -> Run:
        words = [sys.executable, "-m", "launcher", "launch", str(self._job), "--run-dir", str(self._folder / name)]
        with self._log(name).open("ab") as log:
            launch = subprocess.Popen(
                [*words, "--ranks", str(ranks), *self._sets], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        return Run(RunFiles((self._folder / name).resolve()), launch, self._chance)

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _next(self) -> int:
        self._number += 1
        return self._number


def equal(line: dict[str, Any], expected: dict[str, Any], *, exact: bool) -> tuple[bool, bool]:
    """Whether two lines of metrics.jsonl agree: in loss, to the last bit or nearly; in all data up to there."""
    off = abs(line["loss"] - expected["loss"])
    loss = off == 0 if exact else off <= _TOLERANCE * abs(expected["loss"])
    return loss, line["batch_hash"] == expected["batch_hash"]


def run(
    job: Path,
    folder: Path,
    *,
    overrides: Sequence[str],
    ranks: int | None,
    rounds: int,
    faults: Sequence[str] | None,
    seed: int,
    steps: int,
) -> int:
    """Returns 0 if every row is equal, 1 otherwise. The rows are kept in drill.json and drill.md, as they come."""
    drill = Drill(job, folder, overrides, ranks, steps, seed)
    possible = [*FAULTS, *([RANKS] if drill.others else [])]
    faults = faults or possible
    if unknown := set(faults) - set(possible):
        raise SpecError(f"--faults: {', '.join(sorted(unknown))}: not for this job; choose from {', '.join(possible)}")
    _make_room(folder)
    print(f"drill: the undisturbed run first, then {rounds} rounds of {', '.join(faults)}; seed {seed}", flush=True)
    begun, rows = time.monotonic(), []
    try:
        drill.reference()
        print(f"undisturbed: finished in {time.monotonic() - begun:.0f} s", flush=True)
        for row in drill.rounds(rounds, faults):
            rows.append(row)
            verdict = "equal" if row.passed else "NOT EQUAL"
            told = f"{row.round}/{rounds} {row.fault}: {row.hit}; stepping again after {row.seconds:.1f} s"
            print(f"{told}, {verdict}", flush=True)
            (folder / "drill.json").write_text(json.dumps([asdict(one) for one in rows], indent=1), encoding="utf-8")
            (folder / "drill.md").write_text(markdown(rows), encoding="utf-8")
    finally:
        drill.close()
    print("\n" + "\n".join(table([_HEAD, *map(_cells, rows)])))
    failed = sum(not row.passed for row in rows)
    slowest = max(rows, key=lambda row: row.seconds)
    print(f"\n{len(rows) - failed} of {len(rows)} rounds equal; at most {slowest.seconds:.1f} s to be stepping again")
    print(f"{folder / 'drill.md'}")
    return CRASHED if failed else FINISHED


_HEAD = (
    "round", "fault", "what was hit", "what happened", "noticed s", "start-up s", "first step s", "stepping again s",
    "tokens lost", "ranks gone", "loss", "order",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    times = (f"{one:.1f}" for one in (row.noticed, row.start_up, row.first_step, row.seconds))
    equal = ("equal" if one else "DIFFERS" for one in (row.loss_equal, row.order_equal))
    gone = "yes" if row.ranks_gone else "NO"
    return (str(row.round), row.fault, row.hit, row.happened, *times, f"{row.tokens_lost:,}", gone, *equal)


def markdown(rows: Sequence[Row]) -> str:
    lines = [_HEAD, tuple("---" for _ in _HEAD), *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _possible(spec: Any) -> list[int]:
    """Numbers of ranks, up to twice the job's, that its batches can be dealt to."""
    found = []
    for count in range(1, 2 * spec.resources.world_size + 1):
        try:
            for stage in spec.curriculum:
                spec.batch_plan(stage, count)
        except ValueError:
            continue
        found.append(count)
    return found


def _make_room(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _MARK).is_file():
            raise RunDirError(f"{folder}: is not empty and no earlier drill; give another folder with --dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()


def _lines(files: RunFiles) -> list[dict[str, Any]]:
    from ernie_dist.events.history import read_all_attempts

    return read_all_attempts(files.metrics)


def _last(files: RunFiles) -> int:
    return max((line["step"] for line in _lines(files)), default=0)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    from ernie_dist.events.history import read_events

    return read_events(path)
