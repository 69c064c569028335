"""The script in docs/python-api.md does the whole road, in under 40 lines; and the doors to it are light."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ernie_dist import Run
from ernie_dist.spec.errors import RunDirError

ROOT = Path(__file__).resolve().parents[2]


def test_the_whole_road_from_python(taught: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs/python-api.md").read_text(encoding="utf-8")
    script = re.search(r"^```python\n(.*?)^```", page, flags=re.M | re.S)[1]
    assert script.count("\n") < 40
    script = script.replace('"baidu/ERNIE-4.5-0.3B-PT"', repr(str(taught.base))).replace("2e-5", "1e-2")
    (tmp_path / "data").mkdir()
    known = {question: answer for question, answer in taught.answers.items() if "产于" in question}
    rows = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in known.items()]
    (tmp_path / "data/qa.jsonl").write_text("".join(rows * 8), encoding="utf-8")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(known["白芝产于哪里？"]) == 2 and known["金苓产于哪里？"] in done.stdout
    assert (tmp_path / "loss.png").stat().st_size > 5000

    run = Run(tmp_path / "runs/herbs")
    curve = run.metrics()
    assert list(curve.index) == list(range(1, 61)) and curve["loss"].iloc[-1] < 0.1 * curve["loss"].iloc[0]
    with run.files.metrics.open("a") as file:  # a second attempt goes back to step 60
        file.write(
            json.dumps({**json.loads(run.files.metrics.read_text().splitlines()[-1]), "attempt": 2, "loss": 7.0})
        )
    again = run.metrics()
    assert len(again) == 60 and again["loss"][60] == 7.0 and again["loss"][59] == curve["loss"][59]
    assert {"Evaluated", "Finished"} <= {event["event"] for event in run.events()}


def test_the_doors_are_light_and_say_what_is_behind_them(tmp_path: Path) -> None:
    code = (
        "import sys, ernie_dist; from ernie_dist import Run; "
        "print(sorted({'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    with pytest.raises(ImportError, match="laod"):
        from ernie_dist import laod  # noqa: F401
    with pytest.raises(RunDirError, match="is not a run directory"):
        Run(tmp_path)
