"""List where a network may be tapped: what `python -m at_fused.taps` runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _architectures
from .._terminal import lenient_output
from .suggest import Level, levels, pair_up, written

EXAMPLES = """\
examples:
  python -m at_fused.taps torchvision:mobilenet_v3_small
  python -m at_fused.taps timm:vit_tiny_patch16_224 resnet-18     # and the pairs of a student and a teacher
  python -m at_fused.taps path/to/file.py:factory --size 32
"""


@lenient_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 after a mistake, which is reported in one line."""
    try:
        print(_told(_parse(argv)))
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        print(f"taps: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m at_fused.taps", allow_abbrev=False,
        description="List the modules that end each resolution of a network, with the shapes of their "
        "features; of a student and a teacher also the pairs of the same size.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a name of the zoo, torchvision or timm (torchvision:NAME, timm:NAME: only there), "
        "package.module:factory or path/to/file.py:factory; or two, student and teacher",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of the images (default: what the network is made for)",
    )
    args = parser.parse_args(argv)
    if len(args.models) > 2:
        raise ValueError(f"{len(args.models)} networks: one, or a student and a teacher")
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size}: must be at least 1")
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (examples: --help)")


def _told(args: argparse.Namespace) -> str:
    architectures = [_architectures.find(name) for name in args.models]
    size = args.size or architectures[0].size  # the student's: both see the same images
    image = torch.zeros(1, 3, size, size)
    found = [
        _levels(name, made.create(None), image) for name, made in zip(args.models, architectures, strict=True)
    ]
    parts = [f"{size} x {size} pixels"]
    for name, level in zip(args.models, found, strict=True):
        parts.append(f"{name}\n{_table(level)}")
    if len(found) == 2:
        parts.append(f"taps: {written(pair_up(*found))}")
    return "\n\n".join(parts)


def _levels(name: str, model: torch.nn.Module, image: Tensor) -> list[Level]:
    try:
        return levels(model, image)
    except Exception as error:  # whatever the code of a network raises
        raise ValueError(f"{name}: {error}; another --size may serve") from None


def _table(found: list[Level]) -> str:
    rows = [("tap", "shape", "grid", "channel-dim")]
    for level in found:
        shape = "x".join(map(str, ("B", *level.shape[1:])))
        rows.append(
            (level.name, shape, f"{level.grid.height}x{level.grid.width}", str(level.grid.channel_dim))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
