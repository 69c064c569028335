"""What is wrong with a node is found, and said in one line. There is no GPU here: nvidia-smi is a script that speaks as
the real one is documented to; disks, clocks and the site's command are real."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher import health

Smi = Callable[..., None]
FIT = "0, GPU-aa-0, 00000000:3B:00.0, 0\n1, GPU-bb-1, 00000000:5E:00.0, 0\n"
NO_REMAPS = "GPU-aa-0, No\nGPU-bb-1, No\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Puts an nvidia-smi on the PATH that prints what it is told, or waits."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def say(gpus: str = FIT, *, remaps: str = NO_REMAPS, code: int = 0, seconds: float = 0) -> None:
        (folder / "gpus").write_text(gpus)
        (folder / "remaps").write_text(remaps)
        script = folder / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\nsleep {seconds}\ncase "$1" in\n'
            f"--query-gpu=*) cat {folder}/gpus; exit {code};;\n"
            f"--query-remapped-rows=*) cat {folder}/remaps;;\nesac\n"
        )
        script.chmod(0o755)

    return say


def only(found: list[str]) -> str:
    assert len(found) == 1 and "\n" not in found[0], found
    return found[0]


def test_a_fit_node_has_no_problems_with_a_fake_nvidia_smi(smi: Smi, tmp_path: Path):
    smi()
    assert health.problems(tmp_path, 2, "echo all well") == []
    assert [path.name for path in tmp_path.iterdir()] == ["bin"], "nothing is left behind"
    smi("0, GPU-aa-0, 00000000:3B:00.0, [N/A]\n", remaps="Option is not recognized.\n")  # an old GPU, an old driver
    assert health.problems(tmp_path, 1, None) == []


def test_bad_gpus_are_named_by_a_fake_nvidia_smi(smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    smi(FIT.replace("5E:00.0, 0", "5E:00.0, 3"), remaps="GPU-aa-0, Yes\nGPU-bb-1, No\n")
    errors, remap = health.problems(tmp_path, 2, None)
    assert errors.startswith("GPU 1 (00000000:5E:00.0) has 3 uncorrected ECC error(s)") and "0 are allowed" in errors
    assert remap.startswith("GPU 0 (00000000:3B:00.0) has a row remap pending") and "reset it" in remap

    # What is wrong with a GPU that another job has is none of our business.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "row remap" in only(health.problems(tmp_path, 1, None))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb")
    assert "uncorrected" in only(health.problems(tmp_path, 1, None))
    smi()
    assert only(health.problems(tmp_path, 2, None)).startswith("1 GPU(s) can be used, 2 are wanted")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert only(health.problems(tmp_path, 8, None)).startswith("2 GPU(s) can be used, 8 are wanted")

    lost = "Unable to determine the device handle for GPU 0000:5E:00.0: GPU is lost.  Reboot the system to recover it\n"
    smi(FIT + lost, code=15)
    assert "5E:00.0: GPU is lost" in only(health.problems(tmp_path, 2, None))
    smi("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 610.57\n", code=18)
    assert "version mismatch; reset the GPU or reboot" in only(health.problems(tmp_path, 2, None))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert health.problems(tmp_path, 2, None) == [], "ranks compute on the CPU"


def test_a_driver_that_hangs_is_a_problem_with_a_fake_nvidia_smi(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    smi(seconds=60)
    monkeypatch.setattr(health, "_SMI_SECONDS", 0.5)
    begun = time.monotonic()
    assert "gave no answer in 0.5 s" in only(health.problems(tmp_path, 1, None))
    assert time.monotonic() - begun < 5


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_found_by_writing_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with small_disk(tmp_path / "run", "1m") as folder:
        assert health.problems(folder, 1, None) == []
        (folder / "filler").write_bytes(bytes((1 << 20) - (1 << 15)))
        found = only(health.problems(folder, 1, None))
        assert found.startswith(f"{folder}: cannot be written here: No space left on device; free space")
        assert [path.name for path in folder.iterdir()] == ["filler"]
        monkeypatch.setenv("TMPDIR", str(folder))
        assert only(health.problems(tmp_path, 1, None)).startswith(f"{folder}: 0 MiB free, temporary files need 64 MiB")
    with small_disk(tmp_path / "inodes", "65m,nr_inodes=2") as folder:
        (folder / "last").touch()
        monkeypatch.setenv("TMPDIR", str(folder))
        assert "no inode is free" in only(health.problems(tmp_path, 1, None))
    monkeypatch.delenv("TMPDIR")
    assert "No such file or directory" in only(health.problems(tmp_path / "gone", 1, None))


def test_shared_memory_too_small_for_nccl_is_found_with_a_fake_nvidia_smi(smi: Smi, tmp_path: Path):
    smi()
    code = f"import pathlib, launcher.health as h; print(h.problems(pathlib.Path({str(tmp_path)!r}), 2, None))"
    script = f'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec {sys.executable} -c "{code}"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True)
    if "denied" in done.stderr or "not permitted" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.stdout.startswith("['/dev/shm: 8 MiB free, NCCL needs 10 MiB for 2 GPUs;"), done.stderr
    assert "--shm-size=1g" in done.stdout


def test_a_clock_that_is_off_is_found_by_the_times_that_files_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The clock that is asked is moved: the one of this machine cannot be."""
    for skew, said in ((90.0, "90 s ahead of"), (-3600.0, "3600 s behind")):
        with monkeypatch.context() as patch:
            patch.setattr(health.time, "time", lambda skew=skew, now=time.time: now() + skew)
            found = only(health.problems(tmp_path, 1, None))
        assert found.startswith(f"the clock is {said} the one of the file server of {tmp_path}, 60 s are allowed")


def test_the_sites_command_gives_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = only(health.problems(tmp_path, 1, "echo looking; echo 'ib0: link is down' >&2; exit 3"))
    assert found == "resources.health_check failed with exit code 3: ib0: link is down"
    assert "no output from exit 1" in only(health.problems(tmp_path, 1, "exit 1"))
    monkeypatch.setattr(health, "COMMAND_SECONDS", 0.5)
    begun = time.monotonic()
    assert "did not end within" in only(health.problems(tmp_path, 1, "sleep 9; echo late"))
    assert time.monotonic() - begun < 5, "its children are killed too"
