"""Weights that torchvision publishes for the zoo's ResNets."""

from __future__ import annotations

from torch import nn

from models.importers import load_state


def load_published(model: nn.Module, name: str) -> dict[str, int]:
    """Load torchvision's first ImageNet weights, those of the paper's time, into the ResNet `name`.

    Returns, as `load_state`, the last layer where that stays as it is, for another number of classes.

    Raises:
        ValueError: another model, or no network and none in torch's cache.
    """
    from models import torchvision_compat  # noqa: F401  (before torchvision)

    # isort: split
    from torchvision.models import get_model_weights

    try:
        published = get_model_weights(name.replace("-", ""))["IMAGENET1K_V1"]
    except (ValueError, KeyError):
        raise ValueError(f"torchvision has no weights of {name}") from None
    try:
        state = published.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"the weights of {name} can't be downloaded ({error})") from None
    return load_state(model, dict(state), new_classifier=True)
