"""Flags and locks that the commands of this folder share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from at_fused.visualize.paths import user_path
from trainer.errors import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


class Parser(argparse.ArgumentParser):
    """Mistakes become ConfigError: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def absolute(text: str) -> Path:
    return user_path(text).resolve()


def folder(text: str) -> Path:
    """The absolute path of a folder, which need not exist yet."""
    path = absolute(text)
    nearest = next(part for part in (path, *path.parents) if os.path.exists(part))
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, {nearest} is a file")
    return path


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Make the folder `out`, and lock it against other processes within this context.

    Raises:
        ConfigError: another process is at work there, or the folder can't be made.
    """
    lock = out / ".lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise ConfigError(f"out {out}: {error.strerror}") from None
    with open(lock, "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"out {out}: another process is at work there") from None
        except OSError:
            pass  # a file system without locks
        os.set_inheritable(file.fileno(), True)  # a training that outlives this process still holds it
        yield


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
