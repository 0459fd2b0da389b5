"""Launches of the Triton backend, through Triton's own launcher to a driver that only listens."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import cases
import pytest
import torch
from paths import ROOT

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
LIBRARY = str(ROOT / "tests/library")  # check_triton takes its features from test_triton


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver that does more than listen")
@pytest.mark.skipif(cases.INTERPRETED, reason="the interpreter launches nothing")
@pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="Triton needs Python's headers"
)
def test_launches(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{library.name}", "-o", library]
    subprocess.run([*command, HERE / "libcuda.c"], check=True)
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, [LIBRARY, os.environ.get("PYTHONPATH")])),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "DISABLE_LLVM_OPT": "1",  # nothing runs what is compiled
        "DISABLE_PTXAS_OPT": "1",
    }
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            HERE / "check_triton.py",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout
