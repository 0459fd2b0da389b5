"""Random choices that depend on a key alone: the same on any machine, for any number of ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def generator(*key: Any) -> torch.Generator:
    """A CPU generator seeded by `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def epoch_order(size: int, seed: int, epoch: int) -> tuple[Tensor, torch.Generator]:
    """The order of an epoch's `size` images, and the generator that draws what else the epoch needs."""
    draw = generator(seed, epoch)
    return torch.randperm(size, generator=draw), draw


def repeated_from(epoch: int, cycle: int) -> int:
    """The epoch whose augmentation `epoch` has, image by image, where it repeats every `cycle` epochs."""
    return epoch % cycle if cycle else epoch


def places(order: Tensor, earlier: Tensor) -> Tensor:
    """The positions that the images of `order` had in an `earlier` order of the same images."""
    return earlier.argsort()[order]


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` of the labels (N,), drawn by `seed`, balanced over classes as far as possible."""
    shuffled = torch.randperm(len(labels), generator=generator("subset", seed))
    of = labels[shuffled]
    turn = torch.zeros_like(of)  # 0 for the first of its class in the shuffled order, 1 for the second, ...
    for label in of.unique():
        mine = of == label
        turn[mine] = torch.arange(int(mine.sum()))
    return shuffled[turn.argsort(stable=True)[:count]].sort().values
