"""What a trained network answers to the test images: its predictions, and its attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import at_fused
import models
from at_fused.visualize.similarity import similarity
from trainer import checkpoint
from trainer.data import LabelledImages

BATCH = 100


@dataclass(frozen=True)
class Answers:
    """A network's answers to N test images."""

    predictions: Tensor  # (N,) labels of classes
    maps: list[Tensor]  # per tap (N, h, w), of l2 norm 1
    names: Sequence[str] = ()  # of the classes that it knows, by label


def network_answers(
    network: str,
    weights: Path,
    names: Sequence[str],
    dataset: LabelledImages,
    taps: Sequence[str] | None = None,
) -> Answers:
    """A network's answers to all test images.

    Args:
        network: the name of the model.
        weights: the file that holds its weights.
        names: of the classes that it was trained on, which may not be those of the images.
        dataset: the images.
        taps: whose maps; by default those of the model's groups.
    """
    model = models.create(network, len(names)).eval()
    checkpoint.load_weights(model, weights, network)
    predictions, maps = [], []
    size = len(dataset.test)
    parts = [slice(i, min(i + BATCH, size)) for i in range(0, size, BATCH)]
    with torch.no_grad(), at_fused.FeatureTaps(model, taps or model.taps["groups"]) as tapped:
        for images, _ in dataset.evaluation_batches(parts):
            predictions.append(model(images).argmax(1))
            maps.append([at_fused.attention_map(feature, normalize="l2") for feature in tapped.features])
    return Answers(torch.cat(predictions), [torch.cat(tap) for tap in zip(*maps, strict=True)], names)


def map_likeness(own: Answers, reference: Answers) -> list[float]:
    """Per tap, the mean over images of the cosine similarity between two networks' maps."""
    pairs = zip(own.maps, reference.maps, strict=True)
    return [similarity(a, b).mean().item() for a, b in pairs]
