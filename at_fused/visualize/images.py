"""Pillow images of any mode as 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB. 16-bit grey levels are scaled: Pillow's own conversion clips them at 255.

    Raises:
        ValueError: floating-point grey levels, of which nobody knows what is white.
    """
    if image.mode == "F":
        raise ValueError("floating-point grey levels have no known range")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64) / 257  # 65535 is white
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
