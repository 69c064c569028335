"""The one command that every node runs, whoever got the node: it looks at itself, then starts its ranks.

python -m launcher.node RUN_DIR ATTEMPT --nodes N --ranks-per-node K [--rendezvous HOST:PORT] [--node-rank R]
  -> attempts/ATTEMPT/nodes/0000.json -> health -> torchrun -> python -m ernie_dist RUN_DIR ATTEMPT, K times
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ernie_dist.spec.run_files import RunFiles
from ernie_dist.spec.stop_file import DEADLINE
from launcher.health import problems

NODE = "ERNIE_NODE"
"""variable of the ranks' environment: what their node is called"""


@dataclass(frozen=True)
class Nodes:
    """The nodes of one attempt."""

    count: int
    ranks_per_node: int
    rendezvous: str | None = None
    """host:port of the first node; None on a single node, where torchrun takes a free port"""


def node_command(
    run_dir: Path,
    attempt: int,
    nodes: Nodes,
    *,
    node_rank: int | None = None,
    deadline: float | None = None,
    health_check: str | None = None,
    python: str = sys.executable,
) -> list[str]:
    """The command. node_rank: None where Slurm tells each node its own. deadline: in seconds since the epoch."""
    return [
        *(python, "-m", "launcher.node", str(run_dir), str(attempt)),
        *("--nodes", str(nodes.count), "--ranks-per-node", str(nodes.ranks_per_node)),
        *(("--rendezvous", nodes.rendezvous) if nodes.rendezvous else ()),
        *(("--node-rank", str(node_rank)) if node_rank is not None else ()),
        *(("--deadline", f"{deadline:.0f}") if deadline is not None else ()),
        *(("--health-check", health_check) if health_check else ()),
    ]


def torchrun(run_dir: Path, attempt: int, nodes: Nodes, node_rank: int) -> list[str]:
    """What the node becomes. The first node's ranks come first, so a rank's number tells its node."""
    host, _, port = (nodes.rendezvous or "").rpartition(":")
    meeting = ["--node-rank", str(node_rank), "--master-addr", host, "--master-port", port]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(nodes.count), "--nproc-per-node", str(nodes.ranks_per_node)),
        *(meeting if nodes.rendezvous else ["--standalone"]),
        *("--no-python", sys.executable, "-m", "ernie_dist", str(run_dir), str(attempt)),
    ]


def rank_environment(ranks_per_node: int, deadline: float | None = None) -> dict[str, str]:
    """Variables the ranks need, besides what they inherit. deadline: of the attempt, in seconds since the epoch."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks_per_node)
    return {
        NODE: node_name(),
        "OMP_NUM_THREADS": str(threads),
        # torch finds the ninja of our environment only by its name
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        # NCCL's flight recorder: the last collectives of each rank, written when one times out or the watchdog asks
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        **({DEADLINE: str(deadline)} if deadline is not None else {}),
    }


def node_name() -> str:
    """What the scheduler calls this node, or else its host name."""
    return os.environ.get(NODE) or os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def main() -> int:
    """Becomes torchrun, or returns 1 if the node is not fit for it; why is in its file then."""
    options = _parser().parse_args()
    files, nodes = RunFiles(options.run_dir), Nodes(options.nodes, options.ranks_per_node, options.rendezvous)
    number = options.node_rank if options.node_rank is not None else int(os.environ.get("SLURM_PROCID", 0))
    first = number * nodes.ranks_per_node
    record = {"host": node_name(), "ranks": [first, first + nodes.ranks_per_node - 1], "time": time.time()}
    path = files.node(options.attempt, number)
    path.parent.mkdir(exist_ok=True)
    _write(path, record)
    os.environ.update(rank_environment(nodes.ranks_per_node, options.deadline))  # a site's check may ask for ERNIE_NODE
    found = problems(files.attempt(options.attempt), nodes.ranks_per_node, options.health_check)
    if found:
        _write(path, {**record, "unhealthy": "; ".join(found)})
        print(f"node {record['host']} is not fit: {'; '.join(found)}", file=sys.stderr, flush=True)
        return 1
    command = torchrun(options.run_dir, options.attempt, nodes, number)
    os.execv(command[0], command)


def _write(path: Path, content: dict[str, object]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    aside.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launcher.node", description="Runs one node's ranks of an attempt.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("attempt", type=int)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="of the first node; with several nodes")
    parser.add_argument("--node-rank", type=int, help="default: SLURM_PROCID, or 0")
    parser.add_argument("--deadline", type=float, help="when the attempt has to be over, in seconds since the epoch")
    parser.add_argument("--health-check", metavar="COMMAND", help="a line of shell that fails on a node not to be used")
    return parser


if __name__ == "__main__":
    sys.exit(main())
