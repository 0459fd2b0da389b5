"""The command line of train.py: every key is a flag, and flags win over the recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

import at_fused
from at_fused.visualize.paths import user_path
from trainer import run_folder
from trainer.choices import Told
from trainer.config import Config, flag_text, make_config
from trainer.errors import ConfigError, did_you_mean
from trainer.recipes import load_recipe
from trainer.taps import split

FIRST = "--recipe recipes/demo/student.yaml --output-dir runs/first"  # needs no data, takes seconds on a CPU

# Each group by its first key, in the order of Config: a new key belongs to the group around it there.
GROUPS = {
    "dataset": "data",
    "student": "networks",
    "method": "what the student learns from",
    "epochs": "training",
    "optimizer": "optimizer and learning rate",
    "label_smoothing": "regularisation and averaging",
    "amp": "arithmetic and machine",
    "output_dir": "the run",
}

# Over the keys of a run whose student is only tested or exported.
STUDENT_ALONE = {"method": "none", "teacher-cache": "off", "pretrained": False}
STUDENT_ALONE |= {"freeze": [], "freeze-bn": True, "sync-bn": False}
ON_CPU = {"device": "cpu", "amp": "none"}


class Action(NamedTuple):
    """What a command line asks for instead of a training, if anything; `weights` are those of the student."""

    print_config: bool = False
    eval_only: bool = False
    export: Path | None = None
    weights: Path | None = None


def parse_args(argv: Sequence[str] | None = None) -> tuple[Config, Action]:
    """Configuration of a command line, and what it asks for. Flags win over the recipe.

    Raises:
        ConfigError: a mistake, in one line.
        SystemExit: `--help` or `--version` was asked for, and printed.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words:
        raise ConfigError(
            f"nothing to train is named; to begin with: python train.py {FIRST} (all keys: --help)"
        )
    for word in words:
        if not _is_unicode(word):
            raise ConfigError(f"{word!a} is not UTF-8")
    arguments = vars(_parser().parse_args(words))
    recipe, action = arguments.pop("recipe"), Action(*(arguments.pop(name) for name in Action._fields))
    flags = {key.replace("_", "-"): _unlist(key, value) for key, value in arguments.items()}
    values = (load_recipe(recipe) if recipe else {}) | flags
    if action.print_config or not (action.eval_only or action.export):
        if action.weights:
            raise ConfigError(
                f"weights {action.weights} is for eval-only and export (to begin with: pretrained)"
            )
        return make_config(values, to_print=action.print_config), action
    config = make_config(values | STUDENT_ALONE | (ON_CPU if action.export else {}))
    return config, action._replace(weights=_weights(config, action))


def _weights(config: Config, action: Action) -> Path:
    if action.weights:
        return action.weights
    asked = f"export {action.export}" if action.export else "eval-only"
    if config.output_dir is None:
        raise ConfigError(f"{asked} needs weights, or the output-dir of a finished run")
    weights = config.output_dir / run_folder.MODEL
    if not weights.exists():
        raise ConfigError(f"{asked}: there is no {weights}; name the file with weights")
    return weights


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        usage="train.py [--recipe FILE] [--KEY VALUE ...]",
        description="Train an image classifier, alone or as the student of a teacher.",
        epilog=f"to begin with: python train.py {FIRST}",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", type=user_path, metavar="FILE", help="YAML file of the keys below")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and exit"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="print the student's test error and exit; nothing is written"
    )
    parser.add_argument(
        "--export", type=user_path, metavar="FILE", help="write the student as a .pt2 or .onnx FILE and exit"
    )
    parser.add_argument(
        "--weights",
        type=user_path,
        metavar="FILE",
        help="the student's, for both of these; unset: model.pt of output-dir",
    )
    versions = f"at_fused {at_fused.__version__}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=versions, help="print the versions and exit")
    group: Any = parser
    for name, field in Config.model_fields.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        options: dict[str, Any] = {"help": _help(field), "metavar": "VALUE", "default": argparse.SUPPRESS}
        if field.annotation is bool:
            options |= {"nargs": "?", "const": "true"}
        elif "list" in str(field.annotation):
            options |= {"nargs": "*"}
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, **options)
    return parser


def _is_unicode(word: str) -> bool:
    """False for a word that Python has made of other bytes (PEP 383), such as a file name in Latin-1."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        unknown = [word for word in message.split() if word.startswith("--")]
        if "unrecognized" in message and unknown:
            near = did_you_mean(unknown[0].split("=")[0], self._option_string_actions)
            message = f"unknown flag {unknown[0]}{near}"
        raise ConfigError(message)


def _unlist(key: str, value: Any) -> Any:
    """Words of a list flag: `--freeze a b` and `--freeze a,b` are both understood; taps may also be YAML."""
    if not isinstance(value, list):
        return value
    if key == "taps":
        return value[0] if len(value) == 1 else [name for word in value for name in split(word)]
    return [part for word in value for part in word.split(",") if part]


def _help(field: Any) -> str:
    choices = [str(c) for c in get_args(field.annotation) if isinstance(c, str)]
    text = f"{field.description}{' (' + ', '.join(choices) + ')' if choices else ''}"
    text += "".join(note.text() for note in field.metadata if isinstance(note, Told))
    if not field.is_required() and field.default not in (None, []) and "default" not in text:
        text += f"; default {flag_text(field.default)}"
    return text.replace("%", "%%")
