"""Models by name, from torchvision, timm, a user's own code and, in a checkout, the zoo.

Every mistake of the user's is a ValueError of one line.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _factories
from ._selectors import close_names

Triple = tuple[float, float, float]
IMAGENET: tuple[Triple, Triple] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10: tuple[Triple, Triple] = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)

ELSEWHERE = "torchvision:NAME, timm:NAME, package.module:factory and path/to/file.py:factory"


class Pretrained(NamedTuple):
    """A model with published weights, and the layers that they do not serve."""

    model: nn.Module
    new: Mapping[str, int]  # freshly initialised layers: number of classes of the published ones


@dataclass(frozen=True)
class Architecture:
    """How to make a model, and the images it expects: side in pixels, mean and deviation of pixels in 0..1.

    `create(num_classes, **options)` and `pretrained(num_classes, **options)` take options of the model's own;
    with None in place of a number, it has the number of classes that its library gives it.
    """

    name: str
    create: Callable[..., nn.Module]
    pretrained: Callable[..., Pretrained]
    read: Callable[[Path], nn.Module] | None = None  # a file of weights, where the library has its own reader
    size: int = 224
    statistics: tuple[Triple, Triple] = IMAGENET


class LibraryMissing(Exception):
    """A library of models cannot be imported; says why."""


def find(name: str) -> Architecture:
    """Returns the model of that name: as `elsewhere` takes them, else of the zoo, torchvision or timm.

    `zoo/NAME`, `torchvision/NAME` and `timm/NAME` insist on one of them.

    Raises:
        ValueError: there is none; lists close names, and the libraries that cannot be imported.
    """
    if ":" in name or name.endswith(".py"):  # the latter lacks its factory
        return elsewhere(name)
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
    raise ValueError("; ".join([f"unknown model {name!r}", *_hints(own_name, known), *missing]))


def elsewhere(name: str) -> Architecture:
    """Returns the model named `torchvision:NAME` or `timm:NAME`, or by the factory that makes it.

    Raises:
        ValueError: there is none; lists close names, or says why the library cannot be imported.
    """
    library, _, own_name = name.partition(":")
    if library not in ("torchvision", "timm"):
        return _of_factory(name)
    try:
        found, names = _torchvision(own_name) if library == "torchvision" else _timm(own_name)
    except LibraryMissing as error:
        install = f": pip install {library}" if str(error) == NOT_INSTALLED else ""
        raise ValueError(f"{library} can't be imported: {error}{install}") from None
    if found is None:
        raise ValueError(
            "; ".join([f"{library} has no model {own_name!r} for classes", *_hints(own_name, names)])
        )
    return found


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


def classifier(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, int]:
    """Layer -> number of classes of the `given` weights, for layers of a model that have another number.

    Its `own` weights differ in shape from these in no others, and in the first size alone, the same for all.
    """
    other = [key for key in own.keys() & given.keys() if own[key].shape != given[key].shape]
    sizes = {(own[key].shape[:1], given[key].shape[:1]) for key in other}
    if len(sizes) != 1 or any(own[k].shape[1:] != given[k].shape[1:] or not given[k].ndim for k in other):
        return {}
    return {key.rpartition(".")[0]: len(given[key]) for key in sorted(other)}


# --- libraries ------------------------------------------------------------------------------------------


def _zoo(name: str) -> tuple[Architecture | None, list[str]]:
    zoo = repository("models")
    if zoo is None:
        raise LibraryMissing("only in a checkout")
    try:
        found = zoo.architecture(name)
        with torch.device("meta"):
            found.create(None)
    except zoo.UnknownModel:
        return None, zoo.available()
    except ValueError as error:  # a size that can't be built
        raise ValueError(f"model {name!r}: {error}") from None
    return found, []


def _torchvision(name: str) -> tuple[Architecture | None, list[str]]:
    library = _import("torchvision.models")
    names = library.list_models(module=library)
    if name not in names:
        return None, names
    preset = library.get_model_weights(name).DEFAULT.transforms()
    init: dict[str, Any] = (
        {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    )  # else each warns

    def create(classes: int | None, **options: Any) -> nn.Module:
        options = init | {"num_classes": 1000 if classes is None else classes} | options
        return _made(library.get_model, name, weights=None, **options)

    def pretrained(classes: int | None, **options: Any) -> Pretrained:
        model = _made(library.get_model, name, weights="DEFAULT", **options)
        if classes in (None, 1000):
            return Pretrained(model, {})
        fresh = create(classes, **options)
        new = classifier(fresh.state_dict(), model.state_dict())
        for layer in new:
            model.set_submodule(layer, fresh.get_submodule(layer))
        return Pretrained(model, new)

    statistics = tuple(preset.mean), tuple(preset.std)
    return Architecture(name, create, pretrained, None, preset.crop_size[0], statistics), []


def _timm(name: str) -> tuple[Architecture | None, list[str]]:
    library = _import("timm")
    hub = ":" in name  # such as hf-hub:timm/NAME, of which timm knows more when it makes it
    if not hub and not library.is_model(name.partition(".")[0]):
        return None, library.list_models()
    config = None if hub else library.get_pretrained_cfg(name, allow_unregistered=True)

    def create(classes: int | None, **options: Any) -> nn.Module:
        return _made(library.create_model, name, **_classes(classes), **options)

    def pretrained(classes: int | None, **options: Any) -> Pretrained:
        model = _made(library.create_model, name, pretrained=True, **_classes(classes), **options)
        own: Any = model.pretrained_cfg
        heads, number = own.get("classifier") or (), own.get("num_classes")
        heads = [heads] if isinstance(heads, str) else heads
        return Pretrained(model, {} if classes in (None, number) else dict.fromkeys(heads, number))

    if config is None:
        return Architecture(name, create, pretrained), []
    statistics = tuple(config.mean), tuple(config.std)
    return Architecture(name, create, pretrained, None, config.input_size[-1], statistics), []


def _of_factory(name: str) -> Architecture:
    def create(classes: int | None, **options: Any) -> nn.Module:
        return _factories.build(name, 1000 if classes is None else classes, options)

    def pretrained(classes: int | None, **options: Any) -> Pretrained:
        raise ValueError("a factory of your own publishes none")

    return Architecture(name, create, pretrained)


def _made(make: Callable[..., nn.Module], name: str, **options: Any) -> nn.Module:
    """Returns what a library makes; raises its errors and failed downloads as a ValueError of one line."""
    try:
        return make(name, **options)
    except MemoryError:
        raise
    except Exception as error:  # an option that the model does not take, a download that fails
        raise ValueError(_factories.told(error)) from None


def _classes(classes: int | None) -> dict[str, int]:
    return {} if classes is None else {"num_classes": classes}


NOT_INSTALLED = "not installed"


def _import(name: str) -> Any:
    try:
        repository("models")
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # the latter: torchvision next to another torch
        absent = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        raise LibraryMissing(NOT_INSTALLED if absent else _line(error)) from None


def _hints(name: str, known: list[str]) -> list[str]:
    if close := close_names(name, known):
        return [f"close names: {', '.join(close)}"]
    return [f"{len(known)} models are known, none of a close name"] if known else []


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
