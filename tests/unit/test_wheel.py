"""The wheel works away from the checkout: in a clean environment it plans a packaged recipe from an empty folder."""

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASSET_FOLDERS = ("ds_configs", "slurm", "recipes")


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that sees neither the checkout nor a network."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment that holds the wheel alone and borrows the dependencies of this one.

    The borrowed folders come after its own on sys.path, and path files inside them are not read: an editable install
    of the checkout in this environment stays behind.
    """
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(own, "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python.parent


def test_wheel_holds_the_packages_and_their_assets(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ernie_dist", "launcher"}
    for folder in ASSET_FOLDERS:
        here = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        packed = {name.removeprefix("ernie_dist/assets/") for name in names if f"/assets/{folder}/" in name}
        assert here == packed
    assert "ernie_dist/assets/ds_configs/zero2.json" in names


def test_wheel_plans_a_packaged_recipe_from_an_empty_folder(clean: Path, tmp_path: Path):
    where = run(
        clean / "python",
        "-c",
        "import ernie_dist, launcher; print(ernie_dist.__file__, launcher.__file__, sep='\\n')",
        cwd=tmp_path,
    )
    for line in where.splitlines():
        assert Path(line).is_relative_to(clean.parent), f"{line} is not the installed wheel"
    plan = run(clean / "ernie", "plan", "three-stage-0.3b", cwd=tmp_path)
    assert "general" in plan
    assert not list(tmp_path.iterdir()), "a plan writes nothing"
