"""Models by name, with weights, for `python -m at_fused.visualize`.

They come from torchvision, timm and, in a checkout of the repository, its zoo. Every mistake of the user's is
a ValueError of one line.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import _weights
from .._selectors import close_names

Triple = tuple[float, float, float]
IMAGENET: tuple[Triple, Triple] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10: tuple[Triple, Triple] = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Architecture:
    """How to make a model, and the images it expects: their side in pixels, mean and deviation of 0..1."""

    name: str
    create: Callable[[int | None], nn.Module]  # takes the number of classes, None for the library's default
    pretrained: Callable[[], nn.Module]
    read: Callable[[Path], nn.Module] | None = None  # a file of weights, where the library has its own reader
    size: int = 224
    statistics: tuple[Triple, Triple] = IMAGENET


class LibraryMissing(Exception):
    """A library of models cannot be imported; says why."""


@dataclass(frozen=True)
class Network:
    """A model in eval mode and where it comes from."""

    model: nn.Module
    architecture: Architecture


def load(name: str, weights: str | None) -> Network:
    """The model called `name` (see `find`) with the weights of a file, "pretrained" ones or random ones."""
    architecture = find(name)
    if weights is None:
        model = architecture.create(None)
    elif weights == PRETRAINED:
        try:
            model = architecture.pretrained()
        except Exception as error:  # whatever a download can raise
            raise ValueError(f"no pretrained weights of {name}: {_line(error)}") from None
    elif Path(weights).is_dir():
        raise ValueError(f"checkpoint {weights} is a folder: name its model.pt")
    elif not Path(weights).is_file():
        raise ValueError(f"checkpoint {weights}: no such file")
    else:
        try:
            model = (architecture.read or (lambda path: _read(architecture, path)))(Path(weights))
        except OSError as error:
            raise ValueError(f"checkpoint {weights}: {error.strerror or error}") from None
    for module in model.modules():
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010 (typed so); a recorded output must stay as it was
    return Network(model.eval().requires_grad_(False), architecture)


def find(name: str) -> Architecture:
    """The zoo's model of that name, else torchvision's, else timm's; `timm/NAME` insists on one of them.

    Raises:
        ValueError: no library has it; lists close names, and the libraries that cannot be imported.
    """
    library, _, own_name = name.rpartition("/")
    libraries = {"zoo": _zoo, "torchvision": _torchvision, "timm": _timm}
    if library not in ("", *libraries):
        raise ValueError(f"unknown library {library!r}: zoo, torchvision or timm")
    known: list[str] = []
    missing: list[str] = []
    for prefix in [library] if library else libraries:
        try:
            found, names = libraries[prefix](own_name)
        except LibraryMissing as error:
            missing.append(f"{prefix}: {error}")
            continue
        if found is not None:
            return found
        known += names
    if close := close_names(own_name, known):
        hints = [f"close names: {', '.join(close)}"]
    else:
        hints = [f"{len(known)} models are known, none of a close name"] if known else []
    raise ValueError("; ".join([f"unknown model {name!r}", *hints, *missing]))


def categories(classes: int) -> list[str] | None:
    """ImageNet's names for 1,000 classes."""
    try:
        library = _import("torchvision.models")
    except LibraryMissing:
        return None
    return list(library.ResNet18_Weights.DEFAULT.meta["categories"]) if classes == 1000 else None


def repository(module: str) -> ModuleType | None:
    """`models` or `trainer` of a checkout of the repository; another package of that name is left alone."""
    spec = importlib.util.find_spec("models")
    marker = "torchvision_compat"
    if spec is None or spec.origin is None or not Path(spec.origin).with_name(f"{marker}.py").exists():
        return None
    importlib.import_module(f"models.{marker}")  # before torchvision, next to a CPU-only torch
    return importlib.import_module(module)


def _zoo(name: str) -> tuple[Architecture | None, list[str]]:
    zoo = repository("models")
    if zoo is None:
        raise LibraryMissing("only in a checkout")
    try:
        with torch.device("meta"):
            zoo.create(name)
    except zoo.UnknownModel:
        return None, zoo.available()
    except ValueError as error:  # a size that can't be built
        raise ValueError(f"model {name!r}: {error}") from None

    def pretrained() -> nn.Module:
        raise ValueError("the zoo publishes none; try torchvision/resnet18, timm/resnet18, ...")

    small = re.fullmatch(r"(authors-)?resnet-\d+", name) is None
    architecture = Architecture(
        name,
        lambda classes: zoo.create(name, **({} if classes is None else {"num_classes": classes})),
        pretrained,
        lambda path: zoo.load_pretrained(path, name),
        32 if small else 224,
        CIFAR10 if small else IMAGENET,
    )
    return architecture, []


def _torchvision(name: str) -> tuple[Architecture | None, list[str]]:
    library = _import("torchvision.models")
    names = library.list_models(module=library)
    if name not in names:
        return None, names
    preset = library.get_model_weights(name).DEFAULT.transforms()
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}  # else each warns

    def create(classes: int | None) -> nn.Module:
        return library.get_model(
            name, weights=None, num_classes=1000 if classes is None else classes, **options
        )

    def pretrained() -> nn.Module:
        return library.get_model(name, weights="DEFAULT")

    statistics = tuple(preset.mean), tuple(preset.std)
    return Architecture(name, create, pretrained, None, preset.crop_size[0], statistics), []


def _timm(name: str) -> tuple[Architecture | None, list[str]]:
    library = _import("timm")
    if not library.is_model(name.partition(".")[0]):
        return None, library.list_models()
    config = library.get_pretrained_cfg(name, allow_unregistered=True)

    def create(classes: int | None) -> nn.Module:
        return library.create_model(name, **({} if classes is None else {"num_classes": classes}))

    def pretrained() -> nn.Module:
        return library.create_model(name, pretrained=True)

    statistics = tuple(config.mean), tuple(config.std)
    return Architecture(name, create, pretrained, None, config.input_size[-1], statistics), []


def _import(name: str) -> Any:
    try:
        repository("models")
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # the latter: torchvision next to another torch
        absent = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        raise LibraryMissing("not installed" if absent else _line(error)) from None


def _read(architecture: Architecture, path: Path) -> nn.Module:
    """A model with the weights in `path`; the last layer gets as many classes as they have."""
    model = architecture.create(None)
    own = model.state_dict()
    try:
        state = _weights.load(path, own.keys())
    except ValueError as error:
        raise ValueError(f"checkpoint {error}") from None
    heads = {
        len(state[key])
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
        and (state[key].ndim, state[key].shape[1:]) == (own[key].ndim, own[key].shape[1:])
    }
    if len(heads) == 1:
        model = architecture.create(heads.pop())
        own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape),
    }
    if any(problems.values()):
        listed = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in problems.items() if keys]
        raise ValueError(f"checkpoint {path} does not fit {architecture.name}: {'; '.join(listed)}")
    model.load_state_dict(state)
    return model


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
