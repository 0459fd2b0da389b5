"""Counts that need no clock: memory held on the way, kernels launched."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler reports each start and stop


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that `run` holds at once, beyond what is allocated before it and what it keeps.

    Counts what PyTorch's allocator gives out: for forward and backward, everything but inputs and gradients.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = [0, *itertools.accumulate(event.nbytes() for event in events)]
    return max(held) - held[-1]


def launches(run: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fills that `run` sends to a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())
