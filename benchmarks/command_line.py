"""What the commands of this folder share in reading their flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from trainer.config import ConfigError


class Parser(argparse.ArgumentParser):
    """Mistakes become ConfigError: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def absolute(text: str) -> Path:
    return Path(text).resolve()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
