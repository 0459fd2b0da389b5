"""Import this before torchvision: `from models import torchvision_compat  # noqa: F401`.

torchvision's PyPI wheel is built for a CUDA torch. Next to a CPU-only torch its compiled operators cannot
load, and `import torchvision` then stops at "operator torchvision::nms does not exist", as it describes
(`register_fake`) two operators that nothing has declared. Declaring their schemas is enough: all of its
Python (datasets, transforms, models) works, and only calling non-maximum suppression itself still raises.

Where the compiled operators load, this module changes nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the declarations live as long as this object


def _compiled_operators_load() -> bool:
    """Load torchvision's operators as its own `extension.py` would."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # not installed: leave it to the import to say so
    binaries = list(Path(spec.origin).parent.glob("_C*"))  # _C.so; from 0.29 on _C_stable.so
    try:
        for binary in binaries:
            torch.ops.load_library(binary)
    except OSError:
        return False
    return bool(binaries)


def _declare() -> None:
    global _library
    if _library is None and not hasattr(torch.ops.torchvision, "nms") and not _compiled_operators_load():
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            _library.define(schema)


_declare()
