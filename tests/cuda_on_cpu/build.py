"""Builds the CUDA sources with g++ against the SIMT host layer of this folder, into build/simt.

    python tests/cuda_on_cpu/build.py TARGET [SANITIZERS]    # prints the path of what it built

Only the declarations of shared memory, which no header can give a meaning, are rewritten on the way.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]  # a script, too: no helpers
BUILD = ROOT / "build" / "simt"

KERNELS = [f"csrc/cuda/power{p}.cu" for p in ("1", "2", "4", "_any")]
PROGRAMS = {
    "layer_driver": ["tests/cuda_on_cpu/layer_driver.cpp"],
    "attention_driver": ["tests/cuda_on_cpu/attention_driver.cpp", *KERNELS],
}
LIBRARIES = {
    "simt_layer": ["tests/cuda_on_cpu/layer.cpp"],  # a Python module
    "simt_cuda": ["csrc/cuda/ops.cpp", "tests/cuda_on_cpu/device.cpp", *KERNELS],  # operators of torch
}
TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000 -include torch_on_cpu.h"

# `extern __shared__ T name[];` and `__shared__ T name[n];`, one name each, inside a function.
DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?(\w[\w: ]*?)\s+(\w+)\[\];")
STATIC = re.compile(r"(?<!extern )__shared__\s+([\w:]+(?:<[^;]*?>)?)\s+(\w+)((?:\[[^;]*?\])*);")

THREADS = re.compile(r"constexpr int threads = \d+;")


def rewritten(source: str) -> str:
    source = DYNAMIC.sub(r"auto* \2 = static_cast<\1*>(simt::dynamic_shared());", source)
    return STATIC.sub(r"auto& \2 = simt::shared<\1\3>([] {});", source)


def write(path: Path, text: str) -> None:
    """Leaves an unchanged file's date alone."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def mirror_sources(folder: Path, few_threads: bool) -> None:
    """Copies csrc and this folder to `folder`; device code (.cuh) is rewritten.

    ThreadSanitizer takes a megabyte per thread: it gets blocks of `few_threads`.
    """
    for path in [*ROOT.glob("csrc/**/*.*"), *HERE.glob("**/*.*")]:
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            text = path.read_text()
            text = rewritten(text) if path.suffix == ".cuh" else text
            text = THREADS.sub("constexpr int threads = 96;", text) if few_threads else text
            relative = path.relative_to(ROOT)
            write(folder / relative, f'#line 1 "{relative}"\n{text}')


def ninja_file(sanitizers: str) -> str:
    """Paths are quoted for the shell, and those of the sources relative to the folder."""
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [
        "source/tests/cuda_on_cpu/include",
        "source/tests/cuda_on_cpu",
        "source/csrc",
        pybind11.get_include(),
        sysconfig.get_paths()["include"],
        *include_paths(),
    ]
    sanitize = f"-fsanitize={sanitizers} -fno-sanitize-recover=all" if sanitizers else ""
    # ThreadSanitizer must not watch the engine, which stands for the hardware.
    engine = "-DSIMT_TSAN" if sanitizers == "thread" else sanitize
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "flags = -std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas "
        + " ".join(shlex.quote(f"-I{path}") for path in includes),
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -x c++ -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx {sanitize} $extra $in $libraries -o $out",
        "build engine.o: compile source/tests/cuda_on_cpu/engine.cpp",
        f"  extra = {engine}",
    ]
    targets = PROGRAMS | LIBRARIES
    for unit in sorted({unit for units in targets.values() for unit in units}):
        torch = TORCH if unit.endswith(("ops.cpp", "device.cpp")) else ""
        lines += [f"build {unit}.o: compile source/{unit}", f"  extra = {sanitize} {torch}"]
    torch_libraries = (
        " ".join(shlex.quote(f"-L{path}") for path in library_paths()) + " -ltorch -ltorch_cpu -lc10"
    )
    for name, units in targets.items():
        libraries = torch_libraries if name == "simt_cuda" else ""
        objects = " ".join(f"{unit}.o" for unit in units)
        lines += [f"build {output(name)}: link engine.o {objects}"]
        lines += [f"  extra = {'-shared' if name in LIBRARIES else ''}", f"  libraries = {libraries}"]
    return "\n".join(lines) + "\n"


def output(target: str) -> str:
    return f"{target}.so" if target in LIBRARIES else target


def build(target: str, sanitizers: str = "") -> Path:
    """Brings a target up to date; raises RuntimeError with the compiler's messages."""
    folder = BUILD / (sanitizers.replace(",", "-") or "release")
    folder.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mirror_sources(folder / "source", few_threads=sanitizers == "thread")
        write(folder / "build.ninja", ninja_file(sanitizers))
        command = [sys.executable, "-m", "ninja", "--quiet", "-C", str(folder), "-j2", output(target)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stdout[:4000] + result.stderr)
    return folder / output(target)


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
