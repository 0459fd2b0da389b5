"""Fair times on a machine that is never quiet: contenders take turns in one process, and medians count."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], object]  # what is timed
    prepare: Callable[[], object] = nothing  # called before each run, untimed


@dataclass(frozen=True)
class Times:
    """Seconds of one contender, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, percent: float) -> float:
        """Linear interpolation between the two nearest entries."""
        return percentile(self.seconds, percent)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of `values`."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Waits until the device has finished all it was given."""
    return torch.cuda.synchronize if device.type == "cuda" else nothing


def interleave(
    contenders: Sequence[Contender], rounds: int, device: torch.device, *, warmup: int = 3
) -> dict[str, Times]:
    """Times every contender once per round, in an order drawn anew: none always follows the same one.

    A round shares what the machine is doing at the moment: compare round by round, or by medians.
    """
    synchronize = synchronizer(device)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()
    try:
        for number in range(-warmup, rounds):
            for contender in order.sample(list(contenders), len(contenders)):
                contender.prepare()
                synchronize()
                start = time.perf_counter()
                contender.run()
                synchronize()
                elapsed = time.perf_counter() - start
                if number >= 0:
                    seconds[contender.name].append(elapsed)
    finally:
        gc.enable()
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def copy(bytes_moved: int, device: torch.device) -> Contender:
    """A contender that copies a buffer: `bytes_moved` counts what is read and what is written."""
    source = torch.ones(bytes_moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Contender("copy", lambda: target.copy_(source))
