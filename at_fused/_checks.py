"""Checks of the public functions' arguments: what is wrong with them, in one sentence."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from . import backends, reference

Features = Tensor | Sequence[Tensor]
ChannelDim = int | Sequence[int]
Masks = Tensor | Sequence[Tensor | None]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of each option, what its words stand for, and the words that stand for nothing there.
_OPTIONS: dict[str, list[Collection[str | None]]] = {
    "mapping": [reference.MAPPINGS],
    "normalize": [(None,), reference.NORMS],
    "distance": [reference.DISTANCES],
    "reduction": [reference.REDUCTIONS],
    "resize": [reference.RESIZES, ("error",)],
    "backend": [("auto",), backends.NAMES],
}


def choices(option: str) -> tuple[str | None, ...]:
    """What `option` can be."""
    return tuple(word for words in _OPTIONS[option] for word in words)


def check_real(name: str, value: object) -> None:
    if type(value) is float or type(value) is int:  # a third of the time of what follows
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")


def check_number(name: str, value: float, *, at_least: float, finite: bool = True) -> None:
    check_real(name, value)
    if not value >= at_least or (finite and value == math.inf):
        raise ValueError(f"{name} must be {'a finite number ' if finite else ''}>= {at_least}, got {value}")


def check_options(p: float, norm_order: float = 2, eps: float = 0, **options: str | None) -> None:
    """The options that do not depend on the features; `options` are those of a few words."""
    check_number("p", p, at_least=1)
    for name, value in options.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be one of {choices(name)}, got {type(value).__name__}")
        for words in _OPTIONS[name]:
            if value in words:
                break
        else:
            raise ValueError(f"{name} must be one of {choices(name)}, got {value!r}")
    check_number("norm_order", norm_order, at_least=1, finite=False)
    check_number("eps", eps, at_least=0)


def feature_error(feat: object, channel_dim: int) -> tuple[type[Exception], str] | None:
    """Why `feat` is no feature with channels at `channel_dim`: an error type and its text; else None."""
    if not isinstance(feat, Tensor):
        return TypeError, f"must be a tensor, got {type(feat).__name__}"
    if feat.dtype not in _DTYPES:
        return TypeError, f"must be fp64, fp32, bf16 or fp16, got {feat.dtype}"
    if feat.is_nested or feat.layout != torch.strided:
        return TypeError, f"must be a dense tensor, got {'a nested one' if feat.is_nested else feat.layout}"
    if feat.ndim < 3:
        return ValueError, "must have batch, channel and spatial dimensions"
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        return TypeError, f"channel_dim must be an integer, got {type(channel_dim).__name__}"
    if not -feat.ndim <= channel_dim < feat.ndim or channel_dim % feat.ndim == 0:
        return ValueError, f"has no channel_dim {channel_dim} besides its batch dimension"
    if feat.shape[channel_dim] == 0:
        return ValueError, "has no channels"
    return None


def channels_second(feat: Tensor, channel_dim: int) -> Tensor:
    """A view of `feat` as (B, C, *spatial)."""
    return feat if channel_dim == 1 else feat.movedim(channel_dim, 1)


def per_pair(what: str, value: ChannelDim, count: int) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,) * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{what} must be an integer or one per pair, got {type(value).__name__}")
    if len(value) != count:
        raise ValueError(f"{what} must be an integer or one per pair: got {len(value)} for {count} pairs")
    return tuple(value)


def dims_of_both(
    channel_dim: ChannelDim, t_channel_dim: ChannelDim | None, count: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimension of the channels in each feature, the student's and the teacher's."""
    s_dims = per_pair("channel_dim", channel_dim, count)
    return s_dims, s_dims if t_channel_dim is None else per_pair("t_channel_dim", t_channel_dim, count)


def check_pairs(
    s_feats: Features,
    t_feats: Features,
    resize: str,
    channel_dim: ChannelDim = 1,
    t_channel_dim: ChannelDim | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns both sides as lists of (B, C, *spatial) views; raises if a pair does not match."""
    if isinstance(s_feats, Tensor) and isinstance(t_feats, Tensor):
        s_feats, t_feats = [s_feats], [t_feats]
    for side, feats in (("s_feats", s_feats), ("t_feats", t_feats)):
        if not isinstance(feats, Sequence):
            raise TypeError(
                f"s_feats and t_feats must be two tensors or two sequences: {side} is {described(feats)}"
            )
    if len(s_feats) != len(t_feats):
        shapes = [[described(feat) for feat in feats] for feats in (s_feats, t_feats)]
        raise ValueError(
            f"student and teacher must have the same number of features: got {len(s_feats)} {shapes[0]} "
            f"and {len(t_feats)} {shapes[1]}"
        )
    if not len(s_feats):
        raise ValueError("s_feats and t_feats are empty: at least one pair is needed")
    s_dims, t_dims = dims_of_both(channel_dim, t_channel_dim, len(s_feats))
    students: list[Tensor] = []
    teachers: list[Tensor] = []
    for index, (s_feat, t_feat, s_dim, t_dim) in enumerate(
        zip(s_feats, t_feats, s_dims, t_dims, strict=True)
    ):
        for side, feat, dim in (("student", s_feat, s_dim), ("teacher", t_feat, t_dim)):
            error = feature_error(feat, dim)
            if error:
                kind, text = error
                raise kind(f"pair {index}: {_pair(s_feat, t_feat)}: the {side} {text}")
            warn_if_channels_last(feat, dim, f"pair {index}, {side}")
        student, teacher = channels_second(s_feat, s_dim), channels_second(t_feat, t_dim)
        problem = _mismatch(student, teacher, resize)
        if problem is None and students and student.device != students[0].device:
            problem = f"are on {student.device}, pair 0 on {students[0].device}"
        if problem:
            raise ValueError(f"pair {index}: {_pair(s_feat, t_feat)} {problem}")
        warn_if_tokens_in_a_line(student.shape[2:], teacher.shape[2:], (s_dim, t_dim), f"pair {index}")
        students.append(student)
        teachers.append(teacher)
    return students, teachers


def _pair(student: object, teacher: object) -> str:
    return f"student {described(student)} and teacher {described(teacher)}"


def described(value: object, *, dtype: bool = False) -> str:
    """The shape of a tensor, the type of anything else: for messages."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    # Not str(): under torch.compile, sizes are symbols, of which it can't be traced.
    shape = "nested tensor" if value.is_nested else f"{tuple(value.shape)}"
    return f"{str(value.dtype).removeprefix('torch.')} {shape}" if dtype else shape


def _mismatch(student: Tensor, teacher: Tensor, resize: str) -> str | None:
    """Why two (B, C, *spatial) features are no pair, in words; else None."""
    if student.device != teacher.device:
        return f"are on different devices, {student.device} and {teacher.device}"
    if student.shape[0] != teacher.shape[0]:
        return "differ in batch size"
    return space_mismatch(student.shape[2:], teacher.shape[2:], resize)


def map_mismatch(student: Tensor, teacher: Tensor, resize: str) -> str | None:
    """Why two (B, *spatial) maps of one batch size cannot be compared, in words; else None."""
    if student.device != teacher.device:
        return f"are on different devices, {student.device} and {teacher.device}"
    return space_mismatch(student.shape[1:], teacher.shape[1:], resize)


def space_mismatch(student: torch.Size, teacher: torch.Size, resize: str = "bilinear") -> str | None:
    """Why two maps of these sizes cannot be compared, in words; else None."""
    if len(student) != len(teacher):
        sizes = reference.of_one_rank(student, teacher)
        if sizes is None:
            return f"differ in the number of spatial dimensions{_cure(student, teacher)}"
        student, teacher = (torch.Size(size) for size in sizes)
    if student != teacher:
        if resize == "error":
            return 'differ in spatial size (resize="error")'
        if 0 in student or 0 in teacher:
            return "differ in spatial size, and one is empty"
        if len(student) > 3:
            return "differ in spatial size, and maps of more than 3 dimensions can't be resized"
    return None


def _cure(student: torch.Size, teacher: torch.Size) -> str:
    """The advice for a pair of which one map is a line of tokens and the other a grid."""
    line, grid = sorted((student, teacher), key=len)
    if (len(line), len(grid)) != (1, 2):
        return ""
    tokens = line[0]
    fits = [extra for extra in range(1, 10) if tokens > extra and reference.tokens_grid(tokens - extra, grid)]
    here = f", and {tokens} tokens do not fill a grid in the proportions of {grid[0]} x {grid[1]}: "
    if fits:
        return (
            f"{here}leave out those that have no place in the image, feat[:, {fits[0]}:] or, behind a tap's "
            f"name, [:, {fits[0]}:]"
        )
    return f"{here}say which, feat.unflatten(1, (h, w)) or, behind a tap's name, :grid(h, w)"


def check_masks(
    masks: Masks, name: Callable[[int], str], shapes: Sequence[Sequence[int]], device: torch.device
) -> list[Tensor | None] | None:
    """One mask (B, *spatial), or None, per pair; `shapes` are those of the student's maps. None: no masks.

    `name` is called for a pair that is wrong alone.
    """
    if isinstance(masks, Tensor) or not isinstance(masks, Sequence):
        raise TypeError(f"masks must be a sequence, one mask or None per pair, got {described(masks)}")
    if len(masks) != len(shapes):
        raise ValueError(f"masks must have one per pair: got {len(masks)} for {len(shapes)} pairs")
    for index, (mask, shape) in enumerate(zip(masks, shapes, strict=True)):
        if mask is None:
            continue
        kind: type[Exception] = ValueError
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind, problem = TypeError, f"must be a bool tensor {tuple(shape)}"
        elif tuple(mask.shape) != tuple(shape):
            problem = f"must have the shape of the student's map, {tuple(shape)}"
        elif mask.device != device:
            problem = f"is on {mask.device}, the student on {device}"
        else:
            continue
        raise kind(f"{name(index)}: the mask {described(mask, dtype=True)} {problem}")
    return None if all(mask is None for mask in masks) else list(masks)


def check_batches(name: Callable[[int], str], sizes: Sequence[int]) -> None:
    """With reduction="batch" the losses of all pairs' samples are the rows of one tensor."""
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(
                f'{name(index)}: reduction="batch" needs one batch size in all pairs, got {size} and, in the '
                f"first, {sizes[0]}"
            )


_warned_shapes: set[tuple[int, ...]] = set()


def warn_if_channels_last(feat: Tensor, channel_dim: int, what: str) -> None:
    """Warn, once per shape, where a feature looks like (B, H, W, C) or (B, N, C) and is not taken so."""
    if torch.compiler.is_compiling() or channel_dim % feat.ndim != 1 or feat.stride(-1) != 1:
        return
    shape = tuple(feat.shape[1:])
    if shape in _warned_shapes or not _looks_channels_last(shape):
        return
    _warned_shapes.add(shape)
    warnings.warn(
        f"{what}: the feature {described(feat)} looks as if its channels came last, and channel_dim is "
        f"{channel_dim}: {shape[-1]} values are taken for a spatial dimension; say channel_dim=-1 if they "
        "are channels",
        stacklevel=4,
    )


def warn_if_tokens_in_a_line(
    student: torch.Size, teacher: torch.Size, dims: tuple[int, int], what: str
) -> None:
    """Warn, once per sizes, where maps of (B, N, C) tokens that may be grids are resized along a line."""
    if len(student) != 1 or len(teacher) != 1 or student == teacher or torch.compiler.is_compiling():
        return
    sizes = student[0], teacher[0]
    last = all(dim % 3 == 2 for dim in dims)
    if not last or sizes in _warned_shapes or not all(n > 1 and _may_fill_a_square(n) for n in sizes):
        return
    _warned_shapes.add(sizes)
    warnings.warn(
        f"{what}: the maps of {sizes[0]} and {sizes[1]} tokens are resized along a line; if they are the "
        "rows of grids, give both their grid: feat[:, 1:].unflatten(1, (h, w)) or, behind a tap's name, "
        "[:, 1:]:grid (without [:, 1:] where there is no class token)",
        stacklevel=4,
    )


def _may_fill_a_square(tokens: int) -> bool:
    """Whether they fill a square grid, with or without class and distillation tokens."""
    return any(math.isqrt(tokens - extra) ** 2 == tokens - extra for extra in (0, 1, 2))


def _looks_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether sizes behind the batch are (H, W, C) with H = W, or (N, C) with N a grid of tokens."""
    if len(shape) == 3:
        return shape[0] == shape[1] != shape[2] and shape[0] > 1 and shape[2] % 16 == 0
    if len(shape) == 2 and shape[0] > 1:
        tokens, channels = shape
        # A power of 2 is as likely channels.
        return _may_fill_a_square(tokens) and channels % 16 == 0 and tokens.bit_count() > 1
    return False


def check_weights(weights: Sequence[float], count: int | None = None) -> list[float]:
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a sequence of numbers, got {type(weights).__name__}")
    for index, weight in enumerate(weights):
        check_real(f"weights[{index}]", weight)
    if count is None and not len(weights):
        raise ValueError("weights are empty: one number per pair is needed")
    if count is not None and len(weights) != count:
        raise ValueError(f"weights must have one number per pair: got {len(weights)} for {count} pairs")
    return [float(weight) for weight in weights]


def check_targets(targets: object) -> None:
    classes = (torch.int64, torch.uint8)  # what PyTorch's cross-entropy takes
    if not isinstance(targets, Tensor) or not (targets.dtype in classes or targets.is_floating_point()):
        raise TypeError(
            f"targets must be int64 classes or probabilities, got {described(targets, dtype=True)}"
        )
