"""Real clusters on this machine, started by the tests that need one."""

from ray_cluster import ray_cluster

__all__ = ["ray_cluster"]
