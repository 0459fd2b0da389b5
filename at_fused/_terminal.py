"""What a program says: never the reason that its work fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Outlet:
    """A text stream that takes whatever is written to it.

    What the encoding of `stream` lacks becomes escapes. Once the stream has failed (its reader has gone, the
    disk is full, the terminal was closed), `failure` says how, and the rest is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self._try(self.stream.write, text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self._try(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.failure = self.failure or error
            _discard(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lenient_output() -> Iterator[None]:
    """Makes stdout and stderr outlets within this context; can decorate a program's main function."""
    before = sys.stdout, sys.stderr
    outlets = [stream and Outlet(stream) for stream in before]  # None: closed by the shell
    sys.stdout, sys.stderr = outlets  # type: ignore[assignment]
    try:
        yield
    finally:
        for outlet in outlets:
            if outlet:
                outlet.flush()  # else the interpreter finds what can't be written, and changes the exit code
        sys.stdout, sys.stderr = before


def require_output() -> None:
    """Flush stdout, and raise if that fails; for programs whose only result is their output.

    Raises:
        OSError: it can't be written; not if the reader has closed the pipe.
    """
    if sys.stdout:
        sys.stdout.flush()
    failure = getattr(sys.stdout, "failure", None)
    if failure and not isinstance(failure, BrokenPipeError):
        raise OSError(failure.errno, failure.strerror, "stdout")


def _discard(stream: TextIO) -> None:
    """Let the null device take what waits in `stream`, and what follows."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # no file: nothing waits
        pass
