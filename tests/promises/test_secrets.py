"""Keys in the environment reach the services they are for, and no file, log or command line."""

import os
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

SECRETS = {
    "WANDB_API_KEY": "wandb_v1_Kq7RecognisableWandbKeyRecognisable0",
    "HF_TOKEN": "hf_RecognisableHubTokenRecognisable01",
    "RAY_AUTH_TOKEN": "RecognisableRayTokenRecognisable",
    "HTTPS_PROXY": "http://person:RecognisablePassword@127.0.0.1:9",
    "AWS_SECRET_ACCESS_KEY": "RecognisableCloudKey",
}
MARK = b"Recognisable"


def command_lines(run: str) -> set[bytes]:
    """Of every process that names the run."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:  # it has just ended
            continue
        if run.encode() in line:
            found.add(line)
    return found


def test_secrets_reach_no_file_no_log_and_no_command_line(runs):
    run = "secrets-of-this-run"
    overrides = ["engine.kind=plain", "track.wandb.project=p", "track.tensorboard=true"]
    process = runs.start(run, *overrides, ranks=1, **SECRETS)
    seen: set[bytes] = set()
    while process.poll() is None:
        seen |= command_lines(run)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert any(b"-m\0ernie_dist\0" in line for line in seen), seen
    assert not [line for line in seen if MARK in line]
    assert MARK.decode() not in output
    files = [path for path in runs.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [str(path) for path in files if MARK in path.read_bytes()]
    names = {path.name for path in files}
    assert {"job.json", "launch.json", "launch.sh", "rank_00000.log", "end.json", "report.html"} <= names
    assert any(name.endswith(".wandb") for name in names)
    # Who wrote a secret into a log by mistake, a library for one, shows it to nobody else.
    for private in (runs.files(run).attempt(1), runs.files(run).wandb):
        assert stat.S_IMODE(os.stat(private).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(runs.files(run).rank_log(1, 0)).st_mode) == 0o600
