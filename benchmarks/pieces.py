"""Run commands one after another on a machine that may end at any second, and keep their results."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from at_fused._files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 470.0  # a piece that takes longer is stopped, and fails
SAVE_EVERY_S = 5.0  # while a piece runs


@dataclass(frozen=True)
class Piece:
    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    limit_s: float = LIMIT_S
    obstacle: str | None = None  # why it can't run here

    def describe(self) -> str:
        settings = [f"{key}={value}" for key, value in self.environment.items()]
        return " ".join([*settings, *self.command])


class Process(Protocol):
    def wait(self, timeout: float) -> int:
        """The exit code; `subprocess.TimeoutExpired` if the process still runs after `timeout` seconds."""

    def kill(self) -> None:
        """End the process and all that it has started."""


class Command:
    """A process group."""

    def __init__(self, piece: Piece, log: IO[str]) -> None:
        self._process = subprocess.Popen(
            piece.command,
            cwd=ROOT,
            env=os.environ | piece.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, timeout: float) -> int:
        return self._process.wait(timeout)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Record:
    """The pieces that are done, in `folder`: done.jsonl has a line per success, logs/ the outputs.

    A success counts for the sources that it ran on. `archive`, if given, holds all of `folder` in one file.
    """

    def __init__(self, folder: Path, sources: str, archive: Path | None = None) -> None:
        self.folder, self.sources, self.archive = folder, sources, archive
        self._archived: list[tuple[str, int, int]] = []

    def create(self) -> None:
        """Make the folder; fill an empty one from the archive, if there is one."""
        empty = not self.folder.exists() or not any(self.folder.iterdir())
        self.folder.mkdir(parents=True, exist_ok=True)
        if empty and self.archive and self.archive.exists():
            with tarfile.open(self.archive) as archive:
                archive.extractall(self.folder, filter="data")
        (self.folder / "logs").mkdir(exist_ok=True)

    def done(self) -> dict[str, float]:
        """The seconds of every piece that has succeeded, by name."""
        found = {}
        try:
            lines = (self.folder / "done.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            if entry["sources"] == self.sources:
                found[entry["piece"]] = entry["seconds"]
        return found

    def add(self, piece: Piece, seconds: float) -> None:
        entry = {"piece": piece.name, "seconds": round(seconds, 1), "sources": self.sources}
        with (self.folder / "done.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(entry)}\n")  # the last line may have been cut off by a kill

    def state(self, piece: Piece) -> str:
        seconds = self.done().get(piece.name)
        if seconds is not None:
            return f"done in {seconds:.0f} s"
        return f"skipped: {piece.obstacle}" if piece.obstacle else "not run"

    def log(self, piece: Piece) -> Path:
        return self.folder / "logs" / f"{piece.name}.log"

    def save(self) -> None:
        """Replace the archive where the folder has changed."""
        if self.archive is None:
            return
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        files = [path for path in found if path.name != self.archive.name and path.suffix != ".tmp"]
        marks = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]
        if marks == self._archived:
            return
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as archive:
            for path in files:
                archive.add(path, path.relative_to(self.folder))
        write_atomically(self.archive, content.getvalue())
        self._archived = marks


def run_missing(
    todo: Sequence[Piece],
    record: Record,
    budget_s: float | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    start: Callable[[Piece, IO[str]], Process] = Command,
    finished: Callable[[dict[str, str]], object] = lambda states: None,
) -> dict[str, str]:
    """Run the pieces that have not succeeded yet; returns the state of each by name.

    After each piece that has run, `finished` gets the states so far.
    """
    end = clock() + (budget_s or math.inf)
    states: dict[str, str] = {}
    for piece in todo:
        if piece.name in record.done() or piece.obstacle or clock() >= end:
            states[piece.name] = record.state(piece)
        else:
            print(f"[gpu] {piece.name}", flush=True)
            began = clock()
            failure = _run(piece, record, min(began + piece.limit_s, end), clock, start)
            if failure is None:
                record.add(piece, clock() - began)
                states[piece.name] = record.state(piece)
            else:
                states[piece.name] = "not done within the budget" if clock() >= end else f"failed: {failure}"
            finished(states)
            record.save()
        print(f"[gpu] {piece.name}: {states[piece.name]}", flush=True)
    return states


def _run(
    piece: Piece,
    record: Record,
    end: float,
    clock: Callable[[], float],
    start: Callable[[Piece, IO[str]], Process],
) -> str | None:
    """None on success, or what went wrong."""
    log = record.log(piece)
    with log.open("a") as file:  # an earlier call may have measured a part
        try:
            process = start(piece, file)
        except OSError as error:
            return str(error)
        try:
            while True:
                try:
                    code = process.wait(max(0.0, min(SAVE_EVERY_S, end - clock())))
                    return f"exit {code}: {log}" if code else None
                except subprocess.TimeoutExpired:
                    if clock() >= end:
                        return f"took more than its time: {log}"
                    record.save()
        finally:
            process.kill()
