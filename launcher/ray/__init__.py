"""The door to Ray: attempts as actors, jobs of its job server, data over its workers. Nothing outside imports ray."""

from __future__ import annotations

import os

from ernie_dist.spec.errors import EnvironmentProblem

# Ray reads them when it is imported. Only one node prints, and what it prints is no noise: a line is a step.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")

try:
    import ray as _ray  # noqa: F401
except ImportError as error:
    raise EnvironmentProblem(f"Ray is not installed here ({error}): pip install 'ernie_dist[ray]'") from None
