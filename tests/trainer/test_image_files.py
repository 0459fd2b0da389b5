"""Image files: which of a folder are read, in what order, and that everybody sees the same pixels of them."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import picture

from at_fused.visualize import images, pictures
from models import torchvision_compat  # noqa: F401  (before torchvision)
from trainer.data import folders
from trainer.data.files import Files, read_folders

# isort: split
from torchvision.datasets import ImageFolder

Pixels = np.ndarray

# By EXIF's orientation, where the stored row 0 and column 0 are seen: the upright image of a stored one.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda s: s,  # top, left
    2: lambda s: s[:, ::-1],  # top, right
    3: lambda s: s[::-1, ::-1],  # bottom, right
    4: lambda s: s[::-1],  # bottom, left
    5: lambda s: s.swapaxes(0, 1),  # left, top
    6: lambda s: s.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda s: s.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda s: s.swapaxes(0, 1)[::-1],  # left, bottom
}
ORIENTATION = 0x0112


def oriented(path: Path, pixels: Pixels, orientation: int, **options: Any) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


def trained_on(path: Path, **options: Any) -> Pixels:
    """(H, W, 3) as the trainer reads it, before the crops."""
    sample = folders.ImageFiles(Files([str(path)], torch.tensor([0]), **options), lambda x: x, False)[0, 0]
    assert sample.image is not None, sample.faults
    return sample.image.numpy()


# --- pixels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, options", [("png", {}), ("tif", {}), ("webp", {"lossless": True})])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_is_upright_everywhere(
    orientation: int, suffix: str, options: dict[str, Any], tmp_path: Path
) -> None:
    stored = np.random.default_rng(0).integers(256, size=(12, 12, 3), dtype=np.uint8)
    path = oriented(tmp_path / f"a.{suffix}", stored, orientation, **options)
    expected = UPRIGHT[orientation](stored)
    np.testing.assert_array_equal(trained_on(path), expected)
    shown = pictures.read_files([str(path)], 1).shown(12)[0]
    np.testing.assert_array_equal((shown * 255).round().permute(1, 2, 0), expected)


@pytest.mark.parametrize("suffix", ["jpg", "mpo", "avif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_what_cameras_write_is_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    """Lossy: a quarter of each picture has a colour of its own, and keeps it; 48 x 32 becomes 32 x 48."""
    if f".{suffix}" not in images.suffixes():
        pytest.skip(f"this Pillow reads no {suffix}")
    stored = np.zeros((32, 48, 3), dtype=np.uint8)
    stored[:16, :24], stored[:16, 24:], stored[16:, :24], stored[16:, 24:] = 0, 80, 160, 240
    seen = np.asarray(images.read(oriented(tmp_path / f"a.{suffix}", stored, orientation, quality=95)))
    expected = UPRIGHT[orientation](stored)
    assert seen.shape == expected.shape
    assert np.abs(seen.astype(int) - expected).mean() < 8  # 80 apart: another turn would be 40 off and more


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_sixteen_bits_are_turned_too(orientation: int, tmp_path: Path) -> None:
    levels = np.arange(8 * 6, dtype=np.uint16).reshape(8, 6) * 257
    path = oriented(tmp_path / "a.png", levels, orientation)
    expected = UPRIGHT[orientation]((levels // 257).astype(np.uint8))
    np.testing.assert_array_equal(np.asarray(images.read(path))[..., 0], expected)


def test_a_box_is_cut_from_the_image_as_it_is_stored(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    path = oriented(tmp_path / "a.png", stored, 6)
    seen = trained_on(path, boxes=[(3.0, 5.0, 13.0, 11.0)])
    np.testing.assert_array_equal(seen, UPRIGHT[6](stored[5:11, 3:13]))


@pytest.mark.parametrize(
    "block", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x05", b"Exif\0\0nonsense" * 5]
)
def test_a_damaged_exif_block_turns_nothing(block: bytes, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.jpg")
    picture(0).save(tmp_path / "b.jpg", exif=block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of the damage
        seen = trained_on(tmp_path / "b.jpg")
    np.testing.assert_array_equal(seen, trained_on(tmp_path / "a.jpg"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "animated", "clear"])
def test_pixels_of_every_mode(mode: str, tmp_path: Path) -> None:
    """Against Pillow's own conversion of the whole image, or what was put in; without a warning."""
    source = picture(0, 8, 6)
    path = tmp_path / {"CMYK": "a.tif", "YCbCr": "a.tif", "animated": "a.gif"}.get(mode, "a.png")
    if mode == "I;16":
        levels = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
        Image.fromarray(levels).save(path)
        expected = np.repeat((levels / 257).round().astype(np.uint8)[..., None], 3, axis=2)
    elif mode == "animated":
        frames = [source.quantize(16), picture(1, 8, 6).quantize(16)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
        expected = np.asarray(frames[0].convert("RGB"))
    elif mode == "clear":  # a palette with a transparency of its own for each colour
        palette = source.quantize(8)
        palette.save(path, transparency=bytes([0, 128, 255, 255, 0, 1, 2, 3]))
        expected = np.asarray(palette.convert("RGB"))
    else:
        source.convert(mode).save(path)
        expected = np.asarray(source.convert(mode).convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(trained_on(path), expected)


# --- which files --------------------------------------------------------------------------------------------


def saved(path: Path) -> bool:
    """Whether Pillow can write such a file, and has."""
    for mode in ("RGB", "P", "1"):
        try:
            picture(0, 16, 16).convert(mode).save(path)
            return True
        except (OSError, ValueError, KeyError, Warning):
            path.unlink(missing_ok=True)
    return False


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
def test_whatever_pillow_writes_and_reads_is_an_image(tmp_path: Path) -> None:
    needs_ghostscript = {".eps", ".ps"}
    listed = set()
    for suffix in Image.registered_extensions().keys() - needs_ghostscript:
        path = tmp_path / f"a{suffix.upper()}"
        if saved(path):
            try:
                with Image.open(path) as file:
                    file.load()
            except Exception:
                path.unlink()  # written, and not read again, as PDF
            else:
                listed.add(path.name)
    assert {"a.GIF", "a.JFIF", "a.JP2", "a.MPO", "a.WEBP", "a.TIFF", "a.JPE", "a.APNG"} <= listed
    found, left_out = images.find_images(tmp_path)
    assert ({Path(path).name for path in found}, left_out) == (listed, {})
    for path in found:
        assert images.read(path).mode == "RGB", path


def make_tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name), 4, 4).save(root / name)
    return root


def test_order_and_labels_are_torchvisions(tmp_path: Path) -> None:
    """So that the identity of a run's images, which has their order, stays what it was."""
    names = [
        "b/2.png",
        "b/10.jpg",
        "b/sub/1.png",
        "b/sub-1/1.png",
        "b/sub/deep/x.bmp",
        "b/B.PNG",
        "a b/é.png",
    ]
    for split in ("train", "val"):
        make_tree(tmp_path / "images" / split, *names, "C/a.webp", "C/b.pgm", "C/b.tif")
    (tmp_path / "images/train/a b/linked").symlink_to(tmp_path / "images/train/C")
    shutil.copytree(tmp_path / "images/train/b/sub", tmp_path / "images/train/C/a/b")
    found = read_folders(tmp_path / "images")
    reference = ImageFolder(tmp_path / "images/train")
    assert found.train.paths == [path for path, _ in reference.samples]
    assert found.train.labels.tolist() == reference.targets
    assert found.names == reference.classes == ["C", "a b", "b"]
    assert not found.left_out


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    names = [
        "0.png",
        "sub/1.png",
        ".hidden.png",
        "._0.jpg",
        ".thumbnails/0.png",
        "sub/.ipynb_checkpoints/1.png",
    ]
    found, left_out = images.find_images(make_tree(tmp_path, *names))
    assert found == [f"{tmp_path}/0.png", f"{tmp_path}/sub/1.png"]
    assert left_out == {"hidden": 4}
    inside, _ = images.find_images(tmp_path / ".thumbnails")
    assert inside == [f"{tmp_path}/.thumbnails/0.png"], "asked for by name, it is not hidden"


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    make_tree(tmp_path, "0.png")
    for name in ("a.heic", "b.HEIC", "c.txt", "README", "film.mpg", "data.h5", "x.tar.gz"):
        (tmp_path / name).touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    _, left_out = images.find_images(tmp_path)
    counts = {".heic": 2, ".txt": 1, "without a suffix": 2, ".mpg": 1, ".h5": 1, ".gz": 1}
    assert left_out == counts
    assert images.told(left_out) == "2 .heic, 2 without a suffix, 1 .gz, 1 .h5, 1 .mpg, 1 .txt"
    many = images.LeftOut({f".{i}": 2 for i in range(8)})
    assert images.told(many).endswith(", 4 of other kinds")
    assert images.told(images.LeftOut()) == ""


@pytest.mark.parametrize(
    "link, target, found",
    [
        ("cat/loop", "cat", ["cat/0.png", "cat/sub/1.png"]),
        ("cat/sub/loop", "cat", ["cat/0.png", "cat/sub/1.png"]),
        ("cat/sub/loop", "cat/sub", ["cat/0.png", "cat/sub/1.png"]),
        ("cat/up", ".", ["cat/0.png", "cat/sub/1.png"]),
        ("cat/sub/up", "..", ["cat/0.png", "cat/sub/1.png"]),
    ],
)
def test_links_that_lead_back_are_not_followed(
    link: str, target: str, found: list[str], tmp_path: Path
) -> None:
    train = make_tree(tmp_path / "train", "cat/0.png", "cat/sub/1.png", "dog/0.png")
    (train / link).symlink_to(train / target)
    paths, left_out = images.find_images(train / "cat")
    assert [Path(path).relative_to(train).as_posix() for path in paths] == found
    assert left_out == {images.LOOP: 1}
    (tmp_path / "link").symlink_to(train / "cat")  # the folder is a link itself, as in reproduce.mini
    assert images.find_images(tmp_path / "link")[1] == left_out


def test_links_that_lead_back_by_a_detour(tmp_path: Path) -> None:
    root = make_tree(tmp_path, "a/0.png", "b/1.png")
    (root / "a/b").symlink_to(root / "b")
    (root / "b/a").symlink_to(root / "a")
    paths, left_out = images.find_images(root / "a")
    assert paths == [f"{root}/a/0.png", f"{root}/a/b/1.png"], "other folders are followed"
    assert left_out == {images.LOOP: 1}
    (root / "self").symlink_to(root / "self")
    assert images.find_images(root / "b")[0] == [f"{root}/b/1.png", f"{root}/b/a/0.png"]


def test_folders_of_classes(tmp_path: Path) -> None:
    make_tree(tmp_path, "bee/0.png", "Ant/0.png", ".ipynb_checkpoints/0.png", "loose.png", ".DS_Store.png")
    (tmp_path / "all").symlink_to(tmp_path)
    (tmp_path / "cat").symlink_to(tmp_path / "bee")
    names, left_out = images.class_folders(tmp_path)
    assert names == ["Ant", "bee", "cat"]
    assert left_out == {images.HIDDEN: 2, images.BESIDE: 1, images.LOOP: 1}


def test_a_folder_that_can_not_be_read_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree(tmp_path, "a/0.png", "a/closed/1.png")
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError):
        images.find_images(root / "a")
    with pytest.raises(ValueError, match=r"images .*/a/closed: Permission denied"):
        pictures.read_files([str(root)], 1)
