"""Keys and passwords that a person put into a job, which is copied to the run directory and to whoever watches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_KEY = re.compile(
    r"wandb_v\d_\w{16,}|\bhf_[A-Za-z0-9]{16,}|\b(ghp|gho|ghs|github_pat)_\w{16,}|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b"
)
_OLD_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
"""a commit looks the same"""
_PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
_SECRET_VARIABLE = re.compile(r"\$\{?\w*(KEY|TOKEN|PASSWORD|SECRET)(?!\w)", re.IGNORECASE)
_EXPANDED = re.compile(r"(^|\.)(from_pretrained|config|tokenizer|dataset|path(\.\d+)?)$")
"""fields in which variables are replaced by their values"""


def secrets_in(raw: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(dotted field, what it looks like) of a raw job; never the value itself."""
    if isinstance(raw, dict):
        for key, value in raw.items():
            yield from secrets_in(value, f"{where}.{key}" if where else str(key))
    elif isinstance(raw, (list, tuple)):
        for number, value in enumerate(raw):
            yield from secrets_in(value, f"{where}.{number}")
    elif isinstance(raw, str):
        if _PASSWORD_IN_URL.search(raw):
            yield where, "an address with a password in it"
        elif _EXPANDED.search(where) and _SECRET_VARIABLE.search(raw):
            yield where, "a variable that holds a secret"
        elif _KEY.search(raw) or (_OLD_WANDB_KEY.fullmatch(raw) and not where.endswith("revision")):
            yield where, "a key"
