"""Builds csrc/ into plain shared libraries beside the Python files; everything else is in pyproject.toml.

The libraries register their operators with torch through its stable ABI and are loaded with
`torch.ops.load_library`: no Python module, no libpython, so one binary serves every Python and torch >= 2.10.
Without torch or a compiler the install succeeds as pure Python and one line says what is missing; the CUDA
kernels are built where torch was built for CUDA and there is nvcc.

AT_FUSED_NO_EXTENSION=1       do not build
AT_FUSED_REQUIRE_EXTENSION=1  fail where the build is impossible or breaks
AT_FUSED_CUDA=0, 1            never build the CUDA kernels; build them for a torch without CUDA, too
AT_FUSED_CPU=0                never build the CPU kernels
AT_FUSED_SANITIZE=address,undefined   build with these sanitizers, into the wheel only (make sanitize)
TORCH_CUDA_ARCH_LIST=list     GPU architectures, as torch's own extensions take them: "8.0;9.0a;10.0+PTX"
MAX_JOBS=n                    parallel compilations
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # reached under --no-build-isolation only
    raise SystemExit(
        f"at_fused: setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'"
    )

from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # expose only what torch 2.10 has, too


def libraries() -> list[Extension]:
    """One entry per library: the CPU kernels and the CUDA kernels."""
    os.chdir(ROOT)  # setuptools wants sources relative to setup.py
    sources = {name: sorted(glob(f"csrc/{name}/*.c*[pu]")) for name in ("cpu", "cuda")}  # .cpp and .cu
    return [Extension(f"at_fused._{name}", files, language="c++") for name, files in sources.items() if files]


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def what_is_missing() -> str | None:
    """Why the libraries cannot be built here and what to do about it, or None."""
    try:
        import torch
    except Exception as error:  # a broken torch raises more than ImportError
        return f"torch cannot be imported in this build ({error}); install torch"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        return f"torch {torch.__version__} is too old; install torch >= 2.10"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if sys.platform != "win32" and shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}); install one (apt install g++)"
    return None


def wants_cuda() -> bool:
    import torch

    return is_set("AT_FUSED_CUDA") if "AT_FUSED_CUDA" in os.environ else torch.version.cuda is not None


class Toolkit(NamedTuple):
    """A CUDA toolkit with nvcc (home/bin), headers and libraries."""

    home: Path
    include: Path
    libraries: list[Path]

    def ask(self, option: str) -> str:
        """What its nvcc prints."""
        return subprocess.run([self.home / "bin/nvcc", option], capture_output=True, text=True).stdout


# Where a toolkit has a machine's headers and libraries; conda's has them nowhere else.
TARGETS = {"x86_64": ["targets/x86_64-linux"], "aarch64": ["targets/sbsa-linux", "targets/aarch64-linux"]}


def cuda_toolkit() -> Toolkit | None:
    """The first complete toolkit of CUDA_HOME, CUDA_PATH, the nvcc on the PATH and /usr/local/cuda."""
    nvcc = shutil.which("nvcc")  # may be a link or a script that leads to the real one
    on_path = [Path(nvcc).resolve().parents[1], Path(nvcc).parents[1]] if nvcc else []
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in map(Path, [*named, *on_path, "/usr/local/cuda"]):
        roots = [home, *(home / target for target in TARGETS.get(platform.machine(), []))]
        for root in roots if (home / "bin/nvcc").exists() else []:
            if (root / "include/cuda_runtime.h").exists():
                libraries = [root / "lib64", root / "lib", home / "lib"]
                return Toolkit(home, root / "include", libraries)
    return None


def mismatch(toolkit: Toolkit) -> str | None:
    """Why the toolkit can't build for this torch: torch refuses a CUDA of another major version."""
    import torch

    found = re.search(r"release ((\d+)[.\d]*)", toolkit.ask("--version"))
    if found is None or torch.version.cuda is None or torch.version.cuda.split(".")[0] == found[2]:
        return None
    return (
        f"nvcc in {toolkit.home} is CUDA {found[1]} and torch {torch.__version__} is built for CUDA "
        f"{torch.version.cuda}: install a toolkit of torch's major version, or set CUDA_HOME to one"
    )


def default_architectures(toolkit: Toolkit) -> str:
    """Turing, Ampere (and Ada), Hopper and Blackwell, as far as nvcc knows them.

    Later GPUs compile code for themselves: that of 10.0, since 12.0's is of no use to 11.0.
    """
    known = toolkit.ask("--list-gpu-code").split()
    turing = "7.5;" if "sm_75" in known else ""
    return turing + ("8.0;9.0a;10.0+PTX;12.0" if "sm_120" in known else "8.0;9.0+PTX")


def build_id(architectures: str) -> str:
    """Of the CUDA library, in hexadecimal: the same for the same sources and architectures."""
    summary = hashlib.blake2b(architectures.encode(), digest_size=20)
    for path in sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.*"), ROOT / "setup.py"]):
        summary.update(f"{path.name}\n".encode() + path.read_bytes())
    return summary.hexdigest()


def is_current(library: Path, architectures: str) -> bool:
    """Whether the CUDA library was built from these sources, on whatever machine."""
    return library.exists() and bytes.fromhex(build_id(architectures)) in library.read_bytes()


class BuildLibraries(build_ext):
    """Builds with torch's BuildExtension (ninja), or leaves a pure-Python package: decided at build time."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # no Python ABI in the name: nothing in it needs Python

    def run(self) -> None:
        required = is_set("AT_FUSED_REQUIRE_EXTENSION")
        if is_set("AT_FUSED_NO_EXTENSION"):
            return self.leave_out("AT_FUSED_NO_EXTENSION is set")
        if missing := what_is_missing():
            if required:
                raise SystemExit(f"at_fused: {missing}")
            return self.leave_out(f"{missing}, then: pip install --no-build-isolation .")
        for library in list(self.extensions):
            if library.name == "at_fused._cuda" and not self.can_build_cuda(library):
                continue
            if library.name == "at_fused._cpu" and os.environ.get("AT_FUSED_CPU") == "0":
                self.forget(library)
                continue
            try:
                self.compile(library)
            except Exception as error:
                if required:
                    raise
                self.beside_the_source(library).unlink(missing_ok=True)
                self.leave_out(
                    f"{Path(library.sources[0]).parent} does not compile "
                    f"({(str(error) or repr(error)).splitlines()[0]}); to see why: "
                    "AT_FUSED_REQUIRE_EXTENSION=1 pip install -v --no-build-isolation .",
                    library,
                )

    def can_build_cuda(self, library: Extension) -> bool:
        """Whether the CUDA library can be built and is wanted; forgets it otherwise."""
        if wants_cuda() and not is_set("AT_FUSED_SANITIZE"):
            if toolkit := cuda_toolkit():
                obstacle = mismatch(toolkit)
                if obstacle and (is_set("AT_FUSED_CUDA") or is_set("AT_FUSED_REQUIRE_EXTENSION")):
                    raise SystemExit(f"at_fused: {obstacle}")
                if obstacle:
                    self.leave_out(obstacle, library)
                return obstacle is None
            if is_set("AT_FUSED_CUDA"):
                raise SystemExit(
                    "at_fused: AT_FUSED_CUDA is set and there is no nvcc: install a CUDA toolkit"
                )
            print("at_fused: no nvcc: GPUs are served by Triton alone", file=sys.stderr, flush=True)
        self.forget(library)
        return False

    def leave_out(self, reason: str, library: Extension | None = None) -> None:
        """Leaves a library out of the package, or all of them."""
        names = {"at_fused._cpu": "CPU", "at_fused._cuda": "CUDA"}
        kernels = names[library.name] if library else "compiled"
        print(f"at_fused: installing without {kernels} kernels: {reason}", file=sys.stderr, flush=True)
        for left_out in [library] if library else list(self.extensions):
            self.forget(left_out)

    def forget(self, library: Extension) -> None:
        self.built(library).unlink(missing_ok=True)  # left in build/ by an earlier build
        beside = self.beside_the_source(library)
        newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
        if beside.exists() and beside.stat().st_mtime < newest:  # must not answer for newer sources
            beside.unlink()
        self.extensions = [other for other in self.extensions if other is not library]
        self.distribution.ext_modules = self.extensions

    def compile(self, library: Extension) -> None:
        from torch.utils import cpp_extension

        sanitizers = os.environ.get("AT_FUSED_SANITIZE", "")
        flags = ["-fno-math-errno", "-fvisibility=hidden", STABLE_ABI]
        if sanitizers:
            flags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}"]
            flags += ["-fno-sanitize-recover=all"]
        else:
            flags += ["-O3", "-g0"]
        options: dict[str, Any] = {"include_dirs": ["csrc"]}
        options["extra_link_args"] = [f"-fsanitize={sanitizers}"] if sanitizers else []
        if library.name == "at_fused._cuda":
            toolkit = cuda_toolkit()
            cpp_extension.CUDA_HOME = str(toolkit.home)  # a torch without CUDA looks for none
            architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures(toolkit))
            options["include_dirs"].append(str(toolkit.include))
            options["extra_link_args"] += [f"-Wl,--build-id=0x{build_id(architectures)}"]
            # The runtime is linked in and not exported: one binary serves the torch of any CUDA release.
            options["library_dirs"] = [str(folder) for folder in toolkit.libraries]
            options["libraries"] = ["cudart_static", "dl", "rt", "pthread"]
            # libtorch.so, of which nothing is used, leads the loader to libtorch_cuda.so.
            options["extra_link_args"] += ["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch"]
        self.distribution.ext_modules = [
            cpp_extension.CppExtension(
                library.name,
                library.sources,
                extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden"]},
                py_limited_api=True,  # leaves libtorch_python out of the link
                **options,
            )
        ]
        builder = cpp_extension.BuildExtension(self.distribution)
        builder.get_ext_filename = self.get_ext_filename
        builder.build_lib = self.build_lib
        builder.build_temp = os.path.join("build", sanitizers.replace(",", "-") or "release", library.name)
        builder.force = True  # headers may have changed: ninja knows which sources these concern
        builder.ensure_finalized()
        try:
            builder.run()
        finally:
            self.distribution.ext_modules = self.extensions
        if sanitizers:
            return  # loads only into a process that preloads the sanitizers
        # A clone's root imports the source package, which needs it as well.
        beside_the_source = self.beside_the_source(library)
        fresh = beside_the_source.with_suffix(f".{os.getpid()}")
        shutil.copy2(self.built(library), fresh)
        fresh.replace(beside_the_source)  # in one step: running processes keep what they mapped

    def built(self, library: Extension) -> Path:
        return Path(self.build_lib, self.get_ext_filename(library.name))

    def beside_the_source(self, library: Extension) -> Path:
        return ROOT / self.get_ext_filename(library.name)

    def copy_extensions_to_source(self) -> None:
        """Done by `compile`, for every kind of install."""


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM with a library in it and py3-none-any without."""

    def run(self) -> None:
        self.run_command("build")  # decides whether there is a library
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform if self.distribution.has_ext_modules() else "any"


if __name__ == "__main__":
    setup(ext_modules=libraries(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
