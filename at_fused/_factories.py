"""Models of a user's own code: `package.module:factory` and `path/to/file.py:factory`.

Every mistake is a ValueError of one line, in the user's code also those it raises.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ._selectors import close_names
from .visualize.paths import user_path

_code: dict[str, dict[str, str]] = {}  # of the modules at each place: digests of their files when imported


def resolved(name: str) -> str:
    """`name` with a file's path made absolute, so that it names the same file in every folder."""
    place, _, factory = name.rpartition(":")
    return f"{os.path.abspath(user_path(place))}:{factory}" if place.endswith(".py") else name


def build(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Returns the model that the factory `name` makes for a number of classes, with its own options."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError("a factory is named package.module:factory or path/to/file.py:factory")
    with _recorded(place):
        module = _imported(place)
        return _made(_attribute(module, attribute, place), place, attribute, num_classes, options)


def code(name: str) -> dict[str, str]:
    """The code that a model was built of by the factory called `name`: digests of files, by module.

    They are the factory's own, first, and those imported for it from its folder or package, as they were
    then. Empty for a model that no factory has made.
    """
    return dict(_code.get(name.rpartition(":")[0], {}))


def _made(
    factory: Callable[..., Any], place: str, attribute: str, num_classes: int, options: dict[str, Any]
) -> nn.Module:
    arguments = {"num_classes": num_classes, **options}
    call = f"{attribute}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"it is called as {call}: {error}") from None
    except ValueError:  # of compiled code, which has no signature
        pass
    try:
        model = factory(**arguments)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"{call} failed: {told(error, place)}") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"{call} returned a {type(model).__name__}, not an nn.Module")
    return model


@contextlib.contextmanager
def _recorded(place: str) -> Iterator[None]:
    """Note the code at `place`, and what of its folder or package is imported meanwhile."""
    before = set(sys.modules)
    yield
    own = _imported(place)
    top = _file(sys.modules.get(own.__name__.partition(".")[0], own))
    found = _code.setdefault(place, {})
    for name in [own.__name__, *sys.modules.keys() - before]:
        path = _file(sys.modules.get(name))
        if path and name not in found and (name == own.__name__ or (top and _is_beside(top, path))):
            with contextlib.suppress(OSError):
                found[name] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _file(module: ModuleType | None) -> Path | None:
    path = getattr(module, "__file__", None)
    return Path(path) if path else None


def _is_beside(own: Path, other: Path) -> bool:
    """Whether it is in that folder, but not in a virtual environment inside it."""
    folder = own.parent
    return other.is_relative_to(folder) and "site-packages" not in other.relative_to(folder).parts


def told(error: BaseException, place: str = "") -> str:
    """Another program's error as one line: its type, its message, and the line of the file `place`."""
    text = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if place and frame.filename.endswith(place)]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{where}"


def _imported(place: str) -> ModuleType:
    return _of_file(os.path.abspath(user_path(place))) if place.endswith(".py") else _of_package(place)


@functools.cache
def _of_file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    number = hashlib.blake2b(path.encode(), digest_size=4).hexdigest()
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_{number}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no file of Python code")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look it up
    _append_to_path(os.path.dirname(path))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ValueError(f"{path} can't be imported: {told(error, path)}") from None
    return module


def _of_package(name: str) -> ModuleType:
    folder = os.getcwd()
    _append_to_path(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"there is no module {error.name}, neither installed nor in {folder}; a file is named "
                "path/to/file.py:factory"
            ) from None
        raise ValueError(f"{name} can't be imported: {told(error)}") from None
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{name} can't be imported: {told(error, name.replace('.', os.sep) + '.py')}"
        ) from None


def _append_to_path(folder: str) -> None:
    """Let its modules be imported, also later; behind all others, which they can't replace."""
    if folder not in sys.path:
        sys.path.append(folder)


def _attribute(module: ModuleType, name: str, place: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [
                key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
            ]
            close = close_names(name, known)
            hint = (
                f"close names: {', '.join(close)}" if close else f"it has: {', '.join(known[:10]) or 'none'}"
            )
            raise ValueError(f"{place} has no {name!r}; {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(
            f"{name!r} in {place} is a {type(found).__name__}, not a function that makes a model"
        )
    return found
