"""Weights of other projects in the zoo's models, recognised by their keys.

Understood are the zoo's own `state_dict`s (a ResNet's is torchvision's; one for small images RepDistiller's,
mdistiller's and torchdistill's), the parameter dictionaries of the paper's authors for WRNs and ImageNet's
ResNets (szagoruyko/wide-residual-networks and attention-transfer, BatchNorm's statistics among the parameters
or beside them), the WRNs of RepDistiller and mdistiller, and what mmrazor saves of its WRN and of ResNets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from at_fused import _weights
from at_fused._architectures import classifier
from at_fused._weights import State
from models.identify import (
    AUTHORS,
    AUTHORS_RESNET,
    OPENMMLAB,
    REPDISTILLER,
    RESNET,
    ZOO_WRN,
    NotInZoo,
    zoo_name,
)
from models.tapped import TappedModel

SHOWN = 10  # keys of a kind that an error lists before it counts the rest; 3 of another model


@dataclass(frozen=True)
class Naming:
    """How a project calls the weights of a family of models."""

    name: str
    file: str  # what only its keys match
    family: str  # what the zoo's keys of the family match
    key: Callable[[str], str]  # its key for the zoo's


def _authors_key(key: str) -> str:
    key = re.sub(r"(group|bn|conv)(\d)", lambda m: f"{m[1]}{int(m[2]) - 1}", key)  # they count from 0
    key = re.sub(r"\.(\d+)\.", r".block\1.", key).replace("shortcut.weight", "convdim")
    return re.sub(r"conv(\d?)\.weight", lambda m: f"conv{m[1] or 0}", key)


def _authors_resnet_key(key: str) -> str:
    return _authors_key(key.replace("layer", "group").replace("downsample.", "shortcut."))


def _repdistiller_key(key: str) -> str:
    key = re.sub(r"^group(\d)\.", r"block\1.layer.", key)
    return re.sub(r"^(conv|bn)\.", r"\g<1>1.", key).replace("shortcut", "convShortcut")


def _mmrazor_key(key: str) -> str:
    key = re.sub(r"^(conv|bn)\.", r"\g<1>1.", key.replace("group", "layer")).replace("shortcut", "downsample")
    return _openmmlab_key(key)


def _openmmlab_key(key: str) -> str:
    return f"head.{key}" if key.startswith("fc.") else f"backbone.{key}"


ZOO = Naming("a model of the zoo", "", "", lambda key: key)
NAMINGS = [
    Naming("the authors' WRN", AUTHORS, ZOO_WRN, _authors_key),
    Naming("the authors' ResNet", AUTHORS, AUTHORS_RESNET, _authors_resnet_key),
    Naming("RepDistiller's WRN", REPDISTILLER, ZOO_WRN, _repdistiller_key),
    Naming("mmrazor's WRN", OPENMMLAB, ZOO_WRN, _mmrazor_key),
    Naming("OpenMMLab's ResNet", OPENMMLAB, RESNET, _openmmlab_key),
]


def load_pretrained(path: str | Path, name: str | None = None) -> TappedModel:
    """The model whose weights `path` holds, in eval mode; nothing in the file is executed.

    Args:
        path: a file of one of the kinds above, written by torch.save or safetensors, or a checkpoint that
            holds it under "model", "state_dict", "params" or the like, wrapped or not, or beside a teacher's.
        name: the model's name in the zoo. Unset, it is found from the weights; a NIN's must be given, as they
            do not tell whether there is a ReLU before pooling.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, an architecture that the zoo has not, or keys or shapes that do not fit;
            lists them.
    """
    from models import create

    state = _weights.load(path)
    try:
        model = create(name or zoo_name(state), **_ends(state))
        load_state(model, state)
    except NotInZoo as error:
        raise ValueError(f"{path}: holds {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model.eval()


def load_state(model: nn.Module, state: State, *, new_classifier: bool = False) -> dict[str, int]:
    """Load weights of any known naming into `model`; the counts of BatchNorm's batches may be missing.

    With `new_classifier` the last layer keeps its own weights where those given are of another number of
    classes: returned are the layers that do, with that number.

    Raises:
        ValueError: says which other architecture the weights are of, where that is known, and lists missing
            and unexpected keys, as the file calls them, shapes that differ and tensors that are sparse.
    """
    theirs = model.state_dict()
    naming = _naming(state, theirs)
    own = {naming.key(key): (key, tensor) for key, tensor in theirs.items()}
    new = classifier({key: tensor for key, (_, tensor) in own.items()}, state) if new_classifier else {}
    state = state | {key: tensor for key, (_, tensor) in own.items() if key.rpartition(".")[0] in new}
    shared = own.keys() & state.keys()
    other = {key for key in shared if state[key].shape != own[key][1].shape}
    missing = [key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked")]
    shapes = [f"{key} is {tuple(state[key].shape)}, not {tuple(own[key][1].shape)}" for key in other]
    unexpected = state.keys() - own.keys()
    sparse = [key for key in shared if state[key].layout != torch.strided]
    kinds = (("missing", missing), ("unexpected", unexpected), ("shapes", shapes), ("sparse", sparse))
    if any(keys for _, keys in kinds):
        found, expected = _architecture(state), _architecture(theirs)
        other_model = found is not None and found != expected
        problems = [_listed(kind, keys, 3 if other_model else SHOWN) for kind, keys in kinds if keys]
        which = f"it holds {found}; " if other_model else ""
        raise ValueError(f"{which}read as {naming.name}: {'; '.join(problems)}")
    model.load_state_dict({own[key][0]: state[key] for key in own.keys() & state.keys()}, strict=False)
    return {
        own[k][0].rpartition(".")[0]: new[k.rpartition(".")[0]] for k in own if k.rpartition(".")[0] in new
    }


def _naming(state: State, theirs: State) -> Naming:
    def fits(pattern: str, keys: Collection[str]) -> bool:
        return any(re.match(pattern, key) for key in keys)

    return next((n for n in NAMINGS if fits(n.file, state) and fits(n.family, theirs)), ZOO)


def _architecture(state: State) -> str | None:
    """What these weights are of, in words; None where that is not known."""
    try:
        return zoo_name(state)
    except NotInZoo as error:
        return str(error)
    except ValueError:
        return None


def _ends(state: State) -> dict[str, int]:
    """Numbers of input channels and of classes, as far as the weights tell."""
    ends = {}
    for stem in ("conv.weight", "conv0", "conv1.weight", "block1.conv1.weight", "backbone.conv1.weight"):
        if stem in state and state[stem].ndim == 4:
            ends["in_channels"] = state[stem].shape[1]
    for last in ("fc.weight", "head.fc.weight"):
        if last in state and state[last].ndim == 2:
            ends["num_classes"] = len(state[last])
    return ends


def _listed(kind: str, keys: Collection[str], shown: int) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return f"{len(keys)} {kind}: {', '.join(sorted(keys)[:shown])}{more}"
