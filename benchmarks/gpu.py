"""What is measured and tested on a GPU, in pieces, the most important first: `make gpu RESULTS=DIR`.

The same command continues where the last one ended. It fetches nothing: it uses the CUDA library in place if
that was built from these sources for this GPU; else it measures Triton first, and then builds the library.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from at_fused._files import write_atomically
from at_fused._terminal import lenient_output
from at_fused.visualize.paths import user_path
from benchmarks import plots, predictions, report
from benchmarks.loss import tables as loss_tables
from benchmarks.pieces import ROOT, Piece, Record, run_missing
from benchmarks.report import Row, Table
from benchmarks.suites import loss as loss_suite

FIRST_S = 60.0  # limit of a first measurement, so that the next piece starts in time
FEW = ("--workloads", "imagenet", "cifar")


def pieces(results: Path, device: str, quick: bool, cifar: Path | None, has_library: bool) -> list[Piece]:
    """The pieces, the most important first, without tests and sanitizers that need no GPU."""
    python = sys.executable
    common = [python, "-m", "benchmarks", "--device", device, *(["--quick"] if quick else [])]

    def suite(
        name: str, suite: str, *options: str, limit_s: float = 470, obstacle: str | None = None
    ) -> Piece:
        command = [*common, "--suite", suite, "--resume", "--out", str(results / name), *options]
        return Piece(name, command, limit_s=limit_s, obstacle=obstacle)

    def loss(name: str, *options: str, **others: Any) -> Piece:
        return suite(f"loss-{name}", "loss", *options, **others)

    def first(name: str, *ours: str) -> Piece:
        graphs = ("--timings", "graph", "--modes", "both", "--providers", *ours, "authors-autocast")
        as_called = ("--providers", "ours", "authors")
        return loss(name, *FEW, *(graphs if device == "cuda" else as_called), limit_s=FIRST_S)

    def test(name: str, *options: str, obstacle: str | None = None) -> Piece:
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        return Piece(f"test-{name}", [python, "-m", "pytest", "-q", *options, *workers], obstacle=obstacle)

    def sanitizer(tool: str) -> Piece:
        few = [
            "--batch",
            "2",
            "--providers",
            "ours",
            "--dtypes",
            "bf16",
            "fp32",
            "--workloads",
            "cifar",
            "imagenet",
            "vit",
        ]
        small = [*common, "--suite", "memory", "--out", str(results / tool), *few]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else neighbours in a block hide an overrun
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", *small]
        obstacle = None if shutil.which(command[0]) else f"{command[0]} is not installed"
        return Piece(tool, command, uncached, obstacle=obstacle)

    cuda = first("first-cuda", "ours-cuda", "ours-cuda-two-pass")
    triton = first("first-triton", "ours-triton")
    device_test = test("cuda_device", "tests/library/test_cuda_device.py")
    numbers = [
        f"tests/library/test_{name}.py" for name in ("attention_loss", "attention_map", "compositions")
    ]
    hot = [python, "-m", "pytest", "-q", "benchmarks", "--benchmark-only"]
    lacks = None if importlib.util.find_spec("pydantic") else "pydantic is not installed"
    return [
        *([cuda, device_test, triton] if has_library else [triton, _build(python), cuda, device_test]),
        test("cuda", *numbers[:2], "-k", "cuda"),
        loss("imagenet", "--workloads", "imagenet", "imagenet-last2"),
        loss("cifar", "--workloads", "cifar", "cifar40"),
        suite("step", "step"),
        *map(sanitizer, ("memcheck", "racecheck")),
        test("triton", *numbers[:2], "-k", "triton"),
        loss("imagenet50", "--workloads", "imagenet50", "imagenet50-last2"),
        loss("blocks", "--workloads", "cifar-blocks", "cifar40-blocks", "vit"),
        suite("memory", "memory", *FEW),
        suite("trainer", "trainer", *(["--cifar", str(cifar)] if cifar else []), obstacle=lacks),
        loss("fp32", *FEW, "--dtypes", "fp32"),
        loss("fp16", *FEW, "--dtypes", "fp16"),
        loss("powers", *FEW, "--p", "1", "4", "--modes", "both"),
        test("compositions", numbers[2], "-k", "cuda or triton"),
        test("properties", "tests/library/test_properties.py"),
        test("stress", "tests/library/test_stress.py", "-k", "cuda or triton"),
        test("trainer", "tests/trainer/test_trainer.py", "tests/trainer/test_methods.py", obstacle=lacks),
        suite("scaling", "scaling", "--providers", "authors", "vecdot", "compile", "ours"),
        Piece("hot-cells", [*hot, f"--benchmark-json={results / 'hot-cells.json'}"]),
    ]


def _build(python: str) -> Piece:
    settings = {"AT_FUSED_REQUIRE_EXTENSION": "1", "AT_FUSED_CUDA": "1", "AT_FUSED_CPU": "0"}
    settings |= {"TORCH_CUDA_ARCH_LIST": architecture(), "MAX_JOBS": str(os.cpu_count())}
    return Piece("build", [python, "setup.py", "build_ext"], settings)


def architecture() -> str:
    """The architecture of this machine's GPU, to compile for it alone: each one takes a minute."""
    if not torch.cuda.is_available():
        return "9.0a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def has_library() -> bool:
    """Whether the CUDA library in place was built from these sources for this GPU, here or elsewhere."""
    try:
        setup = importlib.import_module("setup")
    except (ImportError, SystemExit):  # setuptools are missing, or too old
        return False
    return bool(setup.is_current(ROOT / "at_fused" / "_cuda.so", architecture()))


def source_digest() -> str:
    """A digest of all sources that are built, tested and measured."""
    summary = hashlib.blake2b(digest_size=8)
    folders = ("at_fused", "csrc", "models", "trainer", "recipes", "tests", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    files += [ROOT / name for name in ("setup.py", "pyproject.toml", "train.py")]
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh", ".yaml", ".toml"}
    for path in sorted(path for path in files if path.suffix in kinds):
        summary.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return summary.hexdigest()


def unpack_wheels(folder: Path, site: Path) -> None:
    """Make the packages of the wheels in `folder` importable, here and in the pieces.

    Raises:
        ValueError: there are none.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"--wheels {folder}: no *.whl there")
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(site)
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    importlib.invalidate_caches()


# --- summary ----------------------------------------------------------------------------------------


def loss_rows(measured: Path, todo: Sequence[Piece], device: str) -> tuple[list[Row], dict[str, Any] | None]:
    """The rows of every cell that a piece has measured, finished or not, and the machine."""
    rows: dict[tuple[Any, ...], Row] = {}
    machine = None
    for piece in todo:
        content = report.read(measured / piece.name, f"loss-{device}")
        for row in content.get("rows", []):
            rows[tuple(row[key] for key in ("cell", "batch", "mode", "timing", "provider"))] = row
        machine = content.get("machine", machine)
    return list(rows.values()), machine


def summarize(
    results: Path, measured: Path, todo: Sequence[Piece], device: str, states: dict[str, str]
) -> None:
    """Write the cells of all loss pieces into DIR/loss-DEVICE.*, and their times into DIR/summary.md."""
    rows, machine = loss_rows(measured, todo, device)
    if machine:
        loss_suite.page(rows, draws=False).write(results, f"loss-{device}", rows, machine)
    tables = [Table("Pieces", ["piece", "state"], [[name, state] for name, state in states.items()])]
    tables += [loss_tables.times_table(heading, group) for heading, group in loss_tables.groups(rows).items()]
    page = report.markdown("GPU run", machine, tables)
    write_atomically(results / "summary.md", page.encode())


def draw(results: Path, measured: Path, todo: Sequence[Piece], device: str) -> None:
    """Write the picture of all losses, and the measured figures beside the predictions."""
    rows, machine = loss_rows(measured, todo, device)
    if machine:
        plots.times_floor(loss_tables.main_group(rows), results / f"loss-{device}.png", machine)
    for path in measured.glob(f"*/*-{device}.*"):
        if not path.name.startswith("loss-"):
            shutil.copy(path, results)
    if list(results.glob("*-cuda.json")):
        predictions.main(["--out", str(results), "--measured", str(results)])


# --- command line -----------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--results", type=user_path, required=True, help="folder for results and logs")
    parser.add_argument(
        "--archive",
        type=user_path,
        metavar="FILE",
        help="also keep all of it in this .tar.gz, up to date within seconds; fills an empty folder",
    )
    parser.add_argument("--budget", type=float, metavar="S", help="end within so many seconds")
    parser.add_argument(
        "--wheels", type=user_path, metavar="DIR", help="wheels of packages that are missing here"
    )
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="only these pieces")
    parser.add_argument("--list", action="store_true", help="print every piece and whether it is done")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that would run")
    parser.add_argument("--summarize", action="store_true", help="only write the summary of what is there")
    parser.add_argument("--device", default="cuda", help="cpu: to try the pieces without a GPU")
    parser.add_argument(
        "--cifar", type=user_path, metavar="DIR", help="has cifar-10-batches-py (default: digits)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny batches, few rounds")
    return parser.parse_args(argv)


@lenient_output()
def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        return run(options)
    except (OSError, ValueError) as error:
        what = f"--results {options.results}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"gpu: {what}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    results = options.results.resolve()
    record = Record(results, source_digest(), options.archive and options.archive.resolve())
    measured = results / "pieces" / record.sources
    site = tempfile.TemporaryDirectory()
    if options.wheels:
        unpack_wheels(options.wheels.resolve(), Path(site.name))
    cifar = options.cifar and options.cifar.resolve()
    todo = pieces(measured, options.device, options.quick, cifar, has_library())
    names = [piece.name for piece in todo]
    if wrong := sorted(set(options.only or ()) - set(names)):
        raise ValueError(f"no piece {wrong[0]!r}; there are: {', '.join(names)}")
    selected = [piece for piece in todo if not options.only or piece.name in options.only]
    if options.list or options.dry_run:
        for piece in selected:
            if options.list:
                print(f"{piece.name:24} {record.state(piece)}")
            elif record.state(piece) == "not run":
                print(piece.describe())
        return 0
    if options.device == "cuda" and not options.summarize and not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA device that torch can use")
    record.create()
    measured.mkdir(parents=True, exist_ok=True)

    def summary(states: dict[str, str]) -> None:
        everything = {piece.name: record.state(piece) for piece in todo} | states
        try:
            summarize(results, measured, todo, options.device, everything)
        except Exception as error:  # a table must not cost the time on the device
            print(f"[gpu] no summary yet: {error!r}", flush=True)

    states: dict[str, str] = {}
    if not options.summarize:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the piece, too
        try:
            states = run_missing(selected, record, options.budget, finished=summary)
        finally:
            record.save()
    summary(states)
    draw(results, measured, todo, options.device)
    record.save()
    print(f"[gpu] summary: {results / 'summary.md'}")
    return int(any(state.startswith("failed") for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
