"""A network of a run: made by the name that its key has, with weights, and tried on an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import models
from trainer import checkpoint
from trainer.choices import flag_text
from trainer.config import Config
from trainer.data import DATASETS, LabelledImages
from trainer.data.files import ImageFolders
from trainer.errors import ConfigError, checkpoint_of


class Network(NamedTuple):
    """A network on the CPU, and lines to tell about its weights."""

    model: nn.Module
    notes: list[str]


def create(key: str, config: Config, dataset: LabelledImages) -> Network:
    """The network that `key`, student or teacher, names, with its weights.

    Of a student they may be of other classes: its last layer is new then.

    Raises:
        ConfigError: there is no such model, it can't be made, or the weights can't be had or do not fit.
    """
    name, options = getattr(config, key), getattr(config, f"{key}_args")
    named = f"{key} {name}" + (f", {key}-args {flag_text(options)}" if options else "")
    weights_key = "pretrained" if key == "student" else "teacher-checkpoint"
    weights = getattr(config, weights_key.replace("-", "_"))
    try:
        architecture = models.architecture(name)
        if weights is not True:
            made = models.Pretrained(architecture.create(dataset.classes, **options), {})
    except (ValueError, TypeError, RuntimeError) as error:  # the last: beyond the memory
        raise ConfigError(f"{named}: {error}") from None
    if weights is True:
        try:
            made = architecture.pretrained(dataset.classes, **options)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{weights_key} true: {error}; name a file") from None
    elif weights:
        with checkpoint_of(weights_key):
            fitted = name if key == "teacher" else f"pretrained {name}"
            new = checkpoint.load_weights(made.model, weights, fitted, new_classifier=key == "student")
            made = models.Pretrained(made.model, new)
    if key == "teacher" and made.new:
        raise ConfigError(
            f"teacher-checkpoint true: the weights of {name} are of {max(made.new.values())} classes, and "
            f"{config.dataset} has {dataset.classes}: train it first, as a student with pretrained true"
        )
    model = made.model
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    notes = [
        f"{weights_key}: {layer} of {name} starts anew, for {dataset.classes} classes instead of {classes}"
        for layer, classes in made.new.items()
    ]
    if weights is True and (told := _other_statistics(architecture, dataset)):
        notes.append(f"{weights_key}: {name} {told}")
    return Network(model, notes)


def _other_statistics(architecture: models.Architecture, dataset: LabelledImages) -> str | None:
    """What the published weights expect of the pixels, where that is not how these are normalised."""
    expected = 255 * torch.tensor(architecture.statistics)
    found = torch.stack([dataset.mean, dataset.std]).to(expected)
    if torch.allclose(expected, found, rtol=0, atol=1.0):
        return None
    told = ["mean {}, deviation {}".format(*pair.round().int().tolist()) for pair in (expected, found)]
    return f"was trained on pixels normalised by {told[0]}; here they are by {told[1]}"


def check_images(key: str, model: nn.Module, config: Config, dataset: LabelledImages) -> None:
    """Run a network on an image of the data set, and one of other libraries also as training does.

    Raises:
        ConfigError: it can't take such images, or does not put out logits.
    """
    example = dataset.example()
    _check_logits(key, model.eval(), config, dataset, example)
    if key == "student" and not isinstance(model, models.TappedModel):
        buffers = [buffer.clone() for buffer in model.buffers()]
        with torch.random.fork_rng([example.device] if example.is_cuda else []):
            _check_logits(key, model.train(), config, dataset, example.expand(2, -1, -1, -1))
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


@torch.no_grad()
def _check_logits(
    key: str, model: nn.Module, config: Config, dataset: LabelledImages, images: Tensor
) -> None:
    name = getattr(config, key)
    try:
        logits = model(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the code of a network raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = _size_advice(key, name, model, config, images)
        raise ConfigError(
            f"{key} {name} can't take the images of {config.dataset}: {reason}{advice}"
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (len(images), dataset.classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        mode = "in training " if model.training else ""
        auxiliary = f" ({key}-args {{aux_logits: false}} leaves the others out)" * hasattr(
            model, "aux_logits"
        )
        raise ConfigError(
            f"{key} {name} puts out {found} {mode}for {len(images)} images, not logits "
            f"{(len(images), dataset.classes)}{auxiliary}"
        )


def _size_advice(key: str, name: str, model: nn.Module, config: Config, images: Tensor) -> str:
    """What to set where a network of another library, or a user's, can't take images of this size."""
    if ":" not in name:
        return ""
    height, width = images.shape[-2:]
    size = models.architecture(name).size
    ways = []
    if isinstance(DATASETS[config.dataset], ImageFolders) and size != height:
        ways.append(f"image-size {size}")
    for option, owner in (("image_size", model), ("img_size", getattr(model, "patch_embed", None))):
        if hasattr(owner, option):
            ways.append(f"{key}-args {{{option}: {height}}}")
    advice = f": set {' or '.join(ways)}" if ways else f", and it is made for {size} x {size}"
    return f"; they are {height} x {width}{advice}"
