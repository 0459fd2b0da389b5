"""Fair times on a machine that is never quiet: contenders take turns in one process, and medians count."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

L2_BYTES = 256 * 2**20  # more than any GPU's L2 cache


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], object]  # what is timed
    prepare: Callable[[], object] = nothing  # called before each run, untimed
    queued: bool = False  # on a GPU: launched while it is busy, so that only the device's time counts


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
    return float(np.percentile(values, percent))


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has finished its work."""
    return torch.cuda.synchronize if device.type == "cuda" else nothing


def interleave(
    contenders: Sequence[Contender], rounds: int, device: torch.device, *, warmup: int = 3
) -> dict[str, Times]:
    """The times of every contender, which runs once per round; each round has a new random order.

    The load of the machine is much the same within a round: compare round by round, or by medians.
    On a GPU events take the time, and its L2 cache holds nothing of the inputs when a contender starts.
    """
    synchronize, elapsed = synchronizer(device), stopwatch(device)
    evict = evictor(device)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()
    try:
        for number in range(-warmup, rounds):
            for contender in order.sample(list(contenders), len(contenders)):
                contender.prepare()
                evict()
                if not contender.queued:
                    synchronize()
                taken = elapsed(contender.run)
                if number >= 0:
                    seconds[contender.name].append(taken)
    finally:
        gc.enable()
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs another and returns the seconds until the device is done."""

    def by_clock(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def by_events(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return by_events if device.type == "cuda" else by_clock


def evictor(device: torch.device) -> Callable[[], object]:
    """A function that fills a GPU's L2 cache with other data; on a CPU it does nothing.

    It reads: data that it wrote would be written back while the next contender is timed.
    """
    if device.type != "cuda":
        return nothing
    other = torch.ones(L2_BYTES // 4, dtype=torch.float32, device=device)
    return partial(torch.sum, other, 0, out=torch.empty((), device=device))


def captured(contender: Contender, device: torch.device) -> Contender:
    """The contender as a CUDA graph: one launch replays all of its kernels, without the host in between."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):  # lazy initialisation must not be captured
        for _ in range(3):
            contender.prepare()
            contender.run()
        contender.prepare()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        contender.run()
    return Contender(contender.name, graph.replay, queued=True)


def copy(bytes_moved: int, device: torch.device) -> Contender:
    """A contender that copies a buffer: `bytes_moved` counts what is read and what is written."""
    source = torch.ones(bytes_moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Contender("copy", lambda: target.copy_(source), queued=True)
