"""Real clusters on this machine, started by the tests that need one."""

from ray_cluster import ray_cluster
from slurm_cluster import slurm_cluster

__all__ = ["ray_cluster", "slurm_cluster"]
