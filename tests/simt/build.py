"""Builds the CUDA sources with g++ against the SIMT host layer of this folder, into build/simt.

    python tests/simt/build.py TARGET [SANITIZERS]    # prints the path of what it built

Only the declarations of shared memory, which no header can give a meaning, are rewritten on the way.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "simt"

PROGRAMS = {"layer_driver": ["layer_driver.cpp"]}
MODULES = {"simt_layer": ["layer.cpp"]}

# `extern __shared__ T name[];` and `__shared__ T name[n];`, one name each, inside a function.
DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?(\w[\w: ]*?)\s+(\w+)\[\];")
STATIC = re.compile(r"(?<!extern )__shared__\s+([\w:]+(?:<[^;]*?>)?)\s+(\w+)((?:\[[^;]*?\])*);")


def rewritten(source: str) -> str:
    source = DYNAMIC.sub(r"auto* \2 = static_cast<\1*>(simt::dynamic_shared());", source)
    return STATIC.sub(r"auto& \2 = simt::shared<\1\3>([] {});", source)


def write(path: Path, text: str) -> None:
    """Leaves an unchanged file's date alone."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def mirror_sources() -> None:
    """Copies csrc and this folder to build/simt/source; device code (.cuh) is rewritten."""
    for path in [*ROOT.glob("csrc/**/*.*"), *HERE.glob("**/*.*")]:
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            text = path.read_text()
            text = rewritten(text) if path.suffix == ".cuh" else text
            relative = path.relative_to(ROOT)
            write(BUILD / "source" / relative, f'#line 1 "{relative}"\n{text}')


def ninja_file(sanitizers: str) -> str:
    import pybind11

    layer = BUILD / "source" / HERE.relative_to(ROOT)
    includes = [
        layer / "include",
        BUILD / "source" / "csrc",
        pybind11.get_include(),
        sysconfig.get_paths()["include"],
    ]
    sanitize = f"-fsanitize={sanitizers} -fno-sanitize-recover=all" if sanitizers else ""
    # ThreadSanitizer must not watch the engine, which stands for the hardware.
    engine = "-DSIMT_TSAN" if sanitizers == "thread" else sanitize
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "flags = -std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas "
        + " ".join(f"-I{path}" for path in includes),
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx {sanitize} $extra $in -o $out",
        f"build engine.o: compile {layer}/engine.cpp",
        f"  extra = {engine}",
    ]
    for name, sources in (PROGRAMS | MODULES).items():
        objects = [f"{source}.o" for source in sources]
        for source, compiled in zip(sources, objects, strict=True):
            lines += [f"build {compiled}: compile {layer}/{source}", f"  extra = {sanitize}"]
        lines += [f"build {output(name)}: link engine.o {' '.join(objects)}"]
        lines += ["  extra = -shared"] if name in MODULES else []
    return "\n".join(lines) + "\n"


def output(target: str) -> str:
    return f"{target}.so" if target in MODULES else target


def build(target: str, sanitizers: str = "") -> Path:
    """Brings a target up to date; raises RuntimeError with the compiler's messages."""
    folder = BUILD / (sanitizers.replace(",", "-") or "release")
    folder.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mirror_sources()
        write(folder / "build.ninja", ninja_file(sanitizers))
        command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j2", output(target)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stdout[:4000] + result.stderr)
    return folder / output(target)


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
