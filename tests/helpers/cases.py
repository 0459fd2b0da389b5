"""Shared by the library's tests: backends and their devices, memory layouts, comparison with the truth."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.multiprocessing
import truth
from torch import Tensor

import at_fused

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Triton without a GPU: a process that tests nothing else, with small shapes, because the interpreter takes
# milliseconds where a kernel takes microseconds.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("triton",) if INTERPRETED else at_fused.available_backends()
FUSED = [name for name in BACKENDS if name != "reference"]

SOAK = int(os.environ.get("AT_FUSED_SOAK", "1"))  # `make soak`: how many times the work of an ordinary run

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def device_of(backend: str) -> str:
    """GPU backends run on the GPU; Triton without one runs interpreted, on the CPU."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def in_ranks(ranks: int, work: Callable[..., None], *arguments: object) -> None:
    """Run `work(rank, *arguments)` in a process per rank: forks, which need no imports, where they work."""
    method = "spawn" if torch.cuda.is_available() else "fork"  # autograd's threads, on a GPU
    torch.multiprocessing.start_processes(work, arguments, nprocs=ranks, start_method=method)


# --- layouts: same logical shape (B, C, *spatial), other strides ----------------------------------


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def batch_innermost(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def channels_first(x: Tensor) -> Tensor:
    """Channels outermost, before the batch."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def misaligned(x: Tensor) -> Tensor:
    """Contiguous, but one element off any vector boundary."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def sliced(x: Tensor) -> Tensor:
    """A window into a bigger tensor of NaN, which shows if one element too many is read."""
    big = x.new_full([2 * x.shape[0], x.shape[1] + 2, *(n + 3 for n in x.shape[2:])], torch.nan)
    window = big[::2, 1:-1]
    for dim, n in enumerate(x.shape[2:], start=2):
        window = window.narrow(dim, 1, n)
    return window.copy_(x)


def narrowed(x: Tensor) -> Tensor:
    """Rows of a wider tensor of NaN: a gap behind each, and nothing else between them."""
    return x.new_full([*x.shape[:-1], x.shape[-1] + 1], torch.nan)[..., :-1].copy_(x)


def every_other_row(x: Tensor) -> Tensor:
    """Every second row of a taller tensor of NaN."""
    shape = [*x.shape]
    shape[2] *= 2
    return x.new_full(shape, torch.nan)[:, :, ::2].copy_(x)


def sliced_channels_last(x: Tensor) -> Tensor:
    big = channels_last(x.new_full([x.shape[0], 2 * x.shape[1] + 1, *x.shape[2:]], torch.nan))
    return big[:, 1::2].copy_(x)


def expanded_batch(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def expanded_channel(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


def expanded_space(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


DENSE: list[Callable[[Tensor], Tensor]] = [
    Tensor.contiguous,
    channels_last,
    transposed,
    batch_innermost,
    channels_first,
    misaligned,
]
LAYOUTS = [
    *DENSE,
    sliced,
    narrowed,
    every_other_row,
    sliced_channels_last,
    expanded_batch,
    expanded_channel,
    expanded_space,
]


def with_dtypes(layouts: list[Callable[[Tensor], Tensor]]) -> list[tuple[torch.dtype, Callable]]:
    """Pairs of a dtype and a layout. In Triton's slow interpreter each layout meets fp32, and each dtype the
    first two layouts: a kernel converts what it has read in one place, and test_properties draws any pair."""
    return [
        (dtype, layout)
        for dtype in DTYPES
        for layout in layouts
        if not INTERPRETED or dtype == torch.float32 or layout in layouts[:2]
    ]


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value).replace("torch.", ""))


def feature(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous,
    seed: int = 0,
    device: str = "cpu",
    scale: float = 1.0,
) -> Tensor:
    """A signed random feature: a leaf that requires grad, laid out by ``layout``."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return layout((draw * scale).to(dtype).to(device)).detach().requires_grad_()


def far_apart(shape: tuple[int, ...], axis: int) -> Tensor:
    """An fp16 feature (B, C, H, W) whose stride along `axis` walks beyond 2^31 elements.

    The storage is address space, never touched in between: that costs nothing on the CPU only.
    """
    strides = [97, 31, 5, 1]
    strides[axis] = (2**31 + 1000) // (shape[axis] - 1)
    storage = torch.empty(2**31 + 2000, dtype=torch.float16)
    values = feature(*shape, dtype=torch.float16).detach()
    return storage.as_strided(shape, strides).copy_(values).requires_grad_()


def exact(x: Tensor) -> np.ndarray:
    """The tensor's own values in fp64."""
    return x.detach().cpu().double().numpy()


# --- comparison with the truth --------------------------------------------------------------------


def unit(dtype: torch.dtype) -> float:
    """Roundoff of the accumulator: fp64 for fp64, else fp32 (design: accumulation is fp32)."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def assert_within(got: Tensor, expected: np.ndarray, size: np.ndarray, dtype: torch.dtype, what: str) -> None:
    """``|got - expected|``: the accumulator's roundings of ``size``, then one in the result's dtype."""
    info = torch.finfo(got.dtype)
    allowed = truth.ROUNDINGS * unit(dtype) * (size + np.abs(expected)) + info.eps / 2 * np.abs(expected)
    allowed = allowed + info.tiny * info.eps  # the smallest subnormal: half precision underflows to it
    error = np.abs(exact(got) - expected)
    overflows = (np.abs(expected) + allowed > info.max) & np.isinf(exact(got)) & (exact(got) * expected > 0)
    error = np.where(overflows, 0.0, error)
    worst = np.unravel_index(np.argmax(error - allowed), error.shape) if error.size else None
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, not {expected.shape}"
    assert np.all(error <= allowed), (
        f"{what}{worst}: {exact(got)[worst]}, not {expected[worst]} ± {allowed[worst]}"
    )


def check_loss(
    s_feats: list[Tensor],
    t_feats: list[Tensor],
    p: float = 2,
    *,
    backend: str,
    upstream: float = 1.0,
    **options,
) -> list[Tensor]:
    """Value and gradients of ``attention_loss`` (both sides) against the truth; returns the gradients."""
    channel_dim = options.get("channel_dim", 1)
    canonical = [[exact(x.movedim(channel_dim, 1)) for x in feats] for feats in (s_feats, t_feats)]
    hidden = {"channel_dim", "reduction", "resize"}
    expected = truth.attention_loss(
        *canonical,
        p,
        resize_mode=options.get("resize", "bilinear"),
        **{key: value for key, value in options.items() if key not in hidden},
    )
    inputs = [*s_feats, *t_feats]
    pairs = zip(s_feats, t_feats, strict=True)
    accs = [torch.float64 if s.dtype == t.dtype == torch.float64 else torch.float32 for s, t in pairs]
    loss = at_fused.attention_loss(s_feats, t_feats, p, backend=backend, **options)
    assert loss.dtype == (torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32)
    if options.get("reduction") == "none":
        assert loss.shape == (len(accs),)
        for i, acc in enumerate(accs):
            assert_within(loss[i], expected.values[i], expected.sizes[i], acc, f"loss {i}")
    else:
        assert loss.shape == ()
        least = torch.float32 if torch.float32 in accs else torch.float64
        total, size = (np.asarray(parts.sum()) for parts in (expected.values, expected.sizes))
        assert_within(loss, total, size, least, "loss")

    grads = torch.autograd.grad(loss.sum() * upstream, inputs)
    truths = [*expected.s_grads, *expected.t_grads]
    sizes = [*expected.s_sizes, *expected.t_sizes]
    for i, (x, grad, exact_grad, size) in enumerate(zip(inputs, grads, truths, sizes, strict=True)):
        who = f"student {i}" if i < len(s_feats) else f"teacher {i - len(s_feats)}"
        acc = accs[i % len(accs)]
        assert grad.dtype == x.dtype, f"{who}: gradient is {grad.dtype}"
        assert_within(
            grad.movedim(channel_dim, 1), upstream * exact_grad, abs(upstream) * size, acc, f"grad of {who}"
        )
    return list(grads)
