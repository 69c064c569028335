"""A real Slurm cluster on loopback: munged, slurmctld and four slurmd, with nothing installed or left behind.

with SlurmCluster() as cluster:
    job = cluster.submit("job.sbatch", "--nodes=2")
    assert cluster.finish(job) == "COMPLETED"
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ernie_dist.spec.orphan import die_with_parent

NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")

_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

_CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# No cgroups and no accounting: any machine will do.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# This machine's real size does not matter.
SlurmdParameters=config_overrides
# Quick, so that tests are.
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdTimeout=10
KillWait=3
ReturnToService=2
JobRequeue=1
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port={node_ports} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF
"""


class SlurmCluster:
    """Nodes n1 to n4 of two CPUs each; partitions low, and high, which preempts it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ernie-slurm-", dir="/tmp"))  # a socket's path has to be short
        path = os.pathsep.join([str(Path(sys.executable).parent), _PATH])  # where `ernie` is
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = {**outside, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @staticmethod
    def obstacle() -> str | None:
        """Why this machine cannot have one; None if it can."""
        missing = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
        if missing:
            return f"no {', '.join(missing)} (Debian and Ubuntu: apt install slurm-wlm munge)"
        return None if os.geteuid() == 0 else "Slurm's daemons have to be started by root"

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what a person at a login node does ---------------------------------------------------------------------------

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, timeout: float = 60) -> str:
        """A command's output, both streams. Fails the test on an exit code other than 0, unless check is off."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment, timeout=timeout, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def submit(self, *sbatch: str, cwd: Path | None = None) -> int:
        """sbatch's arguments -> the job's number."""
        return int(self.run("sbatch", "--parsable", *sbatch, cwd=cwd).split(";")[0])

    def show(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says, field by field; {} for a job that is forgotten."""
        said = self.run("scontrol", "--oneliner", "show", "job", str(job), check=False)
        return dict(re.findall(r"(\S+?)=(\S*)", said))

    def state(self, job: int) -> str:
        return self.show(job).get("JobState", "UNKNOWN")

    def nodes(self, job: int) -> list[str]:
        """Names of the nodes that a job has."""
        listed = self.show(job).get("NodeList", "(null)")
        return [] if listed == "(null)" else self.run("scontrol", "show", "hostnames", listed).split()

    def finish(self, job: int, seconds: float = 300) -> str:
        """The state in which a job ended for good; the one it is in after that time, if it did not."""
        with suppress(AssertionError):
            self._wait(lambda: self.state(job) in ENDED, seconds)
        return self.state(job)

    # -- what happens to a cluster ------------------------------------------------------------------------------------

    def preempt(self, *, grace: int) -> None:
        """A more important job takes all nodes for a second. grace: the seconds that jobs in `low` get to leave."""
        self.run("scontrol", "update", "PartitionName=low", f"GraceTime={grace}")
        self.submit("--partition=high", f"--nodes={len(NODES)}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")

    def kill_node(self, node: str) -> None:
        """Power off: the daemon, its steps and whatever ran on the node are gone at once, without a word."""
        daemon = self._daemons.pop(f"slurmd-{node}")
        daemon.kill()
        daemon.wait()
        for pid in self.processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def clear(self) -> None:
        """Ends every job and starts every node that was killed: all of them wait for a job then."""
        self.run("scancel", "--user=root")
        for node in NODES:
            if f"slurmd-{node}" not in self._daemons:
                self._start_node(node)
        self._wait_idle()

    def _start_node(self, node: str) -> None:
        self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))

    def _wait_idle(self) -> None:
        def states() -> list[str]:
            return self.run("sinfo", "--noheader", "--format=%T", check=False).splitlines()

        self._wait(lambda: set(states()) == {"idle"}, 60)

    def _wait(self, happened: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"it never happened\n{self._said()}"
            time.sleep(0.1)

    def _said(self) -> str:
        """The daemons' last words."""
        files = sorted(self.folder.glob("*.out"))
        return "\n".join(f"{file}:\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def processes(self, node: str) -> list[int]:
        """What Slurm started on a node, its slurmstepd included."""
        marks = {f"SLURM_CONF={self.environment['SLURM_CONF']}".encode(), f"SLURMD_NODENAME={node}".encode()}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if marks <= set((process / "environ").read_bytes().split(b"\0")):
                    found.append(int(process.name))
        return found

    # -- start and stop -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        key, socket_path = self.folder / "munge.key", self.folder / "munge.sock"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.folder / "state").mkdir()
        conf = self.folder / "slurm.conf"
        controller, *ports = _free_ports(1 + len(NODES))
        conf.write_text(
            _CONF.format(
                host=socket.gethostname().split(".")[0],
                folder=self.folder,
                nodes=",".join(NODES),
                controller_port=controller,
                node_ports=",".join(map(str, ports)),
            )
        )
        (self.folder / "plugstack.conf").touch()  # not the machine's own
        self._daemon(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_path}",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        self._wait(socket_path.exists, 10)
        self._daemon("slurmctld", "slurmctld", "-D", "-c", "-f", str(conf))
        for node in NODES:
            self._start_node(node)
        self._wait_idle()

    def _daemon(self, name: str, *command: str) -> None:
        """In the foreground, as our child: it ends with us, whatever happens to us."""
        node = name.removeprefix("slurmd-")
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env={**self.environment, "SLURMD_NODENAME": node}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, preexec_fn=die_with_parent, start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        """Ends every job and every daemon, and removes the folder."""
        with suppress(AssertionError, OSError, subprocess.TimeoutExpired):
            self.run("scancel", "--user=root", check=False, timeout=10)
        for name in sorted(self._daemons, reverse=True):  # slurmd, slurmctld, munged
            self._daemons[name].terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for node in NODES:
            for pid in self.processes(node):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens at, taken together so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """One cluster for all tests: whoever kills a node starts it again."""
    obstacle = SlurmCluster.obstacle()
    if obstacle and os.environ.get("ERNIE_REQUIRE_CLUSTERS") == "1":
        pytest.fail(obstacle, pytrace=False)
    if obstacle:
        pytest.skip(obstacle)
    with SlurmCluster() as cluster:
        yield cluster
