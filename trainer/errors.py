"""Mistakes of the user's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A mistake of the user's: the command line prints its one line and exits with code 2."""


class RankError(ConfigError):
    """One that may occur on a single rank, which then prints it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest of the `known` words, to end a message with; nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


@contextmanager
def checkpoint_of(key: str) -> Iterator[None]:
    """Errors about a checkpoint name the key that it was given by."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"{key} {str(error).removeprefix('checkpoint ')}") from None
