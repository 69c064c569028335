"""A node that is not as the others is named before a model is built. Two real ranks, each taken for a node."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ernie_dist.preflight import differing, preflight, wrong_clocks
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.world import World

HERE = Path(__file__).parent
DISGUISE = """
mount -t tmpfs tmpfs {root}/hidden/attempts/0001
mount --bind {root}/other.json {root}/job/job.json
mount --bind {root}/deaf {root}/deaf
mount -o remount,bind,ro {root}/deaf
exec {python} {worker} {folders}
"""
"""what a node sees that has other things mounted than the others"""


def ranks(root: Path, folders: list[Path]) -> list[list[dict]]:
    """What each of two ranks says of each run directory; the second one is in disguise."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = DISGUISE.format(
        root=root, python=sys.executable, worker=HERE / "preflight_worker.py", folders=" ".join(map(str, folders))
    )
    commands = [
        [sys.executable, str(HERE / "preflight_worker.py"), *map(str, folders)],
        ["unshare", "--mount", "sh", "-ec", script],
    ]
    own = ({}, {"STRANGE_PACKAGES": str(root / "packages")})
    started = []
    for rank, command in enumerate(commands):
        place = {"RANK": str(rank), "GROUP_RANK": str(rank), "LOCAL_RANK": "0", "ERNIE_NODE": f"n{rank + 7}"}
        place |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command,
                env={**os.environ, **place, **own[rank]},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], outputs
    return [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output, _ in outputs]


@pytest.mark.distributed
def test_a_node_that_differs_is_named_and_its_file_says_why(tmp_path: Path):
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("mounting is not allowed here")
    folders = {name: RunFiles(tmp_path / name) for name in ("good", "hidden", "job", "deaf", "versions")}
    for files in folders.values():
        files.node(1, 0).parent.mkdir(parents=True)
        files.node(1, 1).write_text('{"host": "n8", "pid": 17}')
        files.job.write_text("{}")
    (tmp_path / "other.json").write_text('{"seed": 18}')
    (tmp_path / "packages" / "transformers-9.9.9.dist-info").mkdir(parents=True)
    (tmp_path / "packages" / "transformers-9.9.9.dist-info" / "METADATA").write_text(
        "Name: transformers\nVersion: 9.9.9\n"
    )

    first, second = ranks(tmp_path, [files.root for files in folders.values()])
    said = dict(zip(folders, first, strict=True))
    good = said.pop("good")
    assert good["nodes"] == ["n7", "n8"] and 0 < good["latency"] < 1 and good["bandwidth"] > 1e6
    assert good["seconds"] < 5
    assert [one.get("refused") for one in first] == [one.get("refused") for one in second], "all ranks say the same"
    assert not (folders["good"].attempt(1) / "preflight").exists()
    assert json.loads(folders["good"].node(1, 1).read_text()) == {"host": "n8", "pid": 17}

    reasons = {
        "hidden": "preflight/token was written on another node and is not seen (No such file or directory); the run",
        "job": f"{folders['job'].job} is ",
        "deaf": "cannot be written there: Read-only file system",
        "versions": "transformers is 9.9.9 there and ",
    }
    for name, reason in reasons.items():
        assert said[name]["refused"].startswith("node n8 is not fit: ") and said[name]["exit_code"] == 1
        assert reason in said[name]["refused"] and "\n" not in said[name]["refused"]
        record = json.loads(folders[name].node(1, 1).read_text())
        assert (record["host"], record["pid"]) == ("n8", 17) and reason in record["unhealthy"]
        assert not folders[name].node(1, 0).exists(), "nothing is wrong with n7"


def test_most_ranks_are_right_and_where_there_is_no_most_rank_0_is():
    facts = [{"torch": "2.13.0", "device": "cuda"} for _ in range(6)]
    nodes = [(0, "a"), (0, "a"), (1, "b"), (1, "b"), (2, "c"), (2, "c")]
    assert differing(facts, nodes) == {}
    for rank in (0, 1):
        facts[rank] = {"torch": "2.12.0", "device": "cpu"}
    assert differing(facts, nodes) == {0: "torch is 2.12.0 there and 2.13.0 elsewhere"}
    assert differing(facts[:4], nodes[:4]) == {1: "torch is 2.13.0 there and 2.12.0 elsewhere"}

    assert wrong_clocks([0.0, 59.0], nodes[:2]) == {}
    assert list(wrong_clocks([500.0, 500.0, 1.0, 2.0, 0.0, 0.0], nodes)) == [0]
    assert wrong_clocks([500.0, 400.0], [(0, "a"), (1, "b")]) == {
        1: "its clock is 100 s behind, 60 s are allowed; set it (chronyc makestep)"
    }


def test_one_rank_has_nothing_to_compare_and_is_warned_of_company_on_a_fake_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    alone = World(node="n7")
    assert preflight(RunFiles(tmp_path), 1, alone).nodes == ("n7",) and not caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, said in ((75, ""), (40, "of GPU 0 40.0 of 80.0 GiB are in use before we begin; 10% are allowed")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free << 30, 80 << 30))
        assert preflight(RunFiles(tmp_path), 1, alone).bandwidth is None
        assert said in caplog.text and bool(said) == bool(caplog.text)
