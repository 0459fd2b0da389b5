"""Reproduction of the paper's tables: trains every cell and sets it beside the published figure.

    python -m benchmarks.paper table1 --schedule short --data-dir DIR --seeds 2 --jobs 2 --out runs/table1

Finished runs are kept, interrupted ones continue, so the same command can be given again after anything.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from trainer.checkpoint import write_atomically
from trainer.config import Config, ConfigError, differing_keys, load_recipe, make_config

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("none", "at", "kd", "at+kd")
METHOD_NAMES = {"none": "student alone", "at": "AT", "kd": "KD", "at+kd": "AT+KD", "teacher": "teacher"}


@dataclass(frozen=True)
class Row:
    """A student, its teacher, and the paper's test errors in percent (median of 5 seeds, 200 epochs)."""

    student: str
    teacher: str
    paper: dict[str, float]


TABLE1 = {
    row.student + "-from-" + row.teacher: row
    for row in (
        Row("wrn-16-1", "wrn-16-2", {"none": 8.77, "at": 7.93, "kd": 7.41, "at+kd": 7.51, "teacher": 6.31}),
        Row("wrn-16-1", "wrn-40-1", {"none": 8.77, "at": 8.25, "kd": 8.39, "at+kd": 8.01, "teacher": 6.58}),
        Row("wrn-16-2", "wrn-40-2", {"none": 6.31, "at": 5.85, "kd": 6.08, "at+kd": 5.71, "teacher": 5.23}),
    )
}


@dataclass(frozen=True)
class Job:
    """One training: its configuration, and the one whose weights it needs first."""

    name: str
    config: Config
    teacher: Job | None = None

    @property
    def folder(self) -> Path:
        return Path(str(self.config.output_dir))

    def summary(self) -> dict[str, Any] | None:
        """Results, if the run is finished; a folder that holds another run raises ConfigError."""
        try:
            stored = yaml.safe_load((self.folder / "config.yaml").read_text())
            keys = differing_keys(stored, self.config)
            if keys:
                raise ConfigError(f"{self.folder} holds a different run: {', '.join(keys)} differ")
            return dict(json.loads((self.folder / "summary.json").read_text()))
        except FileNotFoundError:
            return None

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


class Table:
    """The jobs of a table: `cells` maps (row, method) to one per seed, (row, "teacher") to the teacher's."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.recipe = load_recipe(ROOT / "recipes" / args.schedule / "base.yaml")
        self.cells: dict[tuple[str, str], list[Job]] = {}
        for name in args.rows:
            row = TABLE1[name]
            teacher = None if args.teacher_checkpoint else self._job(row.teacher, "none", 0)
            if teacher:
                self.cells[name, "teacher"] = [teacher]
            for method in args.methods:
                seeds = range(args.seeds)
                self.cells[name, method] = [
                    self._job(row.student, method, s, row.teacher, teacher) for s in seeds
                ]

    def _job(
        self, student: str, method: str, seed: int, teacher_name: str = "", teacher: Job | None = None
    ) -> Job:
        name = f"{student}/{method}-seed{seed}"
        keys: dict[str, Any] = {
            "data-dir": self.args.data_dir,
            "student": student,
            "method": method,
            "seed": seed,
        }
        if method != "none":
            name = f"{student}-from-{teacher_name}/{method}-seed{seed}"
            weights = self.args.teacher_checkpoint or (teacher and teacher.folder / "model.pt")
            keys |= {"teacher": teacher_name, "teacher-checkpoint": str(weights)}
        keys |= {"threads": self.args.threads, "output-dir": str(self.args.out / name)}
        if self.args.epochs:
            keys["epochs"] = self.args.epochs
        return Job(name, make_config(self.recipe | keys), None if method == "none" else teacher)

    def jobs(self) -> list[Job]:
        """Every job once (rows share some): teachers first, then seed by seed, to compare early."""
        every = {job.name: job for jobs in self.cells.values() for job in jobs}
        return sorted(every.values(), key=lambda job: (not self._teaches(job), job.config.seed))

    def _teaches(self, job: Job) -> bool:
        return any(job in jobs for (_, method), jobs in self.cells.items() if method == "teacher")

    def results(self) -> list[dict[str, Any]]:
        """One entry per cell: errors of the finished seeds, their medians, and the paper's figure."""
        entries = []
        for (name, method), jobs in self.cells.items():
            done = [(job, summary) for job in jobs if (summary := job.summary())]
            last = [summary["last_test_error"] for _, summary in done]
            best = [summary["best_test_error"] for _, summary in done]
            entries.append(
                {
                    "row": name,
                    "method": method,
                    "seeds": [job.config.seed for job, _ in done],
                    "last_test_error": last,
                    "best_test_error": best,
                    "median_last": median(last) if last else None,
                    "median_best": median(best) if best else None,
                    "paper": TABLE1[name].paper[method],
                    "epochs": jobs[0].config.epochs,
                    "seconds": [sum(epoch["seconds"] for epoch in job.history()) for job, _ in done],
                }
            )
        return entries

    def write(self) -> str:
        """table1.json and table1.md in the output folder; returns the Markdown."""
        entries = self.results()
        text = markdown(entries, self.args.schedule)
        self.args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.args.out / "table1.json", (json.dumps(entries, indent=2) + "\n").encode())
        write_atomically(self.args.out / "table1.md", text.encode())
        return text


def markdown(entries: list[dict[str, Any]], schedule: str) -> str:
    """The results as a table; cells without a finished run say so."""
    lines = [
        f"CIFAR-10 test error in percent, schedule `{schedule}` ({entries[0]['epochs']} epochs). "
        "Paper: median of 5 seeds after 200 epochs.",
        "",
        "| student ← teacher | method | last epoch, median | each seed | best epoch, median | paper |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        row = TABLE1[entry["row"]]
        found = entry["last_test_error"]
        measured = (
            [
                f"{entry['median_last']:.2f}",
                ", ".join(f"{e:.2f}" for e in found),
                f"{entry['median_best']:.2f}",
            ]
            if found
            else ["not finished", "", ""]
        )
        cells = [
            f"{row.student} ← {row.teacher}",
            METHOD_NAMES[entry["method"]],
            *measured,
            f"{entry['paper']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run_jobs(table: Table, parallel: int) -> int:
    """Train what is not finished, `parallel` at a time; returns the number of failed jobs."""
    waiting = [job for job in table.jobs() if job.summary() is None]
    running: dict[subprocess.Popen[bytes], Job] = {}
    failed: set[str] = set()

    def stop(number: int, frame: Any) -> None:
        for process in running:
            process.terminate()  # each writes a checkpoint and ends
        for process in running:
            process.wait()
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    while waiting or running:
        for job in [job for job in waiting if job.teacher and job.teacher.name in failed]:
            waiting.remove(job)
            failed.add(job.name)
            say(f"skipped {job.name}: its teacher failed")
        ready = [job for job in waiting if job.teacher is None or job.teacher.summary()]
        while ready and len(running) < parallel:
            job = ready.pop(0)
            waiting.remove(job)
            running[start(job, table.args.out)] = job
            say(f"started {job.name}")
        for process in [process for process in running if process.poll() is not None]:
            job = running.pop(process)
            summary = job.summary() if process.returncode == 0 else None
            if summary is None:
                failed.add(job.name)
                say(f"failed {job.name} (exit {process.returncode}): see {log_path(job, table.args.out)}")
            else:
                say(f"finished {job.name}: last test error {summary['last_test_error']:.2f} %")
                table.write()
        time.sleep(1)
    return len(failed)


def log_path(job: Job, out: Path) -> Path:
    return out / "logs" / f"{job.name.replace('/', '-')}.log"


def start(job: Job, out: Path) -> subprocess.Popen[bytes]:
    path = log_path(job, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = path.with_suffix(".yaml")
    recipe.write_text(job.config.to_yaml())
    threads = {"OMP_NUM_THREADS": str(job.config.threads)} if job.config.threads else {}
    with open(path, "ab") as log:
        command = [sys.executable, str(ROOT / "train.py"), "--recipe", str(recipe)]
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | threads
        )


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["table1"])
    parser.add_argument(
        "--schedule", default="short", choices=["short"], help="which recipes/SCHEDULE/base.yaml"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=TABLE1,
        default=["wrn-16-1-from-wrn-16-2"],
        metavar="ROW",
        help=", ".join(TABLE1),
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=5, help="train seeds 0 to N-1 (default 5, as the paper)")
    parser.add_argument("--epochs", type=int, help="instead of the schedule's")
    parser.add_argument("--data-dir", required=True, type=lambda p: str(Path(p).resolve()))
    parser.add_argument("--out", required=True, type=lambda p: Path(p).resolve())
    parser.add_argument(
        "--teacher-checkpoint", type=lambda p: Path(p).resolve(), help="use these weights, train none"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each training")
    args = parser.parse_args(argv)
    if args.teacher_checkpoint and len(args.rows) > 1:
        parser.error("--teacher-checkpoint serves a single row")
    try:
        table = Table(args)
        failed = run_jobs(table, args.jobs)
        print(table.write())
    except ConfigError as error:
        print(f"benchmarks.paper: error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
