"""What the READMEs and docs say holds: paths exist, commands parse, the cheap ones run, every field is described."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from ernie_dist.spec.job import JobSpec, load_job
from launcher.cli import _parser

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh.md")
DOCS = (
    "architecture",
    "jobs",
    "data",
    "evaluate",
    "results",
    "speed",
    "chat-and-serve",
    "plan",
    "slurm",
    "ray",
    "fault-tolerance",
    "security",
)
PAGES = (*READMES, "CONTRIBUTING.md", *(f"docs/{name}.md" for name in DOCS))
EXAMPLE = "job.yaml"
"""the job that a README shows in full; commands in it name it as a file"""


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)
    return [block for name, block in found if name == language]


def commands(page: str) -> list[list[str]]:
    """The commands in a page's shell blocks, as words, without comments."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


EVERY_COMMAND = sorted({tuple(command) for page in PAGES for command in commands(page)})
CHEAP = [command for command in EVERY_COMMAND if command[:2] in (("ernie", "plan"), ("ernie", "schema"))]


# ----------------------------------------------------------------------------------------------------------------- tree


def tree_paths() -> Iterator[str]:
    """Paths in the README's tree; a line may name several files, each with an ending."""
    tree = next(block for block in blocks("README.md", "") if block.startswith("launcher/"))
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        first, _, rest = line.strip().partition(" ")
        del folders[depth:]
        path = "/".join([*(folder.rstrip("/") for folder in folders), first])
        yield path
        if first.endswith("/"):
            folders.append(first)
            for name in rest.split():
                if re.fullmatch(r"\w[\w-]*(\.(py|md|html|sbatch)|/)", name):
                    yield f"{path}{name}"


def test_paths_of_the_tree_exist():
    paths = list(tree_paths())
    assert len(paths) > 90
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_room_is_in_the_tree():
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    rooms = {path.split("/")[0] + "/" for path in listed if "/" in path and not path.startswith(".")}
    rooms |= {"/".join(path.split("/")[:2]) + "/" for path in listed if re.match(r"(ernie_dist|tests)/\w+/", path)}
    assert rooms - set(tree_paths()) == set()


# ------------------------------------------------------------------------------------------------------------- commands


def test_both_readmes_name_the_same_commands_and_the_same_job():
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    for language in ("yaml", "python"):
        stripped = [[re.sub(r"\s*#.*", "", block) for block in blocks(page, language)] for page in READMES]
        assert stripped[0] == stripped[1]


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_command_exists(command: tuple[str, ...]):
    words = [word for word in command if not re.fullmatch(r"[A-Z_]+=\S*", word)]  # PYTHON=python3.11 make install
    if words[0] == "ernie":
        options = _parser().parse_args(words[1:])  # exits on a verb or an option that is not there
        job = getattr(options, "job", EXAMPLE)
        assert job == EXAMPLE or (ROOT / "recipes" / f"{job}.yaml").is_file()
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "sbatch":
        script = next(word for word in words if word.endswith(".sbatch"))
        assert (ROOT / script).is_file()
        _parser().parse_args(["launch", *words[words.index(script) + 1 :]])
    else:
        assert words[0] == "." or words[0].startswith(".venv/bin/"), f"cannot tell whether {words} works"


@pytest.mark.parametrize("command", [*CHEAP, ("ernie", "--help")], ids=" ".join)
def test_cheap_command_runs(command: tuple[str, ...], tmp_path: Path):
    (tmp_path / EXAMPLE).write_text(blocks("README.md", "yaml")[0], encoding="utf-8")
    words = [sys.executable, "-m", "launcher", *command[1:]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr


def test_snippets_name_what_exists():
    for page in READMES:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = __import__(str(node.module), fromlist=["*"])
                    assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_plans(recipe: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "plan", recipe.stem], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert load_job(recipe).name in done.stdout


# --------------------------------------------------------------------------------------------------------------- fields


def models(kind: Any) -> Iterator[type[BaseModel]]:
    """Every model that a type mentions, itself included."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from models(field.annotation)
            for extra in field.metadata:
                yield from models(extra)
    for argument in get_args(kind):
        yield from models(argument)


@pytest.mark.parametrize(
    "model", sorted(set(models(JobSpec)), key=lambda model: model.__name__), ids=lambda model: model.__name__
)
def test_jobs_page_describes_every_field(model: type[BaseModel]):
    page = (ROOT / "docs/jobs.md").read_text(encoding="utf-8")
    table = re.search(rf"<!-- {model.__name__} -->\n(.*?)(?:\n\n|\Z)", page, flags=re.S)
    assert table, f"docs/jobs.md has no table for {model.__name__}"
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()[2:]]
    assert [row[0].strip("`| ") for row in rows] == list(model.model_fields)
    for row in rows:
        field = model.model_fields[row[0].strip("`| ")]
        if field.is_required():
            assert row[2] == "required", row
        elif isinstance(field.default, (bool, int, float, str)):
            shown = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            assert row[2].strip("`") == shown, row
