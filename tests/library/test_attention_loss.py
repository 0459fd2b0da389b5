"""attention_loss: values and gradients (student and teacher) against the fp64 truth."""

from __future__ import annotations

import math

import cases
import numpy as np
import pytest
import torch
from cases import check_loss, each_backend, exact, feature
from torch import Tensor

import at_fused

DISTANCES = [
    {"distance": "mse"},
    {"distance": "norm", "norm_order": 1},
    {"distance": "norm", "norm_order": 2},
    {"distance": "norm", "norm_order": 3},
]


# All but the first are plain PyTorch on the maps of a backend: in Triton's slow interpreter a few are enough.
COMPOSITIONS = [(normalize, distance) for normalize in ("l2", "l1", None) for distance in DISTANCES]
if cases.INTERPRETED:
    COMPOSITIONS = [("l2", DISTANCES[0]), ("l1", DISTANCES[1]), (None, DISTANCES[2])]


def id_of(value: object) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def pair(shape: tuple[int, ...], t_channels: int | None = None, **options) -> tuple[Tensor, Tensor]:
    """Student and teacher features of one grid, the teacher with its own number of channels."""
    t_shape = (shape[0], t_channels or shape[1], *shape[2:])
    return feature(*shape, seed=1, **options), feature(*t_shape, seed=2, **options)


# --- numbers --------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("normalize, distance", COMPOSITIONS, ids=id_of)
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4])
def test_options(p: float, mapping: str, normalize: str | None, distance: dict, backend: str) -> None:
    for dtype in (torch.float32, torch.float64):
        s, t = pair((3, 10, 5, 4), 7, dtype=dtype, device=cases.device_of(backend))
        check_loss([s], [t], p, mapping=mapping, normalize=normalize, **distance, backend=backend)


@each_backend
@pytest.mark.parametrize("dtype, layout", cases.with_dtypes(cases.LAYOUTS), ids=cases.name_of)
@pytest.mark.parametrize("mapping", ["sum", "max"])
def test_layouts(layout, dtype: torch.dtype, mapping: str, backend: str) -> None:
    """Gradients of half-precision features are checked at a loss scale, where fp16 can hold them."""
    device = cases.device_of(backend)
    for shape, p in (((4, 21, 7, 7), 2), ((2, 33, 6, 5), 1), ((3, 6, 9, 4), 4), ((2, 5, 3, 37), 2)):
        s, t = pair(shape, 12, dtype=dtype, layout=layout, device=device)
        grads = check_loss([s], [t], p, mapping=mapping, backend=backend, upstream=1024.0)
        if layout in cases.DENSE and backend != "reference":
            assert [g.stride() for g in grads] == [s.stride(), t.stride()]


@each_backend
@pytest.mark.parametrize("layout", [Tensor.contiguous, cases.channels_last], ids=cases.name_of)
@pytest.mark.parametrize("batch", [1, 3])
def test_gradient_keeps_the_memory_format(batch: int, layout, backend: str) -> None:
    shape = (batch, 8, 6, 5)
    s, t = pair(shape, 4, layout=layout, dtype=torch.bfloat16, device=cases.device_of(backend))
    grads = check_loss([s], [t], backend=backend)
    assert [g.stride() for g in grads] == [s.stride(), t.stride()]
    for create_graph in (False, True):  # not as leaves, whose .grad gets its format elsewhere
        loss = at_fused.attention_loss(s, t, backend=backend)
        grads = torch.autograd.grad(loss, [s, t], create_graph=create_graph)
        assert [g.stride() for g in grads] == [s.stride(), t.stride()]


@each_backend
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (1, 3, 7, 7),
        (2, 1, 5, 3),
        (5, 17, 1, 1),
        (2, 13, 1, 61),
        (3, 70, 31, 1),
        (1, 257, 9, 11),
        (7, 2, 16, 16),
        (9, 130, 8, 8),
        (0, 4, 3, 3),
        (2, 6, 10),
        (2, 6, 3, 4, 5),
    ],
    ids=str,
)
def test_shapes(shape: tuple[int, ...], mapping: str, backend: str) -> None:
    for layout in (Tensor.contiguous, cases.channels_last):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            s, t = pair(shape, 5, dtype=dtype, layout=layout, device=cases.device_of(backend))
            check_loss([s], [t], mapping=mapping, backend=backend, upstream=256.0)


@each_backend
@pytest.mark.parametrize("mapping, p", [("sum", 2), ("sum", 1), ("sum", 2.5), ("max", 2)])
@pytest.mark.parametrize("shape", [(3, 16, 7, 7), (2, 72, 7, 7), (2, 20, 5, 5), (4, 8, 3, 1)], ids=str)
def test_maps_too_small_for_aligned_rows(
    shape: tuple[int, ...], mapping: str, p: float, backend: str
) -> None:
    """Channels-first, 49 positions are no multiple of a vector: backends fold several channels into a row.
    A few values only: several channels of a row are the strongest, and the first of them counts."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for layout in (Tensor.contiguous, lambda x: torch.cat([x, x], 1)[:, : shape[1]], cases.misaligned):
            s, t = pair(shape, 8, dtype=dtype, device=cases.device_of(backend))
            s, t = (layout((2 * x.detach()).round() / 2).requires_grad_() for x in (s, t))
            check_loss([s], [t], p, mapping=mapping, backend=backend, upstream=256.0)


@each_backend
@pytest.mark.parametrize("distance", ["mse", "norm"])
def test_a_map_of_one_value(distance: str, backend: str) -> None:
    """Unnormalised: any other is 1 everywhere, and its loss 0."""
    s, t = pair((1, 3, 1, 1), 5, device=cases.device_of(backend))
    check_loss([s], [t], normalize=None, distance=distance, backend=backend)


@each_backend
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(
    "s_size, t_size",
    [((4, 4), (8, 8)), ((8, 8), (4, 4)), ((5, 3), (7, 11)), ((9, 4), (3, 6)), ((6, 5), (6, 3)),
     ((1, 1), (3, 2)), ((3, 4), (1, 1)), ((7,), (5,)), ((2, 3, 4), (4, 3, 2))],
    ids=str,
)  # fmt: skip
def test_teacher_map_is_resized_to_the_student_grid(
    s_size: tuple[int, ...], t_size: tuple[int, ...], mode: str, backend: str
) -> None:
    device = cases.device_of(backend)
    for dtype in (torch.float32, torch.float64):
        s = feature(2, 6, *s_size, seed=1, dtype=dtype, device=device)
        t = feature(2, 9, *t_size, seed=2, dtype=dtype, device=device)
        for options in ({}, {"normalize": "l1", "distance": "norm", "p": 1}, {"mapping": "max"}):
            check_loss([s], [t], resize=mode, backend=backend, **options)


@each_backend
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, -2.0, 3.0]], ids=["unweighted", "weighted"])
def test_pairs_of_every_kind_in_one_call(reduction: str, weights: list[float] | None, backend: str) -> None:
    """Ranks, dtypes, layouts, channels and grids differ from pair to pair, or within one where they may."""
    device = cases.device_of(backend)
    s_feats = [
        feature(3, 8, 6, 6, seed=1, device=device),
        feature(3, 5, 7, 7, seed=2, dtype=torch.bfloat16, layout=cases.channels_last, device=device),
        feature(3, 4, 10, seed=3, dtype=torch.float16, device=device),
        feature(3, 6, 2, 3, 4, seed=4, layout=cases.sliced, device=device),
    ]
    t_feats = [
        feature(3, 3, 6, 6, seed=5, dtype=torch.float16, layout=cases.batch_innermost, device=device),
        feature(3, 9, 7, 7, seed=6, device=device),
        feature(3, 2, 10, seed=7, dtype=torch.bfloat16, layout=cases.transposed, device=device),
        feature(3, 6, 2, 3, 4, seed=8, dtype=torch.bfloat16, device=device),
    ]
    for sizes in ("equal", "unequal"):
        if sizes == "unequal":
            t_feats[1] = feature(3, 9, 4, 5, seed=6, device=device)
        check_loss(s_feats, t_feats, weights=weights, reduction=reduction, backend=backend, upstream=4096.0)


UPSTREAMS = {
    "contiguous": lambda upstream: upstream,
    "strided": lambda upstream: upstream.repeat_interleave(2)[::2],
    "expanded": lambda upstream: upstream[2].expand(3),  # as sum() hands it back
}


@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)], ids=["student", "teacher", "both"])
@pytest.mark.parametrize("layout", UPSTREAMS)
@each_backend
def test_upstream_gradient_of_each_pair(layout: str, sides: tuple[int, ...], backend: str) -> None:
    """reduction="none" hands every pair its own upstream gradient, in whatever layout."""
    device = cases.device_of(backend)
    feats = [[feature(2, c, 5, 5, seed=c + i, device=device) for i in range(3)] for c in (4, 6)]
    inputs = [feat.requires_grad_(side in sides) for side in (0, 1) for feat in feats[side]]
    wanted = [feat for feat in inputs if feat.requires_grad]
    upstream = UPSTREAMS[layout](torch.tensor([2.0, 0.0, -3.0], device=device))
    losses = at_fused.attention_loss(*feats, reduction="none", backend=backend)
    got = torch.autograd.grad(losses, wanted, upstream)
    for i, loss in enumerate(at_fused.attention_loss(*feats, reduction="none", backend="reference")):
        pair = [feats[side][i] for side in sides]
        expected = torch.autograd.grad(upstream[i] * loss, pair, retain_graph=True)
        torch.testing.assert_close(list(got[i::3]), list(expected))


@each_backend
def test_an_fp64_feature_in_a_pair_of_fp32(backend: str) -> None:
    s = feature(2, 4, 5, 5, seed=1, device=cases.device_of(backend))
    t = feature(2, 4, 5, 5, seed=2, dtype=torch.float64, device=cases.device_of(backend))
    check_loss([s], [t], backend=backend)
    check_loss([t], [s], backend=backend)


@each_backend
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", [{}, {"mapping": "max"}, {"distance": "norm"}], ids=str)
def test_each_pair_has_its_own_precision(options: dict, reduction: str, backend: str) -> None:
    """fp64 after or before fp32 in one call keeps its digits, and makes the loss fp64."""
    device = cases.device_of(backend)
    pairs = [
        pair((2, 4, 5, 5), 3, dtype=torch.float32, device=device),
        pair((2, 6, 7, 8), dtype=torch.float64, device=device),  # the larger maps, also in bytes
        pair((2, 3, 4, 4), dtype=torch.bfloat16, device=device),
    ]
    for some in (pairs, pairs[:2], pairs[1:]):
        s_feats, t_feats = zip(*some, strict=True)
        check_loss([*s_feats], [*t_feats], reduction=reduction, backend=backend, **options)


@each_backend
@pytest.mark.parametrize(
    "shape, channel_dim", [((3, 49, 12), -1), ((3, 5, 6, 7), -1), ((3, 5, 6, 7), -2), ((3, 5, 6), 2)]
)
def test_channel_dim(shape: tuple[int, ...], channel_dim: int, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        s, t = (feature(*shape, seed=i, dtype=dtype, device=cases.device_of(backend)) for i in (1, 2))
        grads = check_loss([s], [t], channel_dim=channel_dim, backend=backend, upstream=256.0)
        assert all(g.is_contiguous() for g in grads) or backend == "reference"


@each_backend
def test_real_sizes(backend: str) -> None:
    """The groups of WRN-16-1 and WRN-16-2 on CIFAR and ResNet's 512 x 7 x 7: beyond any block or tile."""
    device = cases.device_of(backend)
    for layout in (Tensor.contiguous, cases.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            groups = [(16, 32, 32, 32), (32, 64, 16, 16), (64, 128, 8, 8), (512, 512, 7, 7)]
            options = {"dtype": dtype, "layout": layout, "device": device}
            s_feats = [feature(3, c, h, w, seed=c, **options) for c, _, h, w in groups]
            t_feats = [feature(3, c, h, w, seed=c + 1, **options) for _, c, h, w in groups]
            check_loss(s_feats, t_feats, backend=backend, upstream=1024.0)


@each_backend
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_offsets_beyond_2_to_the_31(axis: int, backend: str) -> None:
    if cases.device_of(backend) == "cuda":
        pytest.skip("untouched pages cost nothing only on the CPU")
    shape = (2, 3, 4, 2)
    far = cases.far_apart(shape, axis)
    near = feature(*shape, seed=1, dtype=torch.float16)
    check_loss([far], [near], backend=backend, upstream=64.0)
    check_loss([near], [far], mapping="max", backend=backend, upstream=64.0)


# --- the two definitions of the distance ----------------------------------------------------------


@each_backend
def test_mse_is_the_authors_code(backend: str) -> None:
    """beta = 1000 with the mean over batch and positions: nothing else is divided (section 4.1.1)."""
    s, t = pair((4, 8, 6, 6), device=cases.device_of(backend))

    def at(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x.detach().double().pow(2).mean(1).flatten(1))

    expected = (at(s) - at(t)).pow(2).mean()
    got = at_fused.attention_loss(s, t, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


@each_backend
def test_norm_is_equation_2(backend: str) -> None:
    """Eq. 2 as printed: the norm is not squared, and no factor 1/2 is hidden inside."""
    s, t = pair((4, 8, 6, 6), device=cases.device_of(backend))
    q_s, q_t = (np.square(exact(x)).sum(1).reshape(4, -1) for x in (s, t))
    unit_s, unit_t = (q / np.sqrt(np.square(q).sum(1, keepdims=True)) for q in (q_s, q_t))
    expected = np.sqrt(np.square(unit_s - unit_t).sum(1)).mean()
    got = at_fused.attention_loss(s, t, distance="norm", backend=backend)
    assert got.item() == pytest.approx(expected, rel=1e-5)


@each_backend
@pytest.mark.parametrize("norm_order", [12, 100])
def test_high_norm_orders_of_small_differences(norm_order: int, backend: str) -> None:
    """Their powers are below fp32."""
    s, t = (feat.detach() for feat in pair((2, 3, 16, 16), device=cases.device_of(backend)))
    t = s[:, :2] * 1.001
    options = {"distance": "norm", "norm_order": norm_order}
    inputs = [x.requires_grad_() for x in (s, t)]
    loss = at_fused.attention_loss(s, t, backend=backend, **options)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = at_fused.attention_loss(*wide, backend="reference", **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    for got, exact_grad in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, wide), strict=True
    ):
        assert got.norm() > 0
        torch.testing.assert_close(
            got.double(), exact_grad, rtol=1e-3, atol=1e-4 * float(exact_grad.abs().max())
        )


@each_backend
@pytest.mark.parametrize("norm_order", [1, 1.5, 2, 3])
@pytest.mark.parametrize("normalize", ["l2", "l1", None])
def test_norm_has_zero_gradient_where_the_maps_are_equal(
    norm_order: float, normalize: str | None, backend: str
) -> None:
    s = feature(3, 5, 4, 4, device=cases.device_of(backend))
    t = s.detach().neg().requires_grad_()  # same |A|, same map
    loss = at_fused.attention_loss(
        s, t, distance="norm", norm_order=norm_order, normalize=normalize, backend=backend
    )
    assert loss.item() == 0.0
    grads = torch.autograd.grad(loss, [s, t], create_graph=True)
    assert all(torch.count_nonzero(g) == 0 for g in grads)
    penalty = sum(grad.square().sum() + grad.sum() for grad in grads)
    assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(penalty, [s, t]))
    # one equal sample among others must not spoil the others
    mixed = t.detach().clone()
    mixed[1:] = feature(2, 5, 4, 4, seed=5).detach().to(mixed.device)
    options = {"distance": "norm", "norm_order": norm_order, "normalize": normalize}
    grads = check_loss([s], [mixed.requires_grad_()], backend=backend, **options)
    assert torch.count_nonzero(grads[0][0]) == 0
    assert torch.count_nonzero(grads[0][1:]) > 0


@each_backend
@pytest.mark.parametrize("mapping", ["sum", "max"])
def test_maps_whose_squares_overflow_fp32(mapping: str, backend: str) -> None:
    """fp16 features near their largest to the 4th: the norm is finite, its square is not."""
    options = {"dtype": torch.float16, "device": cases.device_of(backend)}
    s, t = (feature(2, 5, 4, 4, seed=seed, **options).detach() for seed in (1, 2))
    s, t = ((x.sign() * 5e4 + x * 2e3).requires_grad_() for x in (s, t))
    assert at_fused.attention_map(s, 4, mapping=mapping, backend=backend).square().sum().isinf()
    check_loss([s], [t], p=4, mapping=mapping, backend=backend, upstream=2.0**20)


@each_backend
def test_loss_does_not_depend_on_the_scale_of_the_features(backend: str) -> None:
    s, t = pair((3, 8, 6, 6), device=cases.device_of(backend))
    loss = at_fused.attention_loss(s, t, backend=backend)
    scaled = at_fused.attention_loss(s * 64, t / 16, backend=backend)
    torch.testing.assert_close(scaled, loss, rtol=1e-5, atol=0)


# --- edges ----------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4])
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize(
    "normalize, distance", list(dict.fromkeys((norm, d["distance"]) for norm, d in COMPOSITIONS))
)
def test_zero_maps_give_zero_gradients(
    p: float, mapping: str, normalize: str | None, distance: str, backend: str
) -> None:
    for dtype in (torch.float32, torch.float16):
        s, t = pair((3, 5, 4, 4), dtype=dtype, device=cases.device_of(backend))
        with torch.no_grad():
            s[0] = 0.0
            s[1] = 0.0
            t[1] = 0.0
            s[2, :, 1] = 0.0
        options = {"mapping": mapping, "normalize": normalize, "distance": distance, "backend": backend}
        loss = at_fused.attention_loss(s, t, p, **options)
        grads = torch.autograd.grad(loss, [s, t])
        assert torch.all(grads[0][:2] == 0)
        assert torch.all(grads[1][1] == 0)
        assert torch.all(grads[0][2, :, 1] == 0)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in grads)
        if dtype == torch.float32:
            check_loss([s], [t], p, **options)


@each_backend
@pytest.mark.parametrize("normalize", ["l2", "l1"])
def test_eps_bounds_the_norm_from_below(normalize: str, backend: str) -> None:
    """Below eps the norm is the constant eps: the map is scaled, and its gradient has one term."""
    s, t = pair((3, 5, 4, 4), device=cases.device_of(backend))
    with torch.no_grad():
        s[0] *= 1e-3
        t[1] *= 1e-3
    check_loss([s], [t], normalize=normalize, eps=1e-2, backend=backend)

    s, t = pair((2, 4, 3, 3), device=cases.device_of(backend), scale=1e-7)  # Q ~ 1e-14, below the default
    check_loss([s], [t], normalize=normalize, backend=backend)


@each_backend
@pytest.mark.parametrize("eps, scale", [(1e-30, 1e-12), (1e-30, 1e-7), (0, 1e-12), (1e-40, 1)])
def test_norms_whose_squares_underflow_fp32(eps: float, scale: float, backend: str) -> None:
    """A small eps is the caller's choice: the loss is then the same for features of any scale."""
    s, t = (feat.detach() for feat in pair((3, 5, 4, 4), device=cases.device_of(backend)))
    p = 4 if scale == 1e-7 else 2  # maps of 1e-24 or more
    expected = at_fused.attention_loss(s, t, p, backend="reference")
    got = at_fused.attention_loss(scale * s, scale * t, p, eps=eps, backend=backend)
    torch.testing.assert_close(got, expected)
    if eps:
        nothing = torch.zeros_like(s)
        assert at_fused.attention_loss(nothing, nothing[:, :1], p, eps=eps, backend=backend) == 0


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize(
    "options", [{}, {"distance": "norm"}, {"normalize": "l1"}], ids=["mse", "norm", "l1"]
)
def test_nan_and_inf_propagate(bad: float, mapping: str, options: dict, backend: str) -> None:
    for side in (0, 1):
        for layout in (Tensor.contiguous, cases.channels_last):
            feats = [x.detach() for x in pair((2, 20, 4, 4), layout=layout, device=cases.device_of(backend))]
            feats[side][1, 7, 2, 3] = bad
            loss = at_fused.attention_loss(*feats, mapping=mapping, backend=backend, **options)
            assert not loss.isfinite(), "a broken activation must not look like a good loss"


@each_backend
@pytest.mark.parametrize("distance", ["mse", "norm"])
def test_an_empty_batch_gives_zero(distance: str, backend: str) -> None:
    s, t = pair((0, 4, 5, 5), device=cases.device_of(backend))
    t = feature(0, 4, 5, 5, device=cases.device_of(backend))
    loss = at_fused.attention_loss([s, s], [t, t], distance=distance, backend=backend)
    assert loss.item() == 0.0
    grads = torch.autograd.grad(loss, [s, t])
    assert [g.shape for g in grads] == [s.shape, t.shape]
    each = at_fused.attention_loss([s, s], [t, t], distance=distance, reduction="none", backend=backend)
    assert each.tolist() == [0.0, 0.0]


@each_backend
@pytest.mark.parametrize(
    "options", [{}, *({"distance": "norm", "norm_order": q} for q in (1, 2, math.inf))], ids=str
)
def test_no_positions_give_zero(options: dict, backend: str) -> None:
    student, teacher = torch.zeros(2, 2, 3, 0, 4, device=cases.device_of(backend)).unbind()
    for reduction, zero in (("sum", 0.0), ("none", [0.0])):
        loss = at_fused.attention_loss(
            student.requires_grad_(), teacher, reduction=reduction, backend=backend, **options
        )
        assert loss.tolist() == zero


@each_backend
@pytest.mark.parametrize("normalize", ["l2", "l1"])
def test_a_map_of_zeros_gives_nan_without_eps_and_a_number_with_it(normalize: str, backend: str) -> None:
    s, t = (x.detach() for x in pair((2, 4, 3, 3), device=cases.device_of(backend)))
    for feats in ((s, torch.zeros_like(t)), (torch.zeros_like(s), t)):
        options = {"normalize": normalize, "reduction": "none", "backend": backend}
        assert at_fused.attention_loss(*feats, eps=0.0, **options).isnan().all()
        assert at_fused.attention_loss(*feats, **options).isfinite().all()
    assert at_fused.attention_loss(s, t, normalize=normalize, eps=0.0, backend=backend).isfinite()


@each_backend
def test_max_gives_the_gradient_to_the_first_of_equal_channels(backend: str) -> None:
    for layout in (Tensor.contiguous, cases.channels_last):
        s, t = pair((2, 40, 3, 3), layout=layout, device=cases.device_of(backend))
        with torch.no_grad():
            s[:, 5] = 7.0
            s[:, 6] = -7.0
            s[:, 38] = 7.0
        grad = check_loss([s], [t], mapping="max", backend=backend)[0]
        assert torch.count_nonzero(grad[:, 5]) > 0
        assert torch.count_nonzero(grad) == torch.count_nonzero(grad[:, 5])


@each_backend
def test_gradients_only_where_they_are_asked_for(backend: str) -> None:
    device = cases.device_of(backend)
    s_feats = [feature(2, 4, 5, 5, seed=i, device=device) for i in range(3)]
    t_feats = [feature(2, 6, 5, 5, seed=5 + i, device=device) for i in range(3)]
    every = [*s_feats, *t_feats]
    full = torch.autograd.grad(at_fused.attention_loss(s_feats, t_feats, backend=backend), every)
    for wanted in ({0, 1, 2}, {1}, {3, 4, 5}, {5}, {0, 4}, set(range(6))):
        feats = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(every)]
        loss = at_fused.attention_loss(feats[:3], feats[3:], backend=backend)
        loss.backward()
        for i, (x, expected) in enumerate(zip(feats, full, strict=True)):
            if i in wanted:
                torch.testing.assert_close(x.grad, expected)
            else:
                assert x.grad is None
    feats = [x.detach() for x in every]
    assert not at_fused.attention_loss(feats[:3], feats[3:], backend=backend).requires_grad


@each_backend
def test_one_tensor_is_a_list_of_one(backend: str) -> None:
    s, t = pair((2, 4, 5, 5), device=cases.device_of(backend))
    alone = at_fused.attention_loss(s, t, backend=backend)
    assert torch.equal(alone, at_fused.attention_loss([s], [t], backend=backend))
    assert torch.equal(alone, at_fused.attention_loss((s,), (t,), backend=backend))
    assert at_fused.attention_loss(s, t, reduction="none", backend=backend).shape == (1,)


@each_backend
def test_a_student_can_be_its_own_teacher(backend: str) -> None:
    """The same tensor on both sides, and one tensor in two pairs: gradients add up."""
    s, t = pair((2, 4, 5, 5), device=cases.device_of(backend))
    assert torch.count_nonzero(torch.autograd.grad(at_fused.attention_loss(s, s, backend=backend), s)[0]) == 0
    (once,) = torch.autograd.grad(at_fused.attention_loss(s, t, backend=backend), s)
    (twice,) = torch.autograd.grad(at_fused.attention_loss([s, s], [t, t], backend=backend), s)
    torch.testing.assert_close(twice, 2 * once)


# --- AttentionLoss --------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": [1.0, 0.5]},
        {"distance": "norm", "reduction": "none"},
        {"distance": "norm", "norm_order": 3, "normalize": "l1", "mapping": "max"},
        {"channel_dim": -1, "resize": "nearest"},
        {"eps": 300.0},
    ],
    ids=str,
)
def test_module_is_beta_times_the_function(options: dict, backend: str) -> None:
    device = cases.device_of(backend)
    s_feats = [feature(2, 4, 5, 5, seed=i, device=device) for i in range(2)]
    t_feats = [feature(2, 6, 5, 5, seed=5 + i, device=device) for i in range(2)]
    module = at_fused.AttentionLoss(3, beta=250.0, backend=backend, **options)
    expected = 250.0 * at_fused.attention_loss(s_feats, t_feats, 3, backend=backend, **options)
    got = module(s_feats, t_feats)
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad(got.sum(), s_feats)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), s_feats))
    module.beta = 0.0
    assert module(s_feats, t_feats).sum() == 0.0


def test_module_defaults() -> None:
    s, t = feature(2, 4, 5, 5, seed=1), feature(2, 4, 5, 5, seed=2)
    torch.testing.assert_close(at_fused.AttentionLoss()(s, t), 1000.0 * at_fused.attention_loss(s, t, 2))
    assert not list(at_fused.AttentionLoss().parameters())
    assert not at_fused.AttentionLoss().state_dict()
    assert "beta=30" in repr(at_fused.AttentionLoss(beta=30.0))
