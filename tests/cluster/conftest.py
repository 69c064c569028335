"""Real clusters on this machine, started by the tests that need one."""

from slurm_cluster import slurm_cluster

__all__ = ["slurm_cluster"]
