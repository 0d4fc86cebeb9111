"""The folder of one server's stored responses: nobody else may look into it, and it does not outlive the server long.

A server that is killed cannot remove its own. So a server holds a lock on its folder while it lives, and each that
starts removes the folders that nobody holds any more.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenllm.supervisor import StartError

PREFIX = "tokenllm-responses-"
NEWBORN_S = 60.0  # so young a folder may not have been locked yet


@contextmanager
def private_folder() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix=PREFIX)
    except OSError as error:
        raise StartError(f"there is no place for temporary files: {error.strerror}") from error
    with folder as name, _locked(Path(name)):
        _remove_those_of_the_dead(Path(name).parent)
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises an OSError if another process holds it."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _remove_those_of_the_dead(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # a living server's, or another user's
            if time.time() - folder.stat().st_mtime > NEWBORN_S:
                with _locked(folder):
                    shutil.rmtree(folder)
