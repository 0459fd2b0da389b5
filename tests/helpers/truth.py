"""Independent fp64 truth for the attention-transfer losses, with gradients derived by hand, in NumPy.

Nothing here imports `at_fused` or uses autograd. Features are `(B, C, *spatial)` float64 arrays.

Every number has a *size*: its error if each intermediate result (map, norm, normalised map) had a relative
error of 1. With unit roundoff `e` a result may differ by `ROUNDINGS * e * size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# A running sum of n terms is off by about sqrt(n) roundings: 64 covers 4096 terms and what surrounds them.
ROUNDINGS = 64


@dataclass(frozen=True)
class Loss:
    """Value of each pair, and the gradient of the (weighted) sum with respect to every feature."""

    values: Array
    sizes: Array
    s_grads: list[Array]
    t_grads: list[Array]
    s_sizes: list[Array]
    t_sizes: list[Array]


# --- maps -----------------------------------------------------------------------------------------


def power_map(feat: Array, p: float, mapping: str) -> Array:
    """`F_sum^p` or `F_max^p` (section 3.1): `(B, C, *spatial) -> (B, *spatial)`."""
    powers = np.abs(feat) ** p
    return powers.sum(axis=1) if mapping == "sum" else powers.max(axis=1)


def power_map_slope(feat: Array, p: float, mapping: str) -> Array:
    """`dQ/dA`: `p |A|^(p-1) sign(A)`; for max only the first channel that attains it."""
    slope = p * np.abs(feat) ** (p - 1) * np.sign(feat)
    if mapping == "max":
        winner = np.expand_dims(np.abs(feat).argmax(axis=1), 1)
        slope = np.where(
            np.arange(feat.shape[1]).reshape(1, -1, *[1] * (feat.ndim - 2)) == winner, slope, 0.0
        )
    return slope


def flat(maps: Array) -> Array:
    """`(B, *spatial) -> (B, N)`, also for an empty batch."""
    return maps.reshape(len(maps), int(np.prod(maps.shape[1:])))


def normalized(maps: Array, normalize: str | None, eps: float = 1e-12) -> tuple[Array, Array]:
    """Flat maps `(B, N)` divided by their norm clamped at `eps`; also the clamped norm `(B, 1)`."""
    if normalize is None:
        return maps, np.ones((len(maps), 1))
    norm = np.sqrt((maps**2).sum(1, keepdims=True)) if normalize == "l2" else maps.sum(1, keepdims=True)
    return maps / np.maximum(norm, eps), np.maximum(norm, eps)


def normalized_slope(
    maps: Array, unit_grad: Array, normalize: str | None, eps: float, sign: float = -1.0
) -> Array:
    """Gradient at the maps from the one at the unit maps. `sign=+1` adds the terms' sizes instead."""
    unit, norm = normalized(maps, normalize, eps)
    if normalize is None:
        return unit_grad
    dot = (unit * unit_grad).sum(1, keepdims=True) * (norm > eps)  # a clamped norm is a constant
    return (unit_grad + sign * dot * (unit if normalize == "l2" else 1.0)) / norm


# --- resizing -------------------------------------------------------------------------------------


def resize_matrix(n_in: int, n_out: int, mode: str) -> Array:
    """`(n_out, n_in)` interpolation along one axis, half-pixel centres (`align_corners=False`)."""
    weights = np.zeros((n_out, n_in))
    for i in range(n_out):
        if mode == "nearest":
            weights[i, i * n_in // n_out] = 1.0
        else:
            source = max((i + 0.5) * n_in / n_out - 0.5, 0.0)
            low = min(int(source), n_in - 1)
            weights[i, low] += 1.0 - (source - low)
            weights[i, min(low + 1, n_in - 1)] += source - low
    return weights


def resize(maps: Array, size: Sequence[int], mode: str) -> Array:
    for axis, n_out in enumerate(size, start=1):
        if maps.shape[axis] != n_out:
            matrix = resize_matrix(maps.shape[axis], n_out, mode)
            maps = np.moveaxis(np.tensordot(matrix, maps, axes=(1, axis)), 0, axis)
    return maps


def resize_transposed(grad: Array, size: Sequence[int], mode: str) -> Array:
    """Adjoint of `resize`: from the resized grid back to `size`."""
    for axis, n_in in enumerate(size, start=1):
        if grad.shape[axis] != n_in:
            matrix = resize_matrix(n_in, grad.shape[axis], mode)
            grad = np.moveaxis(np.tensordot(matrix.T, grad, axes=(1, axis)), 0, axis)
    return grad


# --- distances ------------------------------------------------------------------------------------


def distance_and_slope(s: Array, t: Array, distance: str, order: float) -> tuple[float, float, Array, Array]:
    """Mean distance between flat unit maps `(B, N)`: value, its size, gradient at `s`, its size."""
    batch, n = s.shape
    if batch == 0:
        return 0.0, 0.0, np.zeros_like(s), np.zeros_like(s)
    diff, total = s - t, np.abs(s) + np.abs(t)
    if distance == "mse":
        value = (diff**2).mean()
        # the last term is the squared error itself, which is all that is left where both maps are equal
        size = (2 * np.abs(diff) * total + diff**2 + 1e-7 * total**2).mean()
        return float(value), float(size), 2 * diff / (batch * n), 2 * total / (batch * n)
    norm = (np.abs(diff) ** order).sum(1, keepdims=True) ** (1 / order)
    total_norm = (total**order).sum(1, keepdims=True) ** (1 / order)
    safe = np.where(norm > 0, norm, 1.0)
    ratio = np.abs(diff) / safe
    slope = np.where(norm > 0, np.sign(diff) * ratio ** (order - 1), 0.0) / batch
    ratio_size = (total + ratio * total_norm) / safe
    size = (
        (order - 1) * np.where(ratio > 0, ratio, 1.0) ** (order - 2) * ratio_size + ratio ** (order - 1)
    ) / batch
    # Maps equal here may differ by roundings elsewhere, which decide the direction: nothing to compare.
    return float(norm.mean()), float(total_norm.mean()), slope, np.where(norm > 0, size, 1e15)


# --- the loss -------------------------------------------------------------------------------------


def attention_loss(
    s_feats: Sequence[Array],
    t_feats: Sequence[Array],
    p: float = 2,
    *,
    mapping: str = "sum",
    normalize: str | None = "l2",
    distance: str = "mse",
    norm_order: float = 2,
    weights: Sequence[float] | None = None,
    resize_mode: str = "bilinear",
    eps: float = 1e-12,
) -> Loss:
    """Section 3.1 for every pair; the teacher's map is resized to the student's grid before normalising."""
    out = Loss(np.zeros(len(s_feats)), np.zeros(len(s_feats)), [], [], [], [])
    for j, (s_feat, t_feat) in enumerate(zip(s_feats, t_feats, strict=True)):
        weight = 1.0 if weights is None else weights[j]
        s_map = power_map(s_feat, p, mapping)
        t_own = power_map(t_feat, p, mapping)
        t_map = resize(t_own, s_map.shape[1:], resize_mode)
        s_flat, t_flat = flat(s_map), flat(t_map)
        s_unit, t_unit = normalized(s_flat, normalize, eps)[0], normalized(t_flat, normalize, eps)[0]
        value, size, slope, slope_size = distance_and_slope(s_unit, t_unit, distance, norm_order)
        out.values[j], out.sizes[j] = weight * value, abs(weight) * size

        s_grad = normalized_slope(s_flat, weight * slope, normalize, eps).reshape(s_map.shape)
        t_grad = normalized_slope(t_flat, -weight * slope, normalize, eps).reshape(t_map.shape)
        s_size = normalized_slope(s_flat, abs(weight) * slope_size, normalize, eps, +1.0).reshape(s_map.shape)
        t_size = normalized_slope(t_flat, abs(weight) * slope_size, normalize, eps, +1.0).reshape(t_map.shape)
        t_grad = resize_transposed(t_grad, t_own.shape[1:], resize_mode)
        t_size = resize_transposed(t_size, t_own.shape[1:], resize_mode)

        s_slope, t_slope = power_map_slope(s_feat, p, mapping), power_map_slope(t_feat, p, mapping)
        out.s_grads.append(s_slope * s_grad[:, None])
        out.t_grads.append(t_slope * t_grad[:, None])
        out.s_sizes.append(np.abs(s_slope) * s_size[:, None])
        out.t_sizes.append(np.abs(t_slope) * t_size[:, None])
    return out


def distillation(
    s_logits: Array, t_logits: Array, targets: NDArray[np.int64], temperature: float, alpha: float
):
    """`alpha T^2 KL(teacher || student at T) + (1 - alpha) CE`, means; value and student's gradient."""

    def log_softmax(z: Array) -> Array:
        z = z - z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    batch = len(s_logits)
    one_hot = np.eye(s_logits.shape[1])[targets]
    log_s, log_t = log_softmax(s_logits / temperature), log_softmax(t_logits / temperature)
    kl = (np.exp(log_t) * (log_t - log_s)).sum() / batch
    ce = -(one_hot * log_softmax(s_logits)).sum() / batch
    value = alpha * temperature**2 * kl + (1 - alpha) * ce
    grad = alpha * temperature * (np.exp(log_s) - np.exp(log_t)) / batch
    grad += (1 - alpha) * (np.exp(log_softmax(s_logits)) - one_hot) / batch
    return value, grad
