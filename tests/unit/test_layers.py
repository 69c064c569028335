"""The architecture is a test: the contracts in pyproject.toml hold, and light modules stay light at run time."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter: this one has imported everything already."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_contracts_hold():
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache', '--no-logo'])"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_planning_leaves_torch_unloaded():
    modules = "launcher, ernie_dist.spec, ernie_dist.progress, ernie_dist.schedule"
    loaded = run_python(f"import sys, {modules}; print('torch' in sys.modules)").split()
    assert loaded == ["False"]


def test_help_loads_nothing_heavy():
    """What keeps `ernie --help` instant; its time is not asserted, since that would measure the machine."""
    code = """
import contextlib, io, sys
sys.argv = ["ernie", "--help"]
import launcher.cli
with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
    launcher.cli.main()
assert "launch" in text.getvalue(), text.getvalue()
print(*sorted({"pydantic", "yaml", "numpy", "torch", "transformers", "matplotlib"} & set(sys.modules)))
"""
    assert run_python(code).split() == []
