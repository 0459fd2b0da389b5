"""What gets installed, with and without the compiled library."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from paths import ROOT
from wheels import WITHOUT_BUILDS, build_wheel, lines_about_us, packaged

import at_fused

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def test_import_brings_in_nothing_heavy() -> None:
    """Seconds of everybody's start: Dynamo, kernels and pictures come when they are used."""
    heavy = ["torch._dynamo", "sympy", "triton", "matplotlib", "torchvision", "trainer", "models"]
    code = f"import sys, torch, at_fused; print(set({heavy}) & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"


def build_distributions(folder: Path, **variables: str) -> tuple[Path, Path]:
    """`python -m build` on the real sources, without network: the sdist, and the wheel made from it."""
    pytest.importorskip("build")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("at_fused", "csrc"):
        shutil.copytree(ROOT / name, sources / name, ignore=WITHOUT_BUILDS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AT_FUSED_")}
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist"],
        cwd=sources,
        env=environment | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def install(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment with `wheel` in it; torch and the rest lie on its path."""
    venv.create(folder, symlinks=os.name != "nt")
    scripts = sysconfig.get_path("scripts", "venv", {"base": str(folder), "installed_base": str(folder)})
    python = Path(scripts) / Path(sys.executable).name
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*command, "--quiet"], check=True)
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", find], check=True, text=True, capture_output=True).stdout.strip()
    # Paths named in a .pth file come last, and .pth files there (an editable at_fused) do not count.
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def smoke(python: Path, folder: Path) -> list[str]:
    """Uses the installed package away from any checkout; the backends that it found."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(
        [python, ROOT / "tests/packaging/smoke.py"],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_pure_wheel_holds_the_package_and_nothing_else(tree: Path) -> None:
    result, wheel = build_wheel(tree, AT_FUSED_NO_EXTENSION="1")
    assert wheel is not None, result.stdout
    assert wheel.name == f"at_fused-{at_fused.__version__}-py3-none-any.whl"
    sources = {path.relative_to(tree).as_posix() for path in (tree / "at_fused").rglob("*.py")}
    assert packaged(wheel) == sources | {"at_fused/py.typed"}
    assert len(lines_about_us(result.stdout)) == 1


def test_version_is_stated_once() -> None:
    stated = [
        path.relative_to(ROOT).as_posix()
        for folder in ("at_fused", "models", "trainer", "benchmarks", "reproduce", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^__version__\s*=", path.read_text(), re.MULTILINE)
    ]
    assert stated == ["at_fused/__init__.py"]
    assert not re.search(r"^version\s*=\s*\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "version=" not in (ROOT / "setup.py").read_text()


def test_what_repeats_the_version_agrees() -> None:
    assert f"\nversion: {at_fused.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {at_fused.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@needs_compiler
@pytest.mark.slow
def test_wheel_with_the_library_serves_every_python(tree: Path) -> None:
    result, wheel = build_wheel(tree)
    assert wheel is not None, result.stdout
    assert re.fullmatch(rf"at_fused-{re.escape(at_fused.__version__)}-py3-none-(?!any).+\.whl", wheel.name)
    assert "at_fused/_cpu.so" in packaged(wheel)
    in_wheel = zipfile.ZipFile(wheel).read("at_fused/_cpu.so")
    assert b"answer" in in_wheel
    assert b"PyInit" not in in_wheel
    assert b"libtorch_python" not in in_wheel
    assert b"libpython" not in in_wheel
    # A clone runs from its root, so the library must lie beside the sources too.
    assert (tree / "at_fused" / "_cpu.so").read_bytes() == in_wheel
    assert lines_about_us(result.stdout) == []

    # The same tree, now told not to build: what the first build left behind must not slip in.
    result, wheel = build_wheel(tree, AT_FUSED_NO_EXTENSION="1")
    assert wheel is not None, result.stdout
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "at_fused/_cpu.so" not in packaged(wheel)


@needs_compiler
@pytest.mark.slow
def test_code_that_does_not_compile_fails_only_on_request(tree: Path) -> None:
    (tree / "csrc" / "cpu" / "stub.cpp").write_text("int broken( {\n")
    (tree / "at_fused" / "_cpu.so").write_bytes(b"built from older sources")
    result, wheel = build_wheel(tree)
    assert wheel is not None, result.stdout
    assert wheel.name.endswith("-py3-none-any.whl")
    (line,) = lines_about_us(result.stdout)
    assert "AT_FUSED_REQUIRE_EXTENSION=1 pip install -v" in line
    assert not (tree / "at_fused" / "_cpu.so").exists()

    result, wheel = build_wheel(tree, AT_FUSED_REQUIRE_EXTENSION="1")
    assert result.returncode != 0
    assert wheel is None


@pytest.mark.slow
def test_missing_compiler_is_named_in_one_line(tree: Path) -> None:
    result, wheel = build_wheel(tree, CXX="no-such-compiler")
    assert wheel is not None, result.stdout
    assert wheel.name.endswith("-py3-none-any.whl")
    (line,) = lines_about_us(result.stdout)
    assert "no-such-compiler" in line
    assert "install" in line

    result, wheel = build_wheel(tree, CXX="no-such-compiler", AT_FUSED_REQUIRE_EXTENSION="1")
    assert result.returncode != 0
    assert wheel is None


@pytest.mark.slow
def test_build_gives_a_pure_wheel_that_works(tmp_path: Path) -> None:
    sdist, wheel = build_distributions(tmp_path, AT_FUSED_NO_EXTENSION="1")
    assert sdist.name == f"at_fused-{at_fused.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        contents = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert sources | {"setup.py", "LICENSE", "README.md", "at_fused/py.typed"} <= contents
    assert not any(name.endswith(".so") for name in contents)
    assert wheel.name.endswith("-py3-none-any.whl")
    backends = smoke(install(wheel, tmp_path / "environment"), tmp_path)
    assert backends[-1] == "reference"
    assert not {"cpu", "cuda"} & set(backends)


@needs_compiler
@pytest.mark.slow
def test_build_gives_a_wheel_with_the_library_that_works(tmp_path: Path, quick_compiler: str) -> None:
    variables = {"AT_FUSED_REQUIRE_EXTENSION": "1", "AT_FUSED_CUDA": "0", "CXX": quick_compiler}
    _, wheel = build_distributions(tmp_path, **variables)
    assert not wheel.name.endswith("-any.whl")
    assert "cpu" in smoke(install(wheel, tmp_path / "environment"), tmp_path)


def test_package_is_typed() -> None:
    assert (ROOT / "at_fused" / "py.typed").is_file()


def test_package_works_without_the_library(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "at_fused", tmp_path / "at_fused", ignore=WITHOUT_BUILDS)
    program = """
import pathlib, torch, at_fused
assert pathlib.Path(at_fused.__file__).parent.parent == pathlib.Path.cwd(), at_fused.__file__
assert at_fused.available_backends() == ("reference",), at_fused.available_backends()
feature = torch.randn(2, 3, 4, 4, requires_grad=True)
at_fused.attention_loss(feature, torch.randn(2, 5, 4, 4)).backward()
assert feature.grad.abs().sum() > 0
try:
    at_fused.attention_loss(feature, feature, backend="cpu")
except Exception as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert "cpu" in result.stdout
    assert len(result.stdout.splitlines()) == 1
