"""The suites of `python -m benchmarks --suite NAME`: a module each, with the interface `Suite`.

`NAME_probe` is what a suite runs in processes of its own.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch

from benchmarks.report import Result, Row

NAMES = ("loss", "memory", "scaling", "step", "trainer", "teacher", "footprint")


class Suite(Protocol):
    """What a module of this folder offers."""

    ROUNDS: int  # how often each contender runs, unless the command says otherwise

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags of this suite to those of all."""

    def measure(
        self, options: argparse.Namespace, device: torch.device, rows: Sequence[Row]
    ) -> Iterator[list[Row]]:
        """Yields what is measured, piece by piece, without what is among `rows` already.

        Raises:
            ValueError: the options fit neither the device nor the suite.
        """

    def result(self, rows: Sequence[Row], options: argparse.Namespace, device: torch.device) -> Result:
        """The page, the picture and the summary of all rows so far."""


def load(name: str) -> Suite:
    """The suite of this name. Only that one is imported: `trainer` needs packages that the loss does not."""
    return cast(Suite, importlib.import_module(f"benchmarks.suites.{name}"))
