"""Draw the attention maps of networks by name: what `python -m at_fused.visualize` runs."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients import input_gradient
from ..taps import unknown_name
from . import networks, pictures
from .features import feature_map, forward, last_of_each_size
from .grid import SCALES, attention_grid
from .networks import Network

INPUT = "input"  # in place of a layer: the image itself

EXAMPLES = """\
examples:
  Figure 2, one network over its levels:
    python -m at_fused.visualize --model resnet50 --checkpoint pretrained --images cat.jpg --p 1 --out a.png
  Figure 4, several networks and powers, last pre-downsampling and top activations:
    python -m at_fused.visualize --model resnet18 resnet101 --checkpoint pretrained --images cat.jpg \\
        --levels 2 --p 1 2 4 --out powers.png
  Figure 6, student before and after attention transfer, teacher, and what each of them sees:
    python -m at_fused.visualize --model wrn-16-1 wrn-16-1 wrn-16-2 --titles student "student, AT" teacher \\
        --checkpoint runs/alone/model.pt runs/at/model.pt runs/teacher/model.pt \\
        --dataset cifar10 --data-dir DIR --indices 1 2 3 --taps group3 --predictions --out students.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 after a mistake, which is told in one line."""
    try:
        print(_draw(_parse(argv)))
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"visualize: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m at_fused.visualize", allow_abbrev=False,
        description="Draw where networks look: their attention maps beside or over the images.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        required=True,
        metavar="NAME",
        help="one or more networks: names of the zoo, torchvision or timm (timm/NAME: only there)",
    )
    add(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="FILE",
        help="weights, a file (such as a run's model.pt) for each network; 'pretrained': the library's own, "
        "'random': none. One serves all networks; one network may have several",
    )
    add("--titles", nargs="+", metavar="TEXT", help="what to call each network (default: its name)")
    add("--images", nargs="+", metavar="PATH", help="image files and folders")
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
    add("--data-dir", metavar="DIR", help="where the data set lies, as for train.py")
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
    add("--mapping", choices=("sum", "max"), default="sum", help="over channels (default sum)")
    add(
        "--scale",
        choices=SCALES,
        default="own",
        help="each map from 0 to its own maximum (default), or one scale for l2-normalised maps of a group",
    )
    add("--overlay", action="store_true", help="lay the maps over the images, instead of beside them")
    add("--predictions", action="store_true", help="write what each network sees above its map")
    add("--classes", metavar="FILE", help="names of the classes, one a line")
    add("--compare-to", metavar="TITLE", help="write the cosine similarity to this network's map below each")
    add("--colours", default="viridis", metavar="NAME", help="a colour map of matplotlib (default viridis)")
    add("--out", required=True, type=Path, metavar="FILE", help="the picture: .png, .pdf, .svg")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def _draw(args: argparse.Namespace) -> str:
    """Draw what the arguments ask for; returns a line that says what was drawn."""
    _check(args)
    loaded = _load_networks(args)
    first = next(iter(loaded.values()))
    if args.dataset:
        images = pictures.read_dataset(
            args.dataset, args.data_dir, args.indices, first.architecture.size, args.size
        )
    else:
        images = pictures.read_files(args.images, args.count)
    classes = Path(args.classes).read_text().splitlines() if args.classes else images.classes

    features, captions, names = {}, {}, {}
    for number, (title, network) in enumerate(loaded.items()):
        model, x = network.model, images.given(network.architecture)
        with torch.no_grad():
            taps = _tap_names(args, number, model, x)
            logits, features[title] = forward(title, model, x, taps)
        seen = logits.argmax(1)
        answerable = not classes or len(classes) == logits.shape[1]
        targets = images.targets if answerable else None  # else the network knows other classes
        for layer in args.gradient or ():
            j = input_gradient(
                model, x, seen if targets is None else targets, layer=None if layer == INPUT else layer
            )
            features[title].append(feature_map(title, f"the gradient at {layer} is", j))
        names[title] = [*taps, *(f"gradient at {layer}" for layer in args.gradient or ())]
        captions[title] = _captions(seen, logits.shape[1], classes, targets)

    count = min(len(taps) for taps in names.values())
    features = {title: found[-count:] for title, found in features.items()}  # aligned at the top
    figure = attention_grid(
        images.shown(max(network.architecture.size for network in loaded.values())),
        features,
        groups=args.headings or _headings([found[-count:] for found in names.values()]),
        labels=images.labels,
        captions=captions if args.predictions else None,
        compare_to=args.compare_to,
        p=args.p if len(args.p) > 1 else args.p[0],
        mapping=args.mapping,
        scale=args.scale,
        overlay=args.overlay,
        colours=args.colours,
    )
    figure.savefig(args.out)
    drawn = "; ".join(f"{title}: {', '.join(found[-count:])}" for title, found in names.items())
    return f"{args.out}: {len(images.labels)} images; {drawn}"


def _check(args: argparse.Namespace) -> None:
    if bool(args.images) == bool(args.dataset):
        raise ValueError("give either --images or --dataset")
    if any(value is not None and value < 1 for value in (args.count, args.levels, args.size)):
        raise ValueError("--count, --levels and --size must be at least 1")
    if args.gradient == []:
        args.gradient = [INPUT]
    known = (
        ("colour map", args.colours, _colour_maps()),
        ("--out ending", args.out.suffix[1:].lower(), _formats()),
    )
    for what, value, allowed in known:
        if value not in allowed:
            raise ValueError(f"unknown {what} {value!r}{_close(value, allowed)}")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")


def _load_networks(args: argparse.Namespace) -> dict[str, Network]:
    """The networks by their titles."""
    models, weights = args.model, args.checkpoint or ["random"]
    count = max(len(models), len(weights))
    if len(models) not in (1, count) or len(weights) not in (1, count):
        raise ValueError(f"{len(weights)} checkpoints for {len(models)} models: give one for each")
    models, weights = models * (count // len(models)), weights * (count // len(weights))
    titles = args.titles or [
        name.rpartition("/")[2] if models.count(name) == 1 else f"{name} ({place + 1})"
        for place, name in enumerate(models)
    ]
    if len(titles) != count or len(set(titles)) != count:
        raise ValueError(f"--titles: {count} different ones are needed, got {len(set(titles))}")
    if args.compare_to not in (None, *titles):
        raise ValueError(f"--compare-to {args.compare_to!r} is not one of the networks: {', '.join(titles)}")
    if args.taps and len(args.taps) not in (1, count):
        raise ValueError(f"--taps given {len(args.taps)} times for {count} networks")
    random = [title for title, file in zip(titles, weights, strict=True) if file == "random"]
    if random:
        print(f"visualize: random weights: {', '.join(random)}", file=sys.stderr)
    pairs = zip(models, weights, strict=True)
    loaded = [networks.load(name, None if file == "random" else file) for name, file in pairs]
    if args.size:
        loaded = [replace(n, architecture=replace(n.architecture, size=args.size)) for n in loaded]
    return dict(zip(titles, loaded, strict=True))


def _tap_names(args: argparse.Namespace, number: int, model: nn.Module, x: Tensor) -> list[str]:
    named = getattr(model, "taps", None)  # of the zoo
    named = named if isinstance(named, dict) else {}
    if args.taps:
        words = args.taps[number if len(args.taps) > 1 else 0]
        return list(named.get(words[0], words)) if len(words) == 1 else words
    if args.gradient:
        return []
    taps = named["groups"] if "groups" in named else last_of_each_size(model, x[:1])
    return taps[-args.levels :] if args.levels else taps


def _captions(seen: Tensor, outputs: int, classes: list[str] | None, targets: Tensor | None) -> list[str]:
    """What a network sees in each image, and whether it is right, where that is known."""
    known = classes if classes and len(classes) == outputs else networks.categories(outputs)
    texts = [known[i] if known else f"class {i}" for i in seen.tolist()]
    if targets is not None:
        marks = ["✓" if right else "✗" for right in (seen == targets).tolist()]
        texts = [f"{mark} {text}" for mark, text in zip(marks, texts, strict=True)]
    return [textwrap.shorten(text, 24, placeholder="…") for text in texts]


def _headings(names: list[list[str]]) -> list[str]:
    """The taps' names where the networks share them, else their levels."""
    levels = list(zip(*names, strict=True))
    shared = all(len(set(level)) == 1 for level in levels)
    return [level[0] if shared else f"level {i + 1}" for i, level in enumerate(levels)]


def _close(value: str, allowed: Sequence[str]) -> str:
    return "; " + unknown_name(value, list(allowed)).partition("; ")[2]


def _colour_maps() -> list[str]:
    from matplotlib import colormaps

    return list(colormaps)


def _formats() -> list[str]:
    from matplotlib.backend_bases import FigureCanvasBase

    return list(FigureCanvasBase.get_supported_filetypes())


if __name__ == "__main__":
    raise SystemExit(main())
