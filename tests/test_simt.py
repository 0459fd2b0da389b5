"""The CUDA kernels on the CPU: their sources, built by g++ against the host layer in tests/simt."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from types import ModuleType

import numpy as np
import pytest
import torch
from simt.build import build, rewritten

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

SEEDS = [0, 1, 2]  # the order of blocks and threads: by index, and two random ones


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, build(name))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the layer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer() -> ModuleType:
    return load("simt_layer")


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
@pytest.mark.parametrize("fault", ["no_barrier", "uninitialized"])
def test_wrong_numbers_from_a_missing_barrier_or_store(layer: ModuleType, fault: str) -> None:
    x = integers(5, 128)
    assert not np.array_equal(layer.block_sum(x, fault), x.sum(1))


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
        (ASAN, "overrun", "heap-buffer-overflow tests/simt/layer_kernels.cuh"),
        (ASAN, "misaligned", "reference binding to misaligned address"),
        (TSAN, "no_barrier", "data race tests/simt/layer_kernels.cuh"),
        (TSAN, "no_fence", "data race tests/simt/layer_kernels.cuh"),
        (TSAN, "early_exit", "data race"),
    ],
)
def test_sanitizers_report_a_seeded_fault(sanitizers: str, fault: str, report: str) -> None:
    clean, said = run("layer_driver", sanitizers, fault)
    assert not clean
    assert report in said, said
