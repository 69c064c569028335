"""Files that travel with the package: DeepSpeed configs, recipes, Slurm scripts."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from ernie_dist.spec.errors import SpecError

_PACKAGE = Path(__file__).resolve().parents[1]


def asset_folder(kind: str) -> Path:
    """Folder of `kind` ("ds_configs", "recipes", "slurm"): inside the wheel, or at the top of a checkout."""
    installed = _PACKAGE / "assets" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def find_asset(kind: str, name: str, suffix: str) -> Path:
    """A file by path, or a packaged one by bare name ("zero2", "three-stage-0.3b"). Raises SpecError with all names."""
    given = Path(name).expanduser()
    if given.is_file():
        return given.resolve()
    folder = asset_folder(kind)
    packaged = folder / (name if name.endswith(suffix) else name + suffix)
    if packaged.name == (name if name.endswith(suffix) else name + suffix) and packaged.is_file():
        return packaged
    names = sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))
    close = get_close_matches(name.removesuffix(suffix), names, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    raise SpecError(f"{name}: no such file, and no packaged one of that name; {hint}packaged: {', '.join(names)}")
