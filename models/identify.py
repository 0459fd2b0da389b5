"""Which architecture a file's weights are of, found from their names and shapes."""

from __future__ import annotations

import re

from at_fused._weights import State

# The blocks of a group, as files name them: its number and the block's.
ZOO_WRN = r"group(\d)\.(\d+)\."
AUTHORS = r"group(\d)\.block(\d+)\."
REPDISTILLER = r"block(\d)\.layer\.(\d+)\."
AUTHORS_RESNET = r"layer\d\.0\.downsample\.weight"  # in the zoo: a shortcut without BatchNorm
RESNET = r"layer(\d)\.(\d+)\."
OPENMMLAB = r"backbone\.layer(\d)\.(\d+)\."


class NotInZoo(ValueError):
    """Weights of an architecture that is known but not in the zoo; says which."""


def zoo_name(state: State) -> str:
    """The zoo's name of the architecture that has these weights; a few of them may be missing.

    Raises:
        NotInZoo: the architecture is another one, close to one of the zoo's.
        ValueError: it is not known, or the weights do not tell it.
    """
    if counts := _blocks(state, AUTHORS):
        return _authors(state, counts)
    for pattern, conv in (
        (ZOO_WRN, "group{}.0.conv{}.weight"),
        (REPDISTILLER, "block{}.layer.0.conv{}.weight"),
    ):
        if counts := _blocks(state, pattern):
            return _wide_resnet(state, counts, conv)
    if "block1.conv1.weight" in state:
        raise ValueError("the weights of a NIN do not tell which it is: name it")
    if _blocks(state, OPENMMLAB):
        state = {key.removeprefix("backbone."): value for key, value in state.items()}
    if counts := _blocks(state, RESNET):
        return _resnet(state, counts)
    raise _unknown(state)


def _authors(state: State, counts: dict[int, int]) -> str:
    """Of the authors' keys: WRNs have three groups, ImageNet's ResNets four."""
    if any(re.match(r"group\d\.block\d+\.conv\d\.(weight|bias)$", key) for key in state):
        raise NotInZoo(
            "the authors' exported ResNet, with BatchNorm folded into its convolutions "
            "(group0.block0.conv0.bias)"
        )
    if 3 not in counts:
        return _wide_resnet(state, counts, "group{}.block0.conv{}", first=0)
    from models.resnet import AUTHORS_BLOCKS  # torchvision takes seconds to import

    blocks = [counts.get(group, 0) for group in range(4)]
    widths = list(_channels(state, counts, "group{}.block0.conv{}", first=0).values())
    for depth, (_, expected) in AUTHORS_BLOCKS.items():
        if blocks == expected and widths == [64, 128, 256, 512]:
            return f"authors-resnet-{depth}"
    raise NotInZoo(
        f"the authors' ImageNet ResNet with groups of {_listed(blocks)} blocks and {_listed(widths)} "
        "channels; authors-resnet-18 has 2, 2, 2, 2 blocks, authors-resnet-34 3, 4, 6, 5, both 64, 128, 256, "
        "512 channels"
    )


def _wide_resnet(state: State, counts: dict[int, int], conv: str, first: int = 1) -> str:
    channels = _channels(state, counts, conv, first)
    if not channels:
        raise _unknown(state)
    widths = {number / (16 << (group - first)) for group, number in channels.items()}
    (width, *others) = sorted(widths)
    if others or width != int(width):
        raise NotInZoo(
            f"a wide ResNet with groups of {_listed(channels.values())} channels; the zoo's have 16, 32, 64 "
            "times a whole number"
        )
    return f"wrn-{6 * max(counts.values()) + 4}-{int(width)}"


def _resnet(state: State, counts: dict[int, int]) -> str:
    projections = {
        m[1] for key in state if (m := re.match(r"layer\d\.0\.((?:downsample|shortcut)(?:\.\d)?)\.", key))
    }
    if 4 not in counts:
        if projections == {"shortcut.0"}:
            raise NotInZoo(
                "torchdistill's wide ResNet, whose shortcuts project a block's input as it is "
                "(layer2.0.shortcut.0.weight); the zoo's and the authors' project it after BatchNorm and ReLU"
            )
        if projections == {"downsample"}:
            return _wide_resnet(state, counts, "layer{}.0.conv{}.weight")  # mmrazor's
        return _cifar_resnet(state, counts)
    from models.resnet import AUTHORS_BLOCKS, BLOCKS, Bottleneck

    blocks = [counts.get(group, 0) for group in range(1, 5)]
    bottleneck = any(re.match(r"layer\d\.\d+\.conv3\.", key) for key in state)
    plain = projections == {"downsample"}
    kind = f"a ResNet of {_listed(blocks)} {'bottlenecks' if bottleneck else 'basic blocks'}"
    for depth, (block, expected) in (AUTHORS_BLOCKS if plain else BLOCKS).items():
        if blocks == expected and bottleneck == (block is Bottleneck):
            name = f"authors-resnet-{depth}" if plain else f"resnet-{depth}"
            inner = state.get("layer1.0.conv2.weight")
            if inner is not None and inner.ndim == 4 and inner.shape != (64, 64, 3, 3):
                raise NotInZoo(
                    f"{kind} whose layer1.0.conv2.weight is {tuple(inner.shape)}; that of {name} is "
                    "(64, 64, 3, 3), other shapes are those of wide ResNets and ResNeXts"
                )
            return name
    raise NotInZoo(
        f"{kind}; the zoo's resnet-50 has 3, 4, 6, 3 bottlenecks, its resnet-34 as many basic blocks"
    )


def _cifar_resnet(state: State, counts: dict[int, int]) -> str:
    from models.cifar_resnet import WIDTHS

    depth = 6 * max(counts.values()) + 2
    channels = list(_channels(state, counts, "layer{}.0.conv{}.weight").values())
    for suffix, widths in WIDTHS.items():
        if set(channels) <= set(widths[1:]) and channels[:1] in ([], widths[1:2]):
            return f"resnet{depth}{suffix}"
    raise NotInZoo(
        f"a ResNet of {_listed(counts.values())} blocks and {_listed(channels)} channels; the zoo's "
        f"resnet{depth} has 16, 32, 64 channels"
    )


def _blocks(state: State, pattern: str) -> dict[int, int]:
    """Blocks of each group, by its number."""
    counts: dict[int, int] = {}
    for key in state:
        if match := re.match(pattern, key):
            group, block = int(match[1]), int(match[2])
            counts[group] = max(counts.get(group, 0), block + 1)
    return dict(sorted(counts.items()))


def _channels(state: State, counts: dict[int, int], conv: str, first: int = 1) -> dict[int, int]:
    """Output channels of each group, from the first block's convolutions, of which one may be missing."""
    channels = {}
    for group in counts:
        for number in (first, first + 1):
            weight = state.get(conv.format(group, number))
            if weight is not None and weight.ndim:
                channels[group] = len(weight)
                break
    return channels


def _unknown(state: State) -> ValueError:
    from models import available

    return ValueError(
        f"its {len(state)} keys are of no known model, such as: {', '.join(sorted(state)[:3])}; "
        f"known are those of {', '.join(available())}"
    )


def _listed(numbers: object) -> str:
    return ", ".join(map(str, numbers))  # type: ignore[call-overload]
