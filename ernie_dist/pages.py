"""Pages of one file, as report and evaluation write them: the rules of their templates, and how they are replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jinja2


def template(file: Path, **filters: Callable[..., str]) -> jinja2.Template:
    """What it is given is written as text, never as HTML; a name that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(file.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    environment.filters.update(filters)
    return environment.get_template(file.name)


def put(path: Path, content: str | bytes) -> None:
    """Whoever has the old one open never sees half of the new one."""
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(aside, path)
