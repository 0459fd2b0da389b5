"""The CUDA kernels on the CPU: their sources, built by g++ against the host layer in tests/cuda_on_cpu."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import cases
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import check_loss, feature
from hypothesis import given, settings
from paths import ROOT
from torch import Tensor

import at_fused
from cuda_on_cpu import backend
from cuda_on_cpu.build import build, rewritten

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

SEEDS = [0, 1, 2]  # the order of blocks and threads: by index, and two random ones


# --- the layer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simt_layer", build("simt_layer"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=SEEDS)
def any_order(request: pytest.FixtureRequest, layer: ModuleType) -> None:
    layer.seed(request.param)


def integers(*shape: int) -> np.ndarray:
    """Small integers: their sums are exact in fp32."""
    return np.random.default_rng(0).integers(-99, 100, shape).astype(np.float32)


@pytest.mark.usefixtures("any_order")
def test_sums_of_blocks_warps_and_clusters(layer: ModuleType) -> None:
    x = integers(5, 128)
    np.testing.assert_array_equal(layer.block_sum(x), x.sum(1))
    np.testing.assert_array_equal(layer.warp_scan(x), x.reshape(5, 4, 32).cumsum(2).reshape(x.shape))
    neighbours = x.reshape(5, 64, 2)[..., ::-1].reshape(x.shape)
    np.testing.assert_array_equal(layer.neighbour_sum(x), x + neighbours)
    assert layer.last_block_sum(x) == x.sum()
    for blocks in (1, 2, 8):
        y = integers(3, blocks, 64)
        np.testing.assert_array_equal(layer.cluster_sum(y), y.sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_agree_with_torch(layer: ModuleType, dtype: torch.dtype) -> None:
    """All halves, all ties between two of them, both neighbours of each tie, and what overflows."""
    codes = torch.arange(2**16, dtype=torch.int32)
    halves = codes.to(torch.int16).view(dtype)
    following = (codes + 1).to(torch.int16).view(dtype)
    ties = ((halves.double() + following.double()) / 2).float()
    x = torch.cat([halves.float(), ties, ties.nextafter(halves.float()), ties.nextafter(following.float())])
    extremes = torch.tensor([torch.inf, -torch.inf, torch.finfo(dtype).max * (1 + 2**-12), 65519.99, 65520.0])
    x = torch.cat([x[~x.isnan()], extremes, torch.zeros(8)])
    x = x[: len(x) // 4 * 4].view(-1, 4)
    expected = x.to(dtype)
    name = "round_trip_bf16" if dtype == torch.bfloat16 else "round_trip_fp16"
    bits, values = getattr(layer, name)(x.numpy())
    np.testing.assert_array_equal(bits, expected.view(torch.uint16).numpy())
    np.testing.assert_array_equal(values, expected.float().numpy())
    nan = getattr(layer, name)(np.full((1, 4), np.nan, np.float32))[1]
    assert np.isnan(nan).all()


@pytest.mark.usefixtures("any_order")
def test_wrong_numbers_from_a_missing_barrier(layer: ModuleType) -> None:
    x = integers(5, 128)
    assert not np.array_equal(layer.block_sum(x, "no_barrier"), x.sum(1))


@pytest.mark.usefixtures("any_order")
def test_shared_memory_is_nan_until_it_is_written(layer: ModuleType) -> None:
    assert np.isnan(layer.block_sum(integers(5, 128), "uninitialized")).all()


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize(
    "kernel, fault, message",
    [
        (
            "block_sum",
            "other_line",
            r"divergence: in __syncthreads at layer_kernels.cuh:\d+ while",
        ),
        (
            "warp_scan",
            "split_warp",
            r"deadlock: 64 threads wait in __syncthreads .* 64 threads wait",
        ),
        ("warp_scan", "absent_lane", r"shuffle from lane 5, which takes no part"),
    ],
)
def test_divergence_is_an_error(layer: ModuleType, kernel: str, fault: str, message: str) -> None:
    with pytest.raises(layer.Error, match=message):
        getattr(layer, kernel)(integers(2, 128), fault)
    np.testing.assert_array_equal(layer.block_sum(np.ones((1, 64), np.float32)), [64])  # and no harm is left


def test_launches_beyond_the_device_are_errors(layer: ModuleType) -> None:
    for shape in [(1, 2048), (1, 0)]:
        with pytest.raises(layer.Error, match="invalid launch"):
            layer.warp_scan(np.ones(shape, np.float32))
    with pytest.raises(layer.Error, match="invalid launch"):
        layer.cluster_sum(np.ones((1, 16, 32), np.float32))


def test_shared_memory_is_rewritten() -> None:
    source = "extern __shared__ __align__(16) unsigned char all[];\n__shared__ Room<2> room[4][N];"
    assert rewritten(source) == (
        "auto* all = static_cast<unsigned char*>(simt::dynamic_shared());\n"
        "auto& room = simt::shared<Room<2>[4][N]>([] {});"
    )


# --- the kernels: csrc/cuda and at_fused/backends/cuda.py ---------------------------------------------

HALVES = [torch.bfloat16, torch.float16]
LAYOUTS = [Tensor.contiguous, cases.channels_last, cases.misaligned]


@pytest.fixture(scope="module")
def cuda() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("the suite runs on the device itself")
    with backend.installed():
        yield


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("layout", LAYOUTS, ids=cases.name_of)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=cases.name_of)
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4])
def test_powers_dtypes_and_layouts(p: float, dtype: torch.dtype, layout) -> None:
    """On 49 positions, which are no multiple of a vector, and on 64."""
    for size in (7, 8):
        s = feature(2, 16, size, size, seed=1, dtype=dtype, layout=layout)
        t = feature(2, 23, size, size, seed=2, dtype=dtype, layout=layout)
        check_loss([s], [t], p, backend="cuda", upstream=1024.0)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    batch, s_feats, t_feats = draw(st.integers(0, 4)), [], []
    for _ in range(draw(st.integers(1, 4))):
        space = draw(st.sampled_from([(1,), (7, 7), (49,), (5, 3), (2, 2, 2), (1, 61), (16, 16), (31, 1)]))
        for feats in (s_feats, t_feats):
            feats.append(
                feature(
                    batch,
                    draw(st.one_of(st.integers(1, 70), st.sampled_from([8, 64, 128]))),
                    *space,
                    seed=draw(st.integers(0, 99)),
                    dtype=draw(st.sampled_from([torch.float32, *HALVES])),
                    layout=draw(st.sampled_from(LAYOUTS)),
                )
            )
    return s_feats, t_feats


@pytest.mark.usefixtures("cuda")
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(
    pairs(),
    st.sampled_from([1, 2, 4, 2.5]),
    st.sampled_from([8 << 10, 32 << 10, 228 << 10]),
    st.sampled_from(["sum", "none"]),
    st.booleans(),
    st.integers(1, 1000),
)
def test_pairs_of_every_kind(
    feats: tuple[list[Tensor], list[Tensor]], p: float, shared: int, reduction: str, streams: bool, seed: int
) -> None:
    """Sizes, dtypes and layouts differ among pairs and within; so do the blocks that share a sample."""
    backend.set_device(shared_per_multiprocessor=shared, l2=0 if streams else 1 << 30)
    backend.set_order(seed)
    weights = [1.0, -0.5, 0.0, 3.0][: len(feats[0])]
    check_loss(*feats, p, backend="cuda", weights=weights, reduction=reduction, upstream=4096.0)


@pytest.fixture
def stream(cuda: None) -> Iterator[None]:
    yield
    backend.set_device()


def one_pass_gradients(
    s_feats: list[Tensor], t_feats: list[Tensor], p: float, upstream: float, weights: list[float]
) -> tuple[Tensor, ...]:
    at_fused.backends.cuda._last_was_one.fill_(1)
    assert torch.ops.at_fused_cuda.one_pass_pays(s_feats, t_feats, p)
    teachers = [t.detach() for t in t_feats]
    loss = at_fused.attention_loss(s_feats, teachers, p, weights=weights, backend="cuda")
    return torch.autograd.grad(loss * upstream, s_feats)


@pytest.mark.usefixtures("stream")
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=cases.name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name_of)
@pytest.mark.parametrize("team", [1, 2, 4, 8])
def test_one_pass_has_the_bits_of_two(team: int, dtype: torch.dtype, layout) -> None:
    """A sample held by one block or a cluster of 2 to 8; the two-pass form is checked against the truth."""
    s = feature(3, 48, 16, 20, seed=1, dtype=dtype, layout=layout)
    t = feature(3, 40, 16, 20, seed=2, dtype=dtype, layout=layout)
    weights = [1024.0]
    for kibibytes in (228, 112, 88, 72, 56, 48, 40, 32, 28, 24, 20, 16):
        backend.set_device(multiprocessors=1, shared_per_multiprocessor=kibibytes << 10, l2=0)
        at_fused.attention_loss(s.detach(), t.detach(), backend="cuda")
        if torch.ops.at_fused_cuda.one_pass_pays([s], [t], 2.0) and backend.last_cluster() == team:
            break
    else:
        pytest.fail(f"no device makes {team} blocks share a sample")
    for p in (1, 2, 4):
        expected = check_loss([s], [t], p, backend="cuda", weights=weights)[0]
        assert torch.equal(one_pass_gradients([s], [t], p, 1.0, weights)[0], expected)
        # a wrong guess costs time, no bit
        expected = check_loss([s], [t], p, backend="cuda", weights=weights, upstream=-3.0)[0]
        assert torch.equal(one_pass_gradients([s], [t], p, -3.0, weights)[0], expected)


@pytest.mark.usefixtures("stream")
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=cases.name_of)
def test_rows_longer_than_a_block_is_wide(layout) -> None:
    """576 vectors of positions, or of channels: more than one for each thread."""
    shape = (2, 4, 48, 48) if layout is Tensor.contiguous else (2, 2304, 2, 2)
    s, t = (feature(*shape, seed=seed, layout=layout) for seed in (1, 2))
    backend.set_device(multiprocessors=1, l2=0)
    expected = check_loss([s], [t], backend="cuda")[0]
    if layout is Tensor.contiguous:  # of so many channels the cost model makes no single pass
        assert torch.equal(one_pass_gradients([s], [t], 2, 1.0, [1.0])[0], expected)


@pytest.mark.usefixtures("stream")
def test_a_cluster_of_several_samples() -> None:
    """Small samples and idle blocks fill the clusters that a large sample needs."""
    backend.set_device(shared_per_multiprocessor=37 << 10, l2=0)
    sizes = [(24, 16, 20), (8, 7, 7), (8, 4, 4)]
    s_feats = [feature(3, *size, seed=1) for size in sizes]
    t_feats = [feature(3, *size, seed=2) for size in sizes]
    expected = check_loss(s_feats, t_feats, backend="cuda")[:3]
    assert backend.last_cluster() == 1, "backward has none"
    at_fused.attention_loss([s.detach() for s in s_feats], t_feats, backend="cuda")
    assert backend.last_cluster() == 4
    for got, wanted in zip(one_pass_gradients(s_feats, t_feats, 2, 1.0, [1.0] * 3), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("cuda")
def test_more_pairs_than_a_launch_takes() -> None:
    s_feats = [feature(2, 3 + i, 3, 3 + i % 4, seed=i) for i in range(35)]
    t_feats = [feature(2, 2 + i, 3, 3 + i % 4, seed=99 + i) for i in range(35)]
    weights = [0.1 * i for i in range(35)]
    weighted = check_loss(s_feats, t_feats, backend="cuda", weights=weights)
    losses = at_fused.attention_loss(s_feats, t_feats, reduction="none", backend="cuda")
    scaled = torch.autograd.grad(losses, [*s_feats, *t_feats], torch.tensor(weights))
    for got, expected in zip(scaled, weighted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shared", [24 << 10, 228 << 10])
def test_no_schedule_changes_a_bit(cuda: None, shared: int) -> None:
    s_feats = [feature(3, c, n, n, seed=c, dtype=torch.bfloat16) for c, n in ((16, 16), (40, 7))]
    t_feats = [feature(3, c, n, n, seed=c + 1) for c, n in ((24, 16), (10, 7))]
    results = []
    for seed in SEEDS:
        backend.set_order(seed)
        backend.set_device(shared_per_multiprocessor=shared, l2=0)
        loss = at_fused.attention_loss(s_feats, t_feats, backend="cuda")
        results.append([loss, *torch.autograd.grad(loss, [*s_feats, *t_feats])])
    backend.set_device()
    backend.set_order(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("stream")
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=cases.name_of)
def test_stages_of_resnet_18(layout) -> None:
    shapes = [(1, 64, 56, 56), (1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7)]
    s_feats = [feature(*shape, seed=1, dtype=torch.bfloat16, layout=layout) for shape in shapes]
    t_feats = [feature(*shape, seed=2, dtype=torch.bfloat16, layout=layout) for shape in shapes]
    backend.set_device(l2=0)
    weights = [1000.0] * 4
    expected = check_loss(s_feats, t_feats, backend="cuda", weights=weights)
    got = one_pass_gradients(s_feats, t_feats, 2, 1.0, weights)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=False))


def test_the_suite() -> None:
    """Every test of the loss, the maps and what they are used with, in a random order of the threads."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cuda_on_cpu.backend", "-p", "no:cacheprovider"]
    names = ["attention_loss", "attention_map", "gradient_addend", "compositions"]
    files = [f"tests/library/test_{name}.py" for name in names]
    # What PyTorch composes of the kernels' maps, other norms and distances, is tested on the other backends.
    composed = "test_attention_loss and (test_options or zero_maps_give) and (norm- or l1 or None)"
    command += ["-k", f"cuda and not max and not resident_memory and not ({composed})", *files]
    folders = [str(ROOT / "tests"), str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, folders))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout


# --- the sanitizers find what they should -----------------------------------------------------------

ASAN, TSAN = "address,undefined", "thread"


def run(program: str, sanitizers: str, *arguments: str) -> tuple[bool, str]:
    """Whether it ran clean, and what it said."""
    options = {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "exitcode=66", "LD_PRELOAD": ""}
    command = [str(build(program, sanitizers)), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | options, timeout=300)
    return result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("sanitizers", [ASAN, TSAN])
def test_sanitizers_pass_what_is_right(sanitizers: str) -> None:
    clean, said = run("layer_driver", sanitizers)
    assert clean, said


@pytest.mark.parametrize(
    "sanitizers, fault, report",
    [
        (ASAN, "overrun", "heap-buffer-overflow tests/cuda_on_cpu/layer_kernels.cuh"),
        (ASAN, "misaligned", "reference binding to misaligned address"),
        (TSAN, "no_barrier", "data race tests/cuda_on_cpu/layer_kernels.cuh"),
        (TSAN, "no_syncwarp", "data race tests/cuda_on_cpu/layer_kernels.cuh"),
        (TSAN, "no_fence", "data race tests/cuda_on_cpu/layer_kernels.cuh"),
        (TSAN, "early_exit", "data race"),
    ],
)
def test_sanitizers_report_a_seeded_fault(sanitizers: str, fault: str, report: str) -> None:
    clean, said = run("layer_driver", sanitizers, fault)
    assert not clean
    assert report in said, said
