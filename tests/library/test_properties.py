"""Random shapes, layouts, dtypes and options (hypothesis) against the fp64 truth; properties of the loss."""

from __future__ import annotations

import os

import cases
import hypothesis.strategies as st
import pytest
import torch
from cases import check_loss, feature
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor

import at_fused

# Derandomised: the same examples at every run, so that a red run can be run again. `make soak` asks for many
# more than CI, new ones each time; a failure prints how to repeat it.
EXAMPLES = int(os.environ.get("AT_FUSED_EXAMPLES", "0"))
bounded = settings(
    max_examples=EXAMPLES or (40 if cases.INTERPRETED else 120),
    derandomize=not EXAMPLES,
    print_blob=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

backends = st.sampled_from(cases.BACKENDS)
complete = st.sampled_from([name for name in cases.BACKENDS if name != "cuda"])  # serve whatever is drawn
exponents = st.one_of(st.sampled_from([1, 2, 3, 4]), st.floats(1.0, 5.0).map(lambda p: round(p, 2)))
mappings = st.sampled_from(["sum", "max"])
dtypes = st.sampled_from(cases.DTYPES)
layouts = st.sampled_from(cases.LAYOUTS)
spaces = st.one_of(
    st.tuples(st.integers(1, 70)),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
)


@st.composite
def features(draw, batch: int, space: tuple[int, ...], device: str) -> Tensor:
    return feature(
        batch,
        draw(st.integers(1, 70)),
        *space,
        seed=draw(st.integers(0, 99)),
        dtype=draw(dtypes),
        layout=draw(layouts),
        device=device,
    )


@st.composite
def losses(draw) -> tuple[list[Tensor], list[Tensor], float, dict]:
    """Arguments of ``attention_loss``: 1 to 3 pairs of one batch, on equal or unequal grids."""
    backend = draw(backends)
    device, batch = cases.device_of(backend), draw(st.integers(1, 5))
    s_feats, t_feats = [], []
    for _ in range(draw(st.integers(1, 3))):
        space = draw(spaces)
        other = draw(st.one_of(st.just(space), st.tuples(*[st.integers(1, 9)] * len(space))))
        s_feats.append(draw(features(batch, space, device)))
        t_feats.append(draw(features(batch, other, device)))
    weights = st.lists(
        st.integers(-40, 40).map(lambda w: w / 10), min_size=len(s_feats), max_size=len(s_feats)
    )
    options = {
        "backend": backend,
        "mapping": draw(mappings),
        "normalize": draw(st.sampled_from(["l2", "l2", "l1", None])),
        "distance": draw(st.sampled_from(["mse", "mse", "norm"])),
        "norm_order": draw(st.sampled_from([2, 3])),
        "reduction": draw(st.sampled_from(["sum", "none"])),
        "resize": draw(st.sampled_from(["bilinear", "nearest"])),
        "weights": draw(st.one_of(st.none(), weights)),
    }
    return s_feats, t_feats, draw(exponents), options


@bounded
@given(losses())
def test_loss_and_gradients(arguments: tuple[list[Tensor], list[Tensor], float, dict]) -> None:
    s_feats, t_feats, p, options = arguments
    check_loss(s_feats, t_feats, p, **options, upstream=64.0)


@bounded
@given(st.data())
def test_maps_add_over_channels_and_compete_under_max(data: st.DataObject) -> None:
    """F_sum of stacked channels is the sum of their maps; F_max is the greater of them."""
    backend, p = data.draw(complete), data.draw(exponents)
    space, device = data.draw(spaces), cases.device_of(backend)
    a, b = (data.draw(features(2, space, device)).detach().float() for _ in range(2))
    both = data.draw(layouts.filter(lambda f: "expanded" not in f.__name__))(torch.cat([a, b], 1))
    maps = {
        mapping: [at_fused.attention_map(x, p, mapping=mapping, backend=backend) for x in (a, b, both)]
        for mapping in ("sum", "max")
    }
    torch.testing.assert_close(maps["sum"][2], maps["sum"][0] + maps["sum"][1], rtol=2e-5, atol=0)
    torch.testing.assert_close(maps["max"][2], torch.maximum(*maps["max"][:2]), rtol=2e-5, atol=0)


@bounded
@given(st.data())
def test_the_loss_is_symmetric_and_blind_to_signs_and_channel_order(data: st.DataObject) -> None:
    backend, p, mapping = data.draw(complete), data.draw(exponents), data.draw(mappings)
    space, device = data.draw(spaces), cases.device_of(backend)
    s, t = (data.draw(features(3, space, device)).detach() for _ in range(2))
    options = {"p": p, "mapping": mapping, "backend": backend}
    loss = at_fused.attention_loss(s, t, **options)
    # each map carries fp32 roundings of its own: errors are relative to the maps, not to their difference
    close = {"rtol": 1e-4, "atol": 1e-6}
    swapped = at_fused.attention_loss(t, s, **options)
    torch.testing.assert_close(swapped.double(), loss.double(), **close)
    shuffled = s[:, torch.randperm(s.shape[1])] * torch.tensor(-1.0, dtype=s.dtype)
    torch.testing.assert_close(at_fused.attention_loss(shuffled, t, **options), loss, **close)
    assert 0 <= loss.item() <= 2 + 1e-6, "two unit vectors are at most sqrt(2) apart: both maps are positive"


@pytest.mark.parametrize("backend", cases.BACKENDS)
@bounded
@given(scale=st.integers(-6, 6), p=exponents, mapping=mappings)
def test_l2_maps_forget_the_scale(backend: str, scale: int, p: float, mapping: str) -> None:
    assume(backend != "cuda" or mapping == "sum")
    x = feature(2, 7, 5, 3, device=cases.device_of(backend)).detach()
    options = {"p": p, "mapping": mapping, "normalize": "l2", "backend": backend}
    maps = at_fused.attention_map(x, **options)
    torch.testing.assert_close(at_fused.attention_map(x * 2.0**scale, **options), maps, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(maps.flatten(1).norm(dim=1).cpu(), torch.ones(2))
