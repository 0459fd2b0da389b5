"""Trainings in processes of their own, several at a time."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from typing import Any, TypeVar

from trainer.distributed import stop_signals

Job = TypeVar("Job")
POLL_SECONDS = 0.2


def run(
    waiting: list[Job],
    start: Callable[[Job], subprocess.Popen[bytes] | None],
    parallel: int,
    progress: Callable[[Collection[Job]], object],
    every: float,
) -> Generator[tuple[Job, int], None, None]:
    """Runs the jobs in `waiting`, `parallel` at a time; yields each that has ended, with its exit code.

    Args:
        waiting: a job leaves this list when it starts; the caller may remove further ones in between.
        start: starts a job; None while the job needs the results of another.
        parallel: how many run at a time.
        progress: called every so many seconds with the jobs that run.
        every: seconds.

    A signal that asks to end is passed on to every training, which writes a checkpoint and ends; then this
    process ends, too. So do the trainings where the caller stops asking.
    """
    running: dict[subprocess.Popen[bytes], Job] = {}
    reported = time.monotonic()

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    handlers = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        while waiting or running:
            for job in list(waiting):
                if len(running) < parallel and (process := start(job)):
                    waiting.remove(job)
                    running[process] = job
            for process in [process for process in running if process.poll() is not None]:
                yield running.pop(process), process.returncode
            if running and time.monotonic() - reported >= every:
                reported = time.monotonic()
                progress(running.values())
            if waiting or running:
                time.sleep(POLL_SECONDS)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def last_line(log: Path) -> str:
    """The last line of a training's log that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
