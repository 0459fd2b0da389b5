"""Models by name, `models.create("wrn-16-1", num_classes=10)`, and by weights, `load_pretrained(path)`.

Every model of the zoo carries `taps`, a dict that names where attention may be compared: `"groups"` (one
module per resolution) and `"blocks"` (every block), each a list of module names in forward order.
`architecture` also knows the models of torchvision, of timm and of a user's own code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from at_fused import _architectures
from at_fused._architectures import Architecture, Pretrained
from at_fused._factories import code, resolved
from models.importers import load_pretrained
from models.tapped import TappedModel, named_taps

__all__ = [
    "Architecture",
    "Pretrained",
    "TappedModel",
    "UnknownModel",
    "architecture",
    "available",
    "code",
    "create",
    "load_pretrained",
    "named_taps",
    "resolved",
]


class UnknownModel(ValueError):
    """No model answers to this name."""


def _wide_resnet(match: re.Match[str], num_classes: int, **options: Any) -> TappedModel:
    from models.wide_resnet import WideResNet

    return WideResNet(int(match["depth"]), int(match["width"]), num_classes, **options)


def _nin(match: re.Match[str], num_classes: int, **options: Any) -> TappedModel:
    from models.nin import NIN, WIDTHS

    options = {"batch_norm": not match["nobn"], "relu_before_pool": not match["rawpool"]} | options
    return NIN(WIDTHS[match["size"]], num_classes, **options)


def _resnet(match: re.Match[str], num_classes: int, **options: Any) -> TappedModel:
    from models.resnet import ResNet  # torchvision takes seconds to import: only those who ask for it pay

    return ResNet(int(match["depth"]), num_classes, **options)


def _authors_resnet(match: re.Match[str], num_classes: int, **options: Any) -> TappedModel:
    from models.resnet import AuthorsResNet

    return AuthorsResNet(int(match["depth"]), num_classes, **options)


def _cifar_resnet(match: re.Match[str], num_classes: int, **options: Any) -> TappedModel:
    from models.cifar_resnet import WIDTHS, CifarResNet

    return CifarResNet(int(match["depth"]), WIDTHS[match["width"] or ""], num_classes, **options)


Builder = Callable[..., TappedModel]

# What to print for a family (D: depth 6n + 4, K: width), the names it answers to, and who builds it.
_FAMILIES: list[tuple[list[str], str, Builder]] = [
    (["wrn-D-K"], r"wrn-(?P<depth>\d+)-(?P<width>\d+)", _wide_resnet),
    (
        ["nin-thin[-nobn][-rawpool]", "nin-wide[-nobn][-rawpool]"],
        r"nin-(?P<size>thin|wide)(?P<nobn>-nobn)?(?P<rawpool>-rawpool)?",
        _nin,
    ),
    (["resnet-18", "resnet-34", "resnet-50", "resnet-101"], r"resnet-(?P<depth>18|34|50|101)", _resnet),
    (["authors-resnet-18", "authors-resnet-34"], r"authors-resnet-(?P<depth>18|34)", _authors_resnet),
    (
        [f"resnet{depth}[x4]" for depth in (8, 14, 20, 32, 44, 56, 110)],
        r"resnet(?P<depth>8|14|20|32|44|56|110)(?P<width>x4)?",
        _cifar_resnet,
    ),
]


def available() -> list[str]:
    """Names that `create` understands; `wrn-D-K` stands for any depth D = 6n + 4 and width K >= 1.

    Suffixes in brackets are optional: `-nobn` is without BatchNorm, `-rawpool` without ReLU before
    pooling, so `nin-thin-nobn-rawpool` is the student of the paper's Table 3. `resnet20` and the like (no
    hyphen) are for small images, with `x4` of four times the channels; `authors-resnet-18` and `-34` are from
    the authors' ImageNet code.
    """
    return [name for names, _, _ in _FAMILIES for name in names]


def create(name: str, num_classes: int = 10, **options: Any) -> TappedModel:
    """A freshly initialised model.

    Args:
        name: one of `available`, e.g. `"wrn-40-2"` or `"resnet-18"`.
        num_classes: width of the last layer.
        options: passed to the model, e.g. `in_channels=1` for grey images.

    Raises:
        UnknownModel: a name that is none of them.
        ValueError: a depth, width or number of classes that cannot be built.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    for _, pattern, build in _FAMILIES:
        if match := re.fullmatch(pattern, name):
            return build(match, num_classes, **options)
    raise UnknownModel(
        f"unknown model {name!r}; there are: {', '.join(available())}; by train.py also "
        f"{_architectures.ELSEWHERE}"
    )


def architecture(name: str) -> Architecture:
    """How to make the model called `name`, with which weights, and for which images.

    Args:
        name: one of `available`; one of theirs, `torchvision:NAME` or `timm:NAME`; a function or class that
            is called with `num_classes` and returns a module, `package.module:factory` or
            `path/to/file.py:factory`.

    Raises:
        UnknownModel: a name that is none of them.
        ValueError: a name that the library or the code does not have, or one that cannot be imported.
    """
    if ":" in name or name.endswith(".py"):  # the latter lacks its factory
        return _architectures.elsewhere(name)
    if not any(re.fullmatch(pattern, name) for _, pattern, _ in _FAMILIES):
        create(name)  # which raises

    def make(classes: int | None, **options: Any) -> TappedModel:
        return create(name, **({} if classes is None else {"num_classes": classes}), **options)

    def pretrained(classes: int | None, **options: Any) -> Pretrained:
        from models.published import load_published

        model = make(1000 if classes is None else classes, **options)
        return Pretrained(model, load_published(model, name))

    small = re.fullmatch(r"(authors-)?resnet-\d+", name) is None
    return Architecture(
        name,
        make,
        pretrained,
        lambda path: load_pretrained(path, name),
        32 if small else 224,
        _architectures.CIFAR10 if small else _architectures.IMAGENET,
    )
