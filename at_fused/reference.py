"""The definition of attention transfer in plain PyTorch: any device, differentiable any number of times.

Every backend is tested against this file. Features are `(B, C, *spatial)`; maps are `(B, *spatial)`
in fp32 (fp64 for fp64 features).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tracing import constant

EPS = 1e-12  # smallest norm that is divided by; compared in fp32 or fp64, as fp16 holds 0 in its place
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by the number of spatial dimensions


@constant
def knows_autocast(device_type: str) -> bool:
    """Whether there is autocast on such devices, which torch 2.11's Dynamo can't trace."""
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Computes in the dtypes of its inputs, also on devices that know no autocast ("meta")."""
    if knows_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_map(feat: Tensor, p: float, mapping: str) -> Tensor:
    """Raw map F_sum^p or F_max^p of `feat` (B, C, *spatial): (B, *spatial), section 3.1 of the paper."""
    with without_autocast(feat.device.type):
        return MAPPINGS[mapping].reduce(_keeping_format(feat).to(accumulation_dtype(feat.dtype)), p)


def attention_map_backward(feat: Tensor, grad_map: Tensor, p: float, mapping: str) -> Tensor:
    """Gradient at `feat` of its raw map, given the gradient at the map: dQ * p * |A|^(p-1) * sign(A)."""
    with without_autocast(feat.device.type):
        wide = feat.to(accumulation_dtype(feat.dtype))
        grad = grad_map.unsqueeze(1) * _abs_power_derivative(wide, p)
        return MAPPINGS[mapping].keep(grad, wide).to(feat.dtype)


class Mapping(NamedTuple):
    """How a feature (B, C, *spatial) becomes a map of powers |A|^p over its channels."""

    reduce: Callable[[Tensor, float], Tensor]  # the raw map (B, *spatial)
    keep: Callable[[Tensor, Tensor], Tensor]  # of the gradients (B, C, *spatial) of all powers, what counts


def _sum(feat: Tensor, p: float) -> Tensor:
    return _abs_power(feat, p).sum(1)


def _max(feat: Tensor, p: float) -> Tensor:
    return _abs_power(feat.gather(1, _strongest(feat)), p).squeeze(1)


def _of_all_channels(grad: Tensor, feat: Tensor) -> Tensor:
    return grad


def _of_the_strongest(grad: Tensor, feat: Tensor) -> Tensor:
    strongest = _strongest(feat)
    return torch.zeros_like(grad).scatter(1, strongest, grad.gather(1, strongest))


def _strongest(feat: Tensor) -> Tensor:
    """Index (B, 1, *spatial) of each position's largest magnitude, the first on ties: amax would share the
    gradient among them."""
    return feat.detach().abs().argmax(1, keepdim=True)


MAPPINGS = {"sum": Mapping(_sum, _of_all_channels), "max": Mapping(_max, _of_the_strongest)}


def _abs_power(x: Tensor, p: float) -> Tensor:
    if p == 1:
        return x.abs()
    if p == 2:
        return x.square()
    if p == 4:
        return x.square().square()
    magnitude = x.abs()
    # pow has infinite higher derivatives at 0; every derivative we define there is 0.
    is_zero = magnitude == 0
    return magnitude.masked_fill(is_zero, 1).pow(p).masked_fill(is_zero, 0)


def _abs_power_derivative(x: Tensor, p: float) -> Tensor:
    if p == 1:
        return x.sgn()
    if p == 2:
        return 2 * x
    if p == 4:
        return 4 * x * x.square()
    return p * _abs_power(x, p - 1) * x.sgn()


def alias(x: Tensor) -> Tensor:
    """Another tensor of the same memory; unlike a view's, the strides of dimensions of size 1 are kept."""
    return torch.ops.aten.alias.default(x)


def strides_of(feat: Tensor) -> tuple[int, ...]:
    """Strides of a gradient in the memory format of `feat`."""
    return torch.empty_like(feat, device="meta").stride()


def in_format(grad: Tensor | None, strides: Sequence[int]) -> Tensor | None:
    """`grad` with its dimensions in memory in the order that `strides` tell."""
    if grad is None or grad.stride() == strides:
        return grad
    order = sorted(range(grad.ndim), key=lambda dim: -strides[dim])
    return grad.permute(order).contiguous().permute([order.index(dim) for dim in range(grad.ndim)])


def _keeping_format(feat: Tensor) -> Tensor:
    """`feat`, whose gradient is handed on in its memory format; compilers see to that themselves."""
    if not feat.requires_grad or torch.compiler.is_compiling():
        return feat
    strides, other = strides_of(feat), alias(feat)
    other.register_hook(lambda grad: in_format(grad, strides))  # a hook that held the feature would keep it
    return other


def normalize_map(attention: Tensor, order: str | None, eps: float) -> Tensor:
    """Divides each sample's map by its l2 or l1 norm over all positions, clamped below by `eps`."""
    if order is None:
        return attention
    positions = attention.flatten(1)
    norm = sample_norm(positions, NORMS[order])
    return (positions / norm.clamp_min(eps)).view_as(attention)


NORMS = {"l2": 2, "l1": 1}  # orders of the norms that a map can be divided by


def sample_norm(values: Tensor, order: int = 2) -> Tensor:
    """Norms (B, 1) of (B, n), summed in fp64, which MPS lacks: squares of large values overflow fp32."""
    wide = values.dtype if values.device.type == "mps" else torch.float64
    # Rows of zeros, where its second derivative would be NaN, are replaced by ones.
    zero = (values.detach() == 0).all(1, keepdim=True)
    norm = torch.linalg.vector_norm(values.masked_fill(zero, 1), order, dim=1, keepdim=True, dtype=wide)
    return norm.to(values.dtype).masked_fill(zero, 0)


def resize_map(attention: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Interpolates (B, *spatial) maps to `size`; "bilinear" means linear in 1-D and trilinear in 3-D."""
    if tuple(attention.shape[1:]) == tuple(size):
        return attention
    return RESIZES[mode](attention.unsqueeze(1), tuple(size)).squeeze(1)


def _linear(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(maps, size=size, mode=_INTERPOLATION[len(size)], align_corners=False)


def _nearest(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(maps, size=size, mode="nearest")


RESIZES = {"bilinear": _linear, "nearest": _nearest}


def tokens_grid(count: int, like: Sequence[int], *, rounded: bool = False) -> tuple[int, int] | None:
    """Rows and columns that `count` tokens fill in the proportions of the grid `like`, or None.

    `rounded`: to the nearest, as where an image's sides are not multiples of a patch's.
    """
    height, width = like
    if 0 in (count, height, width):
        return None
    rows = int((count * height / width) ** 0.5 + 0.5)  # not math.isqrt: these may be symbols
    if rounded:
        fits = rows and count % rows == 0 and are_proportional((rows, count // rows), like)
    else:
        fits = rows and rows * rows * width == count * height
    return (rows, count // rows) if fits else None


def are_proportional(grid: Sequence[int], like: Sequence[int]) -> bool:
    """Whether two grids have the same proportions, but for a row or a column of `grid`."""
    return abs(grid[0] * like[1] - grid[1] * like[0]) < max(like)


def of_one_rank(student: Sequence[int], teacher: Sequence[int]) -> tuple[Sequence[int], Sequence[int]] | None:
    """Sizes of two maps with as many dimensions: tokens are the rows, one after the other, of a grid in the
    other map's proportions. None where there is no such grid."""
    if len(student) == len(teacher):
        return student, teacher
    if (len(student), len(teacher)) == (1, 2):
        found = tokens_grid(student[0], teacher)
        return found and (found, teacher)
    if (len(student), len(teacher)) == (2, 1):
        found = tokens_grid(teacher[0], student)
        return found and (student, found)
    return None


def on_one_grid(student: Tensor, teacher: Tensor, resize: str) -> tuple[Tensor, Tensor]:
    """Two maps (B, *spatial) of the student's sizes."""
    sizes = of_one_rank(student.shape[1:], teacher.shape[1:])
    if sizes is None:
        raise ValueError(f"maps {tuple(student.shape)} and {tuple(teacher.shape)} have no common grid")
    if student.ndim < teacher.ndim:
        student = student.unflatten(1, sizes[0])
    elif teacher.ndim < student.ndim:
        teacher = teacher.unflatten(1, sizes[1])
    return student, resize_map(teacher, sizes[0], resize)


def mask_map(attention: Tensor, mask: Tensor) -> Tensor:
    """`attention` (B, *spatial) with 0 where `mask` is false; of a sample without any position that counts, a
    map of ones: such maps are equal, whatever they are divided by."""
    uncounted = ~mask.flatten(1).any(1)
    fill = uncounted.to(attention.dtype).view(-1, *[1] * (attention.ndim - 1))
    return torch.where(mask, attention, fill)


def _mean_square(difference: Tensor, counted: int | Tensor, norm_order: float) -> Tensor:
    """The mean over the positions that count; with the mean over the batch, that of the authors' code."""
    return difference.square().sum(1) / counted


def _norm(difference: Tensor, counted: int | Tensor, norm_order: float) -> Tensor:
    """The q-norm over positions, Eq. 2."""
    if not difference.shape[1]:
        return difference.sum(1)  # no maximum of no positions: 0
    # Scaled by the largest difference, so that no power underflows; equal maps, where the norm has no
    # derivative, are replaced by ones.
    largest = difference.detach().abs().amax(1)
    equal = largest == 0
    scale = largest.masked_fill(equal | largest.isinf(), 1)
    norms = torch.linalg.vector_norm(
        (difference / scale[:, None]).masked_fill(equal[:, None], 1), norm_order, dim=1
    )
    return (norms * scale).masked_fill(equal, 0)


# From the differences (B, positions) of two maps, 0 where a position does not count, the number of positions
# that count (at least 1; one for all or (B,)) and the order of the norm to each sample's distance (B,).
DISTANCES: dict[str, Callable[[Tensor, Any, float], Tensor]] = {"mse": _mean_square, "norm": _norm}


def _means(losses: Sequence[Tensor]) -> Tensor:
    """Each pair's mean over the batch; an empty batch gives 0, not NaN."""
    return torch.stack([of_pair.sum() / max(of_pair.numel(), 1) for of_pair in losses])


# From each pair's losses (B,), one per sample.
REDUCTIONS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "sum": lambda losses: _means(losses).sum(),
    "none": _means,
    "batch": lambda losses: torch.stack([*losses]),
}


def loss_from_maps(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    *,
    reduction: str,
    eps: float,
    masks: Sequence[Tensor | None] | None = None,
    normalize: str | None = "l2",
    distance: str = "mse",
    norm_order: float = 2,
    resize: str = "error",
) -> Tensor:
    """The loss from raw maps (B, *spatial); a teacher's is resized to its student's grid, then normalised.

    Where the student's map has a mask m of its sizes, both maps become Q * m before their norms are taken,
    "mse" is the mean over the sum(m) positions of each sample, and a sample without any is 0. So a padded
    sample has the loss of the cropped one.
    """
    losses = []
    for index, (student, teacher, weight) in enumerate(zip(students, teachers, weights, strict=True)):
        mask = None if masks is None else masks[index]
        with without_autocast(student.device.type):
            student, teacher = on_one_grid(student, teacher, resize)
            counted: int | Tensor = max(student.shape[1:].numel(), 1)
            if mask is not None:
                mask = mask.reshape(student.shape)
                student, teacher = mask_map(student, mask), mask_map(teacher, mask)
                counted = mask.flatten(1).sum(1).clamp_min(1)
            difference = normalize_map(student, normalize, eps) - normalize_map(teacher, normalize, eps)
            losses.append(weight * DISTANCES[distance](difference.flatten(1), counted, norm_order))
    return REDUCTIONS[reduction](losses)


def attention_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    p: float,
    mapping: str,
    **options: Any,
) -> Tensor:
    """Attention-transfer loss over all pairs, a scalar or as `reduction` says; options as above."""
    student_maps, teacher_maps = (
        [attention_map(feat, p, mapping) for feat in feats] for feats in (students, teachers)
    )
    return loss_from_maps(student_maps, teacher_maps, weights, **options)
