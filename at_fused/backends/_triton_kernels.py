"""The Triton kernels: raw maps, the loss of given maps and its gradient at them, gradients at the features.

Each is one launch for all features. Programs are numbered feature by feature, of each sample by sample, of
each tile by tile of positions; a program runs through the channels of its tile. The order of every sum
depends on sizes only.

A feature or its gradient is passed as (pointer, batch stride, channel stride, space strides), a map or its
gradient as (pointer, batch stride, space strides), the grid they share as (programs, channels, positions,
inner sizes): the programs in disguise (`_count`), the inner sizes those of all spatial dimensions but the
outermost. What else the code of a feature is compiled for is its `Kind`.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Kind(NamedTuple):
    """What a feature's code is compiled for, besides its dtype and rank."""

    position_vector: int  # positions side by side in memory that may be accessed at once: a power of two
    channel_vector: int  # channels likewise; at most one of the two is not 1
    wide: int  # 1 where offsets within a sample need 64 bits, else 0
    block_c: int  # channels and
    block_p: int  # positions of a tile
    folded: (
        int  # channels that follow one another in a row of positions (`triton._channels_of_a_row`), else 1
    )


@triton.jit
def _count(number):
    """A number of samples or of programs, as `triton.unspecialised` encodes it."""
    return number // 2 - 1


# --- |x|^p and its derivative, p = WHOLE + FRACTION -------------------------------------------------


@triton.jit
def _whole_power(x, EXPONENT: tl.constexpr):
    if EXPONENT == 0:
        result = tl.full(x.shape, 1, x.dtype)
    elif EXPONENT == 1:
        result = x
    elif EXPONENT == 2:
        result = x * x
    elif EXPONENT % 2 == 0:
        result = _whole_power(x * x, EXPONENT // 2)
    else:
        result = x * _whole_power(x * x, EXPONENT // 2)
    return result


@triton.jit
def _abs_power(x, WHOLE: tl.constexpr, FRACTION: tl.constexpr):
    magnitude = tl.abs(x)
    result = _whole_power(magnitude, WHOLE)
    if FRACTION != 0:  # apart: the smaller the argument of exp2, the smaller its error
        result *= tl.exp2(tl.log2(magnitude) * tl.full(x.shape, FRACTION, x.dtype))
    return result


@triton.jit
def _abs_power_slope(x, WHOLE: tl.constexpr, FRACTION: tl.constexpr):
    """|x|^(p-1) sign(x): the derivative but for the factor p."""
    if WHOLE % 2 == 0 and FRACTION == 0:
        result = _whole_power(x, WHOLE - 1)
    else:
        power = _abs_power(x, WHOLE - 1, FRACTION)
        result = tl.where(x < 0, -power, power)  # NaN keeps its own
        if WHOLE == 1 and FRACTION == 0:
            result = tl.where((x > 0) | (x < 0), result, 0)
    return result


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """`x` in `dtype`, to the nearest and even; Triton's interpreter would cut off what bf16 lacks."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        up = (bits >> 16) & 1
        nearest = tl.where(x != x, bits, bits + 0x7FFF + up) >> 16
        result = nearest.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


# --- addresses --------------------------------------------------------------------------------------
#
# `x // VECTOR * VECTOR` is x, a multiple of the power of two VECTOR, in a form that shows it to the compiler.


@triton.jit
def _in_space(position, inner_sizes, strides, PV: tl.constexpr, CV: tl.constexpr):
    """Offsets of positions, counted along the grid; rows of the innermost dimension begin at vectors."""
    if len(inner_sizes) == 0:
        offset = position * (strides[0] // CV * CV)
    else:
        size = inner_sizes[len(inner_sizes) - 1] // PV * PV
        offset = position % size * (strides[len(inner_sizes)] // CV * CV)
        position //= size
        for i in tl.static_range(len(inner_sizes) - 1, 0, -1):
            offset += position % inner_sizes[i - 1] * (strides[i] // (PV * CV) * (PV * CV))
            position //= inner_sizes[i - 1]
        offset += position * (strides[0] // (PV * CV) * (PV * CV))
    return offset


@triton.jit
def _rows(feat, sample, position, inner_sizes, PV: tl.constexpr, CV: tl.constexpr):
    """Pointers (1, block_p) to the first channel at some positions of a sample."""
    first = feat[0] + sample.to(tl.int64) * (feat[1] // (PV * CV) * (PV * CV))
    return (first + _in_space(position, inner_sizes, feat[3], PV, CV))[None, :]


@triton.jit
def _of_map(attention, sample, position, inner_sizes):
    """Pointers (block_p,) to some positions of a sample's map."""
    first = attention[0] + sample.to(tl.int64) * attention[1]
    return first + _in_space(position, inner_sizes, attention[2], 1, 1)


# --- folded features ----------------------------------------------------------------------------------
#
# A row of a folded feature holds some channels, each with all positions of the map: a tile has whole rows.


@triton.jit
def _unfold(row, positions, FOLDED: tl.constexpr):
    """The channels (FOLDED, block) of a row; what lies beyond the positions is of no meaning."""
    BLOCK: tl.constexpr = row.shape[0] // FOLDED
    first = tl.arange(0, FOLDED)[:, None] * positions
    index = first + tl.arange(0, BLOCK)[None, :]
    return tl.reshape(tl.gather(row, tl.reshape(index, [FOLDED * BLOCK]), 0), [FOLDED, BLOCK])


# --- raw maps ---------------------------------------------------------------------------------------


@triton.jit
def _order(x):
    """|x| as integers that compare alike, with NaN above infinity."""
    return tl.abs(x).to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)


@triton.jit
def _map_tile(
    feat,
    attention,
    grid,
    program,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    MAX: tl.constexpr,
    PV: tl.constexpr,
    CV: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FOLDED: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if feat[0].dtype.element_ty == tl.float64 else tl.float32
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    channels, positions = grid[1] // CV * CV, grid[2] // PV * PV
    channel_stride = feat[2] // PV * PV
    tiles = tl.cdiv(positions, BLOCK_P)
    sample = program // tiles
    position = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P).to(index)
    rows = _rows(feat, sample, position, grid[3], PV, CV)
    if MAX:
        joined = tl.zeros([BLOCK_C, BLOCK_P], tl.int64 if dtype == tl.float64 else tl.int32)
    else:
        joined = tl.zeros([BLOCK_C, BLOCK_P], dtype)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C).to(index)[:, None]
        there = (position < positions)[None, :] & (channel < channels)
        x = tl.load(rows + channel * channel_stride, there, 0).to(dtype)
        if MAX:
            joined = tl.maximum(joined, _order(x))
        else:
            joined += _abs_power(x, WHOLE, FRACTION)
    joined = tl.max(joined, 0) if MAX else tl.sum(joined, 0)
    if FOLDED > 1:
        positions //= FOLDED
        position = tl.arange(0, BLOCK_P // FOLDED).to(index)
        joined = _unfold(joined, positions, FOLDED)
        joined = tl.max(joined, 0) if MAX else tl.sum(joined, 0)
    result = _abs_power(joined.to(dtype, bitcast=True), WHOLE, FRACTION) if MAX else joined
    tl.store(_of_map(attention, sample, position, grid[3]), result, position < positions)


@triton.jit
def maps_kernel(
    feats,
    maps,
    grids,
    counter,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    MAX: tl.constexpr,
    KINDS: tl.constexpr,
):
    """Raw maps of all features; also zeroes the counter that `loss_kernel` wants, if there is one."""
    program = tl.program_id(0)
    if counter is not None:  # noqa: SIM102 (known when compiled)
        if program == 0:
            tl.store(counter, 0)
    for i in tl.static_range(len(feats)):
        if (program >= 0) & (program < _count(grids[i][0])):
            _map_tile(
                feats[i],
                maps[i],
                grids[i],
                program,
                WHOLE,
                FRACTION,
                MAX,
                KINDS[i][0],
                KINDS[i][1],
                KINDS[i][2],
                KINDS[i][3],
                KINDS[i][4],
                KINDS[i][5],
            )
        program -= _count(grids[i][0])


# --- gradients at the features ----------------------------------------------------------------------


@triton.jit
def _gradient_tile(
    feat,
    slope,
    grad,
    addend,
    grid,
    factor,
    program,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    MAX: tl.constexpr,
    PV: tl.constexpr,
    CV: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FOLDED: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if feat[0].dtype.element_ty == tl.float64 else tl.float32
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    channels, positions = grid[1] // CV * CV, grid[2] // PV * PV
    channel_stride, grad_channel_stride = feat[2] // PV * PV, grad[2] // PV * PV
    tiles = tl.cdiv(positions, BLOCK_P)
    sample = program // tiles
    position = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P).to(index)
    rows = _rows(feat, sample, position, grid[3], PV, CV)
    grad_rows = _rows(grad, sample, position, grid[3], PV, CV)
    if addend is not None:
        addend_rows = _rows((addend, grad[1], grad[2], grad[3]), sample, position, grid[3], PV, CV)
    # Not always a remainder, which would hide from the compiler that positions are neighbours.
    on_map = position % (positions // FOLDED) if FOLDED > 1 else position
    at_map = tl.load(_of_map(slope, sample, on_map, grid[3]), position < positions, 0).to(dtype)
    at_map = (at_map * (factor.to(dtype) * tl.full((), WHOLE + FRACTION, dtype)))[None, :]

    if MAX:
        # The first channel among the strongest: of each lane's channels, then of all lanes.
        strongest = tl.full([BLOCK_C, BLOCK_P], -1, tl.int64 if dtype == tl.float64 else tl.int32)
        where = tl.zeros([BLOCK_C, BLOCK_P], index)
        for first in range(0, channels, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C).to(index)[:, None]
            there = (position < positions)[None, :] & (channel < channels)
            x = tl.load(rows + channel * channel_stride, there, 0).to(dtype)
            order = tl.where(there, _order(x), -1)
            where = tl.where(order > strongest, channel, where)
            strongest = tl.maximum(strongest, order)
        peak = tl.max(strongest, 0)
        winner = tl.min(tl.where(strongest == peak[None, :], where, channels), 0)
        if FOLDED > 1:
            peaks = _unfold(peak, positions // FOLDED, FOLDED)
            winners = _unfold(winner, positions // FOLDED, FOLDED) * FOLDED
            winners += tl.arange(0, FOLDED).to(index)[:, None]
            winners = tl.where(peaks == tl.max(peaks, 0)[None, :], winners, channels * FOLDED)
            winner = tl.gather(tl.min(winners, 0), on_map, 0)

    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C).to(index)[:, None]
        there = (position < positions)[None, :] & (channel < channels)
        x = tl.load(rows + channel * channel_stride, there, 0).to(dtype)
        offset = channel * grad_channel_stride
        result = at_map * _abs_power_slope(x, WHOLE, FRACTION)
        if MAX:
            if FOLDED > 1:
                channel = channel * FOLDED + (position // (positions // FOLDED))[None, :]
            result = tl.where(channel == winner[None, :], result, 0)
        if addend is not None:
            result += tl.load(addend_rows + offset, there, 0).to(dtype)
        tl.store(grad_rows + offset, _rounded(result, grad[0].dtype.element_ty), there)


@triton.jit(do_not_specialize=["scale_stride"])
def gradients_kernel(
    feats,
    slopes,
    grads,
    addends,
    grids,
    scale,
    scale_stride,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    MAX: tl.constexpr,
    KINDS: tl.constexpr,
):
    """Gradients at all features from those at their raw maps, times the factors in `scale`, plus `addends`,
    which have the gradients' strides; either may be None."""
    program = tl.program_id(0)
    for i in tl.static_range(len(feats)):
        if (program >= 0) & (program < _count(grids[i][0])):
            factor = tl.full((), 1, tl.float32) if scale is None else tl.load(scale + i * scale_stride)
            _gradient_tile(
                feats[i],
                slopes[i],
                grads[i],
                None if addends is None else addends[i],
                grids[i],
                factor,
                program,
                WHOLE,
                FRACTION,
                MAX,
                KINDS[i][0],
                KINDS[i][1],
                KINDS[i][2],
                KINDS[i][3],
                KINDS[i][4],
                KINDS[i][5],
            )
        program -= _count(grids[i][0])


# --- the loss of given maps -------------------------------------------------------------------------

BLOCK = tl.constexpr(512)  # positions or samples at a time


@triton.jit
def _fp64(parts):
    """An fp64 number passed as three floats, which Triton makes fp32 each."""
    return tl.zeros((), tl.float64) + parts[0] + parts[1] + parts[2]


@triton.jit
def _inverse_norm(attention, positions, eps):
    """1 / max(|map|, eps) for the l2 norm, and whether eps is the greater."""
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, positions, BLOCK):
        position = first + tl.arange(0, BLOCK)
        q = tl.load(attention + position, position < positions, 0).to(tl.float64)
        squares += q * q
    norm = tl.sqrt(tl.sum(squares, 0))
    return 1 / tl.where(norm < eps, eps, norm), norm < eps  # NaN stays


@triton.jit
def _distance(
    student,
    teacher,
    positions,
    factor,
    eps,
    STUDENT_SLOPES: tl.constexpr,
    TEACHER_SLOPES: tl.constexpr,
):
    """Squared distance of two maps, normalised; their gradients, times factor, replace them where asked for.

    With u, v the normalised maps and d = u - v: d|d|^2/dQ_S = 2 (d - u <u, d>) / |Q_S|, and likewise for v.
    In fp64: the squares of large maps overflow fp32.
    """
    student_inverse, student_clamped = _inverse_norm(student, positions, eps)
    teacher_inverse, teacher_clamped = _inverse_norm(teacher, positions, eps)
    squares = tl.zeros([BLOCK], tl.float64)
    along_student = tl.zeros([BLOCK], tl.float64)
    along_teacher = tl.zeros([BLOCK], tl.float64)
    for first in range(0, positions, BLOCK):
        position = first + tl.arange(0, BLOCK)
        there = position < positions
        u = tl.load(student + position, there, 0).to(tl.float64) * student_inverse
        v = tl.load(teacher + position, there, 0).to(tl.float64) * teacher_inverse
        squares += (u - v) * (u - v)
        along_student += u * (u - v)
        along_teacher += v * (u - v)
    if STUDENT_SLOPES or TEACHER_SLOPES:
        on_student = tl.where(student_clamped, 0, tl.sum(along_student, 0))  # a clamped norm is a constant
        on_teacher = tl.where(teacher_clamped, 0, tl.sum(along_teacher, 0))
        for first in range(0, positions, BLOCK):
            position = first + tl.arange(0, BLOCK)
            there = position < positions
            u = tl.load(student + position, there, 0).to(tl.float64) * student_inverse
            v = tl.load(teacher + position, there, 0).to(tl.float64) * teacher_inverse
            if STUDENT_SLOPES:
                slope = (u - v - u * on_student) * (2 * factor * student_inverse)
                tl.store(student + position, slope, there)
            if TEACHER_SLOPES:
                slope = (v - u + v * on_teacher) * (2 * factor * teacher_inverse)
                tl.store(teacher + position, slope, there)
    return tl.sum(squares, 0)


@triton.jit
def loss_kernel(
    students,
    teachers,
    grids,
    factors,
    eps,
    distances,
    counter,
    loss,
    REDUCE: tl.constexpr,
    STUDENT_SLOPES: tl.constexpr,
    TEACHER_SLOPES: tl.constexpr,
):
    """Loss of all pairs of maps, which their gradients replace where asked for.

    Maps are contiguous, and their grid is (samples in disguise, positions); `factors` and `eps` are in parts.
    The program that finishes last, which `counter` tells, adds up the samples' `distances` in their order.
    """
    program = tl.program_id(0)
    sample = program
    for i in tl.static_range(len(students)):
        if (sample >= 0) & (sample < _count(grids[i][0])):
            first = sample.to(tl.int64) * grids[i][1]
            distance = _distance(
                students[i] + first,
                teachers[i] + first,
                grids[i][1],
                _fp64(factors[i]),
                _fp64(eps),
                STUDENT_SLOPES,
                TEACHER_SLOPES,
            )
            tl.store(distances + program, distance)
        sample -= _count(grids[i][0])

    tl.debug_barrier()
    finished = tl.atomic_add(counter, 1, sem="acq_rel")
    if finished == tl.num_programs(0) - 1:
        total = tl.zeros((), tl.float64)
        for i in tl.static_range(len(students)):
            sums = tl.zeros([BLOCK], tl.float64)
            count = _count(grids[i][0])
            for first in range(0, count, BLOCK):
                one = first + tl.arange(0, BLOCK)
                # Past the first-level cache, which need not know what other programs wrote.
                sums += tl.load(distances + one, one < count, 0, cache_modifier=".cg")
            distances += count
            pair = tl.sum(sums, 0) * _fp64(factors[i])
            total += pair
            if not REDUCE:
                tl.store(loss + i, pair)
        if REDUCE:
            tl.store(loss, total)
