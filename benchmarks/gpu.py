"""Everything to be asked of a GPU, in pieces of under 8 minutes: `make gpu RESULTS=DIR [BUDGET_S=seconds]`.

With CIFAR=DIR, which has cifar-10-batches-py, train.py is timed on CIFAR-10, else on digits.

A piece that succeeds leaves a stamp in DIR/stamps, so the same command goes on where the last one ended.
It ends within BUDGET_S seconds: a piece that isn't done by then is begun anew the next time. Nothing is
installed or fetched: the libraries are built in place with the Python that runs this.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from at_fused._terminal import lenient_output
from at_fused.visualize.paths import user_path
from benchmarks import predictions, report
from benchmarks.report import Row, Table
from benchmarks.run import draw_loss, write_loss

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 470.0  # a piece that takes longer is ended, and fails

# Test files whose cases run on the device: those that the first benchmarks rely on, and those that compile
# thousands of Triton's kernels. The other files come last.
FIRST_TESTS = ("test_cuda*", "test_attention_*")
DEVICE_TESTS = ("test_triton*", "test_compositions", "test_properties")


@dataclass(frozen=True)
class Piece:
    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    obstacle: str | None = None  # why it can't run here

    def describe(self) -> str:
        settings = [f"{key}={value}" for key, value in self.environment.items()]
        return " ".join([*settings, *self.command])


def pieces(results: Path, device: str, quick: bool, cifar: Path | None = None) -> list[Piece]:
    """In the order in which they matter."""
    python = sys.executable
    settings = {"AT_FUSED_REQUIRE_EXTENSION": "1", "MAX_JOBS": str(os.cpu_count())}
    if device == "cuda":
        settings |= {"AT_FUSED_CUDA": "1", "TORCH_CUDA_ARCH_LIST": _architecture()}
    build = Piece("build", [python, "setup.py", "build_ext"], settings)
    tests = ROOT / "tests"
    first, on_device = (
        [path for pattern in patterns for path in sorted(tests.glob(f"{pattern}.py"))]
        for patterns in (FIRST_TESTS, DEVICE_TESTS)
    )
    others = [path for path in sorted(tests.glob("test_*.py")) if path not in first + on_device]
    benchmarks = _benchmarks(python, results, device, quick, cifar)
    return [
        build,
        *(_test(python, path) for path in first),
        *benchmarks[:3],
        *(_test(python, path) for path in on_device),
        *_sanitizers(python, device),
        *benchmarks[3:],
        *(_test(python, path) for path in others),
    ]


def _architecture() -> str:
    """Of this machine's GPU alone: each architecture costs a minute of compiling."""
    if not torch.cuda.is_available():
        return "9.0a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


def _test(python: str, path: Path) -> Piece:
    command = [python, "-m", "pytest", "-q", str(path.relative_to(ROOT))]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    trains = re.search(r"\b(trainer|train\.py|paper|recipes|from runs)\b", path.read_text())
    return Piece(f"test-{path.stem[5:]}", command, obstacle=_trainer_lacks() if trains else None)


def _trainer_lacks() -> str | None:
    return None if importlib.util.find_spec("pydantic") else "pydantic is not installed"


def _sanitizers(python: str, device: str) -> list[Piece]:
    sanitizer = "compute-sanitizer"
    obstacle = None if shutil.which(sanitizer) else f"{sanitizer} is not installed"
    small = [python, "-m", "benchmarks.run", "--suite", "memory", "--quick", "--device", device]
    small += ["--dtypes", "bf16", "fp32", "--providers", "ours", "--out", "build/sanitized-memory"]
    small += ["--workloads", "cifar", "imagenet", "vit"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else neighbours in a block hide an overrun
    return [
        Piece(tool, [sanitizer, "--tool", tool, "--error-exitcode", "3", *small], uncached, obstacle)
        for tool in ("memcheck", "racecheck")
    ]


def _benchmarks(python: str, results: Path, device: str, quick: bool, cifar: Path | None) -> list[Piece]:
    common = [python, "-m", "benchmarks.run", "--device", device, *(["--quick"] if quick else [])]

    def loss(name: str, *options: str) -> Piece:
        out = results / "pieces" / f"loss-{name}"
        return Piece(f"loss-{name}", [*common, "--suite", "loss", "--out", str(out), *options])

    def suite(name: str, *options: str, obstacle: str | None = None) -> Piece:
        return Piece(name, [*common, "--suite", name, "--out", str(results), *options], obstacle=obstacle)

    few = ("--workloads", "cifar", "imagenet")
    hot = [python, "-m", "pytest", "-q", "benchmarks", "--benchmark-only"]
    return [
        loss("imagenet", "--workloads", "imagenet", "imagenet-last2"),
        loss("cifar", "--workloads", "cifar", "cifar40"),
        suite("step"),
        suite("trainer", *(["--cifar", str(cifar)] if cifar else []), obstacle=_trainer_lacks()),
        loss("imagenet50", "--workloads", "imagenet50", "imagenet50-last2"),
        loss("blocks", "--workloads", "cifar-blocks", "cifar40-blocks", "vit"),
        suite("memory", *few),
        loss("fp32", *few, "--dtypes", "fp32"),
        loss("fp16", *few, "--dtypes", "fp16"),
        loss("powers", *few, "--p", "1", "4", "--modes", "both"),
        suite("scaling", "--providers", "authors", "vecdot", "compile", "ours"),
        Piece("hot-cells", [*hot, f"--benchmark-json={results / 'hot-cells.json'}"]),
    ]


# --- running ----------------------------------------------------------------------------------------


def source_digest() -> str:
    """The same for the same sources of all that is built, tested and measured."""
    summary = hashlib.blake2b(digest_size=8)
    folders = ("at_fused", "csrc", "models", "trainer", "recipes", "tests", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    files += [ROOT / name for name in ("setup.py", "pyproject.toml", "train.py")]
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh", ".yaml", ".toml"}
    for path in sorted(path for path in files if path.suffix in kinds):
        summary.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return summary.hexdigest()


class Record:
    """What has been done, in files: DIR/stamps for successes, DIR/logs for every output.

    A stamp holds the piece's seconds and the sources it ran on; of other sources, it counts for nothing.
    """

    def __init__(self, results: Path) -> None:
        self.sources = source_digest()
        self.stamps, self.logs = results / "stamps", results / "logs"

    def create(self) -> None:
        for folder in (self.stamps, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def done(self, piece: Piece) -> bool:
        return self._stamp(piece)[1] == self.sources

    def _stamp(self, piece: Piece) -> tuple[str, str]:
        try:
            seconds, sources = (self.stamps / piece.name).read_text().split()
        except (OSError, ValueError):
            return "", ""
        return seconds, sources

    def state(self, piece: Piece) -> str:
        if self.done(piece):
            return f"done in {self._stamp(piece)[0]} s"
        return f"skipped: {piece.obstacle}" if piece.obstacle else "not run"

    def run(self, piece: Piece, limit_s: float) -> str | None:
        """None on success, else what went wrong."""
        log = self.logs / f"{piece.name}.log"
        started = time.monotonic()
        with log.open("w") as file:
            try:
                process = subprocess.Popen(
                    piece.command,
                    cwd=ROOT,
                    env=os.environ | piece.environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    preexec_fn=os.setpgrp,  # so that it ends with all it started
                )
            except OSError as error:
                return str(error)
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return f"took more than {limit_s:.0f} s: {log}"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code:
            return f"exit {code}: {log}"
        (self.stamps / piece.name).write_text(f"{time.monotonic() - started:.0f} {self.sources}\n")
        return None


def run_missing(
    todo: Sequence[Piece],
    record: Record,
    budget_s: float | None,
    limit_s: float = LIMIT_S,
    clock: Callable[[], float] = time.monotonic,
    finished: Callable[[dict[str, str]], object] = lambda states: None,
) -> dict[str, str]:
    """Runs the pieces without a stamp; returns the state of each by name. `finished` gets those so far after
    each run."""
    deadline = clock() + (budget_s or math.inf)
    states: dict[str, str] = {}
    for piece in todo:
        left = deadline - clock()
        if record.done(piece) or piece.obstacle or left <= 0:
            states[piece.name] = record.state(piece)
        else:
            print(f"[gpu] {piece.name}", flush=True)
            failure = record.run(piece, min(limit_s, left))
            states[piece.name] = f"failed: {failure}" if failure else record.state(piece)
            if failure and clock() >= deadline:
                states[piece.name] = "not done within the budget"
            finished(states)
        print(f"[gpu] {piece.name}: {states[piece.name]}", flush=True)
    return states


# --- summary ----------------------------------------------------------------------------------------


def summarize(results: Path, device_type: str, states: dict[str, str]) -> None:
    """Joins the loss pieces, holds everything against the predictions, writes DIR/summary.md."""
    machine = report.describe_machine(torch.device(device_type))
    rows: list[Row] = []
    for path in sorted((results / "pieces").glob(f"*/loss-{device_type}.json")):
        if states.get(path.parent.name, "").startswith("done"):
            measured = json.loads(path.read_text())
            rows += measured["rows"]
            machine = measured["machine"]  # its backends are those that were built since this process began
    if rows:
        write_loss(results, device_type, machine, rows)
        draw_loss(results, device_type, rows)
    if list(results.glob("*-cuda.json")):
        predictions.main(["--out", str(results), "--measured", str(results)])
    table = Table("Pieces", ["piece", "state"], [[name, state] for name, state in states.items()])
    (results / "summary.md").write_text(report.markdown("GPU run", machine, [table]), encoding="utf-8")


@lenient_output()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--results", type=user_path, required=True, help="folder for results, logs and stamps"
    )
    parser.add_argument("--budget", type=float, metavar="S", help="end within so many seconds")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="only these pieces")
    parser.add_argument("--list", action="store_true", help="print every piece and whether it is done")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that would run")
    parser.add_argument("--device", default="cuda", help="cpu: to try the pieces without a GPU")
    parser.add_argument(
        "--cifar", type=user_path, metavar="DIR", help="has cifar-10-batches-py (default: digits)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny batches, few rounds")
    options = parser.parse_args(argv)
    results = options.results.resolve()
    cifar = options.cifar and options.cifar.resolve()
    todo = pieces(results, options.device, options.quick, cifar)
    names = [piece.name for piece in todo]
    if wrong := sorted(set(options.only or ()) - set(names)):
        print(f"gpu: no piece {wrong[0]!r}; there are: {', '.join(names)}", file=sys.stderr)
        return 2
    selected = [piece for piece in todo if not options.only or piece.name in options.only]
    record = Record(results)
    if options.list or options.dry_run:
        for piece in selected:
            if options.list:
                print(f"{piece.name:24} {record.state(piece)}")
            elif not record.done(piece) and not piece.obstacle:
                print(piece.describe())
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu: this machine has no CUDA device that torch can use", file=sys.stderr)
        return 2
    try:
        record.create()
    except OSError as error:
        print(f"gpu: --results {results}: {error.strerror}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the running piece, too

    def summary(states: dict[str, str]) -> None:
        summarize(results, options.device, {piece.name: record.state(piece) for piece in todo} | states)

    def interim(states: dict[str, str]) -> None:
        try:
            summary(states)
        except Exception as error:  # a table is no reason to lose the device's time
            print(f"[gpu] no summary yet: {error!r}", flush=True)

    states = run_missing(selected, record, options.budget, finished=interim)
    summary(states)
    print(f"[gpu] summary: {results / 'summary.md'}")
    return int(any(state.startswith("failed") for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
