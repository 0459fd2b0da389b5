"""Paths as users write them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


class UnknownHome(argparse.ArgumentTypeError, ValueError):
    """A path begins with ~name, and nobody of that name has a home folder here; argparse prints the line."""


def expand(text: str) -> str:
    """`text` with the home folder in place of a leading ~ or ~name: shells leave it in `--key=~/x`.

    Raises:
        UnknownHome: there is no such folder.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        name = path.partition(os.sep)[0]
        raise UnknownHome(f"there is no home folder {name}; a file of that name is ./{name}")
    return path


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user means by `text`; raises as `expand`."""
    return Path(expand(os.fspath(text)))
