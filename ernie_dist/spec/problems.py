"""Mistakes in a job, all of them at once: where, what value, and what to do about it."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from ernie_dist.spec.errors import SpecError


@dataclass(frozen=True)
class Problem:
    """One mistake. `where` is a dotted field path; `value` is None where there is no value to show."""

    where: str
    message: str
    value: str | None = None

    def __str__(self) -> str:
        shown = f" = {self.value}" if self.value is not None else ""
        return f"  {self.where}{shown}\n      {self.message}"


def refuse(origin: str, problems: Sequence[Problem]) -> SpecError:
    """The error that lists every problem of the job that came from `origin` (a file name)."""
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    return SpecError("\n".join([f"{count} in {origin}:", *map(str, problems)]))


def suggest(name: str, known: Iterable[str]) -> str:
    """'did you mean "law"? known: general, law'"""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return (f'did you mean "{close[0]}"? ' if close else "") + f"known: {', '.join(names) or 'none'}"


def from_pydantic(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Translates pydantic's errors into problems that carry a remedy."""
    problems: dict[str, Problem] = {}
    for item in error.errors(include_url=False):
        path = _real_path(item, model)
        where = ".".join(map(str, path)) or "the job"
        if where not in problems or item["type"] == "value_error":  # the member of a union that read all of the value
            problems[where] = Problem(where, _message(item, path, model), _shown(item))
    # Of a union's members, the one that got further into the value is the one that was meant.
    return [problem for where, problem in problems.items() if not any(w.startswith(f"{where}.") for w in problems)]


def _message(item: Any, path: Sequence[int | str], model: type[BaseModel]) -> str:
    kind, detail = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        owner = _type_at(path[:-1], model)
        return "unknown field; " + suggest(str(path[-1]), owner.model_fields if owner else ())
    if kind == "value_error":  # our own validators: they carry the remedy
        return detail
    if kind == "model_type":
        owner = _type_at(path, model)
        return "needs a mapping of fields; " + suggest("", owner.model_fields if owner else ())
    if kind == "too_short":
        return f"needs at least {item['ctx']['min_length']}"
    description = _description(path, model)
    wanted = f" ({description})" if description else ""
    if kind == "missing":
        return f"is required{wanted}"
    if kind == "literal_error":
        return f"must be one of {item['ctx']['expected']}{wanted}"
    if kind == "string_pattern_mismatch":
        return "must begin with a letter or digit and hold only letters, digits, '_', '.' and '-'"
    return (detail[:1].lower() + detail[1:]) + wanted


def _shown(item: Any) -> str | None:
    if item["type"] in ("missing", "extra_forbidden") or isinstance(item["input"], (dict, BaseModel)):
        return None
    text = json.dumps(item["input"], ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _real_path(item: Any, model: type[BaseModel]) -> list[int | str]:
    """The error's path without the segments pydantic adds for members of a union ("str", "[key]")."""
    path: list[int | str] = []
    for depth, part in enumerate(item["loc"]):
        here = _type_at(path, model, models_only=False)
        if isinstance(here, type) and issubclass(here, BaseModel):
            unknown = item["type"] == "extra_forbidden" and depth == len(item["loc"]) - 1
            if part in here.model_fields or unknown:
                path.append(part)
        elif isinstance(part, int) or (typing.get_origin(here) is dict and part != "[key]"):
            path.append(part)
    return path


def _type_at(path: Sequence[int | str], model: type[BaseModel], *, models_only: bool = True) -> Any:
    here: Any = model
    for part in path:
        here = _step(here, part)
        if here is None:
            return None
    here = _plain(here)
    if models_only and not (isinstance(here, type) and issubclass(here, BaseModel)):
        return None
    return here


def _step(here: Any, part: int | str) -> Any:
    here = _plain(here)
    if isinstance(here, type) and issubclass(here, BaseModel):
        field = here.model_fields.get(str(part))
        return field.annotation if field else None
    origin, arguments = typing.get_origin(here), typing.get_args(here)
    if origin is dict:
        return arguments[1]
    return arguments[0] if origin in (tuple, list) else None


def _plain(here: Any) -> Any:
    """Strips Annotated and optional wrappers; of a union keeps the model or container, where there is one."""
    if typing.get_origin(here) is typing.Annotated:
        return _plain(typing.get_args(here)[0])
    if typing.get_origin(here) in (typing.Union, types.UnionType):
        members = [_plain(member) for member in typing.get_args(here)]
        structured = [m for m in members if typing.get_origin(m) or (isinstance(m, type) and issubclass(m, BaseModel))]
        return structured[0] if structured else members[0]
    return here


def _description(path: Sequence[int | str], model: type[BaseModel]) -> str | None:
    for cut in range(len(path), 0, -1):
        owner = _type_at(path[: cut - 1], model)
        field = owner.model_fields.get(str(path[cut - 1])) if owner else None
        if field is not None:
            return field.description
    return None
