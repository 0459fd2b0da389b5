"""The reproduction of the paper's tables: what it runs, what it keeps, and the table it writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import paper

ROW = "wrn-16-1-from-wrn-16-2"


def main(out: Path, *more: str) -> int:
    common = ["table1", "--data-dir", str(out), "--out", str(out), "--epochs", "1", "--threads", "1"]
    return paper.main([*common, *more])


def finish(out: Path, name: str, **keys: Any) -> None:
    """A run as train.py would leave it, with an error told by its name."""
    folder = out / name
    folder.mkdir(parents=True)
    job = next(job for job in table(out, **keys).jobs() if job.name == name)
    error = 10 + len(name) / 10 + job.config.seed
    (folder / "config.yaml").write_text(job.config.to_yaml())
    (folder / "metrics.jsonl").write_text(json.dumps({"seconds": 3.0, "test_error": error}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"last_test_error": error, "best_test_error": error - 1}))


def table(out: Path, seeds: int = 2, rows: tuple[str, ...] = (ROW,)) -> paper.Table:
    keys = {"schedule": "short", "rows": rows, "methods": paper.METHODS, "seeds": seeds, "epochs": 1}
    keys |= {"data_dir": str(out), "out": out, "teacher_checkpoint": None, "threads": 1}
    return paper.Table(argparse.Namespace(**keys))


def test_jobs_of_a_row(tmp_path: Path) -> None:
    jobs = table(tmp_path).jobs()
    names = [job.name for job in jobs]
    assert names[0] == "wrn-16-2/none-seed0"  # the teacher comes first
    assert len(names) == len(set(names)) == 1 + 4 * 2
    for job in jobs:
        config = job.config
        assert (config.lr_schedule, config.amp, config.epochs, config.threads) == ("onecycle", "bf16", 1, 1)
        if config.method != "none":
            assert config.teacher_checkpoint == tmp_path / "wrn-16-2/none-seed0/model.pt"
            assert (config.student, config.teacher) == ("wrn-16-1", "wrn-16-2")
            assert job.teacher is not None
            assert job.teacher.name == names[0]


def test_rows_share_runs(tmp_path: Path) -> None:
    jobs = table(tmp_path, rows=tuple(paper.TABLE1)).jobs()
    assert sum(job.name == "wrn-16-2/none-seed0" for job in jobs) == 1  # a teacher here, a student there
    # 3 teachers, 2 students alone twice (one of them a teacher too), and 3 methods of 3 rows twice
    assert len(jobs) == 3 + 2 * 2 - 1 + 3 * 3 * 2


def test_finished_runs_are_kept_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in table(tmp_path).jobs():
        finish(tmp_path, job.name)
    assert main(tmp_path, "--seeds", "2") == 0
    text = (tmp_path / "table1.md").read_text()
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| wrn")]
    assert rows == [
        "| wrn-16-1 ← wrn-16-2 | teacher | 11.90 | 11.90 | 10.90 | 6.31 |",
        "| wrn-16-1 ← wrn-16-2 | student alone | 12.40 | 11.90, 12.90 | 11.40 | 8.77 |",
        "| wrn-16-1 ← wrn-16-2 | AT | 13.60 | 13.10, 14.10 | 12.60 | 7.93 |",
        "| wrn-16-1 ← wrn-16-2 | KD | 13.60 | 13.10, 14.10 | 12.60 | 7.41 |",
        "| wrn-16-1 ← wrn-16-2 | AT+KD | 13.90 | 13.40, 14.40 | 12.90 | 7.51 |",
    ]
    entries = json.loads((tmp_path / "table1.json").read_text())
    assert [entry["method"] for entry in entries] == ["teacher", "none", "at", "kd", "at+kd"]
    assert entries[1]["seconds"] == [3.0, 3.0]


def test_unfinished_cells_say_so(tmp_path: Path) -> None:
    finish(tmp_path, "wrn-16-1/none-seed1")
    text = table(tmp_path).write()
    assert "| AT | not finished |" in text
    assert "| student alone | 12.90 | 12.90 |" in text


def test_another_run_is_not_taken_for_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(tmp_path, "wrn-16-1/none-seed1")
    assert main(tmp_path, "--seeds", "2", "--epochs", "9") == 2
    error = capsys.readouterr().err
    assert "none-seed1 holds a different run: epochs differ" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_trains_in_order_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits in place of CIFAR: the teacher, then AT from it; a failing run fails what needs it."""
    recipe = {"dataset": "digits", "limit-train": 64, "limit-test": 50, "lr-schedule": "onecycle"}
    monkeypatch.setattr(paper, "load_recipe", lambda path: recipe)
    keys = ("--seeds", "1", "--methods", "at")
    assert main(tmp_path / "a", *keys) == 0
    teacher, student = (tmp_path / "a" / name for name in ("wrn-16-2/none-seed0", f"{ROW}/at-seed0"))
    assert json.loads((student / "summary.json").read_text())["method"] == "at"
    times = [(folder / "summary.json").stat().st_mtime_ns for folder in (teacher, student)]
    assert times[0] < times[1]
    assert main(tmp_path / "a", *keys) == 0
    assert times == [(folder / "summary.json").stat().st_mtime_ns for folder in (teacher, student)]

    (tmp_path / "b/wrn-16-2/none-seed0").mkdir(parents=True)
    (tmp_path / "b/wrn-16-2/none-seed0/model.pt").write_text("somebody's")
    assert main(tmp_path / "b", *keys) == 1
    assert "not finished" in (tmp_path / "b/table1.md").read_text()
    assert not (tmp_path / "b" / ROW).exists()
