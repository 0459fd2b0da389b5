"""PyTorch's settings in this process: dtypes, layout, threads, determinism."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.config import Config
from trainer.distributed import Ranks

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def default_dtype(config: Config) -> Iterator[None]:
    """What models and images are made in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if config.precision == "fp64" else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def set_up_torch(config: Config, ranks: Ranks) -> None:
    """The process's threads and determinism, as `config` asks."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = not config.deterministic  # tries cuDNN's algorithms once for each size
    if ranks.device.type == "cuda" and config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # for debugging


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The autocast context for the networks' forward passes."""
    dtype = AMP_DTYPES.get(config.amp)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def in_layout(config: Config, images: Tensor) -> Tensor:
    """`images`, which a data set has in channels-last memory, in that of the run."""
    return images if config.channels_last else images.contiguous()


def new_pass(config: Config) -> None:
    """Allow CUDA graphs to overwrite their previous outputs, which have been used."""
    if config.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros where there is none yet: fused SGD leaves it as it was allocated if the first step overflows."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            buffers = optimizer.state[parameter]
            if buffers.get("momentum_buffer") is None:
                buffers["momentum_buffer"] = torch.zeros_like(parameter)
