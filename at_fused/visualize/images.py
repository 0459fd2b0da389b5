"""Image files, as whoever looks at them sees them: which of a folder are images, and their pixels in RGB."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image, ImageFile, ImageOps

LeftOut = Counter[str]  # how many files and folders were passed over, by kind

HIDDEN = "hidden"
LOOP = "linked to a folder above"
BESIDE = "beside the class folders"
KINDS_TOLD = 6


@cache
def suffixes() -> frozenset[str]:
    """Endings of the files that Pillow reads, in lower case.

    Not of those that it only recognises: video, and formats that wait for a handler from elsewhere.
    """
    known = Image.registered_extensions()  # of all plugins: Pillow loads most when it meets such a file
    readers = {kind: reader for kind, (reader, _) in Image.OPEN.items() if kind != "MPEG"}
    stubs = {
        kind
        for kind, reader in readers.items()
        if isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)
    }
    kinds = readers.keys() - stubs | {"MPO"}  # read as the JPEG that it begins with
    return frozenset(suffix for suffix, kind in known.items() if kind in kinds)


def class_folders(folder: str | os.PathLike[str]) -> tuple[list[str], LeftOut]:
    """Names of the folders in `folder`, sorted, and what is left out: hidden ones, and files.

    Raises:
        OSError: `folder` can't be read.
    """
    names, left_out = [], LeftOut()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                left_out[HIDDEN] += 1
            elif not os.path.isdir(entry.path):
                left_out[BESIDE] += 1
            elif entry.is_symlink() and _contains(entry.path, [os.path.realpath(folder)]):
                left_out[LOOP] += 1
            else:
                names.append(entry.name)
    return sorted(names), left_out


def find_images(folder: str | os.PathLike[str]) -> tuple[list[str], LeftOut]:
    """Paths of the images in `folder` and its subfolders, and what is left out.

    Left out are files of other kinds and what is hidden: names that begin with a dot. Links are followed, but
    to no folder that they are in themselves. The order is that of torchvision's ImageFolder.

    Raises:
        OSError: a folder can't be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    root = os.fspath(folder)
    images: dict[str, list[str]] = {}
    left_out = LeftOut()
    above: dict[str, list[str]] = {root: []}  # of each folder: where the links on the way to it are
    for path, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        entered = []
        for name in folders:
            inside = os.path.join(path, name)
            way = above[path]
            if name.startswith("."):
                left_out[HIDDEN] += 1
                continue
            if os.path.islink(inside):
                way = [*way, os.path.realpath(path)]
                if _contains(inside, way):
                    left_out[LOOP] += 1
                    continue
            above[inside] = way
            entered.append(name)
        folders[:] = entered
        images[path] = []
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                left_out[HIDDEN] += 1
            elif suffix in suffixes():
                images[path].append(os.path.join(path, name))
            else:
                left_out[suffix or "without a suffix"] += 1
    return [image for path in sorted(images) for image in images[path]], left_out


def _contains(folder: str, paths: Iterable[str]) -> bool:
    """Whether one of `paths`, free of links, is `folder` or in it."""
    real = os.path.realpath(folder)
    return any(os.path.commonpath([real, path]) == real for path in paths)


def told(left_out: LeftOut) -> str:
    """A text such as "12 .heic, 3 hidden"; empty if nothing was left out."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {kind}" for kind, count in ordered[:KINDS_TOLD]]
    if rest := sum(count for _, count in ordered[KINDS_TOLD:]):
        parts.append(f"{rest} of other kinds")
    return ", ".join(parts)


def read(path: str | os.PathLike[str], box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """The image in a file (of several the first), in RGB and turned as its EXIF orientation says.

    `box`: only this part is taken, (left, top, right, bottom) in pixels as the file stores them.

    Raises:
        Exception: whatever Pillow's readers raise; ValueError as `to_rgb`.
    """
    with Image.open(path) as file:
        file.load()
        image = file if box is None else file.crop(box)
        with suppress(Exception):  # a damaged EXIF block turns nothing
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB, without its transparency. 16-bit grey levels are scaled: Pillow would clip them at 255.

    Raises:
        ValueError: floating-point grey levels, of which nobody knows what is white.
    """
    if image.mode == "F":
        raise ValueError("floating-point grey levels have no known range")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64) / 257  # 65535 is white
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # else Pillow warns of what is meant
    return image.convert("RGB")
