"""Which CUDA toolkit setup.py takes, for which GPUs, and how a library is known to be of these sources."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT
from wheels import build_wheel, lines_about_us, packaged

CODES = {
    "13.0": "sm_75 sm_80 sm_90 sm_100 sm_120",
    "12.4": "sm_60 sm_75 sm_80 sm_90",
    "14.9": "sm_80 sm_90 sm_120",
}
TARGET = "targets/sbsa-linux" if platform.machine() == "aarch64" else "targets/x86_64-linux"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """setup.py's functions, in an environment without a toolkit of its own."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))


def make_toolkit(home: Path, headers: str = "include", version: str = "13.0") -> Path:
    """A toolkit that answers questions and compiles nothing."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin/nvcc"
    nvcc.write_text(
        f'#!/bin/sh\ncase "$1" in\n--version) echo "Cuda compilation tools, release {version}, V1";;\n'
        f'--list-gpu-code) printf "%s\\n" {CODES[version]};;\n*) exit 1;;\nesac\n'
    )
    nvcc.chmod(0o755)
    (home / headers).mkdir(parents=True)
    (home / headers / "cuda_runtime.h").touch()
    return home


def test_the_toolkit_of_a_conda_environment(
    setup: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc is on the PATH, headers and libraries are in targets/MACHINE, beside those of other machines."""
    conda = make_toolkit(tmp_path / "conda", f"{TARGET}/include")
    for other in ("ppc64le-linux", "a-linux"):
        (conda / f"targets/{other}/include").mkdir(parents=True)
        (conda / f"targets/{other}/include/cuda_runtime.h").touch()
    monkeypatch.setenv("PATH", f"{conda / 'bin'}:{os.environ['PATH']}")
    toolkit = setup.cuda_toolkit()
    assert (toolkit.home, toolkit.include) == (conda, conda / TARGET / "include")
    assert conda / TARGET / "lib" in toolkit.libraries


def test_the_first_whole_toolkit_is_taken(
    setup: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, linked = make_toolkit(tmp_path / "named"), make_toolkit(tmp_path / "linked")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").symlink_to(linked / "bin/nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert setup.cuda_toolkit().home == linked
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert setup.cuda_toolkit().home == named
    (named / "include/cuda_runtime.h").unlink()  # nvcc alone builds nothing
    assert setup.cuda_toolkit().home == linked


@pytest.mark.parametrize(
    "version, architectures",
    [("13.0", "7.5;8.0;9.0a;10.0+PTX;12.0"), ("12.4", "7.5;8.0;9.0+PTX"), ("14.9", "8.0;9.0a;10.0+PTX;12.0")],
)
def test_architectures_are_those_that_nvcc_knows(
    version: str, architectures: str, setup: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda", version=version)))
    assert setup.default_architectures(setup.cuda_toolkit()) == architectures


def test_a_cuda_of_another_major_version_is_told_in_one_line(
    tree: Path, tmp_path: Path, quick_compiler: str, setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/stub.cu").write_text("__global__ void kernel() {}\n")
    home = make_toolkit(tmp_path / "cuda", version="12.4")
    program = (
        "import runpy, sys, torch\ntorch.version.cuda = '13.0'\n"
        "sys.argv = ['setup.py', 'build_ext', '--build-lib', 'out']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )

    def build(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AT_FUSED_")}
        environment |= {"CUDA_HOME": str(home), "CXX": quick_compiler, "AT_FUSED_CPU": "0"}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=tree, env=environment | variables, capture_output=True, text=True)

    sentence = (
        f"nvcc in {home} is CUDA 12.4 and torch {torch.__version__} is built for CUDA 13.0: "
        "install a toolkit of torch's major version, or set CUDA_HOME to one"
    )
    result = build()
    assert result.returncode == 0, result.stderr
    assert lines_about_us(result.stderr) == [f"at_fused: installing without CUDA kernels: {sentence}"]
    for variable in ("AT_FUSED_CUDA", "AT_FUSED_REQUIRE_EXTENSION"):
        result = build(**{variable: "1"})
        assert result.returncode == 1
        assert lines_about_us(result.stderr) == [f"at_fused: {sentence}"]

    monkeypatch.setenv("CUDA_HOME", str(home))
    toolkit = setup.cuda_toolkit()
    for cuda, fits in (("12.8", True), ("13.0", False), (None, True)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert (setup.mismatch(toolkit) is None) == fits


def test_cpu_kernels_can_be_left_out(tree: Path) -> None:
    result, wheel = build_wheel(tree, AT_FUSED_CPU="0", AT_FUSED_CUDA="0")
    assert wheel is not None, result.stdout
    assert packaged(wheel).isdisjoint({"at_fused/_cpu.so", "at_fused/_cuda.so"})
    assert lines_about_us(result.stdout) == []


# --- a library that was built elsewhere ---------------------------------------------------------------


@pytest.fixture
def in_tree(tree: Path) -> Callable[[str], Any]:
    """A function of the tree's own setup.py, by name."""
    for name in ("cuda", "cuda/plan.h", "cuda/stub.cu"):
        path = tree / "csrc" / name
        path.touch() if path.suffix else path.mkdir()
    functions = runpy.run_path(str(tree / "setup.py"), run_name="setup")
    return functions.__getitem__


def test_a_build_id_is_that_of_sources_and_architectures(tree: Path, in_tree: Callable[[str], Any]) -> None:
    build_id = in_tree("build_id")
    first = build_id("9.0a")
    assert len(bytes.fromhex(first)) == 20
    os.utime(tree / "csrc/cuda/stub.cu", (0, 0))  # a copy of another age is the same
    (tree / "csrc/cpu/stub.cpp").write_text("// the CPU's\n")
    assert build_id("9.0a") == first
    assert build_id("8.0") != first
    (tree / "csrc/cuda/plan.h").write_text("// changed\n")
    assert build_id("9.0a") != first


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(sys.platform != "linux", reason="build ids are ELF's")
@pytest.mark.slow
def test_a_library_names_its_sources(tree: Path, in_tree: Callable[[str], Any]) -> None:
    is_current, library = in_tree("is_current"), tree / "at_fused/_cuda.so"
    assert not is_current(library, "9.0")
    source = tree / "csrc/cuda/stub.cu"
    source.write_text("__global__ void kernel() {}\nvoid launch() { kernel<<<1, 1>>>(); }\n")
    result, _ = build_wheel(tree, AT_FUSED_CUDA="1", AT_FUSED_CPU="0", TORCH_CUDA_ARCH_LIST="9.0")
    assert is_current(library, "9.0"), result.stdout
    assert not is_current(library, "8.0")
    source.write_text("// newer\n")
    assert not is_current(library, "9.0")
