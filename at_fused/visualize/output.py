"""The file that the picture goes to: never one of the inputs, and replaced in one step."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from at_fused._files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check(out: Path) -> None:
    """Whether a picture can have this name.

    Raises:
        ValueError: of an unknown format, a folder, or in a folder that does not exist.
    """
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder")
    if _format(out) not in _formats():
        raise ValueError(f"--out {out}: the name must end with one of .{', .'.join(_formats())}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")


def spare(out: Path, files: Iterable[str | Path], what: str) -> None:
    """Refuses to overwrite one of `files`.

    Raises:
        ValueError: says that `out` is `what`.
    """
    if any(is_same(out, Path(file)) for file in files):
        raise ValueError(f"--out {out} is {what}: choose another name")


def is_same(one: Path, other: Path) -> bool:
    """Whether both are names of one file that exists."""
    return one.exists() and other.exists() and one.samefile(other)


def save(figure: Figure, out: Path) -> None:
    """Replaces `out` in one step, so that after a failure it holds what it held.

    Raises:
        ValueError: the picture cannot be written; says why.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format=_format(out))
    try:
        write_atomically(out.resolve(), picture.getvalue())  # a link stays a link
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror or error}") from None


def _format(out: Path) -> str:
    return out.suffix[1:].lower()


def _formats() -> list[str]:
    from matplotlib.backend_bases import FigureCanvasBase

    return sorted(FigureCanvasBase.get_supported_filetypes())
