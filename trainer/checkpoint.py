"""Files that are written whole or not at all, and checkpoints read without running code from them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.importers import find_weights, load_state
from trainer.config import ConfigError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: after a crash at any moment it holds the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)


def save(path: Path, state: Any) -> None:
    """Save tensors and plain containers atomically; equal states give equal bytes."""
    buffer = io.BytesIO()  # through a buffer: torch.save writes a file's own name into it
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, weights only. Missing, truncated or foreign files raise ConfigError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"checkpoint {path}: {error.strerror or error}") from None
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ConfigError(f"checkpoint {path} is truncated or not a checkpoint ({reason})") from None
    if not isinstance(state, dict):
        raise ConfigError(f"checkpoint {path} does not hold a dictionary")
    return state


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` as contiguous tensors on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Load model.pt, checkpoint.pt or another project's file (see models.importers) into `model`.

    What does not fit `model`, called `name`, raises ConfigError.
    """
    content = load(path)
    try:
        load_state(model, find_weights(content))
    except ValueError as error:
        raise ConfigError(f"checkpoint {path} does not fit {name}: {error}") from None
