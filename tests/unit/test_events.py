"""The record of a run survives being killed, and nobody who watches can stop or slow the training."""

import io
import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest

from ernie_dist.events.aside import Aside
from ernie_dist.events.console import ConsoleSink
from ernie_dist.events.event import (
    AttemptStarted,
    CheckpointSaved,
    Evaluated,
    Event,
    EventBus,
    Finished,
    Preflight,
    Restored,
    StageStarted,
    StepFinished,
    Stopped,
)
from ernie_dist.events.history import read_all_attempts, read_events, read_metrics, replayed_steps
from ernie_dist.events.jsonl import JsonlSink
from ernie_dist.events.wandb import WandbSink
from ernie_dist.events.wording import cut, display_width, human_bytes, human_count, human_seconds, perplexity_text
from ernie_dist.spec.errors import RecordNotKept
from ernie_dist.spec.run_files import RunFiles
from ernie_dist.spec.training import WandbSpec


def started(attempt: int, step: int, device: str = "cpu") -> AttemptStarted:
    return AttemptStarted(attempt, step, 20, 20 * 1024, 2, device, "deepspeed zero2", 1_234_567, {"torch": "2.13.0"})


def finished_step(step: int, attempt: int = 1, **changed: object) -> StepFinished:
    values = {
        "step": step,
        "stage": "general",
        "loss": 1 / 3 + 1 / step,
        "learning_rate": 1e-3 / 7,
        "grad_norm": 0.1 * step,
        "consumed_tokens": step * 1024,
        "loss_tokens": 1000,
        "tokens_per_second": 5120.0,
        "mfu": None,
        "attempt": attempt,
        "batch_hash": f"{step:016x}",
        "applied": True,
    }
    return StepFinished(**{**values, **changed})


def held_out(step: int, source: str, loss: float = 3.0) -> Evaluated:
    return Evaluated(step, "general", source, loss, 1000, step * 1024, True)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path / "run")


def record(files: RunFiles, *events: Event) -> None:
    sink = JsonlSink(files)
    for event in events:
        sink.handle(event)
    sink.close()


# ---- the record ------------------------------------------------------------------------------------------------------


def test_a_step_is_one_line_with_the_documented_keys(files):
    record(files, started(1, 0), finished_step(1), held_out(1, "law"))
    [line] = files.metrics.read_text().splitlines()
    assert list(json.loads(line)) == [field.name for field in fields(StepFinished) if field.name != "time"] + ["time"]
    assert [event["event"] for event in read_events(files.events)] == ["AttemptStarted", "Evaluated"]


def test_floats_keep_their_bits(files):
    losses = [1 / 3, math.pi * 1e-30, 5e-324, 0.1 + 0.2, -0.0, struct.unpack("f", struct.pack("f", 2.3))[0]]
    record(files, *(finished_step(step, loss=loss) for step, loss in enumerate(losses, start=1)))
    assert [line["loss"].hex() for line in read_metrics(files.metrics)] == [loss.hex() for loss in losses]


def test_what_is_not_finite_is_null_and_read_as_nan(files):
    record(files, finished_step(1, loss=math.nan, grad_norm=math.inf), held_out(1, "law", math.nan))
    strict = json.loads(files.metrics.read_text(), parse_constant=pytest.fail)
    assert strict["loss"] is None and strict["grad_norm"] is None
    [line] = read_metrics(files.metrics)
    assert math.isnan(line["loss"]) and math.isnan(line["grad_norm"]) and line["mfu"] is None


def test_a_torn_last_line_costs_that_line_only(files):
    """At whatever byte the process was killed."""
    record(files, finished_step(1), finished_step(2))
    whole = files.metrics.read_bytes()
    second = whole.index(b"\n") + 1
    for end in range(second, len(whole) + 1):
        files.metrics.write_bytes(whole[:end])
        kept = [1, 2] if end >= len(whole) - 1 else [1]
        assert [line["step"] for line in read_metrics(files.metrics)] == kept, end
        record(files, finished_step(3))
        assert [line["step"] for line in read_metrics(files.metrics)] == [*kept, 3], end
    files.metrics.write_bytes(whole[: second - 5])
    record(files, finished_step(3))
    assert [line["step"] for line in read_metrics(files.metrics)] == [3]


def test_a_long_torn_line_is_found(files):
    record(files, finished_step(1))
    with files.metrics.open("ab") as file:
        file.write(b'{"step": 2, "stage": "' + b"x" * 200_000)
    record(files, finished_step(2))
    assert [line["step"] for line in read_metrics(files.metrics)] == [1, 2]


@contextmanager
def full_disk(path: Path, room: int) -> Iterator[None]:
    """No file can grow past the size of `path` and `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_delays_the_record_and_costs_no_line_of_it(files, caplog):
    sink = JsonlSink(files)
    bus = EventBus([sink])
    for step in range(1, 2001):
        bus.emit(finished_step(step))
    with full_disk(files.metrics, room=500):  # a line and a half
        for step in range(2001, 2021):
            bus.emit(finished_step(step))
        assert not files.metrics.read_bytes().endswith(b"\n")
    bus.emit(finished_step(2021))
    assert [line["step"] for line in read_all_attempts(files.metrics)] == list(range(1, 2022))
    assert caplog.text.count("wait in memory") == 1 and caplog.text.count("nothing of it is missing") == 1
    bus.close()


def test_disk_full_for_too_long_ends_the_run_and_says_so(files, caplog):
    bus = EventBus([JsonlSink(files, most_waiting=10_000)])
    for step in range(1, 2001):
        bus.emit(finished_step(step))
    with full_disk(files.metrics, room=10):
        with pytest.raises(RecordNotKept, match="free some space and launch again") as raised:
            for step in range(2001, 2101):
                bus.emit(finished_step(step))
        bus.close()
    assert raised.value.exit_code == 1 and "lines are lost" in caplog.text
    record(files, finished_step(2001, attempt=2))
    assert [line["step"] for line in read_all_attempts(files.metrics)] == list(range(1, 2002))


def test_killed_while_writing_every_line_but_the_last_is_there(files):
    """A process that writes as fast as it can gets SIGKILL: no step that was emitted is missing in between."""
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_events import JsonlSink, RunFiles, finished_step
sink, step = JsonlSink(RunFiles(Path(sys.argv[1]))), 0
print("ready", flush=True)
while True:
    step += 1
    sink.handle(finished_step(step))
"""
    arguments = [sys.executable, "-c", code, str(files.root), str(Path(__file__).parent)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    record(files, finished_step(10**9, attempt=2))
    steps = [line["step"] for line in read_metrics(files.metrics)]
    assert len(steps) > 2 and steps[:-1] == list(range(1, len(steps)))


def test_of_a_step_written_twice_the_later_attempt_counts(files):
    record(files, *(finished_step(step, attempt=1) for step in range(1, 8)))
    record(files, *(finished_step(step, attempt=2, grad_norm=0.5) for step in range(5, 10)))
    assert [(line["step"], line["attempt"]) for line in read_metrics(files.metrics)] == [
        *((step, 1) for step in range(1, 5)),
        *((step, 2) for step in range(5, 10)),
    ]
    assert len(read_all_attempts(files.metrics)) == 12
    assert read_metrics(files.root / "nothing.jsonl") == []


def test_replayed_steps_show_a_difference_of_one_bit(files):
    record(files, *(finished_step(step) for step in range(1, 8)))
    nudged = math.nextafter(finished_step(6).loss, 1)
    record(files, finished_step(5, 2), finished_step(6, 2, loss=nudged), finished_step(7, 2, batch_hash="0" * 16))
    record(files, finished_step(7, 3, batch_hash="0" * 16), finished_step(8, 3))
    compared = [(r.step, r.first_attempt, r.second_attempt, r.identical) for r in replayed_steps(files.metrics)]
    assert compared == [(5, 1, 2, True), (6, 1, 2, False), (7, 1, 2, False), (7, 2, 3, True)]


def test_history_needs_no_torch():
    code = "import sys, ernie_dist.events.history; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- the console -----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and what a person sees on it."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines = [""]
        for part in self.getvalue().replace("\r\x1b[2K", "\x00").split("\n"):
            lines[-1] += part
            lines.append("")
        return [line.rpartition("\x00")[2] for line in lines[:-1]]


def test_plain_lines_are_few_and_name_what_happens():
    stream, now = io.StringIO(), [0.0]
    sink = ConsoleSink(stream, clock=lambda: now[0])
    bus = EventBus([sink])
    bus.emit(started(1, 0))
    bus.emit(StageStarted(0, "general", 0, 20, 0))
    for step in range(1, 21):
        now[0] += 1.0
        bus.emit(finished_step(step, time=1000.0 + step))
    bus.emit(held_out(20, "law", 3.0))
    bus.emit(held_out(20, "web", 2.0))
    bus.emit(CheckpointSaved(20, "step_00000020", 5 << 20, 0.5, 0.1))
    bus.emit(Finished(20, 20480, "RUN/export"))
    bus.close()
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert sum("no GPU here: the job runs on 2 CPU ranks" in line for line in lines) == 1
    progress = [line for line in lines if line.startswith("general  step ")]
    assert [line.split()[2] for line in progress] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert "0:14 left" in progress[1]  # 1024 tokens a second on the clock, whatever the steps themselves took
    assert "held-out loss at step 20, after general: law 3.0000 (perplexity 20.09); web 2.0000 (perplexity 7.39)" in (
        lines
    )
    assert any(line.startswith("checkpoint step_00000020: 5.0 MiB") for line in lines)
    assert lines[-1] == "finished: 20 steps, 20,480 tokens; model in RUN/export"


def test_live_line_is_redrawn_below_what_stays():
    stream, now = Terminal(), [0.0]
    sink = ConsoleSink(stream, clock=lambda: now[0], width=60)
    sink.handle(Preflight(2, ("n1",), 0.1))
    sink.handle(Preflight(2, tuple(f"n{node}" for node in range(9)), 0.1, 2.5e-5, 187e9))
    sink.handle(started(2, 4, device="cuda"))
    sink.handle(Restored(2, 4, 4096, "step_00000004", 0.3))
    for step in range(5, 9):
        now[0] += 1.0
        sink.handle(finished_step(step, stage="阶段" * 20, time=1000.0 + step))
    sink.handle(Stopped(8, "SIGTERM"))
    sink.close()
    screen = stream.screen()
    network = "all-reduce in 0.025 ms, bus bandwidth 187 GB/s"
    assert screen[0] == f"9 nodes (n0, n1, n2, n3, n4, n5, n6, n7 and 1 more): {network}"
    assert screen[2] == "goes on from step_00000004: step 4, read in 0.3 s"
    assert screen[3] == "stopped after step 8 (SIGTERM); launch again to go on"
    assert screen[4].startswith("阶段") and screen[4].endswith("…") and display_width(screen[4]) <= 59
    assert screen[5:] == [""] and "no GPU" not in stream.getvalue()


def test_wording():
    assert cut("一二三四", 6) == "一二…" and display_width("一二…") == 5
    assert cut("abc", 3) == "abc" and cut("abcd", 3) == "ab…"
    assert [human_seconds(s) for s in (5, 65, 3725, 90061)] == ["0:05", "1:05", "1:02:05", "1d 1:01:01"]
    assert [human_count(n) for n in (12, 1234, 30e9)] == ["12", "1.23K", "30B"]
    assert [human_bytes(n) for n in (12, 2048, 3 << 30)] == ["12 B", "2.0 KiB", "3.0 GiB"]
    assert [perplexity_text(x) for x in (1.0, 9.0, 800.0, math.nan)] == ["2.72", "8,103", "inf", "nan"]


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ernie_dist.events.tensorboard import TensorboardSink

    for attempt, first, last in ((1, 0, 7), (2, 4, 9)):
        sink = TensorboardSink(tmp_path)
        sink.handle(started(attempt, first))
        for step in range(first + 1, last + 1):
            sink.handle(finished_step(step, attempt, loss=float(attempt)))
            if step == 4:
                sink.handle(held_out(step, "law", 2.0))
        sink.close()
        if attempt == 1:
            time.sleep(1.1)  # TensorBoard orders its files by the second they were opened in
    read = EventAccumulator(str(tmp_path)).Reload()
    points = [(point.step, point.value) for point in read.Scalars("train/loss")]
    assert points == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 10)]
    assert [point.step for point in read.Scalars("eval/law/loss")] == [4]
    assert read.Scalars("eval/law/perplexity")[0].value == pytest.approx(math.exp(2.0))
    assert {"optim/lr", "optim/grad_norm", "perf/tokens_per_second"} <= set(read.Tags()["scalars"])


class Stuck:
    """A sink that hangs in its first event, as a file of a dead server does."""

    def __init__(self) -> None:
        self.released, self.seen = threading.Event(), []

    def handle(self, event: Event) -> None:
        self.released.wait()
        self.seen.append(event)

    def close(self) -> None:
        pass


def test_sink_that_hangs_holds_nobody_up(caplog):
    stuck = Stuck()
    bus = EventBus([Aside(stuck, queue_events=100, close_seconds=0.4)])
    begin = time.perf_counter()
    for step in range(1, 1001):
        bus.emit(finished_step(step))
    bus.close()
    assert time.perf_counter() - begin < 2
    assert caplog.text.count("Stuck does not keep up") == 1 and "is left behind" in caplog.text
    stuck.released.set()


def test_sink_aside_gets_every_event_in_order_and_its_failure_is_told_once(caplog):
    class Fails(Stuck):
        def close(self) -> None:
            raise OSError("the disk is gone")

    fails = Fails()
    fails.released.set()
    bus = EventBus([Aside(fails)])
    for step in range(1, 1001):
        bus.emit(finished_step(step))
    bus.close()
    assert [event.step for event in fails.seen] == list(range(1, 1001))
    assert caplog.text.count("Fails failed and is left out") == 1


# ---- W&B -------------------------------------------------------------------------------------------------------------


def wandb_sink(files: RunFiles, **options: object) -> WandbSink:
    files.root.mkdir(exist_ok=True)
    return WandbSink(WandbSpec(project="p", **options.pop("spec", {})), files.wandb, {"seed": 17}, "run", **options)


class FakeRun:
    """Notes what it is given; `on_log` may misbehave."""

    starting_step = 0
    dir = "run/wandb/offline-run-1/files"

    def __init__(self, on_log=lambda: None):
        self.points, self.summary, self.config, self.on_log = [], {}, {}, on_log
        self.config = types.SimpleNamespace(update=lambda *a, **k: None)
        self.exit_code = None

    def log(self, points, step):
        self.on_log()
        self.points.append((step, points))

    def mark_preempting(self):
        pass

    def finish(self, exit_code):
        self.exit_code = exit_code


def mock_wandb(monkeypatch, init) -> None:
    module = types.ModuleType("wandb")
    module.Settings = lambda **settings: settings
    module.Table = lambda **content: content
    module.teardown = lambda: None
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)


def emit_many(sink: WandbSink, steps: int) -> float:
    """Seconds of the slowest call."""
    slowest = 0.0
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        sink.handle(finished_step(step))
        slowest = max(slowest, time.perf_counter() - begin)
    return slowest


def test_mock_wandb_that_hangs_in_init_blocks_nothing(files, monkeypatch, caplog):
    forever = threading.Event()
    mock_wandb(monkeypatch, lambda **settings: forever.wait())
    sink = wandb_sink(files, queue_events=100, close_seconds=0.3)
    assert emit_many(sink, 1000) < 1
    begin = time.perf_counter()
    sink.close()
    assert time.perf_counter() - begin < 2
    assert "W&B missed 900 events" in caplog.text
    assert caplog.text.count("does not keep up") == 1
    forever.set()


def test_mock_wandb_that_hangs_in_log_blocks_nothing(files, monkeypatch, caplog):
    forever = threading.Event()
    mock_wandb(monkeypatch, lambda **settings: FakeRun(on_log=forever.wait))
    sink = wandb_sink(files, queue_events=10, close_seconds=0.3)
    assert emit_many(sink, 100) < 1
    sink.close()
    assert "is left behind" in caplog.text
    forever.set()


@pytest.mark.parametrize("where", ["init", "log"])
def test_mock_wandb_that_fails_is_reported_once(files, monkeypatch, caplog, where):
    def fail(**settings):
        raise ValueError("the service is on fire")

    mock_wandb(monkeypatch, fail if where == "init" else lambda **settings: FakeRun(on_log=fail))
    sink = wandb_sink(files)
    emit_many(sink, 50)
    time.sleep(0.1)
    emit_many(sink, 50)
    sink.close()
    assert caplog.text.count("the service is on fire") == 1
    assert "goes on without W&B" in caplog.text and "metrics.jsonl" in caplog.text


def test_missing_wandb_is_reported_once(files, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink = wandb_sink(files)
    emit_many(sink, 50)
    sink.close()
    assert caplog.text.count("wandb is not installed") == 1


def test_mock_wandb_server_away_is_kept_offline(files, monkeypatch, caplog):
    run, modes = FakeRun(), []

    def init(mode, **settings):
        modes.append(mode)
        if mode == "online":
            raise ConnectionError("no route to host")
        return run

    mock_wandb(monkeypatch, init)
    sink = wandb_sink(files, spec={"mode": "online"})
    emit_many(sink, 3)
    sink.close()
    assert modes == ["online", "offline"] and [step for step, _ in run.points] == [1, 2, 3]
    assert "kept offline" in caplog.text


def test_mock_wandb_gets_no_step_it_already_has(files, monkeypatch):
    run = FakeRun()
    run.starting_step = 6
    mock_wandb(monkeypatch, lambda **settings: run)
    sink = wandb_sink(files)
    for step in range(4, 9):
        sink.handle(finished_step(step, 2))
    sink.handle(Stopped(8, "SIGTERM"))
    sink.close()
    assert [step for step, _ in run.points] == [6, 7, 8] and run.exit_code == 75


ATTEMPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_events import *
files, attempt, first, last = RunFiles(Path(sys.argv[2])), *map(int, sys.argv[3:])
bus = EventBus([JsonlSink(files), wandb_sink(files)])
bus.emit(started(attempt, first))
for step in range(first + 1, last + 1):
    bus.emit(finished_step(step, attempt))
bus.emit(CheckpointSaved(last, f"step_{last:08d}", 1000, 0.1, 0.0))
bus.emit(held_out(last, "law", 2.0))
bus.emit(Finished(last, 1, "export"))
bus.close()
"""


def test_real_wandb_offline_is_one_run_over_two_attempts(files):
    pytest.importorskip("wandb")
    for attempt, first, last in ((1, 0, 7), (2, 4, 9)):
        arguments = [str(Path(__file__).parent), str(files.root), str(attempt), str(first), str(last)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment |= {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, "-c", ATTEMPT, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout + done.stderr == ""
    run_id = (files.wandb / "run_id").read_text().strip()
    logs = sorted(files.wandb.glob("offline-run-*/*.wandb"))
    assert [log.name for log in logs] == [f"run-{run_id}.wandb"] * 2
    first, second = (read_wandb(log) for log in logs)
    assert first["id"] == second["id"] == run_id and first["config"]["seed"] == 17
    assert [step for step, point in first["points"] if "train/loss" in point] == list(range(1, 8))
    assert [step for step, point in second["points"] if "train/loss" in point] == [8, 9]  # 5 to 7 are in the first
    assert dict(second["points"])[9]["train/loss"] == finished_step(9).loss
    assert dict(second["points"])[9]["eval/law/loss"] == 2.0
    assert second["summary"]["checkpoint/last"].endswith("checkpoints/step_00000009")
    assert second["summary"]["eval/table"]["nrows"] == 2


def read_wandb(path: Path) -> dict:
    """The run in wandb's transaction log: 7 bytes of header, then protobuf records in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    raw, position, body = path.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    found: dict = {"points": [], "summary": {}, "config": {}}
    while position + 7 <= len(raw):
        if (left := 32768 - position % 32768) < 7:  # a block's end too short for a header
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[position : position + 7])
        body += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (1, 4):  # 1 whole, 2 first, 3 middle, 4 last part of a record
            continue
        entry = wandb_internal_pb2.Record.FromString(body)
        body = b""
        if entry.HasField("run"):
            found["id"] = entry.run.run_id
            found["config"] |= {item.key: json.loads(item.value_json) for item in entry.run.config.update}
        elif entry.HasField("history"):
            point = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entry.history.item}
            found["points"].append((entry.history.step.num, point))
        elif entry.HasField("summary"):
            for item in entry.summary.update:
                found["summary"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found
