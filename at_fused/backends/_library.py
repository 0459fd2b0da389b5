"""Loading of the compiled libraries."""

from __future__ import annotations

from pathlib import Path

import torch


def load(library: Path) -> str | None:
    """Registers the operators of `library`; None, or in one line why that fails: the linker's reason, which
    torch wraps."""
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"its library does not load: {str(error.__cause__ or error).splitlines()[0]}"
    return None
