"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME ...` runs one."""

from __future__ import annotations

import ast
import runpy
import sys
from difflib import get_close_matches
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> int:
    found = dict(sorted(_benchmarks().items()))
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        print("python -m benchmarks NAME [--help]\n")
        for name, line in found.items():
            print(f"  {name:14} {line}")
        return 0
    name = sys.argv[1]
    if name not in found:
        near = get_close_matches(name, found, n=1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(found)}"
        print(f"benchmarks: no benchmark is called {name}; {known}", file=sys.stderr)
        return 2
    del sys.argv[1]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    return 0


def _benchmarks() -> dict[str, str]:
    """What can be run, with the first line of its docstring; nothing is imported for it."""
    found = {}
    for path in FOLDER.glob("[!_]*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            found[path.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return found


if __name__ == "__main__":
    sys.exit(main())
