"""Networks with their weights, by name, for `python -m at_fused.visualize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .. import _weights
from .._architectures import Architecture, classifier, find

PRETRAINED = "pretrained"


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
            model = architecture.pretrained(None).model
        except ValueError as error:
            raise ValueError(f"no pretrained weights of {name}: {error}") from None
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


def _read(architecture: Architecture, path: Path) -> nn.Module:
    """A model with the weights in `path`; the last layer gets as many classes as they have."""
    model = architecture.create(None)
    own = model.state_dict()
    try:
        state = _weights.load(path, own.keys())
    except ValueError as error:
        raise ValueError(f"checkpoint {error}") from None
    if heads := classifier(own, state):
        model = architecture.create(*set(heads.values()))
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
