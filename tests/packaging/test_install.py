"""`pip install .` and `pip install -e .` give the three import packages and the command, and nothing more.

Each gets a venv of its own. What tokenllm depends on is borrowed from the venv that runs the tests, through a .pth
file: those are not read recursively, so this venv's own (editable) tokenllm stays out of sight.
"""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = [ROOT / "src", ROOT / "api_schemas", ROOT / "kernels"]
PACKAGES = {"tokenllm", "tokenllm_schemas", "tokenllm_kernels"}


def run(*command: str | Path) -> str:
    """Away from the repository, so that only what is installed can be imported."""
    done = subprocess.run([str(part) for part in command], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    venv.create(tmp_path / "venv", with_pip=False)
    (folder,) = (tmp_path / "venv" / "lib").glob("python3.*")
    (folder / "site-packages" / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By way of the sdist, so that a file missing there is missing here."""
    folder = tmp_path_factory.mktemp("dist")
    build = "import os, sys; os.chdir(sys.argv[1]); from hatchling.build import build_sdist; build_sdist(sys.argv[2])"
    run(sys.executable, "-c", build, ROOT, folder)
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, *folder.glob("*.tar.gz"))
    (built,) = folder.glob("*.whl")
    return built


def locations(python: Path) -> dict[str, Path]:
    script = "import importlib, sys; [print(importlib.import_module(name).__file__) for name in sys.argv[1:]]"
    names = sorted(PACKAGES)
    return dict(zip(names, map(Path, run(python, "-I", "-c", script, *names).splitlines()), strict=True))


def assert_command_works(python: Path) -> None:
    assert "serve" in run(python.parent / "tokenllm", "--help")
    assert "--max-running-requests" in run(python.parent / "tokenllm", "serve", "--help")


def test_the_wheel_holds_the_three_packages_whole_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(root)) for root in SOURCE_ROOTS for path in root.glob("*/**/*.py")}
    assert sources <= packed
    assert {name.split("/")[0] for name in packed} == PACKAGES


def test_an_installed_wheel_imports_and_runs_on_its_own(wheel: Path, python: Path) -> None:
    pip("--python", python, "install", "--no-deps", wheel)
    assert all(path.is_relative_to(python.parents[1]) for path in locations(python).values())
    assert_command_works(python)


def test_an_editable_install_imports_from_the_source_roots(python: Path) -> None:
    pip("--python", python, "install", "--no-deps", "--no-build-isolation", "-e", ROOT)
    assert {path.parents[1] for path in locations(python).values()} == set(SOURCE_ROOTS)
    assert_command_works(python)
