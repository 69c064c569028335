"""Ends an attempt that makes no progress, and says which rank held it up: one light process per node, without torch.

python -m ernie_dist.watchdog RUN_DIR ATTEMPT FOLDER FIRST_RANK RANKS WORLD_SIZE PARENT, started by a node's first rank.
Limit passed -> stacks of all ranks of the node -> error.json, HangDetected -> SIGKILL; the launcher may start again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from ernie_dist.events.event import HangDetected
from ernie_dist.events.goodput import step_seconds
from ernie_dist.events.history import read_all_attempts, read_events
from ernie_dist.events.jsonl import JsonlSink
from ernie_dist.hang import Blame, Evidence, Process, blame, kernel_stack, main_thread, process_of
from ernie_dist.heartbeat import STACKS, Phase, Pulse, flight_pipe, rank_file, read_pulse, stacks_file
from ernie_dist.spec.orphan import die_with_parent
from ernie_dist.spec.resilience import WatchdogSpec
from ernie_dist.spec.resolve import ResolvedJob
from ernie_dist.spec.run_files import RunFiles

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
_PAUSED = 10 * POLL_SECONDS
"""a gap between two looks that says that we, and so probably the whole machine, were paused"""
_ANSWER_SECONDS = 5.0
"""for a rank to write its stacks, and for NCCL's flight recorder"""
_PREFLIGHT = timedelta(minutes=10)
"""networks that do not connect say nothing; nothing large is loaded yet, so there is no need to wait long"""
_OTHER_NODES_SECONDS = 10.0
"""for all nodes to write their stacks, and for the one with the rank to blame to speak first"""


class Watchdog:
    """Looks after the ranks of one node."""

    def __init__(
        self,
        files: RunFiles,
        attempt: int,
        folder: Path,
        ranks: range,
        *,
        more_nodes: bool,
        spec: WatchdogSpec,
        longest: Mapping[Phase, float],
    ) -> None:
        self._files, self._attempt, self._folder, self._ranks = files, attempt, folder, ranks
        self._more_nodes, self._spec, self._longest = more_nodes, spec, dict(longest)
        self._begun = self._looked = self._resumed = time.monotonic()
        self._late: dict[int, Pulse | None] = {}
        self._seen: set[int] = set()

    def run(self) -> None:
        """Returns after it has ended the ranks; otherwise it ends with its parent."""
        while not self.look():
            time.sleep(POLL_SECONDS)

    def look(self) -> bool:
        """Whether the ranks hung, and have been ended."""
        now = time.monotonic()
        if now - self._looked > _PAUSED:
            self._resumed = now
        self._looked = now
        pulses = {rank: read_pulse(rank_file(self._folder, rank)) for rank in self._ranks}
        self._seen |= {rank for rank, pulse in pulses.items() if pulse}
        for pulse in filter(None, pulses.values()):
            for phase, seconds in zip(Phase, pulse.longest, strict=True):
                self._longest[phase] = max(self._longest.get(phase, 0.0), seconds)
        late = {rank: pulse for rank, pulse in pulses.items() if self._is_late(rank, pulse, now)}
        # A record may be read while it is written: only one that stays the same counts.
        same = [
            rank for rank, pulse in late.items() if rank in self._late and _place(self._late[rank]) == _place(pulse)
        ]
        self._late = late
        if not same:
            return False
        self._end(pulses, same)
        return True

    def _is_late(self, rank: int, pulse: Pulse | None, now: float) -> bool:
        if pulse is None:  # ended in good order, or not there yet
            return rank not in self._seen and now - max(self._begun, self._resumed) > self._limit(Phase.START)
        return now - max(pulse.since, self._resumed) > self._limit(pulse.phase)

    def _limit(self, phase: Phase) -> float:
        return limit(phase, self._spec, self._longest)

    def _end(self, pulses: Mapping[int, Pulse | None], late: Sequence[int]) -> None:
        evidence = self._evidence({rank: pulse for rank, pulse in pulses.items() if pulse})
        missing = [rank for rank in self._ranks if rank not in self._seen]
        blamed = [Blame(rank, "its process never came up") for rank in missing] or blame(evidence)
        if blamed:
            self._report(evidence, blamed)
        if self._more_nodes:
            time.sleep(_OTHER_NODES_SECONDS)
        if not blamed and not self._files.error(self._attempt).exists():
            self._report(evidence, [Blame(late[0], _ALL_WAIT)])
        shutil.rmtree(self._folder, ignore_errors=True)
        ours = os.getppid()  # ends with us, and we with it: last
        for pid in sorted((pulse.pid for pulse in pulses.values() if pulse), key=lambda pid: pid == ours):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _evidence(self, pulses: Mapping[int, Pulse]) -> list[Evidence]:
        """Stacks of all ranks into the attempt's folder, and what they and the kernel say."""
        self._ask_nccl(list(pulses))
        processes = _processes(pulses)
        stacks = self._stacks({rank: pulse for rank, pulse in pulses.items() if processes[rank].answers})
        now, found = time.monotonic(), []
        for rank, pulse in pulses.items():
            one = Evidence(
                rank=rank,
                phase=pulse.phase,
                step=pulse.step,
                seconds=now - pulse.since,
                limit=self._limit(pulse.phase),
                silent=now - max(pulse.alive, self._resumed),
                process=processes[rank],
                frames=main_thread(stacks.get(rank, "")),
            )
            process = f"process {pulse.pid}, state {one.process.state or 'gone'}"
            head = f"rank {rank}, {process}, {one.process.waits_in or 'not in a kernel function'}: "
            head += f"{one.where} for {one.seconds:.1f} s (limit {one.limit:.1f} s)\n\n"
            text = stacks.get(rank) or f"It could not answer with its Python stacks.\n{kernel_stack(pulse.pid)}"
            self._files.stacks(self._attempt, rank).write_text(head + text, encoding="utf-8")
            found.append(one)
        return found

    def _stacks(self, pulses: Mapping[int, Pulse]) -> dict[int, str]:
        """rank -> what faulthandler wrote, for those that answer in time."""
        for pulse in pulses.values():
            with suppress(ProcessLookupError):
                os.kill(pulse.pid, STACKS)
        sizes: dict[int, int] = {}
        deadline = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.2)
            before, sizes = sizes, {rank: _size(stacks_file(self._folder, rank)) for rank in pulses}
            if before == sizes and all(sizes.values()):
                break
        texts = {}
        for rank in pulses:
            with suppress(OSError):
                texts[rank] = stacks_file(self._folder, rank).read_text(encoding="utf-8", errors="replace")
        return texts

    def _ask_nccl(self, ranks: Sequence[int]) -> None:
        """Where a GPU's collectives are recorded, the record of each rank goes into the attempt's folder."""
        asked = []
        for rank in ranks:
            with suppress(OSError):  # no pipe, or nobody at its other end
                pipe = os.open(flight_pipe(self._folder, rank), os.O_WRONLY | os.O_NONBLOCK)
                os.write(pipe, b"dump\n")
                os.close(pipe)
                asked.append(rank)
        deadline = time.monotonic() + _ANSWER_SECONDS
        traces = [self._files.nccl_trace(self._attempt, rank) for rank in asked]
        while not all(map(_size, traces)) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _report(self, evidence: Sequence[Evidence], blamed: Sequence[Blame]) -> None:
        """error.json, unless a rank or another node has already left one, and HangDetected."""
        by_rank = {one.rank: one for one in evidence}
        stacks = {rank: self._files.stacks(self._attempt, rank) for rank in by_rank}
        first = blamed[0].rank
        one = by_rank.get(first)
        where = one.where if one else "starting up"
        allowed = one.limit if one else self._limit(Phase.START)
        seconds = one.seconds if one else time.monotonic() - self._begun
        message = "; ".join(f"rank {each.rank} hangs: {each.why}" for each in blamed)
        message += f". It is {where}, for {seconds:.0f} s (limit {allowed:.0f} s, see watchdog in the job). "
        message += f"Stacks of all ranks: {self._files.stacks(self._attempt, first).with_stem('stacks_rank_*')}"
        log.error("%s", message)
        text = stacks[first].read_text(encoding="utf-8") if first in stacks else ""
        error = {"rank": first, "kind": "Hang", "message": message, "exit_code": 1, "traceback": text}
        with suppress(FileExistsError), self._files.error(self._attempt).open("x", encoding="utf-8") as file:
            json.dump(error, file, ensure_ascii=False, indent=1)
        event = HangDetected(
            attempt=self._attempt,
            step=one.step if one else 0,
            ranks=tuple(each.rank for each in blamed),
            phase=one.phase.label if one else Phase.START.label,
            seconds=seconds,
            limit=allowed,
            message=message,
            stacks=tuple(str(path.relative_to(self._files.root)) for path in stacks.values()),
        )
        JsonlSink(self._files).handle(event)


_ALL_WAIT = "every rank of this node waits in a collective for a rank of another one, or on its device"


def limit(phase: Phase, spec: WatchdogSpec, longest: Mapping[Phase, float]) -> float:
    """Seconds a phase may take: never less than its floor, and `factor` times the longest time seen."""
    floor = {
        Phase.START: spec.start,
        Phase.PREFLIGHT: min(spec.start, _PREFLIGHT),
        Phase.FIRST_STEP: spec.start,
        Phase.READ: spec.step,
        Phase.STEP: spec.step,
    }
    return max(floor.get(phase, spec.save).total_seconds(), spec.factor * longest.get(phase, 0.0))


def learned(files: RunFiles, job: ResolvedJob) -> dict[Phase, float]:
    """Seconds that the longest of each phase took in the attempts so far. A phase that hung never ended."""
    names = {phase.label: phase for phase in Phase}
    longest: dict[Phase, float] = {}
    known = [(names[e["phase"]], e["seconds"]) for e in read_events(files.events) if e["event"] == "PhaseEnded"]
    first: set[int] = set()
    tokens = {stage.name: stage.tokens_per_batch for stage in job.stages}
    for line in read_all_attempts(files.metrics):
        phase = Phase.STEP if line["attempt"] in first else Phase.FIRST_STEP
        first.add(line["attempt"])
        known.append((phase, step_seconds(line, tokens)))
    for phase, seconds in known:
        longest[phase] = max(longest.get(phase, 0.0), seconds)
    return longest


def _processes(pulses: Mapping[int, Pulse]) -> dict[int, Process]:
    """Looked at twice: a healthy process may wait for a disk for a moment."""
    first = {rank: process_of(pulse.pid) for rank, pulse in pulses.items()}
    if all(process.answers for process in first.values()):
        return first
    time.sleep(1.0)
    second = {rank: process_of(pulse.pid) for rank, pulse in pulses.items()}
    return {rank: second[rank] if first[rank].state == second[rank].state else Process("S") for rank in pulses}


def _place(pulse: Pulse | None) -> tuple[Phase, int, float] | None:
    return (pulse.phase, pulse.step, pulse.since) if pulse else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def main() -> int:
    run_dir, folder = Path(sys.argv[1]), Path(sys.argv[3])
    attempt, first, ranks, world_size, parent = map(int, (sys.argv[2], *sys.argv[4:8]))
    die_with_parent()
    if os.getppid() != parent:
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    files = RunFiles(run_dir)
    job = ResolvedJob.read(files.job)
    if job.spec.watchdog.enabled:
        Watchdog(
            files,
            attempt,
            folder,
            range(first, first + ranks),
            more_nodes=world_size > ranks,
            spec=job.spec.watchdog,
            longest=learned(files, job),
        ).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
