"""Files of model weights: read without running code from them, and unwrapped."""

from __future__ import annotations

import errno
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

# Under these keys checkpoints hold a model's weights.
CONTAINERS = ("model", "state_dict", "model_state_dict", "params", "net", "network", "module", "student")
# So wrappers call the model in them: DataParallel and AveragedModel, Lightning modules, ours and others'.
WRAPPERS = ("module.", "model.", "net.", "network.")
TAUGHT = ("student.", "architecture.")  # beside a teacher; the latter mmrazor's

_FOLDER = 0x10  # MS-DOS's attribute of an archive's entry
_LONGEST = 120  # characters of a reason
_SHOWN = 8  # keys


class Inert:
    """Replaces an object of a file that is no tensor or plain container, and reads nothing of it."""

    def __new__(cls, *args: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_PLAIN: dict[str, Callable[..., Any]] = {  # containers that are filled after they are made
    "collections.defaultdict": lambda *_: {},
    "collections.deque": lambda *_: [],
}


def read(path: str | Path) -> Any:
    """The tensors and plain containers that torch.save or safetensors has written to `path`, on the CPU.

    An `Inert` stands for any other object in it: no code of its class is imported or run.

    Raises:
        OSError: the file can't be read.
        ValueError: it is damaged, or of another kind.
    """
    try:
        if _is_safetensors(path):
            return _read_safetensors(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_inert(path)):
            warnings.simplefilter("ignore")  # the unpickler's, of what it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_sums(path)
    except Exception as error:  # zip, pickle, safetensors and torch each raise their own kinds
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch's, seeking in a truncated file
            raise
        raise _unusable(path, _reason(error)) from None
    if isinstance(content, Inert) or (isinstance(content, type) and issubclass(content, Inert)):
        raise _unusable(path, f"it holds {_named(content)}, not its state_dict")
    return content


def load(path: str | Path, own: Collection[str] = ()) -> State:
    """The weights in a file; what `read` and `find` raise names the file."""
    content = read(path)
    try:
        return find(content, own)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def find(content: Any, own: Collection[str] = ()) -> State:
    """The weights in what a file holds: unwrapped from a checkpoint, without the prefixes of wrappers.

    Of a file with a student's and a teacher's weights these are the student's.

    Args:
        content: what `read` has given.
        own: names of the tensors of the model that is to have them: they are no wrappers' prefixes.

    Raises:
        ValueError: there are none, or several models'; names the keys.
    """
    state = _unwrapped(content)
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}  # torch.compile's
    while True:
        state.pop("n_averaged", None)  # AveragedModel's
        shorter = _without_wrapper(state)
        if shorter is state or not set(own).isdisjoint(state):
            return state
        state = shorter


def _unwrapped(content: Any) -> State:
    """The dictionary of tensors in a checkpoint."""
    if not isinstance(content, Mapping):
        raise ValueError(f"holds no model weights but {_named(content)}")
    for key in CONTAINERS:
        if isinstance(inner := content.get(key), Mapping):
            stats = content.get("stats") if key == "params" else None
            return _unwrapped({**inner, **(stats if isinstance(stats, Mapping) else {})})
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors and not any(isinstance(value, Mapping) for value in content.values()):
        return tensors
    models = [key for key, value in content.items() if _looks_like_weights(value)]
    models = [key for key in models if not str(key).startswith("teacher")] or models
    if len(models) == 1:
        return _unwrapped(content[models[0]])
    if models:
        raise ValueError(f"holds the weights of several models: {_keys(models)}; save one of them")
    if tensors:
        return tensors
    objects = "".join(
        f"; {key} is {_named(value)}" for key, value in content.items() if isinstance(value, Inert)
    )
    raise ValueError(
        f"holds no model weights: its keys are {_keys(content)}{objects[:_LONGEST]}; expected are tensors by "
        f"name, as state_dict() gives them, alone or under one of {', '.join(CONTAINERS)}"
        if content
        else "holds no model weights: it is empty"
    )


def _looks_like_weights(value: Any) -> bool:
    """Whether it is a dictionary with a matrix or kernel in it, as no optimiser or random state is."""
    return isinstance(value, Mapping) and any(
        isinstance(key, str) and isinstance(item, Tensor) and item.is_floating_point() and item.ndim > 1
        for key, item in value.items()
    )


def _without_wrapper(state: State) -> State:
    """`state` without the outermost prefix; itself where there is none."""
    for prefix in TAUGHT:
        if any(key.startswith(prefix) for key in state):
            return _under(prefix, state)
    untaught = {key: value for key, value in state.items() if not key.startswith("teacher.")}
    if 0 < len(untaught) < len(state):
        return untaught
    for prefix in WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            return _under(prefix, state)
    return state


def _under(prefix: str, state: State) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# --- words ----------------------------------------------------------------------------------------------


def _unusable(path: str | Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged, truncated or not a checkpoint of weights alone ({reason})")


def _reason(error: Exception) -> str:
    """One line of plain text."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it holds {found[1]}, which is code"
    if found := re.search(r"WeightsUnpickler error:\s*(.+)", text):
        text = found[1]
    return text.splitlines()[0][:_LONGEST] if text.strip() else type(error).__name__


def _named(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    return f"a pickled {kind.__qualname__}" if issubclass(kind, Inert) else f"a {kind.__qualname__}"


def _keys(content: Collection[Any]) -> str:
    shown = ", ".join(map(str, list(content)[:_SHOWN]))
    return shown + (f" and {len(content) - _SHOWN} more" if len(content) > _SHOWN else "")


# --- files ----------------------------------------------------------------------------------------------


def _inert(path: str | Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """A class that does nothing for each that the file names and torch does not know (its own come first)."""
    if zipfile.is_zipfile(path):
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    else:
        names = _globals(path)
    return [(_PLAIN.get(name) or type(name, (Inert,), {}), name) for name in sorted(names)]


def _globals(path: str | Path) -> set[str]:
    """Classes and functions named in a file from before torch 1.6, which begins with five pickles."""
    with open(path, "rb") as file:
        steps = (step for _ in range(5) for step in pickletools.genops(file))
        names = {str(name).replace(" ", ".") for step, name, _ in steps if step.name == "GLOBAL"}
    return {name.replace("__builtin__.", "builtins.") for name in names}  # Python 2's name, as torch maps it


def _is_safetensors(path: str | Path) -> bool:
    """Such a file begins with the length of its header, in 8 bytes, and the header, which is JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= Path(path).stat().st_size


def _read_safetensors(path: str | Path) -> State:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("a safetensors file, which pip install safetensors makes readable") from None
    return dict(load_file(path))


def _check_sums(path: str | Path) -> None:
    """ValueError where an entry of a zip archive fails its checksum, which torch.load skips."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        folders = [entry.filename for entry in archive.infolist() if entry.external_attr & _FOLDER]
    if damaged or folders:  # a tensor is no folder, of which torch would read nothing
        raise ValueError(f"{damaged or folders[0]} fails its checksum")
