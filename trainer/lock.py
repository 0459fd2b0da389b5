"""One training at a time in an output folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from trainer.errors import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Let no other training write to `folder`, which is there, meanwhile.

    The lock is the process's own (POSIX): it ends with it, and workers forked from it do not hold it. Within
    a process it refuses nothing: one training comes after the other there.

    Raises:
        ConfigError: another is at work there.
    """
    path = folder / LOCK
    while True:
        with open(path, "a") as file:
            try:
                if fcntl:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ConfigError(f"output-dir {folder}: another training is at work there") from None
            except OSError:
                pass  # a file system without locks
            if not _is_at(file, path):
                continue  # its last holder has just removed it
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Let no other process be within this for `folder` meanwhile, and wait for one that is."""
    with open(folder / LOCK, "a") as file:
        if fcntl:
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield
