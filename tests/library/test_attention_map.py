"""attention_map: values and gradients against the fp64 truth, over dtypes, layouts, shapes and options."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
import truth
from cases import each_backend, exact, feature
from torch import Tensor

import at_fused


def check_map(feat: Tensor, p: float = 2, *, backend: str, channel_dim: int = 1, **options) -> Tensor:
    """Value and gradient of ``attention_map`` against the truth; returns the gradient."""
    mapping, normalize = options.get("mapping", "sum"), options.get("normalize")
    canonical = exact(feat.movedim(channel_dim, 1))
    maps = truth.power_map(canonical, p, mapping)
    flat = truth.flat(maps)
    expected = truth.normalized(flat, normalize)[0].reshape(maps.shape)
    acc = torch.float64 if feat.dtype == torch.float64 else torch.float32

    got = at_fused.attention_map(feat, p, backend=backend, channel_dim=channel_dim, **options)
    assert got.dtype == acc
    cases.assert_within(got, expected, np.abs(expected), acc, "map")

    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=acc).to(got.device)
    (grad,) = torch.autograd.grad(got, feat, upstream)
    assert grad.dtype == feat.dtype
    w = exact(upstream).reshape(flat.shape)
    slope = truth.power_map_slope(canonical, p, mapping)
    at_map = truth.normalized_slope(flat, w, normalize, 1e-12).reshape(maps.shape)
    size = truth.normalized_slope(flat, np.abs(w), normalize, 1e-12, +1.0).reshape(maps.shape)
    cases.assert_within(
        grad.movedim(channel_dim, 1), slope * at_map[:, None], np.abs(slope) * size[:, None], acc, "gradient"
    )
    return grad


@each_backend
@pytest.mark.parametrize("normalize", [None, "l2", "l1"])
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", [1, 1.5, 2, 2.7, 3, 4, 5])
def test_options(p: float, mapping: str, normalize: str | None, backend: str) -> None:
    device = cases.device_of(backend)
    for dtype in (torch.float32, torch.float64):
        feat = feature(3, 19, 6, 5, dtype=dtype, device=device)
        check_map(feat, p, mapping=mapping, normalize=normalize, backend=backend)


@each_backend
@pytest.mark.parametrize("dtype, layout", cases.with_dtypes(cases.LAYOUTS), ids=cases.name_of)
@pytest.mark.parametrize("mapping", ["sum", "max"])
def test_layouts(layout, dtype: torch.dtype, mapping: str, backend: str) -> None:
    device = cases.device_of(backend)
    shapes = ((4, 21, 7, 7), 2), ((2, 9, 5, 12), 1), ((3, 34, 4, 4), 4), ((2, 5, 3, 4), 3), ((2, 5, 3, 32), 2)
    for shape, p in shapes:
        feat = feature(*shape, dtype=dtype, layout=layout, device=device)
        check_map(feat, p, mapping=mapping, backend=backend)


@each_backend
@pytest.mark.parametrize("layout", cases.DENSE, ids=cases.name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name_of)
def test_gradient_keeps_the_memory_format(layout, dtype: torch.dtype, backend: str) -> None:
    feat = feature(3, 8, 6, 5, dtype=dtype, layout=layout, device=cases.device_of(backend))
    assert check_map(feat, backend=backend).stride() == feat.stride()


SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 7, 7),
    (2, 1, 5, 3),  # one channel
    (5, 17, 1, 1),  # one position
    (2, 13, 1, 61),  # a prime row
    (3, 70, 31, 1),
    (1, 257, 9, 11),
    (7, 2, 16, 16),
    (0, 4, 3, 3),  # empty batch
    (2, 6, 10),  # (B, C, N)
    (2, 6, 3, 4, 5),  # volume
    (2, 5, 2, 3, 2, 2),
]


@each_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mapping", ["sum", "max"])
def test_shapes(shape: tuple[int, ...], mapping: str, backend: str) -> None:
    for layout in (Tensor.contiguous, cases.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            feat = feature(*shape, dtype=dtype, layout=layout, device=cases.device_of(backend))
            grad = check_map(feat, 2, mapping=mapping, normalize="l2", backend=backend)
            assert grad.shape == feat.shape


@each_backend
@pytest.mark.parametrize(
    "shape, channel_dim",
    [
        ((2, 49, 12), -1),
        ((2, 49, 12), 2),
        ((2, 5, 6, 7), -1),
        ((2, 5, 6, 7), -2),
        ((2, 5, 6, 7), -3),
        ((2, 5, 6, 7), 3),
    ],
    ids=str,
)
def test_channel_dim(shape: tuple[int, ...], channel_dim: int, backend: str) -> None:
    for dtype in (torch.float32, torch.float16):
        feat = feature(*shape, dtype=dtype, device=cases.device_of(backend))
        grad = check_map(feat, 2, normalize="l2", channel_dim=channel_dim, backend=backend)
        assert grad.shape == feat.shape
        assert grad.is_contiguous() or backend == "reference"


@each_backend
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("mapping", ["sum", "max"])
def test_offsets_beyond_2_to_the_31(axis: int, mapping: str, backend: str) -> None:
    """One stride walks more than 2^31 elements; the storage is address space, never touched in between."""
    if cases.device_of(backend) == "cuda":
        pytest.skip("untouched pages cost nothing only on the CPU")
    feat = cases.far_apart((2, 3, 4, 2), axis)
    grad = check_map(feat, 2, mapping=mapping, backend=backend)
    assert grad.untyped_storage().nbytes() == 2 * grad.numel()  # not laid out over the gaps


@each_backend
def test_max_gives_the_gradient_to_the_first_of_equal_channels(backend: str) -> None:
    for layout in (Tensor.contiguous, cases.channels_last):
        values = torch.tensor([1.0, -3.0, 3.0, -3.0, 2.0] * 8).view(1, 40, 1, 1).expand(2, 40, 3, 3)
        feat = layout(values.contiguous()).to(cases.device_of(backend)).requires_grad_()
        at_fused.attention_map(feat, 2, mapping="max", backend=backend).sum().backward()
        expected = torch.zeros(2, 40, 3, 3)
        expected[:, 1] = -6.0
        assert torch.equal(feat.grad.cpu(), expected)


@each_backend
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4])
@pytest.mark.parametrize("normalize", [None, "l2", "l1"])
def test_zeros_have_zero_gradient(p: float, mapping: str, normalize: str | None, backend: str) -> None:
    """sign(0) = 0, and a zero map divides by eps, not by zero."""
    for layout in (Tensor.contiguous, cases.channels_last):
        start = feature(3, 5, 4, 4, layout=layout, device=cases.device_of(backend)).detach()
        start[0] = 0.0
        start[1, :, 2] = 0.0
        start[2, 1:4] = -0.0
        feat = start.requires_grad_()
        grad = check_map(feat, p, mapping=mapping, normalize=normalize, backend=backend)
        assert torch.all(grad[start.detach() == 0] == 0)


@each_backend
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate(bad: float, mapping: str, backend: str) -> None:
    for layout in (Tensor.contiguous, cases.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            start = feature(2, 20, 4, 4, dtype=dtype, layout=layout, device=cases.device_of(backend)).detach()
            start[1, 7, 2, 3] = bad
            for p in (1, 2, 2.5, 3, 4):
                feat = start.detach().requires_grad_()
                got = at_fused.attention_map(feat, p, mapping=mapping, backend=backend).cpu()
                assert torch.equal(got[1, 2, 3].isnan(), torch.tensor(bad != bad))
                assert got[1, 2, 3].isnan() or got[1, 2, 3] == float("inf")
                assert got.isfinite().sum() == got.numel() - 1
                grad = torch.autograd.grad(got.sum(), feat)[0].cpu()
                assert grad.isfinite().sum() == grad.numel() - (p > 1)
                if p > 1:  # with p = 1 it is the sign, of which NaN has none
                    expected = torch.tensor(bad, dtype=dtype)
                    torch.testing.assert_close(grad[1, 7, 2, 3], expected, equal_nan=True)


@each_backend
def test_max_gives_the_gradient_to_the_first_nan(backend: str) -> None:
    """Whatever infinity stands before it, and NaN behind it."""
    for layout in (Tensor.contiguous, cases.channels_last):
        feat = feature(2, 40, 3, 3, layout=layout, device=cases.device_of(backend)).detach()
        feat[1, [5, 7, 38], 2, 1] = torch.tensor([torch.inf, torch.nan, torch.nan], device=feat.device)
        attention = at_fused.attention_map(feat.requires_grad_(), 2, mapping="max", backend=backend)
        grad = torch.autograd.grad(attention.sum(), feat)[0].cpu()
        assert grad.isnan().nonzero().tolist() == [[1, 7, 2, 1]]
        assert torch.count_nonzero(grad) == 2 * 3 * 3
        assert grad[1, 7, 2, 1].isnan()


# --- rounding -------------------------------------------------------------------------------------


def every_half(dtype: torch.dtype) -> Tensor:
    """All 2^16 of them."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def with_negatives(x: Tensor) -> Tensor:
    return torch.cat([x, -x])


def between_halves(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 numbers on, between and beyond those of `dtype`, and the nearest of `dtype`, ties to even."""
    halves = every_half(dtype)
    halves = halves[halves.isfinite() & ~halves.signbit()]
    low, high = halves[:-1], halves[1:]
    middle = ((low.double() + high.double()) / 2).float()
    even = torch.where(low.view(torch.int16) % 2 == 0, low, high)
    below, above = (torch.nextafter(middle, torch.tensor(end)) for end in (0.0, torch.inf))

    info = torch.finfo(dtype)
    most = torch.tensor(info.max)
    overflow = most + most * info.eps / (2 - info.eps) / 2  # half of a last place more
    nans = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    ends = [torch.nextafter(overflow, most), overflow, torch.tensor(torch.inf), *nans]
    rounded_ends = torch.tensor([info.max, torch.inf, torch.inf, *[torch.nan] * 3], dtype=dtype)
    numbers = torch.cat([low.float(), middle, below, above, torch.stack(ends)])
    return with_negatives(numbers), with_negatives(torch.cat([low, even, low, high, rounded_ends]))


@each_backend
@pytest.mark.parametrize("layout", [Tensor.contiguous, cases.channels_last, cases.sliced], ids=cases.name_of)
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name_of)
def test_gradients_are_rounded_to_the_nearest(dtype: torch.dtype, mapping: str, layout, backend: str) -> None:
    """Ties go to the even neighbour, too much to infinity, and NaN stays NaN, whatever its bits."""
    slopes, rounded = between_halves(dtype)
    if cases.INTERPRETED:
        slopes, rounded = slopes[3::199], rounded[3::199]
    slopes, rounded = (x.expand(1, 1, -1).to(cases.device_of(backend)) for x in (slopes, rounded))
    ones = layout(torch.ones(1, 3, slopes.numel(), dtype=dtype, device=slopes.device)).requires_grad_()
    attention = at_fused.attention_map(ones, 1, mapping=mapping, backend=backend)
    (grad,) = torch.autograd.grad(attention, ones, slopes[0])
    torch.testing.assert_close(grad[:, :1], rounded, rtol=0, atol=0, equal_nan=True)
    others = rounded.expand(1, 2, -1) if mapping == "sum" else torch.zeros_like(grad[:, 1:])
    torch.testing.assert_close(grad[:, 1:], others, rtol=0, atol=0, equal_nan=True)


@each_backend
@pytest.mark.parametrize("layout", [Tensor.contiguous, cases.channels_last, cases.sliced], ids=cases.name_of)
@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name_of)
def test_every_half_is_read_as_it_is(
    dtype: torch.dtype, mapping: str, channels: int, layout, backend: str
) -> None:
    """Subnormals, infinities and NaN among them."""
    halves = every_half(dtype).to(cases.device_of(backend))
    if cases.INTERPRETED:  # slowly, and not the subnormals of bf16
        halves = halves[::13][(halves[::13].abs() >= torch.finfo(dtype).tiny) | halves[::13].isnan()]
    feat = torch.zeros(1, channels, halves.numel(), dtype=dtype, device=halves.device)
    feat[:, -1] = halves
    attention = at_fused.attention_map(layout(feat), 1, mapping=mapping, backend=backend)
    torch.testing.assert_close(attention[0], halves.float().abs(), rtol=0, atol=0, equal_nan=True)


@each_backend
def test_half_precision_accumulates_in_fp32(backend: str) -> None:
    """65504^2 overflows fp16, and 2048 ones added one by one in bf16 stop at 256."""
    device = cases.device_of(backend)
    big = torch.full((1, 3, 2, 2), 65504.0, dtype=torch.float16, device=device)
    assert torch.allclose(at_fused.attention_map(big, 2, backend=backend).cpu(), torch.tensor(3 * 65504.0**2))
    ones = torch.ones(1, 2048, 3, 3, dtype=torch.bfloat16, device=device)
    assert torch.equal(at_fused.attention_map(ones, 1, backend=backend).cpu(), torch.full((1, 3, 3), 2048.0))


@each_backend
def test_small_fp16_maps_normalise_without_nan(backend: str) -> None:
    """eps = 1e-12 is zero in fp16, where 0 / 0 would be NaN."""
    feat = feature(2, 4, 3, 3, dtype=torch.float16, device=cases.device_of(backend), scale=1e-4)
    check_map(feat, 2, normalize="l2", backend=backend)
    with torch.no_grad():
        feat.zero_()
    assert torch.all(check_map(feat, 2, normalize="l2", backend=backend) == 0)


@each_backend
def test_no_graph_without_requires_grad(backend: str) -> None:
    feat = feature(2, 4, 3, 3, device=cases.device_of(backend))
    assert not at_fused.attention_map(feat.detach(), backend=backend).requires_grad
    with torch.no_grad():
        assert not at_fused.attention_map(feat, backend=backend).requires_grad


def test_auto_equals_the_best_backend() -> None:
    feat = feature(2, 4, 3, 3)
    serving = [name for name in cases.BACKENDS if cases.device_of(name) == "cpu" and name != "triton"]
    assert torch.equal(at_fused.attention_map(feat), at_fused.attention_map(feat, backend=serving[0]))
