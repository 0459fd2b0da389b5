"""Import this before torchvision: `from models import torchvision_compat  # noqa: F401`.

torchvision's PyPI wheel is built for a CUDA torch. Next to a CPU-only torch its compiled operators cannot
load, and `import torchvision` then stops at "operator torchvision::nms does not exist", as it describes
(`register_fake`) two operators that nothing has declared. Declaring their schemas is enough: all of its
Python (datasets, transforms, models) works, and only calling non-maximum suppression itself still raises.
They are declared when torchvision is about to be imported.

Where the compiled operators load, this module changes nothing.

Run as a script, as `make setup` does, it puts itself into the environment of its Python, if torchvision needs
it there: whatever runs in that environment, libraries and the examples included, can then import torchvision.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_IN_SITE_PACKAGES = "at_fused_torchvision"
_library: Any = None  # the declarations live as long as this object


def _compiled_operators_load() -> bool:
    """Load torchvision's operators as its own `extension.py` would."""
    import torch

    spec = PathFinder.find_spec("torchvision")
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
    import torch  # here: in an environment's site-packages, every start of Python would wait for it

    if _library is None and not hasattr(torch.ops.torchvision, "nms") and not _compiled_operators_load():
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            _library.define(schema)


class _BeforeTorchvision:
    """A finder of `sys.meta_path` that finds nothing: it is asked for each module, and acts on one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            _declare()
        return None


def install(site_packages: Path) -> bool:
    """Have Python import this file whenever it starts, as setuptools does; False where nothing needs it."""
    if _compiled_operators_load():
        return False
    copy = site_packages / f"{_IN_SITE_PACKAGES}.py"
    copy.write_bytes(Path(__file__).read_bytes())
    (site_packages / f"{_IN_SITE_PACKAGES}.pth").write_text(f"import {_IN_SITE_PACKAGES}\n")
    return True


if __name__ == "__main__":
    import sysconfig

    if install(Path(sysconfig.get_path("purelib"))):
        print("torchvision is made for another torch: its operators are declared here, so that it imports")
else:
    sys.meta_path.insert(0, _BeforeTorchvision())
