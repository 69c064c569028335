"""What the Ray launcher decides without a cluster; tests/cluster/test_ray.py has one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.job import JobSpec, parse_job
from launcher.base import Attempt
from launcher.node import Nodes, node_command

pytest.importorskip("ray")

from launcher.ray.environment import taken_along
from launcher.ray.launcher import RayLauncher, possible_sizes

PROMISES = Path(__file__).parents[1] / "promises" / "job.yaml"


def job(**resources: object) -> JobSpec:
    raw = yaml.safe_load(PROMISES.read_text(encoding="utf-8"))
    return parse_job({**raw, "resources": resources}, "job.yaml")


def test_a_run_goes_on_with_as_many_nodes_as_its_batches_can_be_dealt_to():
    assert possible_sizes(job(nodes=4, gpus_per_node=2)) == [4]
    assert possible_sizes(job(nodes=4, min_nodes=1, gpus_per_node=2)) == [4, 2, 1], "8 sequences: not to 6 ranks"
    assert possible_sizes(job(nodes=4, min_nodes=3, gpus_per_node=2)) == [4]


def test_the_script_of_an_attempt_is_the_node_command():
    given = job(nodes=2, gpus_per_node=4, health_check="test -d /shared")
    script = RayLauncher(given).render(Attempt(Path("/shared/run"), 7, given.resources, 1e9))
    words = shlex.split(script.splitlines()[-1])
    same = node_command(
        *(Path("/shared/run"), 7, Nodes(2, 4, "$2")), node_rank=0, deadline=1e9, health_check="test -d /shared"
    )
    assert words[:2] == ["exec", "python"] and "# On each of 2 node(s)" in script
    assert sorted(words[2:]) == sorted(word if word != "0" else "$1" for word in same[1:])


def test_values_of_variables_come_from_the_file_that_only_its_owner_reads_or_from_the_driver(tmp_path: Path):
    file = tmp_path / "run.env"
    file.touch(mode=0o600)
    file.write_text("# keys\nWANDB_API_KEY=a=b\n\nOTHER=1\n", encoding="utf-8")
    resources = job(
        environment=["WANDB_API_KEY", "NCCL_DEBUG", "MISSING"], ray={"environment_file": str(file)}
    ).resources
    ours = {"WANDB_API_KEY": "old", "NCCL_DEBUG": "INFO", "PATH": "/bin"}
    assert taken_along(resources, ours) == {"WANDB_API_KEY": "a=b", "NCCL_DEBUG": "INFO"}
    file.chmod(0o640)
    with pytest.raises(SpecError, match="others can read it; chmod 600"):
        taken_along(resources, ours)
