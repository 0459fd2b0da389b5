"""The command line of `python -m at_fused.visualize`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from .. import __version__
from .._checks import choices
from .._selectors import close_names
from . import output
from .grid import SCALES
from .paths import expand, user_path

INPUT = "input"  # in place of a layer: the image itself

EXAMPLES = """\
examples:
  Figure 2, one network over its levels:
    python -m at_fused.visualize --model resnet50 --checkpoint pretrained \\
        --images cat.jpg --p 1 --out a.png
  Figure 4, several networks and powers, last pre-downsampling and top activations:
    python -m at_fused.visualize --model resnet18 resnet101 --levels 2 \\
        --checkpoint pretrained --images cat.jpg --p 1 2 4 --out powers.png
  Figure 6, student before and after attention transfer, teacher, and what each of them sees:
    python -m at_fused.visualize --model wrn-16-1 wrn-16-1 wrn-16-2 \\
        --titles student "student, AT" teacher --taps group3 --predictions \\
        --checkpoint runs/alone/model.pt runs/at/model.pt runs/teacher/model.pt \\
        --dataset cifar10 --data-dir DIR --indices 1 2 3 --out students.png
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, of which those that can be checked alone are right."""
    parser = _Parser(
        prog="python -m at_fused.visualize", allow_abbrev=False,
        description="Draw where networks look: their attention maps beside or over the images.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--version", action="version", version=f"at_fused {__version__}, torch {torch.__version__}")
    add(
        "--model",
        nargs="+",
        required=True,
        metavar="NAME",
        help="one or more networks: names of the zoo, torchvision or timm (timm:NAME: only there), or "
        "path/to/file.py:factory",
    )
    add(
        "--checkpoint",
        nargs="+",
        type=expand,
        default=[],
        metavar="FILE",
        help="weights, a file (such as a run's model.pt) for each network; 'pretrained': the library's own, "
        "'random': none. One serves all networks; one network may have several",
    )
    add("--titles", nargs="+", metavar="TEXT", help="what to call each network (default: its name)")
    add("--images", nargs="+", type=expand, metavar="PATH", help="image files and folders")
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of the images that networks get (default: their own, or the data set's)",
    )
    add("--count", type=int, default=4, help="images of each folder (default %(default)s)")
    add(
        "--dataset",
        metavar="NAME",
        help="instead of files: test images of a data set of the trainer, as cifar10",
    )
    add("--data-dir", type=expand, metavar="DIR", help="folder of the data set, as for train.py")
    add(
        "--indices",
        nargs="+",
        type=int,
        default=[0, 1, 2, 3],
        metavar="N",
        help="places of the data set's images (default 0 1 2 3)",
    )
    add(
        "--taps",
        nargs="+",
        action="append",
        metavar="MODULE",
        help="modules whose outputs are drawn, or groups, blocks (zoo); may be given once for each network. "
        "Default: the last module of each resolution",
    )
    add("--levels", type=int, metavar="N", help="only the N highest of the default taps")
    add(
        "--gradient",
        nargs="*",
        metavar="MODULE",
        help="also (without --taps: only) maps of the loss's gradient at the input, or at these modules. The "
        "class in the loss is the data set's, or what the network predicts: for files, or of other classes",
    )
    add("--headings", nargs="+", metavar="TEXT", help="what to call the taps (default: their names)")
    add("--p", nargs="+", type=float, default=[2.0], metavar="P", help="exponents of the maps (default 2)")
    add("--mapping", choices=choices("mapping"), default="sum", help="over channels (default sum)")
    add(
        "--scale",
        choices=SCALES,
        default="own",
        help="each map from 0 to its own maximum (default), or one scale for l2-normalised maps of a group",
    )
    add("--overlay", action="store_true", help="lay the maps over the images, instead of beside them")
    add("--predictions", action="store_true", help="write what each network sees above its map")
    add("--classes", type=expand, metavar="FILE", help="class names, one per line")
    add("--compare-to", metavar="TITLE", help="write the cosine similarity to this network's map below each")
    add("--colours", default="viridis", metavar="NAME", help="a colour map of matplotlib (default viridis)")
    add("--out", required=True, type=user_path, metavar="FILE", help="the picture: .png, .pdf, .svg")
    args = parser.parse_args(argv)
    _check(args)
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (examples: --help)" if "required" in message else message)


def _check(args: argparse.Namespace) -> None:
    if bool(args.images) == bool(args.dataset):
        raise ValueError("give either --images or --dataset")
    if "" in (args.images or ()):
        raise ValueError("--images: one of the paths is empty")
    for name in ("count", "levels", "size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if args.gradient == []:
        args.gradient = [INPUT]
    known = _colour_maps()
    if args.colours not in known:
        names = ", ".join(close_names(args.colours, known))
        hint = f"close names: {names}" if names else f"there are: {', '.join(known[:10])}, …"
        raise ValueError(f"unknown colour map {args.colours!r}; {hint}")
    output.check(args.out)
    output.spare(args.out, args.checkpoint, "one of the checkpoints")
    output.spare(args.out, [args.classes] if args.classes else [], "the --classes file")


def _colour_maps() -> list[str]:
    from matplotlib import colormaps

    return list(colormaps)
