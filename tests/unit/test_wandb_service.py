"""W&B's service away, hanging or dying: training does not notice, and in the end W&B has each step once.

Real wandb in processes of its own; a small HTTP server on this machine stands in for the service.
"""

import gzip
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ernie_dist.events.history import read_metrics
from ernie_dist.spec.run_files import RunFiles

pytest.importorskip("wandb")

ATTEMPT = """
import sys, logging
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_events import *
logging.basicConfig(format="%(message)s")
files, mode, (attempt, first, last) = RunFiles(Path(sys.argv[2])), sys.argv[3], map(int, sys.argv[4:])
bus = EventBus([JsonlSink(files), wandb_sink(files, spec={"mode": mode}, init_seconds=3.0, close_seconds=10.0)])
begin = time.perf_counter()
bus.emit(started(attempt, first))
for step in range(first + 1, last + 1):
    bus.emit(finished_step(step, attempt))
print(time.perf_counter() - begin, flush=True)
sys.stdin.readline()
bus.emit(held_out(last, "law", 2.0))
bus.emit(Finished(last, 1, "export"))
begin = time.perf_counter()
bus.close()
print(time.perf_counter() - begin, flush=True)
"""


class Attempt:
    """A process that emits steps first + 1 to last as fast as it can, and ends when told to."""

    def __init__(self, files: RunFiles, url: str, mode: str, *numbers: int) -> None:
        arguments = [str(Path(__file__).parent), str(files.root), mode, *map(str, numbers)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", ATTEMPT, *arguments],
            env=environment(url),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.emitting = float(self.process.stdout.readline())

    def finish(self) -> tuple[float, str]:
        """(seconds that closing took, what was logged)"""
        out, said = self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0, said
        return float(out), said

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=10)


class StandIn:
    """Answers as much of W&B's protocol as a run needs, and keeps the lines of its history."""

    def __init__(self, history: dict[int, dict] | None = None) -> None:
        self.history = history or {}
        self.seen, self.silent, self._over = threading.Event(), threading.Event(), threading.Event()
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                if stand_in.silent.is_set():
                    stand_in._over.wait()
                body = json.loads(gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw)
                self.answer(stand_in.graphql(body) if "query" in body else stand_in.file_stream(body))

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                self.answer({})

            def answer(self, content: dict) -> None:
                raw = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: object) -> None:
                pass  # the other end went away

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """From now on connections are refused."""
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def steps(self) -> list[int]:
        return [self.history[number]["_step"] for number in sorted(self.history)]

    def file_stream(self, body: dict) -> dict:
        chunk = (body.get("files") or {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(chunk["content"], start=chunk["offset"]):
            self.history[number] = json.loads(line)
        return {"limits": {}}

    def graphql(self, body: dict) -> dict:
        asked = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
        name, variables = asked[1] if asked else "", body.get("variables") or {}
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        if name == "RunResumeStatus":
            last = json.dumps({"_step": self.steps[-1], "_runtime": 1}) if self.history else "{}"
            bucket = {
                **{"id": "x", "name": "run", "displayName": "run", "summaryMetrics": last, "config": "{}", "tags": []},
                **{"historyLineCount": len(self.history), "logLineCount": 0, "eventsLineCount": 0},
                **{"historyTail": json.dumps([last]), "eventsTail": "[]", "wandbConfig": '{"t": 1}'},
            }
            return {"data": {"model": {**project, "bucket": bucket if self.history else None}}}
        if name == "UpsertBucket":
            self.seen.set()
            bucket = {"id": "x", "name": variables["name"], "displayName": "run", "config": "{}", "project": project}
            bucket["historyLineCount"] = len(self.history)
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}}
        return {"data": None, "errors": [{"message": f"the stand-in knows no {name}"}]}


def environment(url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "NO_PROXY": "127.0.0.1"}


def synced(files: RunFiles) -> StandIn:
    """What a service has after `wandb sync RUN_DIR/wandb`."""
    service = StandIn()
    command = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", str(files.wandb)]
    done = subprocess.run(command, env=environment(service.url), capture_output=True, text=True, timeout=60)
    service.close()
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stderr
    return service


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path / "run")


@pytest.fixture
def silent() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_killed_offline_attempt_costs_no_point_and_doubles_none(files):
    """wandb keeps the last 32 KiB in memory: the next attempt takes them from metrics.jsonl."""
    killed = Attempt(files, "http://127.0.0.1:9", "offline", 1, 0, 7)
    killed.kill()
    Attempt(files, "http://127.0.0.1:9", "offline", 2, 4, 12).finish()
    Attempt(files, "http://127.0.0.1:9", "offline", 3, 8, 15).finish()  # of whole attempts, only what is new
    service = synced(files)
    assert service.steps == list(range(1, 16))
    record = {line["step"]: line["loss"] for line in read_metrics(files.metrics)}
    assert {line["_step"]: line["train/loss"] for line in service.history.values()} == record


@pytest.mark.parametrize("service", ["refuses", "never_answers"])
def test_stand_in_service_away_at_the_start_blocks_nothing_and_loses_nothing(files, silent, service):
    url = silent if service == "never_answers" else "http://127.0.0.1:9"
    attempt = Attempt(files, url, "online", 1, 0, 20)
    seconds, said = attempt.finish()
    assert attempt.emitting < 1 and seconds < 20
    assert "kept offline" in said and "missed" not in said
    back = StandIn()
    Attempt(files, back.url, "online", 2, 16, 25).finish()
    assert back.steps == list(range(1, 26))  # it gets also what it missed
    assert synced(files).steps == list(range(1, 26))  # from the second attempt's file alone
    back.close()


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_stand_in_service_that_dies_or_hangs_in_the_middle_is_told_the_rest_later(files, how):
    service = StandIn()
    attempt = Attempt(files, service.url, "online", 1, 0, 20)
    assert service.seen.wait(20)
    service.close() if how == "dies" else service.silent.set()
    seconds, said = attempt.finish()
    assert attempt.emitting < 1 and seconds < 20
    assert "wandb sync" in said
    later = synced(files)
    assert later.steps == list(range(1, 21))
    first_seven = {number: later.history[number] for number in range(7)}
    back = StandIn(first_seven)  # that is what the service got before it died
    Attempt(files, back.url, "online", 2, 16, 25).finish()
    assert back.steps == list(range(1, 26))
    assert back.history[19]["train/loss"] == later.history[19]["train/loss"]
    back.close()
