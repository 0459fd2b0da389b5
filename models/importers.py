"""Weights of other projects in the zoo's models, recognised by their keys.

Understood are the zoo's own `state_dict`s (a ResNet's is torchvision's), the parameter dictionaries of the
paper's authors for WRNs (szagoruyko/wide-residual-networks and attention-transfer, BatchNorm's statistics
among the parameters or beside them), and the WRN `state_dict`s of RepDistiller and mdistiller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from at_fused import _weights
from models.tapped import TappedModel
from models.wide_resnet import WideResNet

State = dict[str, Tensor]
SHOWN = 10  # keys of a kind that an error lists before it counts the rest


@dataclass(frozen=True)
class Naming:
    """How a project calls the weights of a wide ResNet."""

    name: str
    block: str  # what only its keys match; the group is the number of the block
    key: Callable[[str], str]  # its key for the zoo's


def _authors_key(key: str) -> str:
    key = re.sub(r"(group|bn|conv)(\d)", lambda m: f"{m[1]}{int(m[2]) - 1}", key)  # they count from 0
    key = re.sub(r"\.(\d+)\.", r".block\1.", key).replace("shortcut.weight", "convdim")
    return re.sub(r"conv(\d?)\.weight", lambda m: f"conv{m[1] or 0}", key)


def _repdistiller_key(key: str) -> str:
    key = re.sub(r"^group(\d)\.", r"block\1.layer.", key)
    return re.sub(r"^(conv|bn)\.", r"\g<1>1.", key).replace("shortcut", "convShortcut")


ZOO = Naming("a model of the zoo", r"group\d\.(\d+)\.", lambda key: key)
NAMINGS = [
    ZOO,
    Naming("the authors' WRN", r"group\d\.block(\d+)\.", _authors_key),
    Naming("RepDistiller's WRN", r"block\d\.layer\.(\d+)\.", _repdistiller_key),
]


def load_pretrained(path: str | Path, name: str | None = None) -> TappedModel:
    """The model whose weights `path` holds, in eval mode; nothing in the file is executed.

    Args:
        path: a file of one of the kinds above, or one that holds it under "model", "state_dict" or "params".
        name: the model's name in the zoo. Unset, it is found from the weights; a NIN's must be given, as they
            do not tell whether there is a ReLU before pooling.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, an unknown architecture, or keys or shapes that do not fit; lists them.
    """
    from models import create

    state = _weights.load(path)
    try:
        model = create(name or _name(state), **_ends(state))
        load_state(model, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model.eval()


def load_state(model: nn.Module, state: State) -> None:
    """Load weights of any known naming into `model`; the counts of BatchNorm's batches may be missing.

    Raises:
        ValueError: lists missing and unexpected keys, as the file calls them, shapes that differ and tensors
            that are sparse.
    """
    naming = _naming(state) if isinstance(model, WideResNet) else ZOO
    own = {naming.key(key): (key, tensor) for key, tensor in model.state_dict().items()}
    shared = own.keys() & state.keys()
    missing = [key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked")]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key][1].shape)}"
        for key in shared
        if state[key].shape != own[key][1].shape
    ]
    unexpected = state.keys() - own.keys()
    sparse = [key for key in shared if state[key].layout != torch.strided]
    kinds = (("missing", missing), ("unexpected", unexpected), ("shapes", shapes), ("sparse", sparse))
    problems = [_listed(kind, keys) for kind, keys in kinds if keys]
    if problems:
        raise ValueError(f"read as {naming.name}: {'; '.join(problems)}")
    model.load_state_dict({own[key][0]: state[key] for key in shared}, strict=False)


def _naming(state: State) -> Naming:
    return next((n for n in NAMINGS if any(re.match(n.block, key) for key in state)), ZOO)


def _name(state: State) -> str:
    """The zoo's name of the architecture that has these weights."""
    naming = _naming(state)
    blocks = [int(match[1]) for key in state if (match := re.match(naming.block, key))]
    convs = [naming.key(f"group1.0.conv{i}.weight") for i in (1, 2)]  # one of them may be missing
    widths = [len(state[key]) // 16 for key in convs if key in state and state[key].ndim]
    if blocks and widths:
        return f"wrn-{6 * (max(blocks) + 1) + 4}-{widths[0]}"
    if "block1.conv1.weight" in state:
        raise ValueError("the weights of a NIN do not tell which it is: name it")
    from models.resnet import BLOCKS, Bottleneck  # torchvision takes seconds to import

    layers = [{m[1] for key in state if (m := re.match(rf"layer{i}\.(\d+)\.", key))} for i in range(1, 5)]
    counts = [len(layer) for layer in layers]
    bottleneck = any(re.match(r"layer\d\.\d+\.conv3\.", key) for key in state)
    for depth, (block, expected) in BLOCKS.items():
        if counts == expected and bottleneck == (block is Bottleneck):
            return f"resnet-{depth}"
    raise ValueError(f"its {len(state)} keys are of no known model, such as: {', '.join(sorted(state)[:3])}")


def _ends(state: State) -> dict[str, int]:
    """Numbers of input channels and of classes, as far as the weights tell."""
    stems = (_naming(state).key("conv.weight"), "conv1.weight", "block1.conv1.weight")
    ends = {}
    for key in stems:
        if key in state and state[key].ndim == 4:
            ends["in_channels"] = state[key].shape[1]
    if "fc.weight" in state and state["fc.weight"].ndim == 2:
        ends["num_classes"] = len(state["fc.weight"])
    return ends


def _listed(kind: str, keys: Collection[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {kind}: {', '.join(sorted(keys)[:SHOWN])}{more}"
