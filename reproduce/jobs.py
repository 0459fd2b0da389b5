"""Training the jobs of a table, several at a time, and estimating how long it would take."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

import models
from reproduce import runner
from reproduce.runner import last_line
from reproduce.tables import Job
from trainer import data
from trainer.config import Config, make_config
from trainer.run_folder import read_metrics

ROOT = Path(__file__).resolve().parent.parent
MEASURED_STEPS = 5  # the first warms up
# Of a training step's time, what an equal batch takes in evaluation: forward without backward.
EVALUATION = 1 / 3
PROGRESS_SECONDS = 60.0  # between lines that say how far the trainings are


def run(jobs: Sequence[Job], logs: Path, parallel: int, finished: Callable[[], object]) -> int:
    """Train what is not finished, `parallel` at a time; returns the number of jobs that failed.

    `finished` is called after each that succeeds. A signal that asks to end is passed on: see `runner.run`.
    """
    waiting = [job for job in jobs if job.summary() is None]
    failed: set[str] = set()

    def begin(job: Job) -> subprocess.Popen[bytes] | None:
        if job.teacher and not job.teacher.summary():
            return None
        say(f"started {job.name}")
        return start(job, logs)

    def progress(running: Collection[Job]) -> None:
        epochs = (f"{job.name} {len(job.history())}/{job.config.epochs} epochs" for job in running)
        say(", ".join(epochs))

    with closing(runner.run(waiting, begin, parallel, progress, PROGRESS_SECONDS)) as ended:
        for job, code in ended:
            summary = job.summary() if code == 0 else None
            if summary is not None:
                say(f"finished {job.name}: last test error {summary['last_test_error']:.2f} %")
                finished()
                continue
            failed.add(job.name)
            log = log_path(job, logs)
            say(f"failed {job.name} (exit {code}): {last_line(log)} (see {log})")
            while lost := next((j for j in waiting if j.teacher and j.teacher.name in failed), None):
                waiting.remove(lost)
                failed.add(lost.name)
                say(f"skipped {lost.name}: its teacher failed")
    return len(failed)


def start(job: Job, logs: Path) -> subprocess.Popen[bytes]:
    path = log_path(job, logs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as log:
        return subprocess.Popen(
            _command(job.config, path.with_suffix(".yaml")),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=_environment(job.config),
            close_fds=False,  # it inherits the lock of `exclusive`
        )


def listing(jobs: Sequence[Job]) -> Iterator[str]:
    """Yields a line per job with its remaining epochs, then one with the number of runs."""
    left = 0
    for job in jobs:
        done = len(job.history())
        finished = job.summary() is not None
        left += not finished
        progress = f" ({done} done)" if done else ""
        yield f"{job.name}: " + ("finished" if finished else f"{job.config.epochs - done} epochs{progress}")
    yield f"{len(jobs)} runs, {left} to train; --measure estimates how long they take"


def check_data(jobs: Sequence[Job]) -> None:
    """ConfigError where the data of a job that is left are missing or damaged."""
    for job in jobs:
        if job.summary() is None:
            _sizes(job.config)


def estimate(jobs: Sequence[Job], say: Callable[[str], object]) -> bool:
    """Report how long the remaining epochs of each job would take; returns whether all were measured.

    It runs a few steps of each recipe, uncompiled and with an untrained teacher.

    Raises:
        ConfigError: the data are missing or damaged.
    """
    steps: dict[str, float | None] = {}  # seconds, by recipe
    total = 0.0
    for job in jobs:
        if job.summary() is not None:
            say(f"{job.name}: finished")
            continue
        recipe = job.name.rpartition("/")[0]
        if recipe not in steps:
            steps[recipe] = measure(job)
        step = steps[recipe]
        epochs = job.config.epochs - len(job.history())
        if step is None:
            say(f"{job.name}: {epochs} epochs, not measured")
            continue
        sizes = _sizes(job.config)
        batch = min(job.config.batch_size, sizes.train)  # as measured
        seconds = (sizes.train + EVALUATION * sizes.test) / batch * step
        total += epochs * seconds
        say(
            f"{job.name}: {epochs} epochs of {seconds:.0f} s ({1000 * step:.0f} ms a step), "
            f"{duration(epochs * seconds)}"
        )
    complete = None not in steps.values()
    rest = "" if complete else ", without what was not measured"
    say(f"together {duration(total)}, one at a time{rest}")
    return complete


def measure(job: Job) -> float | None:
    """Returns the seconds per training step, or None and prints a line to stderr if it can't be measured.

    The steps are epochs of one batch each: metrics.jsonl has the time of every epoch.
    """
    sizes = _sizes(job.config)
    recipe = job.name.rpartition("/")[0]
    print(f"reproduce: measuring {MEASURED_STEPS} steps of {recipe}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = job.config.model_dump(mode="json", by_alias=True)
        keys |= {"output-dir": str(folder / "run"), "resume": "never", "max-steps": MEASURED_STEPS}
        keys |= {"compile": False, "limit-test": min(sizes.test, max(sizes.classes, 100))}
        keys |= {"limit-train": min(sizes.train, job.config.batch_size), "at-start-epoch": 0}
        keys["epochs"] = max(job.config.epochs, MEASURED_STEPS)
        if job.config.teacher:
            teacher = models.create(job.config.teacher, sizes.classes)
            torch.save(teacher.state_dict(), folder / "teacher.pt")
            keys["teacher-checkpoint"] = str(folder / "teacher.pt")
        config = make_config(keys)
        with open(folder / "log", "wb") as log:
            command, environment = _command(config, folder / "recipe.yaml"), _environment(config)
            code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        if code:
            print(f"reproduce: can't measure {job.name}: {last_line(folder / 'log')}", file=sys.stderr)
            return None
        return float(median(epoch["seconds"] for epoch in read_metrics(folder / "run")[1:]))


class Sizes(NamedTuple):
    """Numbers of images that a run uses and of their classes."""

    train: int
    test: int
    classes: int


def _sizes(config: Config) -> Sizes:
    return _count(config.dataset, config.data_dir, config.limit_train, config.limit_test)


@cache
def _count(dataset: str, data_dir: Path | None, limit_train: int | None, limit_test: int | None) -> Sizes:
    keys = {"dataset": dataset, "data-dir": data_dir, "limit-train": limit_train, "limit-test": limit_test}
    config = make_config(keys | {"student": "-"})
    loaded = data.load(config, torch.device("cpu"))
    return Sizes(len(loaded.train), len(loaded.test), loaded.classes)


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def log_path(job: Job, logs: Path) -> Path:
    return logs / f"{job.name.replace('/', '-')}.log"


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _command(config: Config, recipe: Path) -> list[str]:
    recipe.write_text(config.to_yaml())
    return [sys.executable, str(ROOT / "train.py"), "--recipe", str(recipe)]


def _environment(config: Config) -> dict[str, str]:
    return os.environ | ({"OMP_NUM_THREADS": str(config.threads)} if config.threads else {})
