"""Bad arguments: the type of the error, and a message that names the pair and both shapes."""

from __future__ import annotations

import re

import pytest
import torch

import at_fused


def feats(*shapes: tuple[int, ...], **options) -> list[torch.Tensor]:
    return [torch.ones(shape, **options) for shape in shapes]


def mentions(*parts: object) -> str:
    """A pattern that finds every part, in any order; shapes match in () or []."""
    found = ""
    for part in parts:
        text = re.escape(", ".join(map(str, part))) if isinstance(part, tuple) else re.escape(str(part))
        found += f"(?=.*{text})"
    return "(?is)" + found


GOOD = (2, 3, 4, 4)


@pytest.mark.parametrize(
    "bad_s, bad_t",
    [
        (GOOD, (3, 3, 4, 4)),  # batch
        ((2, 3, 4, 5, 6), (2, 3, 4, 5)),  # spatial rank
        ((2, 3, 7), (2, 3, 8, 9)),
    ],
)
def test_pairs_that_do_not_match(bad_s: tuple[int, ...], bad_t: tuple[int, ...]) -> None:
    for index in (0, 1, 2):
        s, t = feats(GOOD, GOOD, GOOD), feats(GOOD, GOOD, GOOD)
        s[index], t[index] = torch.ones(bad_s), torch.ones(bad_t)
        with pytest.raises(ValueError, match=mentions(f"pair {index}", bad_s, bad_t)):
            at_fused.attention_loss(s, t)
        with pytest.raises(ValueError, match=mentions(f"pair {index}", bad_s, bad_t)):
            at_fused.AttentionLoss()(s, t)


def test_sizes_differ_with_resize_error() -> None:
    s, t = feats(GOOD, (2, 3, 8, 8)), feats((2, 5, 4, 4), (2, 3, 8, 7))
    with pytest.raises(ValueError, match=mentions("pair 1", (2, 3, 8, 8), (2, 3, 8, 7))):
        at_fused.attention_loss(s, t, resize="error")
    assert at_fused.attention_loss(s, t).isfinite()


def test_batches_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=mentions("pair 0", (1, 3, 4, 4), GOOD)):
        at_fused.attention_loss(*feats((1, 3, 4, 4), GOOD))


def test_lengths_differ() -> None:
    with pytest.raises(ValueError, match=mentions("2", "1", GOOD)):
        at_fused.attention_loss(feats(GOOD, GOOD), feats(GOOD))
    with pytest.raises(ValueError):
        at_fused.attention_loss(feats(GOOD), feats(GOOD, GOOD))


def test_empty_lists() -> None:
    with pytest.raises(ValueError, match="empty"):
        at_fused.attention_loss([], [])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("side", [0, 1])
def test_dtypes_that_are_not_floating_point(dtype: torch.dtype, side: int) -> None:
    sides = [feats(GOOD, GOOD), feats(GOOD, GOOD)]
    sides[side][1] = sides[side][1].to(dtype)
    with pytest.raises(TypeError, match=mentions("pair 1", str(dtype).removeprefix("torch."), GOOD)):
        at_fused.attention_loss(*sides)
    with pytest.raises(TypeError, match=mentions(str(dtype).removeprefix("torch."), GOOD)):
        at_fused.attention_map(sides[side][1])


def test_sparse_features() -> None:
    with pytest.raises(TypeError, match=mentions("pair 0", "dense", "sparse_coo")):
        at_fused.attention_loss(torch.ones(2, 3, 4).to_sparse(), torch.ones(2, 3, 4))


def test_nested_features() -> None:
    nested = torch.nested.nested_tensor([torch.ones(3, 4, 4), torch.ones(3, 4, 5)])
    with pytest.raises(TypeError, match=mentions("pair 0", "nested", GOOD)):
        at_fused.attention_loss(nested, torch.ones(GOOD))


@pytest.mark.parametrize("weights, kind", [(1.0, TypeError), ("12", TypeError), ([], ValueError)])
def test_weights_of_a_module(weights: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="weights"):
        at_fused.AttentionLoss(weights=weights)


def test_module_is_made_under_any_default_device() -> None:
    with torch.device("meta"):
        at_fused.AttentionLoss(weights=[1.0, 2.0])


def test_different_devices() -> None:
    s, t = feats(GOOD, GOOD), feats(GOOD, (2, 5, 4, 4), device="meta")
    with pytest.raises(ValueError, match=mentions("pair 0", "cpu", "meta", GOOD)):
        at_fused.attention_loss(s, t)
    t[0] = torch.ones(GOOD)
    with pytest.raises(ValueError, match=mentions("pair 1", "cpu", "meta", GOOD, (2, 5, 4, 4))):
        at_fused.attention_loss(s, t)
    s[1] = s[1].to("meta")  # each pair on one device, but not on the same one
    with pytest.raises(ValueError, match=mentions("pair 1", "cpu", "meta")):
        at_fused.attention_loss(s, t)


@pytest.mark.parametrize("p", [0, 0.5, 0.999, -2, float("nan"), float("inf")])
def test_p_below_one(p: float) -> None:
    (x,) = feats(GOOD)
    for call in (
        lambda: at_fused.attention_map(x, p),
        lambda: at_fused.attention_loss(x, x, p),
        lambda: at_fused.AttentionLoss(p),
    ):
        with pytest.raises(ValueError, match=r"\bp\b"):
            call()


@pytest.mark.parametrize("p", ["2", None, torch.tensor(2.0), [2], 2j])
def test_p_that_is_no_number(p: object) -> None:
    (x,) = feats(GOOD)
    with pytest.raises(TypeError, match=r"\bp\b"):
        at_fused.attention_map(x, p)
    with pytest.raises(TypeError, match=r"\bp\b"):
        at_fused.attention_loss(x, x, p)


@pytest.mark.parametrize(
    "option, value, allowed",
    [
        ("mapping", "mean", "sum"),
        ("mapping", None, "sum"),
        ("normalize", "l3", "l2"),
        ("normalize", "", "l2"),
        ("distance", "l2", "mse"),
        ("reduction", "batchmean", "none"),
        ("resize", "bicubic", "nearest"),
        ("resize", None, "nearest"),
        ("backend", "numpy", "reference"),
        ("backend", None, "reference"),
    ],
)
def test_unknown_options_list_what_exists(option: str, value: object, allowed: str) -> None:
    (x,) = feats(GOOD)
    message = mentions(option, repr(value) if value else "", allowed)
    with pytest.raises(ValueError, match=message):
        at_fused.attention_loss(x, x, **{option: value})
    with pytest.raises(ValueError, match=message):  # where it is written, not at the first step
        at_fused.AttentionLoss(**{option: value})
    if option in ("mapping", "normalize", "backend"):
        with pytest.raises(ValueError, match=message):
            at_fused.attention_map(x, **{option: value})


@pytest.mark.parametrize("option", ["mapping", "normalize", "distance", "reduction", "resize", "backend"])
def test_options_of_a_wrong_type(option: str) -> None:
    (x,) = feats(GOOD)
    with pytest.raises(TypeError, match=option):
        at_fused.attention_loss(x, x, **{option: 2})


def test_options_are_keyword_only() -> None:
    (x,) = feats(GOOD)
    for call in (at_fused.attention_map, at_fused.AttentionLoss):
        with pytest.raises(TypeError):
            call(x, 2, "sum")
    with pytest.raises(TypeError):
        at_fused.attention_loss(x, x, 2, "sum")
    with pytest.raises(TypeError, match="bogus"):
        at_fused.attention_loss(x, x, bogus=1)


@pytest.mark.parametrize("norm_order", [0, 0.5, -1, float("nan")])
def test_norm_order_below_one(norm_order: float) -> None:
    (x,) = feats(GOOD)
    with pytest.raises(ValueError, match="norm_order"):
        at_fused.attention_loss(x, x, distance="norm", norm_order=norm_order)


@pytest.mark.parametrize("eps", [-1e-12, float("nan"), float("inf")])
def test_eps_that_is_no_bound(eps: float) -> None:
    (x,) = feats(GOOD)
    with pytest.raises(ValueError, match="eps"):
        at_fused.attention_loss(x, x, eps=eps)


def test_weights() -> None:
    s, t = feats(GOOD, GOOD), feats(GOOD, GOOD)
    for weights in ([1.0], [1.0, 2.0, 3.0], []):
        with pytest.raises(ValueError, match=mentions("weights", len(weights), 2)):
            at_fused.attention_loss(s, t, weights=weights)
    with pytest.raises(ValueError, match=mentions("weights", 1, 2)):
        at_fused.AttentionLoss(weights=[1.0])(s, t)
    for wrong in (2.0, ["1", "2"], "12", torch.ones(2)):
        with pytest.raises(TypeError, match="weights"):
            at_fused.attention_loss(s, t, weights=wrong)


@pytest.mark.parametrize("channel_dim", [0, 4, -4, -5, 17])
def test_channel_dim_out_of_range(channel_dim: int) -> None:
    (x,) = feats(GOOD)
    with pytest.raises(ValueError, match=mentions("channel_dim", channel_dim, GOOD)):
        at_fused.attention_map(x, channel_dim=channel_dim)
    with pytest.raises(ValueError, match=mentions("channel_dim", "pair 0", GOOD)):
        at_fused.attention_loss(x, x, channel_dim=channel_dim)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_too_few_dimensions(shape: tuple[int, ...]) -> None:
    (x,) = feats(shape)
    with pytest.raises(ValueError, match=mentions(shape)):
        at_fused.attention_map(x)
    with pytest.raises(ValueError, match=mentions("pair 0", shape)):
        at_fused.attention_loss([x], [x])


@pytest.mark.parametrize("other", [None, 3.0, "feature", [[1.0]]])
def test_things_that_are_no_tensors(other: object) -> None:
    (x,) = feats(GOOD)
    with pytest.raises(TypeError):
        at_fused.attention_map(other)
    with pytest.raises(TypeError, match="pair 1"):
        at_fused.attention_loss([x, x], [x, other])
    with pytest.raises(TypeError):
        at_fused.attention_loss(x, other)
    with pytest.raises(TypeError):
        at_fused.attention_loss([x], x)


def test_a_backend_that_cannot_serve_says_why() -> None:
    (x,) = feats(GOOD)
    absent = {"cuda", "triton", "cpu"} - set(at_fused.available_backends())
    for name in absent:
        with pytest.raises((ValueError, RuntimeError), match=rf"{name}.*: .+"):
            at_fused.attention_loss(x, x, backend=name)
        with pytest.raises((ValueError, RuntimeError), match=rf"{name}.*: .+"):
            at_fused.attention_map(x, backend=name)


def test_a_backend_of_another_device_says_why() -> None:
    x = torch.ones(GOOD, device="meta")
    for name in set(at_fused.available_backends()) - {"reference"}:
        with pytest.raises((ValueError, RuntimeError), match=name):
            at_fused.attention_map(x, backend=name)


def test_available_backends() -> None:
    found = at_fused.available_backends()
    order = ("cuda", "triton", "cpu", "reference")
    assert isinstance(found, tuple)
    assert found == tuple(name for name in order if name in found)
    assert found[-1] == "reference"


def test_mistakes_of_the_module_are_those_of_the_function() -> None:
    (x,) = feats(GOOD)
    for wrong in (None, (x for _ in range(1))):
        with pytest.raises(TypeError, match="two tensors or two sequences"):
            at_fused.AttentionLoss()(wrong, x)  # type: ignore[arg-type]
    for beta in ("a", torch.tensor(3.0)):
        with pytest.raises(TypeError, match="beta must be a real number"):
            at_fused.AttentionLoss(beta=beta)  # type: ignore[arg-type]
    loss = at_fused.AttentionLoss()
    loss.beta = torch.tensor(3.0)  # type: ignore[assignment]
    with pytest.raises(TypeError, match="beta must be a real number, got Tensor"):
        loss(x, x)


def test_shapes_are_found_on_the_meta_device() -> None:
    x = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True)
    assert at_fused.attention_map(x).shape == (2, 4, 4)
    hints = at_fused.FeatureHints(3, 5).to("meta")
    for loss in (at_fused.attention_loss(x, x.detach()), hints(x, torch.empty(2, 5, 4, 4, device="meta"))):
        assert loss.shape == ()
        assert torch.autograd.grad(loss, x)[0].shape == x.shape
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)).to("meta")
    targets = torch.empty(2, dtype=torch.int64, device="meta")
    assert at_fused.input_gradient(model, x, targets).shape == x.shape


@pytest.mark.parametrize(
    "s, t, options",
    [
        ((4, 5), (4, 6), {}),
        ((4, 5), (3, 5), {}),
        ((4, 5, 2), (4, 5, 2), {}),
        ((4, 5), (4, 5), {"temperature": 0.0}),
        ((4, 5), (4, 5), {"alpha": 1.5}),
        ((4, 5), (4, 5), {"alpha": -0.1}),
    ],
)
def test_distillation(s: tuple[int, ...], t: tuple[int, ...], options: dict) -> None:
    with pytest.raises(ValueError):
        at_fused.distillation_loss(
            torch.zeros(s), torch.zeros(t), torch.zeros(4, dtype=torch.int64), **options
        )
