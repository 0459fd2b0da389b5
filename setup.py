"""Builds csrc/ into plain shared libraries beside the Python files; everything else is in pyproject.toml.

The libraries register their operators with torch through its stable ABI and are loaded with
`torch.ops.load_library`: no Python module, no libpython, so one binary serves every Python and torch >= 2.10.
Without torch or a compiler the install succeeds as pure Python and one line says what is missing.

AT_FUSED_NO_EXTENSION=1       do not build
AT_FUSED_REQUIRE_EXTENSION=1  fail where the build is impossible or breaks
AT_FUSED_SANITIZE=address,undefined   build with these sanitizers, into the wheel only (make sanitize)
MAX_JOBS=n                    parallel compilations
"""

import os
import shutil
import sys
from glob import glob
from pathlib import Path

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
    """One entry per library; a CUDA one (`at_fused._cuda`, csrc/cuda) joins here, to be built with nvcc."""
    os.chdir(ROOT)  # setuptools wants sources relative to setup.py
    sources = sorted(glob("csrc/cpu/*.cpp"))
    return [Extension("at_fused._cpu", sources, language="c++")] if sources else []


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
        try:
            self.compile()
        except Exception as error:
            if required:
                raise
            for library in self.extensions:  # an older one must not answer for newer sources
                (ROOT / self.get_ext_filename(library.name)).unlink(missing_ok=True)
            self.leave_out(
                f"csrc does not compile ({(str(error) or repr(error)).splitlines()[0]}); to see why: "
                "AT_FUSED_REQUIRE_EXTENSION=1 pip install -v --no-build-isolation ."
            )

    def leave_out(self, reason: str) -> None:
        """Turns what is being built into a pure-Python package."""
        print(f"at_fused: installing without the CPU kernel: {reason}", file=sys.stderr, flush=True)
        for library in self.extensions:
            self.built(library).unlink(missing_ok=True)  # left in build/ by an earlier build
        self.extensions = self.distribution.ext_modules = []

    def compile(self) -> None:
        from torch.utils.cpp_extension import BuildExtension, CppExtension

        sanitizers = os.environ.get("AT_FUSED_SANITIZE", "")
        flags = ["-fno-math-errno", "-fvisibility=hidden", STABLE_ABI]
        if sanitizers:
            flags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}"]
            flags += ["-fno-sanitize-recover=all"]
        else:
            flags += ["-O3", "-g0"]
        self.distribution.ext_modules = [
            CppExtension(
                library.name,
                library.sources,
                include_dirs=["csrc"],
                extra_compile_args={"cxx": flags},
                extra_link_args=[f"-fsanitize={sanitizers}"] if sanitizers else [],
                py_limited_api=True,  # leaves libtorch_python out of the link
            )
            for library in self.extensions
        ]
        builder = BuildExtension(self.distribution)
        builder.get_ext_filename = self.get_ext_filename
        builder.build_lib = self.build_lib
        builder.build_temp = os.path.join("build", sanitizers.replace(",", "-") or "release")
        builder.ensure_finalized()
        builder.run()
        if sanitizers:
            return  # loads only into a process that preloads the sanitizers
        for library in self.extensions:  # a clone's root imports the source package, which needs it as well
            beside_the_source = ROOT / self.get_ext_filename(library.name)
            fresh = beside_the_source.with_suffix(f".{os.getpid()}")
            shutil.copy2(self.built(library), fresh)
            fresh.replace(beside_the_source)  # in one step: running processes keep what they mapped

    def built(self, library: Extension) -> Path:
        return Path(self.build_lib, self.get_ext_filename(library.name))

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


setup(ext_modules=libraries(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
