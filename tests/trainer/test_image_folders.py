"""Image files on disk: what is read, cropped, skipped and refused, for any number of ranks and workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CLASSES, dashed, flags, make_folders, picture
from torch import Tensor

import train
from at_fused.visualize import pictures
from trainer import data
from trainer.config import Config, ConfigError, make_config
from trainer.data import folders

CPU = torch.device("cpu")


def config(root: Path, **keys: object) -> Config:
    values = {"dataset": "imagefolder", "data-dir": root, "student": "wrn-10-1", "image-size": 16}
    return make_config(values | dashed(keys))


def batches(dataset: folders.FileSet, parts: list[slice], seed: int = 0, epoch: int = 0) -> list[Tensor]:
    """All images, then all labels, of an epoch's batches."""
    found = list(dataset.training_batches(seed, epoch, parts))
    return [torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found])]


def test_splits_and_labels(tmp_path: Path) -> None:
    dataset = data.load(config(make_folders(tmp_path)), CPU)
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (24, 9, 3)
    for files in (dataset.train, dataset.test):
        assert [Path(path).parent.name for path in files.paths] == [CLASSES[i] for i in files.labels]
    limited = data.load(config(tmp_path, limit_train=9, limit_test=4), CPU)
    assert torch.bincount(limited.train.labels).tolist() == [3, 3, 3]
    assert len(limited.test) == 4
    with pytest.raises(ConfigError, match="limit-train 25 is more than the 24 images of imagefolder"):
        data.load(config(tmp_path, limit_train=25), CPU)


def test_evaluation_is_the_normalised_centre_crop(tmp_path: Path) -> None:
    dataset = data.load(config(make_folders(tmp_path), image_size=14), CPU)
    ((images, labels),) = dataset.evaluation_batches([slice(2, 5)])
    assert images.shape == (3, 3, 14, 14)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [0, 1, 1]
    for place, path in enumerate(dataset.test.paths[2:5]):
        scaled = Image.open(path).resize((21, 16), Image.Resampling.BILINEAR)  # 16 = 14 * 256 / 224
        crop = np.asarray(scaled, dtype=np.float32)[1:15, 4:18]
        expected = (crop / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(images[place].permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.slow
def test_batches_are_the_same_for_any_ranks_workers_and_start(tmp_path: Path) -> None:
    make_folders(tmp_path)
    alone = data.load(config(tmp_path), CPU)
    before = torch.get_rng_state()
    whole = batches(alone, [slice(0, 8), slice(8, 16), slice(16, 24)], seed=3, epoch=1)
    assert torch.equal(torch.get_rng_state(), before), "the run's own random numbers are left alone"
    assert sorted(whole[1].tolist()) == [0] * 8 + [1] * 8 + [2] * 8, "each image once"
    resumed = batches(alone, [slice(8, 16), slice(16, 24)], seed=3, epoch=1)
    halves = batches(alone, [slice(0, 4), slice(12, 16)], seed=3, epoch=1)
    helped = data.load(config(tmp_path, workers=2), CPU)
    for tensor, late, half, other in zip(
        whole,
        resumed,
        halves,
        batches(helped, [slice(0, 12), slice(12, 24)], seed=3, epoch=1),
        strict=True,
    ):
        assert torch.equal(tensor[8:], late)
        assert torch.equal(torch.cat([tensor[:4], tensor[12:16]]), half)
        assert torch.equal(tensor, other)
    again = batches(helped, [slice(0, 24)], seed=3, epoch=2)
    assert not torch.equal(again[0], whole[0]), "each epoch has its own order and crops"


@pytest.mark.parametrize(
    "augment, distinct",
    [("none", 1), ("flip", 2), ("crop-flip", 9)],
)
def test_augmentation(augment: str, distinct: int, tmp_path: Path) -> None:
    """How many versions of one image ten epochs show; each version under flip is the other's mirror image."""
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        picture(5).save(tmp_path / split / "ant" / "0.png")
    dataset = data.load(config(tmp_path, augment=augment), CPU)
    seen = [batches(dataset, [slice(0, 1)], epoch=epoch)[0] for epoch in range(10)]
    versions = {image.numpy().tobytes(): image for image in seen}
    assert len(versions) >= distinct if augment == "crop-flip" else len(versions) == distinct
    if augment == "flip":
        one, other = versions.values()
        assert torch.equal(one, other.flip(-1))


def test_odd_files_are_read_and_broken_ones_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greyscale, CMYK and palette images count; a truncated, an empty and a foreign file are named once."""
    make_folders(tmp_path)
    ants, test_ants = tmp_path / "train" / "ant", tmp_path / "val" / "ant"
    picture(1).convert("L").save(ants / "0.png")
    picture(2).convert("CMYK").save(ants / "1.jpg")
    (ants / "1.png").unlink()
    picture(3).convert("P").save(ants / "2.png")
    whole = (ants / "3.png").read_bytes()
    (ants / "3.png").write_bytes(whole[: len(whole) // 2])
    (ants / "4.png").write_bytes(b"")
    (test_ants / "0.png").write_text("not an image")
    dataset = data.load(config(tmp_path), CPU)
    for epoch in range(2):
        images, labels = batches(dataset, [slice(0, 24)], epoch=epoch)
        assert len(images) == 24, "batches keep their size"
        assert images.isfinite().all()
        assert torch.bincount(labels).tolist() == [8, 8, 8], "the next image stands in"
        seen = sum(len(labels) for _, labels in dataset.evaluation_batches([slice(0, 5), slice(5, 9)]))
        assert seen == 8, "an image that can't be read is not counted"
    lines = capsys.readouterr().err.splitlines()
    assert [Path(line.split()[1].rstrip(",")).name for line in sorted(lines)] == ["3.png", "4.png", "0.png"]
    assert all(line.startswith("skipped ") and line.endswith(")") for line in lines)


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    """Pillow's own conversion would make all but the darkest white; floats, of unknown range, are skipped."""
    make_folders(tmp_path, val=2)
    levels = np.linspace(0, 65535, 40 * 30).reshape(30, 40)
    paths = [tmp_path / "val" / "ant" / name for name in ("0.png", "1.tif")]
    (tmp_path / "val" / "ant" / "1.png").unlink()
    Image.fromarray(levels.astype(np.uint16)).save(paths[0])
    Image.fromarray((levels / 65535).astype(np.float32)).save(paths[1])
    dataset = data.load(config(tmp_path), CPU)
    ((images, labels),) = dataset.evaluation_batches([slice(0, 2)])
    assert labels.tolist() == [0]
    assert dataset.unreadable == [str(paths[1])]
    pixels = images[0] * dataset.std.view(3, 1, 1) + dataset.mean.view(3, 1, 1)
    torch.testing.assert_close(pixels[0], pixels[2], atol=1e-4, rtol=0)
    assert 100 < pixels.mean() < 155
    assert pixels.min() < 50 < 200 < pixels.max()


def test_identity_of_the_images(tmp_path: Path) -> None:
    """The same wherever the folder lies; another with another file, another limit or another label."""
    make_folders(tmp_path / "a", train=3, val=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def identity(name: str, **keys: object) -> dict[str, object]:
        return data.load(config(tmp_path / name, **keys), CPU).identity()

    first = identity("a")
    assert (first["train"], first["test"], first["classes"]) == (9, 3, 3)
    assert identity("b") == first
    assert identity("b", limit_train=6) != first
    (tmp_path / "b/train/ant/0.png").rename(tmp_path / "b/train/ant/9.png")
    assert identity("b") == first | {"files": identity("b")["files"]} != first


def test_too_many_broken_files_end_the_run(tmp_path: Path) -> None:
    make_folders(tmp_path)
    for i in range(3):
        (tmp_path / "train" / "bee" / f"{i}.png").write_bytes(b"")
    allowed = data.load(config(tmp_path, max_unreadable=3), CPU)
    assert len(batches(allowed, [slice(0, 24)])[0]) == 24
    with pytest.raises(ConfigError, match=r"3 images can't be read, such as .*\.png; max-unreadable is 2"):
        batches(data.load(config(tmp_path, max_unreadable=2), CPU), [slice(0, 24)])
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"")
    generous = data.load(config(tmp_path, max_unreadable=50), CPU)
    with pytest.raises(ConfigError, match="no image of a split can be read"):
        list(generous.evaluation_batches([slice(0, 9)]))


def test_missing_and_inconsistent_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the folders train and val"):
        data.load(config(tmp_path), CPU)
    make_folders(tmp_path)
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "dog")
    with pytest.raises(ConfigError, match="train and val differ in their classes, such as cat"):
        data.load(config(tmp_path), CPU)
    (tmp_path / "val" / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        data.load(config(tmp_path), CPU)


def printed(root: Path, capsys: pytest.CaptureFixture[str], **keys: object) -> list[str]:
    """The lines of a training of one step."""
    values = {"dataset": "imagefolder", "data-dir": root, "student": "wrn-10-1", "image-size": 16}
    values |= {"batch-size": 8, "max-steps": 1, "device": "cpu", "output-dir": root.with_name("run")}
    code = train.main(flags(values | dashed(keys)))
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out.splitlines()


def test_what_a_run_reads_and_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What Jupyter, macOS and photo managers leave in folders; images in all kinds of files."""
    root = make_folders(tmp_path / "images")
    for split in ("train", "val"):
        shutil.copytree(root / split / "ant", root / split / ".ipynb_checkpoints")
        shutil.copytree(root / split / "ant", root / split / "cat" / ".thumbnails")
        (root / split / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")
        (root / split / "cat" / "notes.txt").touch()
        (root / split / "cat" / "again").symlink_to(root / split / "cat")
    (root / "train" / "loose.png").touch()
    for name in ("a.gif", "b.jfif", "c.jp2", "d.JPEG"):
        picture(len(name)).save(root / "train" / "bee" / name)
    first, left_out, *_ = printed(root, capsys)
    assert "imagefolder: 28 training and 9 test images of 3 classes" in first
    assert left_out == (
        "left out of data-dir: 6 hidden, 2 .txt, 2 linked to a folder above, 1 beside the class folders"
    )


def test_nothing_is_said_where_nothing_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(make_folders(tmp_path / "images"), capsys)
    assert not any("left out" in line for line in lines)


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    "split, old, new, message",
    [
        ("val", "cat", None, "such as cat: val has no cat"),
        ("train", "cat", None, "such as cat: train has no cat"),
        ("train", "cat", COMPOSED, f"such as {COMPOSED}: val has no {COMPOSED} (1 more names differ)"),
        ("val", "cat", "Cat", "such as Cat: train has no 'Cat', but 'cat', which is spelt in another way"),
    ],
)
def test_classes_of_one_split_alone(
    split: str, old: str, new: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folders(tmp_path)
    shutil.rmtree(tmp_path / split / old) if new is None else (tmp_path / split / old).rename(
        tmp_path / split / new
    )
    check_refused(tmp_path, capsys, f"train and val differ in their classes, {message}")


def check_refused(root: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    words = ["--dataset", "imagefolder", "--student", "wrn-10-1", "--data-dir", str(root)]
    assert train.main([*words, "--output-dir", str(root / "run")]) == 2
    assert capsys.readouterr().err == f"train.py: error: data-dir {root}: {message}\n"
    assert not (root / "run").exists()


def test_a_class_in_two_unicode_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As copies by way of macOS have it: the names look the same."""
    make_folders(tmp_path)
    for split, name in (("train", COMPOSED), ("val", DECOMPOSED)):
        (tmp_path / split / "cat").rename(tmp_path / split / name)
    difference = "val has no 'caf\\xe9', but 'cafe\\u0301', which is its other Unicode form"
    if DECOMPOSED < COMPOSED:
        difference = "train has no 'cafe\\u0301', but 'caf\\xe9', which is its other Unicode form"
    first = min(COMPOSED, DECOMPOSED)
    check_refused(tmp_path, capsys, f"train and val differ in their classes, such as {first}: {difference}")


def test_folders_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "expected the folders train and val (or test), with a folder of images for each class"
    check_refused(tmp_path, capsys, f"{expected} ({tmp_path}/train: No such file or directory)")
    (tmp_path / "train" / ".cache").mkdir(parents=True)
    check_refused(tmp_path, capsys, f"{expected} (train holds no folder)")
    shutil.rmtree(tmp_path / "train")
    make_folders(tmp_path, train=1)
    for name in ("bee", "cat"):
        (tmp_path / "train" / name / "0.png").rename(tmp_path / "train" / name / "0.heic")
    message = f"{expected} (no image in train/bee (left out there: 1 .heic), nor in 1 more)"
    check_refused(tmp_path, capsys, message)


def test_classes_are_called_as_their_folders(tmp_path: Path) -> None:
    """Not as the folders inside, which the images may be in."""
    make_folders(tmp_path)
    for split in ("train", "val"):
        for name in CLASSES:
            (tmp_path / split / name / "more").mkdir()
            for path in (tmp_path / split / name).glob("*.png"):
                path.rename(path.parent / "more" / path.name)
    dataset = data.load(config(tmp_path), CPU)
    assert dataset.names == list(CLASSES)
    seen = pictures.read_dataset("imagefolder", str(tmp_path), [0, 8], 16)
    assert (seen.labels, seen.classes) == (["ant", "cat"], list(CLASSES))


def make_cub(root: Path) -> Path:
    """Six images of two classes, each black but for a white box, which its bounding box gives."""
    root = root / "CUB_200_2011"
    (root / "images").mkdir(parents=True)
    tables: dict[str, list[str]] = {
        name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")
    }
    for number in range(1, 7):
        image = np.zeros((60, 80, 3), dtype=np.uint8)
        left, top, width, height = 10 + number, 5, 40, 30
        image[top : top + height, left : left + width] = 255
        Image.fromarray(image).save(root / "images" / f"{number}.png")
        tables["images"].append(f"{number} {number}.png")
        tables["image_class_labels"].append(f"{number} {1 + number % 2}")
        tables["train_test_split"].append(f"{number} {int(number <= 4)}")
        tables["bounding_boxes"].append(f"{number} {left}.0 {top}.0 {width}.0 {height}.0")
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_cub_crops_the_bounding_box(tmp_path: Path) -> None:
    make_cub(tmp_path)
    dataset = data.load(config(tmp_path, dataset="cub"), CPU)
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (4, 2, 2)
    assert dataset.train.labels.tolist() == [1, 0, 1, 0]
    white = ((torch.tensor([255.0] * 3) - dataset.mean) / dataset.std).view(1, 3, 1, 1)
    images, _ = batches(dataset, [slice(0, 4)])
    torch.testing.assert_close(images, white.expand_as(images))
    ((images, _),) = dataset.evaluation_batches([slice(0, 2)])
    torch.testing.assert_close(images, white.expand_as(images))


@pytest.mark.parametrize("limit, numbers", [(None, [1, 2, 3, 4]), (2, [1, 4])])
def test_cub_boxes_stay_with_their_images(limit: int | None, numbers: list[int], tmp_path: Path) -> None:
    make_cub(tmp_path)
    dataset = data.load(config(tmp_path, dataset="cub", limit_train=limit, seed=2), CPU)
    for files, expected in ((dataset.train, numbers), (dataset.test, [5, 6])):
        assert [int(Path(path).stem) for path in files.paths] == expected
        assert files.labels.tolist() == [number % 2 for number in expected]
        assert files.boxes == [(10 + number, 5, 50 + number, 35) for number in expected]


def test_damaged_cub_tables(tmp_path: Path) -> None:
    root = make_cub(tmp_path)
    (root / "bounding_boxes.txt").write_text("1 10 five 40 30\n")
    with pytest.raises(ConfigError, match=r"bounding_boxes.txt, line 1: cannot be understood"):
        data.load(config(tmp_path, dataset="cub"), CPU)
    (root / "bounding_boxes.txt").write_text("1 10 5 40 30\n")
    with pytest.raises(ConfigError, match="image 2 has no name, label, split or bounding box"):
        data.load(config(tmp_path, dataset="cub"), CPU)
    (root / "images.txt").unlink()
    with pytest.raises(ConfigError, match=r"images.txt: No such file"):
        data.load(config(tmp_path, dataset="cub"), CPU)


@pytest.mark.parametrize(
    "table, line, message",
    [
        ("images", b"6\n", "image 6 has no name, label, split or bounding box"),
        ("image_class_labels", b"6\n", "image 6 has no name, label, split or bounding box"),
        ("image_class_labels", b"6 0\n", "image 6: labels begin with 1, got 0"),
        ("train_test_split", b"", "image 6 has no name, label, split or bounding box"),
        ("images", b"6 \xe9.png\n", "images.txt is not UTF-8"),
    ],
)
def test_faulty_lines_of_cub(table: str, line: bytes, message: str, tmp_path: Path) -> None:
    """In place of the last line of a table."""
    path = make_cub(tmp_path) / f"{table}.txt"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]) + line)
    with pytest.raises(ConfigError, match=message):
        data.load(config(tmp_path, dataset="cub"), CPU)
