"""What this process and the nodes know from their environment.

Values of variables that a job names go from the driver to the nodes, and nowhere else: what stands in a runtime_env or
in an entry point is shown by the dashboard to whoever may look at it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.lease import RAY_JOB
from ernie_dist.spec.resources import ResourcesSpec

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""between the SIGTERM and the SIGKILL of `ray job stop`: Ray reads it in the environment of the job"""
_STOP_WAIT_DEFAULT = 3.0


def inside() -> bool:
    """Whether this process is the entry point of a Ray job, or was started by it."""
    return RAY_JOB in os.environ


def stop_wait() -> float | None:
    """Seconds that a `ray job stop` leaves; None outside a Ray job."""
    return float(os.environ.get(STOP_WAIT) or _STOP_WAIT_DEFAULT) if inside() else None


def refuse_passing_folder(what: str, folder: Path) -> None:
    """Raises SpecError for a folder in the copy of a `--working-dir`, which Ray removes after the job."""
    if "runtime_resources" in folder.parts:
        raise SpecError(f"{what} {folder}: Ray removes it after the job; give a full path that all nodes see")


def taken_along(resources: ResourcesSpec, ours: Mapping[str, str] = os.environ) -> dict[str, str]:
    """name -> value of the names in resources.environment, from the job's environment_file or else from `ours`.

    A name that is in neither is left to what the node itself has. Raises SpecError for a file that cannot be used.
    """
    kept = _read(Path(resources.ray.environment_file)) if resources.ray.environment_file else {}
    known = {**ours, **kept}
    return {name: known[name] for name in resources.environment if name in known}


def _read(path: Path) -> dict[str, str]:
    where = f"resources.ray.environment_file: {path}"
    try:
        if path.stat().st_mode & 0o077:
            raise SpecError(f"{where}: others can read it; chmod 600 it")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SpecError(f"{where}: {error.strerror}; it has to be seen from the head of the cluster") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        name, separator, value = line.partition("=")
        if not line.strip() or line.startswith("#"):
            continue
        if not separator:
            raise SpecError(f"{where}, line {number}: needs the form NAME=VALUE")
        found[name.strip()] = value
    return found
