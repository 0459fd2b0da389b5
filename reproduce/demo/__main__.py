"""What `make demo` runs: on handwritten digits, a teacher, and students alone and with attention transfer.

Prints a table of test errors and times; leaves report.md, curves.png, attention_maps.png and the trainings
themselves in the output folder. Flags it does not know go to every training, e.g. `--epochs 2`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]

if TYPE_CHECKING:
    from reproduce.demo.report import Run

MARK = ".made-by-demo"  # only a folder that holds this file is ever deleted
PROGRESS_SECONDS = 10.0  # between lines that say how far the trainings are


def say(line: str) -> None:
    print(line, flush=True)


class DemoError(Exception):
    """What the demo says in one line before it exits with code 2."""


def claim(folder: Path) -> None:
    """Make `folder` empty and ours; refuse one that the demo did not make."""
    if folder.exists():
        if not (folder / MARK).is_file():
            raise DemoError(
                f"{folder} exists and was not made by the demo: move it away, or use --output-dir"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def log_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"


def train(recipe: str, folder: Path, flags: Sequence[object]) -> Run:
    """Train a recipe in a process of its own that writes into `folder`; what it says goes to a log beside."""
    from reproduce.demo.report import Run

    log = log_of(folder)
    path = ROOT / "recipes" / "demo" / f"{recipe}.yaml"
    command = [sys.executable, ROOT / "train.py", "--recipe", path, "--output-dir", folder, *flags]
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(
            [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if code:
        last = (log.read_text(encoding="utf-8", errors="replace").splitlines() or ["it said nothing"])[-1]
        raise DemoError(f"{folder.name} stopped with code {code}: {last} (see {log})")
    return Run(recipe, folder)


@contextmanager
def progress(running: list[Path], say: Callable[[str], None]) -> Iterator[None]:
    """Say every few seconds how far the trainings in the folders `running` are."""
    begun, ended = time.perf_counter(), Event()

    def watch() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            parts = [f"{folder.name} {epoch_of(folder)}" for folder in list(running)]
            say(f"  {time.perf_counter() - begun:3.0f} s: {', '.join(parts)}")

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def epoch_of(folder: Path) -> str:
    """How far a training is, by its log."""
    try:
        found = re.findall(r"^epoch \d+/\d+", log_of(folder).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = []
    return found[-1] if found else "starts"


def train_all(
    folder: Path, seeds: int, jobs: int, flags: Sequence[str], say: Callable[[str], None]
) -> list[Run]:
    """A teacher and, for each seed, both students: `jobs` processes of one thread each at a time."""

    running: list[Path] = []

    def train_and_tell(recipe: str, name: str, *own: object) -> Run:
        begun = time.perf_counter()
        running.append(folder / name)
        run = train(recipe, folder / name, ["--threads", 1, *own, *flags])
        running.remove(folder / name)
        say(f"{name:<13} test error {run.error:5.2f} %  {time.perf_counter() - begun:3.0f} s")
        return run

    with progress(running, say), ThreadPoolExecutor(jobs) as pool:
        try:
            teacher = pool.submit(train_and_tell, "teacher", "teacher")
            students = [
                pool.submit(train_and_tell, "student", f"student-{seed}", "--seed", seed)
                for seed in range(seeds)
            ]
            lesson = ["--teacher-checkpoint", teacher.result().folder / "model.pt"]
            students += [
                pool.submit(train_and_tell, "student-at", f"student-at-{seed}", "--seed", seed, *lesson)
                for seed in range(seeds)
            ]
            return [teacher.result(), *(student.result() for student in students)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those under way end by themselves
            raise


def _folder(text: str) -> Path:
    from at_fused.visualize.paths import user_path  # imports torch: only those who name a folder wait

    return user_path(text)


def main(argv: Sequence[str] | None = None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", type=_folder, default=ROOT / "runs" / "demo")
    parser.add_argument("--seeds", type=int, default=4, help="students of each kind (default: 4)")
    parser.add_argument(
        "--jobs", type=int, default=min(cores, 6), help="processes at a time (default: the cores)"
    )
    arguments, flags = parser.parse_known_args(argv)
    begun = time.perf_counter()
    count, jobs = arguments.seeds, arguments.jobs
    say(f"digits: 1 teacher, {count} students alone, {count} with attention transfer; {jobs} at a time")
    from at_fused._terminal import lenient_output  # imports torch: the line above comes first

    with lenient_output():
        return run(arguments, flags, begun)


def run(arguments: argparse.Namespace, flags: Sequence[str], begun: float) -> int:
    """Train, and write the results; returns the exit code."""
    try:
        if arguments.seeds < 1 or arguments.jobs < 1:
            raise DemoError("--seeds and --jobs must be at least 1")
        claim(arguments.output_dir)
        runs = train_all(arguments.output_dir, arguments.seeds, arguments.jobs, flags, say)
    except DemoError as error:
        print(f"reproduce.demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

    say("drawing the curves and the maps")
    from rich.console import Console

    from reproduce.demo.report import write_results

    table = write_results(arguments.output_dir, runs, time.perf_counter() - begun)
    Console(highlight=False).print(table)
    print(
        f"{time.perf_counter() - begun:.0f} s in all; report, curves and maps are in {arguments.output_dir}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
