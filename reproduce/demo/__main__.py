"""What `make demo` runs: a teacher, and students alone and with attention transfer, on handwritten digits.

It prints a table of test errors and times, and writes report.md, curves.png, attention_maps.png and the
trainings themselves into the output folder. Unknown flags go to every training, e.g. `--epochs 2`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]

if TYPE_CHECKING:
    from reproduce.demo.report import Run

MARK = ".made-by-demo"  # only a folder that holds this file is ever deleted
PROGRESS_SECONDS = 10.0  # between lines that say how far the trainings are


def say(line: str) -> None:
    print(line, flush=True)


class DemoError(Exception):
    """The line that the demo prints before it exits with code 2."""


def claim(folder: Path) -> None:
    """Make `folder` or empty it; DemoError where the demo did not make it."""
    if folder.exists():
        if not (folder / MARK).is_file():
            raise DemoError(
                f"{folder} exists and was not made by the demo: move it away, or use --output-dir"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


@dataclass(frozen=True)
class Training:
    """A recipe to train into `folder`; its output goes to a log file beside it."""

    recipe: str
    folder: Path
    flags: tuple[object, ...]
    teacher: Path | None = None  # the folder of the training whose weights it needs

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.log"

    def start(self) -> subprocess.Popen[bytes] | None:
        """Start a process; returns None while the teacher is not finished."""
        if self.teacher and not (self.teacher / "summary.json").exists():
            return None
        recipe = ROOT / "recipes" / "demo" / f"{self.recipe}.yaml"
        command = [sys.executable, ROOT / "train.py", "--recipe", recipe, "--output-dir", self.folder]
        command += ["--teacher-checkpoint", self.teacher / "model.pt"] if self.teacher else []
        with open(self.log, "wb") as log:
            return subprocess.Popen(
                [str(word) for word in (*command, "--threads", 1, *self.flags)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def epoch(self) -> str:
        """The latest epoch in its log."""
        try:
            found = re.findall(r"^epoch \d+/\d+", self.log.read_text(encoding="utf-8"), re.MULTILINE)
        except OSError:
            found = []
        return found[-1] if found else "starts"


def train_all(folder: Path, seeds: int, jobs: int, flags: Sequence[str]) -> list[Run]:
    """Train a teacher and, for each seed, both students: `jobs` processes of one thread each at a time."""
    from reproduce import runner  # imports torch, as all below does
    from reproduce.demo.report import Run

    teacher = Training("teacher", folder / "teacher", (*flags,))
    students = [
        Training(recipe, folder / f"{recipe}-{seed}", ("--seed", seed, *flags), taught_by)
        for recipe, taught_by in (("student", None), ("student-at", teacher.folder))
        for seed in range(seeds)
    ]
    begun = time.perf_counter()
    started: dict[Training, float] = {}

    def start(training: Training) -> subprocess.Popen[bytes] | None:
        process = training.start()
        if process:
            started[training] = time.perf_counter()
        return process

    def progress(running: Collection[Training]) -> None:
        parts = [f"{training.folder.name} {training.epoch()}" for training in running]
        say(f"  {time.perf_counter() - begun:3.0f} s: {', '.join(parts)}")

    waiting = [teacher, *students]
    runs = {training: Run(training.recipe, training.folder) for training in waiting}
    with closing(runner.run(waiting, start, jobs, progress, PROGRESS_SECONDS)) as ended:
        for training, code in ended:
            name = training.folder.name
            if code:
                last = runner.last_line(training.log)
                raise DemoError(f"{name} stopped with code {code}: {last} (see {training.log})")
            seconds = time.perf_counter() - started[training]
            say(f"{name:<13} test error {runs[training].error:5.2f} %  {seconds:3.0f} s")
    return list(runs.values())


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
    folder = arguments.output_dir
    try:
        if arguments.seeds < 1 or arguments.jobs < 1:
            raise DemoError("--seeds and --jobs must be at least 1")
        claim(folder)
        runs = train_all(folder, arguments.seeds, arguments.jobs, flags)
    except DemoError as error:
        print(f"reproduce.demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

    say("drawing the curves and the maps")
    from rich.console import Console

    from reproduce.demo.report import write_results

    table = write_results(folder, runs, time.perf_counter() - begun)
    Console(highlight=False).print(table)
    print(f"{time.perf_counter() - begun:.0f} s in all; report, curves and maps are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
