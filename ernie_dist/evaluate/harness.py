"""The door to lm-evaluation-harness: standard benchmarks on a model that is already loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ernie_dist.inference import ChatModel
from ernie_dist.spec.errors import EnvironmentProblem, SpecError


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises EnvironmentProblem without the harness, SpecError for tasks that it does not know."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise EnvironmentProblem(
            '--tasks: lm-evaluation-harness is not installed; pip install "ernie_dist[lm-eval]"'
        ) from None
    names, manager = _named(tuple(tasks))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise SpecError(f"--tasks: the harness knows no {', '.join(unknown)}; `lm_eval ls tasks` lists its own")


def run_tasks(
    chat: ChatModel, tasks: Sequence[str], *, batch_size: int, limit: int | None, seed: int
) -> dict[str, Any]:
    """{task: {metric: value}} as the harness names them. A task is a name, or a YAML file that defines one."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names, manager = _named(tuple(tasks))
    found = simple_evaluate(
        model=HFLM(pretrained=chat.model, tokenizer=chat.tokenizer, batch_size=batch_size),
        tasks=names,
        task_manager=manager,
        limit=limit,
        log_samples=False,
        bootstrap_iters=1000,
        **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed),
    )
    return {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in (found or {}).get("results", {}).items()
    }


@cache
def _named(tasks: tuple[str, ...]) -> tuple[list[str], Any]:
    """Names of the tasks, and the harness's index of them; making one of its thousands of own tasks takes a while."""
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    folders = sorted({str(file.resolve().parent) for file in files})
    names = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    for file in files:
        try:
            names.append(str(yaml.safe_load(file.read_text(encoding="utf-8"))["task"]))
        except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
            raise SpecError(f"--tasks {file}: is no task of the harness ({error}); it needs a field `task`") from None
    return names, TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))
