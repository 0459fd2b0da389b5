"""Files that are written whole or not at all, and checkpoints read without running code from them."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from at_fused import _files, _weights
from models.importers import load_state
from trainer.errors import ConfigError
from trainer.run_folder import CHECKPOINT, PREVIOUS

FORMAT = 1  # of what a run stores; the first versions did not say so


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: after a crash at any moment it holds the old or the new, never a part.

    Raises:
        ConfigError: the disk is full, read-only or broken; what `path` held is still there.
    """
    try:
        _files.write_atomically(path, content)
    except OSError as error:
        kept = " (the file that was there is intact)" if path.exists() else ""
        raise ConfigError(f"cannot write {path}: {error.strerror or error}{kept}") from None


def save(path: Path, state: Any) -> None:
    """Save tensors and plain containers atomically; equal states give equal bytes."""
    buffer = io.BytesIO()  # through a buffer: torch.save writes a file's own name into it
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def save_latest(folder: Path, state: Any, *, keep_latest: bool = True) -> None:
    """Save `state` as the latest checkpoint of the run in `folder`; what was the latest becomes the previous
    one, unless it isn't to be kept because it is damaged."""
    latest, previous = folder / CHECKPOINT, folder / PREVIOUS
    if keep_latest and latest.exists():
        temporary = previous.with_name(f".{PREVIOUS}.tmp")
        try:
            temporary.unlink(missing_ok=True)
            try:
                os.link(latest, temporary)  # a second name: nothing is copied, and the latest never goes away
            except OSError:
                shutil.copyfile(latest, temporary)  # a file system without hard links
            os.replace(temporary, previous)
            temporary.unlink(missing_ok=True)  # still there where both were the same file already
        except OSError as error:
            raise ConfigError(
                f"cannot write {previous}: {error.strerror or error} ({latest.name} is intact)"
            ) from None
    save(latest, state)


def load_latest(folder: Path) -> tuple[dict[str, Any], Path, str | None] | None:
    """The latest good checkpoint of the run in `folder`, its path, and why it isn't the very latest, if so.

    None where the run has not written any.

    Raises:
        ConfigError: there are checkpoints, and none is good.
    """
    latest, previous = folder / CHECKPOINT, folder / PREVIOUS
    if not latest.exists() and not previous.exists():
        return None
    try:
        return load(latest), latest, None
    except ConfigError as error:
        if not previous.exists():
            raise
        return load(previous), previous, str(error)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, weights only. Missing, damaged or foreign files raise ConfigError."""
    try:
        state = _weights.read(path)
    except OSError as error:
        raise ConfigError(f"checkpoint {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"checkpoint {error}") from None
    if not isinstance(state, dict):
        raise ConfigError(f"checkpoint {path} does not hold a dictionary")
    return state


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` as contiguous tensors on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def digest(model: nn.Module) -> str:
    """The same for models of the same weights, whichever file they came from."""
    summary = hashlib.blake2b(digest_size=16)
    for name, tensor in weights(model).items():
        summary.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        summary.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()


def load_weights(model: nn.Module, path: Path, name: str, *, new_classifier: bool = False) -> dict[str, int]:
    """Load model.pt, checkpoint.pt or another project's file (see models.importers) into `model`.

    With `new_classifier` the last layer keeps its own weights where the file's are of other classes; returned
    are the layers that do. What does not fit `model`, called `name`, raises ConfigError.
    """
    content = load(path)
    try:
        state = _weights.find(content, model.state_dict().keys())
        return load_state(model, state, new_classifier=new_classifier)
    except ValueError as error:
        raise ConfigError(f"checkpoint {path} does not fit {name}: {error}") from None
