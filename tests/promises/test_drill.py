"""The drill proves what it says it proves, and notices what it has to notice."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from launcher.drill import equal


def test_one_bit_of_loss_or_another_sequence_is_noticed():
    line = {"loss": 2.5, "batch_hash": "a"}
    off = {"loss": math.nextafter(2.5, 3), "batch_hash": "a"}
    assert equal(line, dict(line), exact=True) == (True, True)
    assert equal(line, off, exact=True) == (False, True)
    assert equal(line, off, exact=False) == (True, True), "other ranks add up in another order"
    assert equal(line, {"loss": 2.51, "batch_hash": "a"}, exact=False) == (False, True)
    assert equal(line, {"loss": math.nan, "batch_hash": "b"}, exact=False) == (False, False)


@pytest.mark.distributed
@pytest.mark.faults
def test_a_drill_ends_with_every_row_equal_and_keeps_its_table(runs):
    words = ["--rounds", "4", "--faults", "kill-in-save,truncate,disk,ranks", "--seed", "5", "--ranks", "2"]
    command = [sys.executable, "-m", "launcher", "drill", "job.yaml", *words, "--steps", "90", "--dir", "drill"]
    done = subprocess.run(command, cwd=runs.folder, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((runs.folder / "drill" / "drill.json").read_text(encoding="utf-8"))
    assert sorted(row["fault"] for row in rows) == ["disk", "kill-in-save", "ranks", "truncate"]
    assert all(row["loss_equal"] and row["order_equal"] and row["ranks_gone"] for row in rows)
    by_name = {row["fault"]: row for row in rows}
    assert "refused" in by_name["truncate"]["happened"] and by_name["truncate"]["tokens_lost"] > 0
    assert "4 of 4 rounds equal" in done.stdout
    assert (runs.folder / "drill" / "drill.md").read_text(encoding="utf-8").count("| equal | equal |") == 4

    for wrong, said in ((["--dir", "data"], "no earlier drill"), (["--faults", "flood"], "choose from kill, ")):
        refused = subprocess.run([*command, *wrong], cwd=runs.folder, capture_output=True, text=True, check=False)
        assert refused.returncode == 2 and said in refused.stderr
