"""A real Ray cluster on this machine: each node is a `ray start --block`, which can be killed like a machine.

Loopback addresses, free ports, token authentication; everything lies in one folder that goes away with it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest

from ernie_dist.spec.orphan import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


class RayCluster:
    """Up to three nodes n1 (the head), n2 and n3, of two CPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # a short path: sockets in it may have no more than 107 characters
        token = folder / "token"
        token.touch(mode=0o600)
        self.token = secrets.token_hex(32)
        token.write_text(self.token)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "120",
            "OMP_WAIT_POLICY": "PASSIVE",  # ranks share two cores: threads that spin take turns with those that work
            # A machine that is lost without a word is noticed after this; with Ray's own settings much later.
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        self._port, self._dashboard, client = free_ports(3)
        self.address = f"127.0.0.2:{self._port}"
        self.dashboard = f"http://127.0.0.1:{self._dashboard}"
        self._head = (
            *("--head", f"--port={self._port}", f"--temp-dir={folder / 'ray'}", f"--ray-client-server-port={client}"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={self._dashboard}"),
        )
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *names: str) -> None:
        """Starts nodes, one after the other."""
        for name in names:
            # They share a folder of logs, and one of them is enough to send it to drivers.
            other = (f"--address={self.address}", "--include-log-monitor=false")
            self._start(name, *(self._head if name == "n1" else other))
            self._wait(lambda name=name: name in self.alive())

    def have(self, count: int) -> None:
        """Kills or starts nodes other than the head."""
        for name in list(self.nodes)[count:]:
            self.kill(name)
        self.start(*[name for name in ("n1", "n2", "n3") if name not in self.nodes][: count - len(self.nodes)])

    def kill(self, name: str) -> None:
        """The machine is gone: every process of the node at once, without a chance to say so."""
        process = self.nodes.pop(name)
        everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in everything:
            with suppress(psutil.NoSuchProcess):
                one.suspend()  # or the first to die would be noticed by the others
        for one in everything:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def ray(self, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """The command of that name, as a person with the token would give it."""
        return self.run(str(BIN / "ray"), *words, seconds=seconds)

    def run(self, *words: str, seconds: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            env={**self.environment, **more},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )

    def alive(self) -> set[str]:
        """Names of the nodes that the cluster knows to be there."""
        return set(self._ids())

    def node_id(self, name: str) -> str:
        return self._ids()[name]

    def ask(self, path: str, method: str = "GET") -> Any:
        """The dashboard's answer; quicker than the command of the same meaning."""
        head = {"Authorization": f"Bearer {self.token}"}
        with urlopen(Request(f"{self.dashboard}{path}", headers=head, method=method), timeout=30) as answer:
            return json.load(answer)

    def _ids(self) -> dict[str, str]:
        try:
            nodes = [node["raylet"] for node in self.ask("/nodes?view=summary")["data"]["summary"]]
        except (OSError, ValueError):
            return {}
        return {node["nodeName"]: node["nodeId"] for node in nodes if node["state"] == "ALIVE"}

    def processes(self) -> list[psutil.Process]:
        """Every process of every node."""
        return [
            process
            for node in self.nodes.values()
            for process in (psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True))
        ]

    def logs(self) -> str:
        """What the nodes said, for a test that failed."""
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("n*.log"))

    def close(self) -> None:
        for name in list(self.nodes):
            self.kill(name)

    def _start(self, name: str, *options: str) -> None:
        # Not 127.0.0.1, for which Ray puts the machine's outer address; and each node has one of its own.
        address = f"127.0.0.{1 + int(name.removeprefix('n'))}"
        agent, grpc, runtime, metrics = free_ports(4)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.nodes[name] = subprocess.Popen(
                [
                    *(str(BIN / "ray"), "start", "--block", f"--node-name={name}", f"--node-ip-address={address}"),
                    *("--num-cpus=2", "--num-gpus=0", f"--object-store-memory={100 << 20}", "--disable-usage-stats"),
                    "--labels=site=loopback",
                    *("--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={agent}"),
                    *(f"--dashboard-agent-grpc-port={grpc}", f"--runtime-env-agent-port={runtime}"),
                    *(f"--metrics-export-port={metrics}", *options),
                ],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )

    def _wait(self, happened, seconds: float = 90) -> None:
        until = time.monotonic() + seconds
        while not happened():
            dead = [name for name, node in self.nodes.items() if node.poll() is not None]
            assert not dead and time.monotonic() < until, f"the cluster does not start ({dead}):\n{self.logs()}"
            time.sleep(0.3)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A cluster of three nodes, shared by all tests: whoever kills a node starts another."""
    reason = _missing()
    if reason and os.environ.get("ERNIE_REQUIRE_CLUSTERS") == "1":
        pytest.fail(reason, pytrace=False)
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="ernie-ray-"))
    cluster = RayCluster(folder)
    try:
        cluster.have(3)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def _missing() -> str:
    try:
        import aiohttp  # noqa: F401
        import ray  # noqa: F401
    except ImportError as error:
        return f"no Ray with a job server here ({error}): pip install 'ernie_dist[ray]'"
    return ""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens at."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
