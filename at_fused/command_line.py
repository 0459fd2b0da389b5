"""The command `at-fused`, also `python -m at_fused`: one name for what trains, draws and reproduces.

    at-fused maps --model resnet50 --checkpoint pretrained --images cat.jpg --out maps.png

`maps` and `taps` come with the package. `train` and `reproduce` belong to a checkout of the repository, whose
modules `trainer`, `models` and `reproduce` are not installed: their names are too common for that.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__

COMMANDS = {
    "train": "train a model, alone or as the student of a teacher (train.py)",
    "maps": "draw the attention maps of networks (python -m at_fused.visualize)",
    "taps": "list the layers of a model that can be compared (python -m at_fused.taps)",
    "reproduce": "train the paper's tables (python -m reproduce)",
}
FROM_CHECKOUT = {"train": "train", "reproduce": "reproduce.__main__"}
INSTALLED = {"maps": "at_fused.visualize.__main__", "taps": "at_fused.taps.__main__"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of COMMANDS with the words after its name; returns its exit code, 2 after a mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    first = words[0] if words else ""
    if first in ("-h", "--help"):
        print(usage())
        return 0
    if first == "--version":
        print(f"at_fused {__version__}")
        return 0
    if first not in COMMANDS:
        what = f"there is no command {first!r}" if words else "which command?"
        print(f"at-fused: error: {what} ({', '.join(COMMANDS)}; more: at-fused --help)", file=sys.stderr)
        return 2
    try:
        run = _find(first)
    except LookupError as error:
        print(f"at-fused {first}: error: {error.args[0]}", file=sys.stderr)
        return 2
    return run(words[1:])


def usage() -> str:
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"usage: at-fused COMMAND ...\n\n{commands}\n\nat-fused COMMAND --help: its own flags"


def _find(command: str) -> Callable[[Sequence[str]], int]:
    """The main function of a command.

    Raises:
        LookupError: says what is missing and what to do.
    """
    if command in FROM_CHECKOUT:
        root = _checkout()
        if root is None:
            raise LookupError("not part of the installed package: run it in a checkout of the repository")
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
    try:
        module = importlib.import_module({**INSTALLED, **FROM_CHECKOUT}[command])
    except ModuleNotFoundError as error:
        raise LookupError(f"needs {error.name}: pip install 'at_fused[train]'") from None
    run: Callable[[Sequence[str]], int] = module.main
    return run


def _checkout() -> Path | None:
    """The repository that this package is part of, else the current folder if it is one."""
    for folder in (Path(__file__).resolve().parents[1], Path.cwd()):
        if all((folder / name).exists() for name in ("train.py", "trainer", "models", "at_fused")):
            return folder
    return None
