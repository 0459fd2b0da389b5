"""Draw the attention maps of networks by name: what `python -m at_fused.visualize` runs."""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .._architectures import categories
from .._terminal import lenient_output
from ..gradients import input_gradient
from . import arguments, networks, output, pictures
from .features import feature_map, forward, last_of_each_size
from .grid import attention_grid
from .networks import Network
from .pictures import Images


@lenient_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 after a mistake, which is reported in one line."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *details: _tell(f"warning: {message}")
        try:
            print(_draw(arguments.parse(argv)))
        except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            _tell(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            _tell("error: interrupted")
            return 130
    return 0


def _tell(text: str) -> None:
    print(f"visualize: {' '.join(text.split())}", file=sys.stderr)


def _draw(args: argparse.Namespace) -> str:
    """Draw what the arguments ask for; returns a line of what was drawn, and one of the files left out."""
    loaded, random = _load_networks(args)
    images = _read_images(args, next(iter(loaded.values())))
    output.spare(args.out, images.files, "one of the images")
    if args.classes:
        images = replace(images, classes=_read_classes(args.classes))
    inputs = {title: images.given(network.architecture) for title, network in loaded.items()}
    taps = {}
    for number, (title, network) in enumerate(loaded.items()):
        with _named(title):
            taps[title] = _tap_names(args, number, network.model, inputs[title])
    taps = _as_many(taps, given=bool(args.taps))
    features, captions = {}, {}
    for title, network in loaded.items():
        features[title], captions[title] = _look(
            args, title, network.model, inputs[title], taps[title], images
        )
    names = {
        title: [*found, *(f"gradient at {layer}" for layer in args.gradient or ())]
        for title, found in taps.items()
    }
    figure = attention_grid(
        images.shown(max(network.architecture.size for network in loaded.values())),
        features,
        groups=args.headings or _headings(list(names.values())),
        labels=images.labels,
        captions=captions if args.predictions else None,
        compare_to=args.compare_to,
        p=args.p if len(args.p) > 1 else args.p[0],
        mapping=args.mapping,
        scale=args.scale,
        overlay=args.overlay,
        colours=args.colours,
        note=random,
    )
    output.save(figure, args.out)
    count = len(images.labels)
    drawn = "; ".join(f"{title}: {', '.join(found)}" for title, found in names.items())
    line = f"{args.out}: {count} image{'s' if count > 1 else ''}; {drawn}"
    return f"{line}\nleft out: {images.left_out}" if images.left_out else line


def _load_networks(args: argparse.Namespace) -> tuple[dict[str, Network], str]:
    """The networks by their titles, and a line that names those with random weights."""
    models, weights = args.model, args.checkpoint or ["random"]
    count = max(len(models), len(weights))
    if len(models) not in (1, count) or len(weights) not in (1, count):
        raise ValueError(f"{len(weights)} checkpoints for {len(models)} models: give one for each")
    models, weights = models * (count // len(models)), weights * (count // len(weights))
    titles = args.titles or _titles(models)
    if len(titles) != count or len(set(titles)) != count:
        raise ValueError(f"--titles: {count} different ones are needed, got {len(set(titles))}")
    if args.compare_to not in (None, *titles):
        raise ValueError(f"--compare-to {args.compare_to!r} is not one of the networks: {', '.join(titles)}")
    if args.taps and len(args.taps) not in (1, count):
        raise ValueError(f"--taps given {len(args.taps)} times for {count} networks")
    pairs = zip(models, weights, strict=True)
    loaded = [networks.load(name, None if file == "random" else file) for name, file in pairs]
    untrained = [title for title, file in zip(titles, weights, strict=True) if file == "random"]
    random = f"random weights: {', '.join(untrained)}" if untrained else ""
    if random:
        _tell(random)
    if args.size:
        loaded = [replace(n, architecture=replace(n.architecture, size=args.size)) for n in loaded]
    return dict(zip(titles, loaded, strict=True)), random


def _titles(models: list[str]) -> list[str]:
    """The models' names, without their libraries where that suffices; equal ones are numbered."""
    short = {name: name.replace("/", ":").rpartition(":")[2] for name in models}
    shared = [name for name in models if list(short.values()).count(short[name]) > 1]
    titles = [name if name in shared else short[name] for name in models]
    return [
        title if titles.count(title) == 1 else f"{title} ({place + 1})" for place, title in enumerate(titles)
    ]


def _read_images(args: argparse.Namespace, first: Network) -> Images:
    if args.dataset:
        return pictures.read_dataset(
            args.dataset, args.data_dir, args.indices, first.architecture.size, args.size
        )
    return pictures.read_files(args.images, args.count)


def _read_classes(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").rstrip().splitlines()
    except OSError as error:
        raise ValueError(f"--classes {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--classes {file}: not a text in UTF-8") from None


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


def _as_many(taps: dict[str, list[str]], given: bool) -> dict[str, list[str]]:
    """As many taps for each network: of those that the user has not given, the top ones."""
    count = min(len(names) for names in taps.values())
    left_out = {title: names[:-count] for title, names in taps.items() if len(names) > count}
    if not left_out:
        return taps
    if given:
        counts = ", ".join(f"{len(names)} for {title}" for title, names in taps.items())
        raise ValueError(f"--taps: {counts}: give as many for each")
    listed = "; ".join(f"{title}: {', '.join(names)}" for title, names in left_out.items())
    _tell(f"left out, to have as many maps of each network: {listed}")
    return {title: names[-count:] for title, names in taps.items()}


def _look(
    args: argparse.Namespace, title: str, model: nn.Module, x: Tensor, taps: list[str], images: Images
) -> tuple[list[Tensor], list[str]]:
    """A network's features and the gradients, all (B, C, h, w), and what it sees in each image."""
    with _named(title), torch.no_grad():
        logits, features = forward(model, x, taps)
    outputs, classes = logits.shape[1], images.classes or []
    if args.classes and len(classes) != outputs:
        raise ValueError(
            f"--classes {args.classes}: {len(classes)} names for the {outputs} classes of {title}"
        )
    if (args.predictions or args.gradient) and not logits.isfinite().all():
        raise ValueError(f"{title}: the logits hold NaN or infinity (weights that diverged)")
    seen = logits.argmax(1)
    targets = images.targets if len(classes) in (0, outputs) else None  # else it knows other classes
    with _named(title):
        for layer in args.gradient or ():
            at = None if layer == arguments.INPUT else layer
            j = input_gradient(model, x, seen if targets is None else targets, layer=at)
            features.append(feature_map(f"the gradient at {layer} is", j))
    return features, _captions(seen, outputs, classes, targets)


@contextmanager
def _named(title: str) -> Iterator[None]:
    """Errors say which network they are about."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{title}: {error}") from None


def _captions(seen: Tensor, outputs: int, classes: list[str], targets: Tensor | None) -> list[str]:
    """What a network sees in each image, and whether it is right, where that is known."""
    known = classes if len(classes) == outputs else categories(outputs)
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


if __name__ == "__main__":
    raise SystemExit(main())
