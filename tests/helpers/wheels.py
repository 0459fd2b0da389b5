"""Builds of the package as a wheel, and what is in it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

WITHOUT_BUILDS = shutil.ignore_patterns("*.so", "__pycache__")
STUB = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path)


def make_tree(folder: Path) -> Path:
    """A clean copy of what the build reads, with a C++ source that compiles in a moment."""
    copy = folder / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "at_fused", copy / "at_fused", ignore=WITHOUT_BUILDS)
    (copy / "csrc" / "cpu").mkdir(parents=True)
    (copy / "csrc" / "cpu" / "stub.cpp").write_text(STUB)
    for folder in ("models", "trainer", "benchmarks", "reproduce", "tests"):  # must stay out of the wheel
        (copy / folder).mkdir()
        (copy / folder / "__init__.py").touch()
    return copy


@pytest.fixture
def quick_compiler(tmp_path: Path) -> str:
    return make_quick_compiler(tmp_path)


def make_quick_compiler(folder: Path) -> str:
    """For builds of which it does not matter how fast their kernels are."""
    script = folder / "c++"
    script.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def build_wheel(tree: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], Path | None]:
    """Builds without network and returns pip's result and the wheel, if there is one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AT_FUSED_") and k != "CXX"}
    shutil.rmtree(tree / "wheels", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "--no-index", "-w", "wheels", "."],
        cwd=tree,
        env=environment | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return result, next((tree / "wheels").glob("*.whl"), None)


def packaged(wheel: Path) -> set[str]:
    """The files in a wheel, its own metadata aside."""
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def lines_about_us(output: str) -> list[str]:
    return re.findall(r"^ *(at_fused: .*)$", output, re.MULTILINE)
