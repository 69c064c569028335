"""What a node looks at before each attempt."""

from pathlib import Path


def problems(attempt_dir: Path, gpus: int, command: str | None) -> list[str]:
    return []
