"""Files of model weights: read without running code from them, and unwrapped."""

from __future__ import annotations

import argparse
import errno
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = 0x10  # MS-DOS's attribute of an archive's entry
_LONGEST = 120  # characters of a reason


def read(path: str | Path) -> Any:
    """The tensors and plain containers that torch.save has written to `path`, on the CPU.

    Raises:
        OSError: the file can't be read.
        ValueError: it is damaged, or of another kind.
    """
    try:
        # RepDistiller's checkpoints hold their command line beside the weights.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # the unpickler's, of what it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_sums(path)
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch's, seeking in a truncated file
            raise
        reason = str(error).splitlines()[0][:_LONGEST] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is damaged, truncated or not a checkpoint of weights alone ({reason})"
        ) from None
    return content


def load(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file; what `read` and `find` raise names the file."""
    content = read(path)
    try:
        return find(content)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def find(content: Any) -> dict[str, Tensor]:
    """The weights in what a file holds: unwrapped from a checkpoint, without the prefixes of wrappers.

    Of a file with a student's and a teacher's weights these are the student's.

    Raises:
        ValueError: there are none.
    """
    for key in ("model", "state_dict", "params") * 2:  # one in the other, in either order
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            stats = content.get("stats") if key == "params" else None
            content = {**content[key], **(stats if isinstance(stats, Mapping) else {})}
    tensors = isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )
    if not tensors or not content:
        raise ValueError("holds no model weights")
    state = {key.replace("_orig_mod.", ""): value for key, value in content.items()}  # torch.compile's
    while all(key.startswith("module.") for key in state):  # DataParallel's
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("student.") for key in state):
        own = {key.removeprefix("student."): value for key, value in state.items()}
        state = {key: value for key, value in own.items() if not key.startswith("teacher.")}
    return state


def _check_sums(path: str | Path) -> None:
    """ValueError where an entry of a zip archive fails its checksum, which torch.load skips."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        folders = [entry.filename for entry in archive.infolist() if entry.external_attr & _FOLDER]
    if damaged or folders:  # a tensor is no folder, of which torch would read nothing
        raise ValueError(f"{damaged or folders[0]} fails its checksum")
