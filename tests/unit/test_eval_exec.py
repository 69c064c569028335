"""Generated code that means harm: it does not get out of its folder, does not outlive its time, and passes nothing."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ernie_dist.data.documents import Turn
from ernie_dist.evaluate.asking import Asked
from ernie_dist.evaluate.execution import Limits, check_confinement, pass_table, program, run, workers_for
from ernie_dist.evaluate.metrics import pass_at
from ernie_dist.evaluate.questions import Question
from ernie_dist.spec.errors import DataError, EnvironmentProblem, SpecError

SMALL = Limits(seconds=60, memory=512 << 20)

LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
SYSTEM_V = ("shmget(0, 1 << 20, 0o1600)", "semget(0, 1, 0o1600)", "msgget(0, 0o1600)")


@pytest.fixture(scope="module")
def confined() -> None:
    try:
        check_confinement()
    except EnvironmentProblem as reason:
        if os.environ.get("ERNIE_REQUIRE_CONFINEMENT") == "1":
            pytest.fail(str(reason), pytrace=False)
        pytest.skip(str(reason))


def marked(mark: str) -> list[str]:
    """Processes of this machine that have `mark` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if mark.encode() in command:
                found.append(entry.name)
    return found


@pytest.mark.usefixtures("confined")
def test_right_code_passes_and_wrong_code_does_not() -> None:
    question = Question("写一个函数 add", None, tests="assert add(1, 2) == 3", entry_point="add")
    answers = (
        "好的：\n```python\ndef add(a, b):\n    return a + b\n```\n完成。",
        "def add(a, b):\n    return a - b",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "def add(a, b)\n    return",
    )
    asked = Asked(0, answers, (0,) * 5, (True,) * 5, None, 0)
    assert pass_table([question], [asked], SMALL) == [[True, False, False, False, False]]
    assert "AssertionError" in run(program(question, answers[1]), SMALL).said


def test_a_completion_goes_on_with_its_prompt() -> None:
    """HumanEval: the prompt is the head of the function, the tests define check(candidate)."""
    question = Question("def one():", None, tests="def check(f):\n    assert f() == 1", entry_point="one")
    assert program(question, "    return 1").splitlines() == [
        *("def one():", "    return 1", "", "def check(f):", "    assert f() == 1", "check(one)"),
    ]


def test_a_completion_gets_back_the_indentation_that_its_answer_lost() -> None:
    asked = 'class One:\n    def get(self):\n        """One."""\n'
    turns = (Turn("system", "写代码", False), Turn("user", asked, False), Turn("assistant", "-", True))
    question = Question("system: 写代码\nuser: " + asked, None, turns=turns, tests="", entry_point="One")
    for prompt, answer in (
        (question, "one = 1\n        return one"),
        (question, "```python\n        one = 1\n        return one\n```"),
        (replace(question, turns=None, text="class One:\n    def get(self):"), "one = 1\n        return one"),
    ):
        namespace: dict[str, Any] = {}
        exec(program(prompt, answer), namespace)
        assert namespace["One"]().get() == 1


@pytest.mark.parametrize(
    "answer", ["class one:\n    pass", "one: int = 1", "async def one():\n    pass", "one = 1", "def one(): pass"]
)
def test_an_answer_that_defines_what_was_asked_for_stands_alone(answer: str) -> None:
    assert "写一个" not in program(Question("写一个 one", None, tests="one", entry_point="one"), answer)


@pytest.mark.usefixtures("confined")
def test_hostile_code_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-tell")
    tmp_path.chmod(0o777)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "mine").chmod(0o666)
    server = socket.create_server(("127.0.0.1", 0))
    hostile = f"""
import glob, os, socket
mine, got = {str(tmp_path)!r}, []
def attempt(name, act):
    try:
        act()
    except OSError:
        return
    got.append(name)
attempt("wrote beside", lambda: open(mine + "/other", "w"))
attempt("read a file", lambda: open(mine + "/mine").read())
attempt("wrote a file", lambda: open(mine + "/mine", "w"))
attempt("removed a file", lambda: os.unlink(mine + "/mine"))
attempt("connected", lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=2))
attempt("read passwords", lambda: open("/etc/shadow").read())
attempt("wrote to the system", lambda: open("/usr/lib/here", "w"))
attempt("saw processes", lambda: os.listdir("/proc"))
attempt("killed", lambda: os.kill({os.getpid()}, 9))
if "do-not-tell" in str(os.environ): got.append("read the environment")
if os.getuid() == 0 or os.geteuid() == 0: got.append("is root")
open("inside", "w").write("this is allowed")
assert got == [], got
"""
    ran = run(hostile, SMALL)
    assert (ran.passed, ran.said) == (True, "")
    assert sorted(os.listdir(tmp_path)) == ["mine"] and (tmp_path / "mine").read_text() == "mine"
    server.close()


@pytest.mark.usefixtures("confined")
@pytest.mark.parametrize(
    "code",
    ["while True: pass", "import time\ntime.sleep(60)", "while True: print('x' * 1000)"],
    ids=["loop", "sleeper", "flood"],
)
def test_it_cannot_take_more_than_its_time(code: str) -> None:
    begun = time.monotonic()
    assert not run(code, replace(SMALL, seconds=2)).passed
    assert time.monotonic() - begun < 6


@pytest.mark.usefixtures("confined")
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("held = [bytearray(1 << 24) for _ in range(200)]", "MemoryError"),
        ("for number in range(200):\n    open(str(number), 'wb').write(bytes(1 << 20))", "No space left"),
        ("open('big', 'wb').write(bytes(1 << 25))", "File too large"),
        ("import os, time\nfor _ in range(200):\n    if os.fork() == 0: time.sleep(60)", "temporarily unavailable"),
        ("import os\nos.memfd_create('kept')", "not permitted"),
        *((LIBC + f"assert libc.{call} >= 0, os.strerror(ctypes.get_errno())", "not permitted") for call in SYSTEM_V),
    ],
    ids=["memory", "disk", "one file", "forks", "memory file", "shared memory", "semaphores", "messages"],
)
def test_it_cannot_use_more_than_its_limits(code: str, reason: str) -> None:
    ran = run(code, SMALL)
    assert not ran.passed and reason in ran.said


@pytest.mark.usefixtures("confined")
def test_nothing_outlives_it() -> None:
    """A daemon that left its session and its parent, ignores signals, and holds no file of ours open."""
    mark = f"survivor-{os.getpid()}-{time.monotonic_ns()}"
    daemon = f"""
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)
        os.close(1); os.close(2)
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", {mark!r}])
    os._exit(0)
"""
    seen: list[str] = []
    watching = threading.Event()

    def watch() -> None:
        while not watching.is_set():
            seen.extend(marked(f"-c\0import time; time.sleep(60)\0{mark}"))
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run(daemon + "time.sleep(1)", SMALL)  # ends by itself
        assert seen and not marked(mark)
        assert not run(daemon + "time.sleep(60)", Limits(seconds=2)).passed  # is ended
        assert not marked(mark)
    finally:
        watching.set()
        thread.join()


@pytest.mark.usefixtures("confined")
def test_it_dies_with_whoever_asked() -> None:
    mark = f"orphan-{os.getpid()}"
    code = (
        "from ernie_dist.evaluate.execution import Limits, run\n"
        f'run(\'import os, sys\\nos.execv(sys.executable, [sys.executable, "-c", '
        f'"import time; time.sleep(60)", "{mark}-inside"])\', Limits(seconds=60))'
    )
    asking = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert becomes(lambda: bool(marked(f"\0{mark}-inside\0")))
    inside = marked(f"\0{mark}-inside\0")[0]
    first_to_go = Path(f"/proc/{inside}/oom_score_adj").read_text()
    asking.kill()
    asking.wait()
    assert becomes(lambda: not marked(f"\0{mark}-inside\0"))
    assert first_to_go == "1000\n"  # where memory runs out, before whoever asked


def becomes(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether it holds within this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_without_confinement_time_is_still_limited() -> None:
    """What --exec-unconfined does, where namespaces are not to be had."""
    assert not run("while True: pass", Limits(seconds=2, confined=False)).passed
    mark = f"background-{os.getpid()}"
    behind = (
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', "
        f"{mark!r}], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)"
    )
    assert run(behind, Limits(seconds=30, confined=False)).passed
    assert becomes(lambda: not marked(f"\0{mark}\0"))


def test_programs_at_once_fit_the_memory() -> None:
    assert workers_for(Limits(memory=1 << 50)) == 1
    assert workers_for(Limits(memory=1, processes=1)) == max(1, len(os.sched_getaffinity(0)) - 1)


def test_pass_at_k_is_unbiased() -> None:
    """5 answers, 2 right. k = 1: 2/5; k = 2: 1 - C(3,2)/C(5,2) = 1 - 3/10; k = 4: any 4 hold a right one."""
    five = [True, False, True, False, False]
    assert pass_at(1, five) == pytest.approx(2 / 5)
    assert pass_at(2, five) == pytest.approx(7 / 10)
    assert pass_at(4, five) == 1.0
    with pytest.raises(DataError, match="--samples 6"):
        pass_at(6, five)


def test_limits_travel_whole() -> None:
    assert json.loads(Limits(seconds=2.5).arguments())["CPU"] == 3
    with pytest.raises(SpecError, match="--exec-timeout 0s"):
        Limits(seconds=0)
