"""One training at a time in an output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.config import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Let no other training write to `folder`, which is there, meanwhile.

    The lock is the process's own (POSIX): it ends with it, and workers forked from it do not hold it.

    Raises:
        ConfigError: another is at work there.
    """
    with open(folder / LOCK, "a") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"output-dir {folder}: another training is at work there") from None
        except OSError:
            pass  # a file system without locks
        yield
