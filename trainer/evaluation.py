"""How well a network does on the test images."""

from __future__ import annotations

import torch
from torch import nn

from trainer.config import Config
from trainer.data import LabelledImages
from trainer.data.dataset import too_many
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.meter import EvaluationMeter
from trainer.torch_settings import autocast, in_layout, new_pass


@torch.no_grad()
def evaluate(model: nn.Module, dataset: LabelledImages, config: Config, ranks: Ranks) -> dict[str, float]:
    """Loss and errors of `model` (see EvaluationMeter), which is left in eval mode.

    Every test image counts once over all ranks. Buffers (BatchNorm's statistics) are those of rank 0; the
    other ranks get theirs back.
    """
    buffers = list(model.buffers())
    own = [buffer.clone() for buffer in buffers] if ranks.world > 1 else []
    ranks.broadcast_(buffers)
    model.eval()
    share = ranks.share(0, len(dataset.test))
    size, meter = config.test_batch_size, EvaluationMeter(dataset.classes, ranks.device)
    starts = range(share.start, share.stop, size)
    parts = [slice(start, min(start + size, share.stop)) for start in starts]
    with autocast(config, ranks.device):
        for images, labels in dataset.evaluation_batches(parts):
            new_pass(config)
            meter.add(model(in_layout(config, images)), labels)
    for buffer, value in zip(buffers, own, strict=False):
        buffer.copy_(value)
    _check_unreadable(dataset, config, ranks)
    seen, *sums = ranks.sum_(meter.sums).tolist()
    if not seen:
        raise ConfigError("no image of the test set can be read")
    return meter.metrics(seen, *sums)


def _check_unreadable(dataset: LabelledImages, config: Config, ranks: Ranks) -> None:
    """ConfigError on every rank where all together could not read more images than may be."""
    paths = {path for paths in ranks.gather(dataset.unreadable) for path in paths}
    if len(paths) > config.max_unreadable:
        raise ConfigError(too_many(paths, config.max_unreadable))
