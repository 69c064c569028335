"""The one command that every node runs, whoever got the node, and its environment."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ernie_dist.spec.stop_file import DEADLINE


@dataclass(frozen=True)
class Nodes:
    """The nodes of one attempt."""

    count: int
    ranks_per_node: int
    rendezvous: str | None = None
    """host:port of the first node; None on a single node, where torchrun takes a free port"""


def node_command(run_dir: Path, attempt: int, nodes: Nodes, *, python: str = sys.executable) -> list[str]:
    """torchrun, starting this node's ranks of `python -m ernie_dist RUN_DIR ATTEMPT`."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", nodes.rendezvous] if nodes.rendezvous else ["--standalone"]
    return [
        *(python, "-m", "torch.distributed.run"),
        *("--nnodes", str(nodes.count), "--nproc-per-node", str(nodes.ranks_per_node)),
        *meeting,
        *("--no-python", python, "-m", "ernie_dist", str(run_dir), str(attempt)),
    ]


def node_environment(ranks_per_node: int, deadline: float | None = None) -> dict[str, str]:
    """Variables the ranks need, besides what they inherit. deadline: of the attempt, in seconds since the epoch."""
    threads = max(1, (os.cpu_count() or 1) // ranks_per_node)
    return {
        "OMP_NUM_THREADS": str(threads),
        # torch finds the ninja of our environment only by its name
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        # NCCL's flight recorder: the last collectives of each rank, written when one times out or the watchdog asks
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        **({DEADLINE: str(deadline)} if deadline is not None else {}),
    }
