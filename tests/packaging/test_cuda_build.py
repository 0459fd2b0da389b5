"""The CUDA library as nvcc builds it, without a GPU: resources, memory accesses, exports, setup.py."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import sass
import torch
from cases import LAYOUTS, name_of
from paths import ROOT
from wheels import build_wheel, lines_about_us, make_quick_compiler, make_tree, packaged

from at_fused.backends import cuda
from benchmarks.issue import INSTRUCTIONS


def triton_folders() -> list[str]:
    """Where Triton is: its wheels bring the disassembler along."""
    spec = importlib.util.find_spec("triton")
    return list(spec.submodule_search_locations or []) if spec else []


NVCC = shutil.which("nvcc")
SEARCH = [os.environ.get("PATH", ""), *(f"{path}/backends/nvidia/bin" for path in triton_folders())]
NVDISASM = shutil.which("nvdisasm", path=os.pathsep.join(SEARCH))
SOURCES = ROOT / "csrc" / "cuda"
KERNELS = ("loss_kernel", "maps_kernel", "backward_kernel")
POWERS = ("Power1", "Power2", "Power4", "PowerAny")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def wasteful(log: str) -> list[str]:
    """What `ptxas -v` says of kernels that use local memory."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert frames, log[-2000:]
    return [" ".join(frame) for frame in frames if frame != ("0", "0", "0")]


def registers(log: str) -> dict[str, int]:
    """Registers per thread by mangled kernel name and architecture."""
    found = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'.*?Used (\d+) registers", log, re.DOTALL)
    return {f"{name} {architecture}": int(count) for name, architecture, count in found}


def nvcc(source: Path, *options: str) -> str:
    command = [NVCC, "-std=c++17", "-O3", *options, str(source)]
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout
    return result.stdout


@needs_nvcc
def test_local_memory_is_noticed(tmp_path: Path) -> None:
    """An array that is indexed at run time: the check below must be able to fail."""
    source = tmp_path / "wasteful.cu"
    source.write_text(
        "__global__ void kernel(float* x, int i) {\n"
        "  float v[64];\n  for (int j = 0; j < 64; ++j) v[i * j % 64] = x[j];\n  x[0] = v[i];\n}\n"
    )
    log = nvcc(source, "-arch=sm_90", "-Xptxas=-v", "-cubin", "-o", str(tmp_path / "wasteful.cubin"))
    assert wasteful(log)
    assert list(registers(log)) == ["_Z6kernelPfi sm_90"]


class Library(NamedTuple):
    """What pip and nvcc say of a build, the wheel, where it was built, and what nvcc had in between."""

    log: str
    wheel: Path
    tree: Path
    kept: Path


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The whole library through setup.py, against whatever torch is here."""
    folder = tmp_path_factory.mktemp("hopper")
    tree, kept = make_tree(folder), folder / "kept"
    kept.mkdir()
    shutil.copytree(SOURCES, tree / "csrc" / "cuda")
    flags = {"NVCC_APPEND_FLAGS": f"-Xptxas=-v -keep -keep-dir={kept}", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    flags |= {"AT_FUSED_CUDA": "1", "AT_FUSED_REQUIRE_EXTENSION": "1", "MAX_JOBS": "2"}
    result, wheel = build_wheel(tree, CXX=make_quick_compiler(folder), **flags)
    assert wheel is not None, result.stdout[-3000:]
    return Library(result.stdout, wheel, tree, kept)


def about(power: str, log: str) -> str:
    """What ptxas says of the kernels for this power."""
    parts = re.split("(?=Compiling entry function)", log)[1:]
    return "".join(part for part in parts if f"{len(power)}{power}E" in part.splitlines()[0])


@pytest.fixture(scope="module", params=["sm_80", "sm_90a", "sm_100"])
def power2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """What ptxas says of the kernels for p = 2 on an architecture, their machine code, and its name."""
    if request.param == "sm_90a":
        library = request.getfixturevalue("hopper")
        return about("Power2", library.log), library.kept / "power2.cubin", request.param
    cubin = tmp_path_factory.mktemp(request.param) / "power2.cubin"
    log = nvcc(SOURCES / "power2.cu", f"-arch={request.param}", "-Xptxas=-v", "-cubin", "-o", str(cubin))
    return log, cubin, request.param


@needs_nvcc
@pytest.mark.slow
def test_two_blocks_share_a_multiprocessor(power2: tuple[str, Path, str]) -> None:
    """No spills within the 72 registers that two blocks of 416 threads may have."""
    log, _, _ = power2
    assert wasteful(log) == []
    assert len(registers(log)) == 5
    assert max(registers(log).values()) <= 72


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    "power, architecture",
    [("2", "sm_75"), ("2", "sm_120"), ("1", "sm_100"), ("4", "sm_100"), ("_any", "sm_100")],
)
def test_no_spills_elsewhere(power: str, architecture: str, tmp_path: Path) -> None:
    """The other powers on Hopper are in its library, below."""
    cubin = str(tmp_path / "kernels.cubin")
    log = nvcc(SOURCES / f"power{power}.cu", f"-arch={architecture}", "-Xptxas=-v", "-cubin", "-o", cubin)
    assert wasteful(log) == []
    assert len(registers(log)) == 5


@needs_nvcc
@pytest.mark.skipif(NVDISASM is None, reason="needs nvdisasm, on the PATH or in Triton's package")
@pytest.mark.slow
def test_instructions_are_within_their_budget(power2: tuple[str, Path, str]) -> None:
    """Memory must limit the kernels: not the issue of instructions, nor fp64 where it is 64 times as slow."""
    _, cubin, architecture = power2
    listing = subprocess.run(
        [str(NVDISASM), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    counted: dict[str, float] = {}
    for name, kernel in sass.kernels(listing).items():
        added = ", added" if "backward_kernel" in name and "ELb1E" in name else ""
        for walk, cost in sass.budget(kernel).items():
            counted[walk + added] = max(cost, counted.get(walk + added, 0))
        if "loss_kernel" in name:
            assert 10 < sass.fp64(kernel) < 30, name
    assert set(counted) == {f"{dtype} {walk}" for dtype in ("bf16", "fp16", "fp32") for walk in INSTRUCTIONS}
    over = {
        walk: cost
        for walk, cost in counted.items()
        if cost > 1.1 * INSTRUCTIONS[walk.split(" ", 1)[1]][architecture]
    }
    assert not over
    assert min(counted.values()) > 6, "counts what it should: a load, four additions, the loop"


@needs_nvcc
@pytest.mark.slow
def test_accesses_are_16_bytes_wide_and_sums_ordered(hopper: Library) -> None:
    ptx = (hopper.kept / "power2.ptx").read_text()
    bodies = re.split(r"^\.visible \.entry ", ptx, flags=re.MULTILINE)[1:]
    kernels = {re.match(r"\w+", body)[0]: body for body in bodies}  # type: ignore[index]
    assert len(kernels) == 5  # maps, loss in two passes and in one, gradient without and with an addend
    wide = {"ld.global": r"ld\.global[.\w]*\.v4\.[bfu]32", "st.global": r"st\.global[.\w]*\.v4\.[bfu]32"}
    wide |= {"ld.shared": r"ld\.shared\.v4\.[bfu]32", "st.shared": r"st\.shared\.v4\.[bfu]32"}
    for name, body in kernels.items():
        one_pass = "loss_kernel" in name and "ELb1E" in name
        adds = "backward_kernel" in name and "ELb1E" in name
        has = {access: len(re.findall(pattern, body)) for access, pattern in wide.items()}
        # Three dtypes and two layouts, with 3 or 4 vectors in flight forward and 2 backward.
        backward = "backward" in name
        assert has["ld.global"] >= (24 if adds else 12 if backward else 18), (name, has)
        assert has["st.global"] >= 12 or not backward, (name, has)
        # What is staged is written, read and turned into the gradient as whole vectors.
        assert not one_pass or min(has["st.global"], has["ld.shared"], has["st.shared"]) >= 6, (name, has)
        # No atomic but the integer that finds the last block: sums don't depend on who comes first.
        atomics = re.findall(r"\b(?:atom|red)\.[.\w]*", body)
        assert all(atomic.endswith(("add.u32", "inc.u32")) for atomic in atomics), (name, atomics)
        assert bool(atomics) == ("loss_kernel" in name), (name, atomics)


@needs_nvcc
@pytest.mark.slow
def test_library_builds_for_hopper_without_spills(hopper: Library) -> None:
    log, wheel, tree, _ = hopper
    assert {"at_fused/_cpu.so", "at_fused/_cuda.so"} <= packaged(wheel)
    assert "arch=compute_90a,code=sm_90a" in log
    assert "arch=compute_80" not in log

    assert wasteful(log) == []
    used = registers(log)
    names = {f"{kernel} {power}" for kernel in KERNELS for power in POWERS}
    assert {f"{kernel} {power}" for kernel in KERNELS for power in POWERS for key in used
            if kernel in key and f"{len(power)}{power}E" in key} == names  # fmt: skip
    for name, count in used.items():  # two blocks of 416 threads share the 65536 registers
        assert count <= 72 or "PowerAny" in name, (name, count)

    library = tree / "at_fused" / "_cuda.so"
    exported = subprocess.run(["nm", "-DC", "--defined-only", str(library)], capture_output=True, text=True)
    assert not re.findall(r" T .*(?:cuda|at_fused)", exported.stdout)
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    assert "libtorch.so" in needed  # leads to libtorch_cuda.so
    assert not re.search(r"libcudart|libtorch_python|libpython", needed)

    # It registers its operators, and needs no GPU for it.
    stand_in = "" if torch.version.cuda else f"ctypes.CDLL({cuda_symbols(tree)!r}, mode=ctypes.RTLD_GLOBAL)\n"
    program = (
        f"import ctypes, torch\n{stand_in}torch.ops.load_library({str(library)!r})\n"
        "print(torch.ops.at_fused_cuda.attention_loss.default._schema)"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert "Tensor(e!) workspace" in loaded.stdout, loaded.stderr


def cuda_symbols(folder: Path) -> str:
    """A library in place of what only a CUDA build of torch has; such a build loads the real one."""
    source, library = folder / "stand_in.cpp", folder / "stand_in.so"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return str(library)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_cuda_library_is_built_where_it_is_of_use(
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tree / "csrc" / "cuda").mkdir()
    source = tree / "csrc" / "cuda" / "stub.cu"
    source.write_text("int broken( {\n")

    # This torch can't use it: not built, and nothing to say about it.
    result, wheel = build_wheel(tree)
    assert wheel is not None, result.stdout
    assert "at_fused/_cpu.so" in packaged(wheel)
    assert "at_fused/_cuda.so" not in packaged(wheel)
    assert lines_about_us(result.stdout) == []

    # Asked for and broken: the CPU kernels are installed all the same.
    result, wheel = build_wheel(tree, AT_FUSED_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert wheel is not None, result.stdout
    assert "at_fused/_cpu.so" in packaged(wheel)
    assert "at_fused/_cuda.so" not in packaged(wheel)
    (line,) = lines_about_us(result.stdout)
    assert line.startswith("at_fused: installing without CUDA kernels: csrc/cuda does not compile")

    # By default one binary runs on Turing to Blackwell, and later GPUs compile it for themselves.
    source.write_text("__global__ void kernel() {}\nvoid launch() { kernel<<<1, 1>>>(); }\n")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    result, wheel = build_wheel(tree, AT_FUSED_CUDA="1")
    assert wheel is not None, result.stdout
    assert "at_fused/_cuda.so" in packaged(wheel)
    codes = set(re.findall(r"code=((?:sm|compute)_\w+)", result.stdout))
    old = {"sm_75", "sm_80"}
    assert codes in (
        old | {"sm_90a", "sm_100", "compute_100", "sm_120"},
        old | {"sm_90", "compute_90"},
    )
    assert ctypes.CDLL(str(tree / "at_fused" / "_cuda.so"))


def test_missing_nvcc_is_an_error_only_on_request(tree: Path, tmp_path: Path) -> None:
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "cuda" / "stub.cu").write_text("__global__ void kernel() {}\n")
    program = (
        "import setuptools, runpy, pathlib, shutil, sys\n"
        "real = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda path: 'nvcc' not in str(path) and real(path)\n"
        "which = shutil.which\n"
        "shutil.which = lambda name, *rest: None if name == 'nvcc' else which(name, *rest)\n"
        "sys.argv = ['setup.py', 'build_ext', '--build-lib', 'out']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AT_FUSED_")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tree,
        env=environment | {"AT_FUSED_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("at_fused: AT_FUSED_CUDA is set and there is no nvcc")


# --- which memory layouts the kernels serve -----------------------------------------------------------


def orientations(x: torch.Tensor) -> set[str]:
    """Which dimensions of (B, C, *spatial) are contiguous; none where the positions are not evenly spaced."""
    positions = x.flatten(2) if x.numel() else x.reshape(*x.shape[:2], -1)
    if positions.data_ptr() != x.data_ptr():
        return set()  # flattening had to copy
    count, spacing = positions.shape[2], positions.stride(2)
    found = {"positions"} if count == 1 or spacing == 1 else set()
    return found | ({"channels"} if x.shape[1] == 1 or x.stride(1) == 1 else set())


def check_gradient(x: torch.Tensor) -> bool:
    """Where a feature is served, its gradient must be contiguous in the same dimension."""
    if not cuda.rows_are_contiguous(x):
        return False
    here, there = orientations(x), orientations(torch.empty_like(x))
    walked = (
        "channels"
        if here == {"channels"} or (x.shape[2:].numel() == 1 and "channels" in here)
        else "positions"
    )
    assert walked in here, (x.shape, x.stride())
    assert walked in there, (x.shape, x.stride(), torch.empty_like(x).stride())
    return True


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_layouts_that_are_served(layout) -> None:
    served = check_gradient(layout(torch.zeros(2, 3, 4, 5)))
    names = {"contiguous", "channels_last", "channels_first", "misaligned", "expanded_batch"}
    assert served == (layout.__name__ in names)


def test_gradients_of_any_view_that_is_served() -> None:
    draw = random.Random(0)
    served = 0
    for _ in range(5000):
        sizes = [draw.choice([1, 2, 3, 4]) for _ in range(draw.choice([3, 4, 5]))]
        x = torch.empty(sizes).permute(draw.sample(range(len(sizes)), len(sizes)))
        for dim in range(x.ndim):
            change = draw.random()
            if change < 0.15:
                x = x.narrow(dim, 0, max(1, x.shape[dim] - 1))
            elif change < 0.25:
                x = x.narrow(dim, 0, 1).expand([*x.shape[:dim], draw.choice([1, 2, 3]), *x.shape[dim + 1 :]])
            elif change < 0.3:
                x = x[(slice(None),) * dim + (slice(None, None, 2),)]
        served += check_gradient(x)
    assert served > 1000
