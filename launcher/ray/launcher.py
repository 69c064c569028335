"""The launcher inside a Ray cluster: one actor per node runs the node command, and dies with what it started.

driver (`ernie launch --on ray`) --placement group, STRICT_SPREAD--> actor on each node --> python -m launcher.node
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ernie_dist.spec.errors import EnvironmentProblem
from ernie_dist.spec.job import JobSpec
from ernie_dist.spec.orphan import die_with_parent
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.spec.stop_file import StopNote, ask_once
from launcher import history
from launcher.base import CRASHED, Attempt, Launcher
from launcher.node import NODE, Nodes, node_command
from launcher.ray import cluster
from launcher.ray.environment import stop_wait, taken_along
from launcher.run_dir import RunDir

_GRACE = 30.0
"""seconds that the other nodes have to end by themselves, and to say why, after one has failed: torchrun's own"""
_STARTING = 300.0
"""seconds that a worker may take to start: a node may die just as it is chosen"""
_LOOK_EVERY = 5.0
"""seconds between two looks at which nodes are to be taken away"""
_KILLED = -signal.SIGKILL


class _Node:
    """One node of one attempt: its process lives as long as the node command does."""

    def place(self) -> tuple[str, str]:
        """Ray's id of this node, and HOST:PORT with a port that is free now."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return ray.get_runtime_context().get_node_id(), f"{address}:{probe.getsockname()[1]}"

    def run(self, words: list[str], log: Path, environment: dict[str, str]) -> int:
        """Waits for the node command; its exit code, negative for a signal."""
        with open(log, "ab", opener=partial(os.open, mode=0o600)) as errors:
            process = subprocess.Popen(
                [sys.executable, *words],
                env={**os.environ, **environment},
                stderr=errors,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )
        return process.wait()


@dataclass(frozen=True)
class _Member:
    """One node of the attempt that is running."""

    rank: int
    id: str
    name: str


class RayLauncher(Launcher):
    """Each attempt is one placement group of the cluster that this process has joined."""

    name = "ray"

    def __init__(self, job: JobSpec) -> None:
        self._sizes = possible_sizes(job)
        self._unfit: dict[str, str] = {}
        self._lacking = ""

    def render(self, attempt: Attempt) -> str:
        command = shlex.join(["python", *_words(attempt, Nodes(self._sizes[0], attempt.resources.gpus_per_node))])
        return (
            f"#!/usr/bin/env bash\n# On each of {self._sizes[0]} node(s): launch.sh NODE_RANK HOST:PORT\n"
            "# HOST:PORT: an address of the first node, and a port that is free there\n"
            f'exec {command} --node-rank "$1" --rendezvous "$2"\n'
        )

    def run(self, attempt: Attempt, end_now: Callable[[], bool]) -> int:
        run_dir = RunDir(attempt.run_dir)
        (run_dir.files.attempt(attempt.number) / "launch.sh").write_text(self.render(attempt), encoding="utf-8")
        request = cluster.Request.of(attempt.resources, self._unfit)
        patience = attempt.resources.ray.wait_for_nodes.total_seconds()
        try:
            with cluster.placed(request, self._sizes, patience, end_now, _say) as group:
                return _KILLED if group is None else self._run_on(group, run_dir, attempt, end_now)
        except EnvironmentProblem as error:
            self._lacking = str(error)
            _leave_error(run_dir.files, attempt.number, 0, "NodesMissing", str(error))
            return CRASHED
        finally:
            self._unfit.update(history.unfit_nodes(run_dir, attempt.number))

    def notice(self) -> float | None:
        """`ray job stop` is the one that sends a signal to a job."""
        return stop_wait()

    def unfit(self) -> str:
        return self._lacking

    def _run_on(self, group: PlacementGroup, run_dir: RunDir, attempt: Attempt, end_now: Callable[[], bool]) -> int:
        files = run_dir.files
        actors = [
            ray.remote(_Node)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,  # ranks cannot join an attempt that has begun
                runtime_env={"env_vars": {"RAY_worker_niceness": "0"}},  # Ray's own 15 is for what may wait
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            )
            .remote()
            for number, bundle in enumerate(group.bundle_specs)
        ]
        try:
            asked, until = [actor.place.remote() for actor in actors], time.monotonic() + _STARTING
            while len(ray.wait(asked, num_returns=len(asked), timeout=0.5)[0]) < len(asked):
                if end_now():
                    return _KILLED
                if time.monotonic() > until:
                    return _lost(files, attempt, None, f"a worker did not start in {_STARTING:.0f} s")
            places = ray.get(asked)
            nodes = Nodes(len(actors), attempt.resources.gpus_per_node, places[0][1])
            members = [_Member(rank, node, cluster.name_of(node)) for rank, (node, _) in enumerate(places)]
            environment = taken_along(attempt.resources)
            running = {
                actor.run.remote(
                    _words(attempt, nodes, member.rank),
                    files.node_log(attempt.number, member.rank),
                    {**environment, NODE: member.name},
                ): member
                for actor, member in zip(actors, members, strict=True)
            }
            return _Watch(running, run_dir, attempt).until_over(end_now)
        except ray.exceptions.RayActorError as error:
            return _lost(files, attempt, None, error)
        finally:
            for actor in actors:
                ray.kill(actor)


class _Watch:
    """Waits for the nodes of an attempt."""

    def __init__(self, running: dict[Any, _Member], run_dir: RunDir, attempt: Attempt) -> None:
        self._running, self._run_dir, self._attempt = running, run_dir, attempt
        self._members = tuple(running.values())
        self._look_at = 0.0

    def until_over(self, end_now: Callable[[], bool]) -> int:
        """The exit code of the first node that failed, else 0; a lost node ends the attempt at once."""
        code, until = 0, float("inf")
        while self._running and time.monotonic() < until:
            if end_now():
                return _KILLED
            done, _ = ray.wait(list(self._running), timeout=0.5)
            for future in done:
                member = self._running.pop(future)
                try:
                    ended = ray.get(future)
                except ray.exceptions.RayActorError as error:
                    return _lost(self._run_dir.files, self._attempt, member, error)
                if ended and not code:
                    unfit = history.unfit_nodes(self._run_dir, self._attempt.number)  # then no rank has begun
                    code, until = ended, time.monotonic() + (0 if unfit else _GRACE)
            self._heed_notices()
        return code

    def _heed_notices(self) -> None:
        """A node that is to be taken away ends the attempt, with a checkpoint if there is time; the run goes on."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_EVERY
        leaving = cluster.draining()
        for member in self._members:
            if member.id in leaving:
                ends = leaving[member.id]
                notice = max(0.0, ends - time.time()) if ends is not None else None
                note = StopNote(f"{member.name} is to be taken away", notice, again=True)
                ask_once(self._run_dir.files.signalled(self._attempt.number), note)


def possible_sizes(job: JobSpec) -> list[int]:
    """Numbers of nodes that the job's batches can be dealt to, from resources.nodes down to resources.min_nodes."""
    resources = job.resources
    sizes = []
    for nodes in range(resources.nodes, (resources.min_nodes or resources.nodes) - 1, -1):
        with suppress(ValueError):
            for stage in job.curriculum:
                job.batch_plan(stage, nodes * resources.gpus_per_node)
            sizes.append(nodes)
    return sizes


def _words(attempt: Attempt, nodes: Nodes, rank: int | None = None) -> list[str]:
    """The node command, without the interpreter: each node has its own."""
    given = attempt.resources.health_check
    words = node_command(
        attempt.run_dir, attempt.number, nodes, node_rank=rank, deadline=attempt.deadline, health_check=given
    )
    return words[1:]


def _lost(files: RunFiles, attempt: Attempt, member: _Member | None, why: Exception | str) -> int:
    """What the ranks of other nodes say from now on is only that they lost a neighbour."""
    silent = isinstance(why, ray.exceptions.ActorUnavailableError)
    reason = "it does not answer any more" if silent else str(why).strip().splitlines()[-1].strip()
    name, rank = (member.name, member.rank) if member else ("a node", 0)
    first = rank * attempt.resources.gpus_per_node
    _leave_error(files, attempt.number, first, "NodeLost", f"{name} was lost: {reason}")
    return CRASHED


def _leave_error(files: RunFiles, attempt: int, rank: int, kind: str, message: str) -> None:
    """The attempt's last word, as a rank would have left it; it takes the place of what a rank said because of it."""
    content = {"rank": rank, "kind": kind, "message": message, "exit_code": CRASHED, "final": False}
    aside = files.error(attempt).with_suffix(".tmp")
    aside.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    aside.replace(files.error(attempt))


def _say(text: str) -> None:
    with suppress(OSError):
        print(text, flush=True)
