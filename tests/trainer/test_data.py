"""Data: the batched augmentation against one image at a time, subsets, shares, and damaged files."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import dashed

from trainer import data
from trainer.config import Config, ConfigError, make_config
from trainer.data import in_memory
from trainer.distributed import Ranks

CPU = torch.device("cpu")


def digits(**keys: object) -> Config:
    values = {"dataset": "digits", "student": "wrn-10-1"}
    return make_config(values | dashed(keys))


def fake_set(
    size: int = 50, pad: int = 4, flip: bool = True, height: int = 32, width: int = 32
) -> in_memory.ImageSet:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (size, height, width, 3), dtype=torch.uint8, generator=draw)
    split = in_memory.Split(images, torch.arange(size) % 10)
    return in_memory.ImageSet(
        split,
        split,
        list("0123456789"),
        torch.tensor([125.3, 123.0, 113.9]),
        torch.tensor([63.0, 62.1, 66.7]),
        pad,
        flip,
    )


@pytest.mark.parametrize(
    "pad, flip, height, width", [(4, True, 32, 32), (2, False, 16, 16), (0, True, 9, 13)]
)
def test_augmentation_is_pad_crop_flip_of_each_image(pad: int, flip: bool, height: int, width: int) -> None:
    dataset = fake_set(pad=pad, flip=flip, height=height, width=width)
    plan = in_memory.plan_epoch(dataset, seed=3, epoch=2)
    images, labels = in_memory.training_batch(dataset, plan, slice(7, 31))
    assert images.shape == (24, 3, height, width)
    for place in range(7, 31):
        source = int(plan.order[place])
        padded = np.pad(
            dataset.train.images[source].numpy(), ((pad, pad), (pad, pad), (0, 0)), mode="reflect"
        )
        top, left = int(plan.down[place]), int(plan.right[place])
        crop = padded[top : top + height, left : left + width]
        crop = crop[:, ::-1] if plan.flip[place] else crop
        expected = (crop.astype(np.float32) - dataset.mean.numpy()) / dataset.std.numpy()
        np.testing.assert_allclose(images[place - 7].permute(1, 2, 0).numpy(), expected, rtol=1e-6, atol=1e-6)
        assert labels[place - 7] == source % 10


def test_epoch_plan_is_a_permutation_with_uniform_crops_and_flips() -> None:
    dataset = fake_set(size=18_000, height=1, width=1)
    plan = in_memory.plan_epoch(dataset, seed=0, epoch=0)
    assert torch.equal(plan.order.sort().values, torch.arange(18_000))
    for offsets in (plan.down, plan.right):
        counts = torch.bincount(offsets, minlength=9)
        assert len(counts) == 9  # 0..2*pad
        assert (counts - 2000).abs().max() < 250  # 6 standard deviations of a binomial count
    assert abs(plan.flip.sum().item() - 9000) < 400
    assert not torch.equal(plan.down, plan.right)


def test_plans_depend_on_seed_and_epoch_alone() -> None:
    dataset = fake_set()
    first = in_memory.plan_epoch(dataset, seed=1, epoch=4)
    torch.randn(3)  # the global generator plays no part
    again = in_memory.plan_epoch(dataset, seed=1, epoch=4)
    for name in ("order", "down", "right", "flip"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    for seed, epoch in ((1, 5), (2, 4), (4, 1)):
        assert not torch.equal(first.order, in_memory.plan_epoch(dataset, seed, epoch).order)


def test_batches_are_channels_last_and_evaluation_is_not_augmented() -> None:
    dataset = fake_set()
    images, _ = in_memory.training_batch(dataset, in_memory.plan_epoch(dataset, 0, 0), slice(0, 8))
    assert images.is_contiguous(memory_format=torch.channels_last)
    plain, labels = in_memory.evaluation_batch(dataset, slice(3, 5))
    expected = (
        dataset.test.images[3:5].permute(0, 3, 1, 2).float() - dataset.mean[:, None, None]
    ) / dataset.std[:, None, None]
    torch.testing.assert_close(plain, expected)
    assert labels.tolist() == [3, 4]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_shares_cover_every_image_once(world: int) -> None:
    for start, stop in ((0, 128), (128, 231), (5, 5 + world), (0, 797)):
        shares = [Ranks(rank, world, CPU).share(start, stop) for rank in range(world)]
        assert [i for share in shares for i in range(share.start, share.stop)] == list(range(start, stop))
        sizes = [share.stop - share.start for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_digits() -> None:
    dataset = data.load(digits(), CPU)
    assert dataset.train.images.shape == (1000, 16, 16, 3)
    assert dataset.test.images.shape == (797, 16, 16, 3)
    assert dataset.classes == 10
    assert not dataset.flip
    pixels = dataset.train.images.float()
    torch.testing.assert_close(dataset.mean, pixels.mean((0, 1, 2)), rtol=0, atol=0.1)
    torch.testing.assert_close(dataset.std, pixels.std((0, 1, 2)), rtol=0, atol=0.1)
    both = torch.cat([dataset.train.images, dataset.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797  # no image is in both parts
    again = data.load(digits(seed=5), CPU)
    assert torch.equal(again.train.images, dataset.train.images)


def test_limits_are_stratified_and_seeded() -> None:
    first = data.load(digits(limit_train=100, limit_test=50), CPU)
    assert torch.bincount(first.train.labels).tolist() == [10] * 10
    assert torch.bincount(first.test.labels).tolist() == [5] * 10
    same = data.load(digits(limit_train=100, limit_test=50), CPU)
    assert torch.equal(first.train.images, same.train.images)
    other = data.load(digits(limit_train=100, limit_test=50, seed=1), CPU)
    assert not torch.equal(first.train.images, other.train.images)
    assert torch.equal(first.test.images, other.test.images)
    assert torch.bincount(data.load(digits(limit_train=105), CPU).train.labels).max() == 11
    with pytest.raises(ConfigError, match="limit-train 1001 is more than the 1000 images"):
        data.load(digits(limit_train=1001), CPU)


@pytest.mark.parametrize(
    "dataset, folder", [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")]
)
def test_missing_and_damaged_cifar(tmp_path: Path, dataset: str, folder: str) -> None:
    config = make_config({"dataset": dataset, "student": "wrn-10-1", "data-dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=f"no folder {folder}"):
        data.load(config, CPU)
    (tmp_path / folder).mkdir()
    for name in ("data_batch_1", "train"):
        (tmp_path / folder / name).write_bytes(b"not a data set")
    with pytest.raises(ConfigError, match=r"incomplete or damaged .expected: .*test") as caught:
        data.load(config, CPU)
    assert "\n" not in str(caught.value)


def store_cifar(
    monkeypatch: pytest.MonkeyPatch, root: Path, images: np.ndarray, name: str = "CIFAR10"
) -> np.ndarray:
    """Have torchvision read `images` (N, 3, 32, 32) under `root`; what it gives: (N, 32, 32, 3), strided."""
    folder = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}[name]
    (root / folder).mkdir()

    class Cifar:
        base_folder, train_list, test_list = folder, (), ()
        data, targets = images.transpose(0, 2, 3, 1), list(range(len(images)))
        classes = tuple(f"class {label}" for label in range({"CIFAR10": 10, "CIFAR100": 100}[name]))

        def __init__(self, root: str, train: bool, download: bool) -> None:
            pass

    monkeypatch.setattr(f"torchvision.datasets.{name}", Cifar)
    return Cifar.data


def test_cifar_is_held_without_strides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's images are a transposed view: taken as they are, every batch would copy the whole set."""
    stored = np.arange(20 * 3 * 32 * 32, dtype=np.uint8).reshape(20, 3, 32, 32)
    given = store_cifar(monkeypatch, tmp_path, stored)
    config = make_config({"dataset": "cifar10", "student": "wrn-10-1", "data-dir": str(tmp_path)})
    dataset = data.load(config, CPU)
    assert dataset.train.images.is_contiguous()
    assert dataset.test.images.is_contiguous()
    assert dataset.train.images.numpy().tobytes() == stored.transpose(0, 2, 3, 1).tobytes()
    chosen = torch.arange(2)
    with pytest.raises(RuntimeError, match="view"):
        in_memory.augment(torch.from_numpy(given), chosen, chosen, chosen, chosen.bool(), 4)


# Red, green and blue over the training images; the authors' code has those of CIFAR-10 as well.
CIFAR = {
    "cifar10": ("CIFAR10", 10, [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
    "cifar100": ("CIFAR100", 100, [129.3, 124.1, 112.4], [68.2, 65.4, 70.4]),
}


@pytest.mark.parametrize(
    "augment, pad, flips", [("crop-flip", 4, True), ("flip", 0, True), ("none", 0, False)]
)
@pytest.mark.parametrize("name, padding", [*product(CIFAR, ["reflect"]), ("cifar100", "zeros")])
def test_cifar_is_padded_flipped_and_normalised(
    name: str,
    padding: str,
    augment: str,
    pad: int,
    flips: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each training image is a crop of the bordered one; all offsets and both sides come."""
    kind, classes, mean, std = CIFAR[name]
    stored = np.random.default_rng(0).integers(256, size=(100, 3, 32, 32), dtype=np.uint8)
    store_cifar(monkeypatch, tmp_path, stored, kind)
    keys = {"dataset": name, "augment": augment, "crop-padding": padding}
    keys |= {"student": "wrn-10-1", "data-dir": str(tmp_path)}
    dataset = data.load(make_config(keys), CPU)
    assert dataset.classes == classes
    exact = (stored - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    ((images, _),) = dataset.evaluation_batches([slice(5, 8)])
    np.testing.assert_allclose(images, exact[5:8], rtol=1e-5, atol=1e-6)

    modes: dict[str, dict[str, Any]] = {"reflect": {"mode": "reflect"}, "zeros": {"mode": "constant"}}
    border = ((0, 0), (0, 0), (pad, pad), (pad, pad))
    padded = np.pad(stored, border, **modes[padding])  # pixels: a normalised 0 is not black
    padded = (padded - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    offsets = range(2 * pad + 1)
    crops = list(product((1, -1), offsets, offsets))
    ((images, labels),) = dataset.training_batches(0, 0, [slice(0, 100)])
    seen = []
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        views = [padded[label, :, y : y + 32, x : x + 32][:, :, ::side] for side, y, x in crops]
        near = [place for place, view in enumerate(views) if abs(view[0, 0, 0] - image[0, 0, 0]) < 1e-4]
        (found,) = (place for place in near if np.allclose(views[place], image, atol=1e-4))
        seen.append(crops[found])
    sides, down, right = map(set, zip(*seen, strict=True))
    assert sides == ({1, -1} if flips else {1})
    assert down == right == set(offsets)
