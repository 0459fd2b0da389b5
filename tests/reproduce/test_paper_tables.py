"""The reproduction of the paper's tables: what it runs, what it keeps, and what it writes."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from runs import fork_trainings, wait_until

import reproduce.jobs
from reproduce import __main__ as paper
from reproduce import report, tables
from reproduce.command_line import exclusive
from reproduce.tables import Job, Plan
from trainer.config import make_config
from trainer.errors import ConfigError

RESULTS = sorted(ROOT.glob("benchmarks/results/*/table[1-5].json"))
ROW = "wrn-16-1-from-wrn-16-2"
STUDENT, TEACHER = "table1/wrn-16-1/seed0", "table1/wrn-16-2/seed0"


def plan(out: Path, table: str = "table1", **options: Any) -> Plan:
    options = {"schedule": "short", "rows": [ROW] if table == "table1" else None, "seeds": 2} | options
    return Plan(table, options.pop("schedule"), out, out / "data", **options)


def finish(job: Job, error: float, **summary: float) -> None:
    """A run as train.py would leave it; its error falls to `error` and stays there in the last epoch."""
    epochs = job.config.epochs
    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").write_text(job.config.to_yaml())
    each = {"seconds": 3.0, "train_error": 5.0, "ce_loss": 1.23456789, "at_loss": 0.0, "kd_loss": 0.0}
    history = [each | {"test_error": error + epochs - e - 2} for e in range(epochs - 1)]
    history.append(each | {"test_error": error, "train_error": 4.0, "at_loss": 0.5})
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    (job.folder / "summary.json").write_text(
        json.dumps({"last_test_error": error, "best_test_error": error - 1, "epochs": epochs} | summary)
    )


# --- the plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("native, amp", [(True, "bf16"), (False, "none")])
def test_jobs_of_a_row(native: bool, amp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.config.computes", lambda amp, cuda: native)
    jobs = plan(tmp_path).jobs
    names = [job.name for job in jobs]
    cells = ("at", "hints", "kd", "at-kd")
    seed0, seed1 = ([f"table1/{ROW}/{cell}/seed{seed}" for cell in cells] for seed in (0, 1))
    assert names == [TEACHER, STUDENT, *seed0, "table1/wrn-16-1/seed1", *seed1]
    for job in jobs:
        config = job.config
        assert (config.lr_schedule, config.amp, config.epochs, config.lr) == ("onecycle", amp, 12, 0.2)
        assert (config.seed, config.data_dir) == (int(job.name[-1]), tmp_path / "data")
        assert job.folder == tmp_path / "short" / job.name
        if config.method != "none":
            assert config.teacher_checkpoint == tmp_path / "short" / TEACHER / "model.pt"
            assert job.teacher == jobs[0]


def test_the_schedule_of_the_paper_is_the_default(tmp_path: Path) -> None:
    config = plan(tmp_path, schedule="paper").jobs[1].config
    assert (config.lr_schedule, config.epochs, config.lr, config.amp) == ("step", 200, 0.1, "none")
    assert paper._parse(["table1", "--data-dir", "d", "--out", "o"]).schedule == "paper"
    assert len(plan(tmp_path, seeds=None).jobs) == 1 + 5 * 5


def test_rows_and_tables_share_runs(tmp_path: Path) -> None:
    jobs = plan(tmp_path, rows=None).jobs
    names = [job.name for job in jobs]
    assert len(names) == len(set(names))
    # 4 teachers with one seed, one of which is also a student (with another seed); 2 other students alone and
    # 4 methods of 4 rows with 2 seeds
    assert len(jobs) == 4 + 1 + 2 * 2 + 4 * 4 * 2
    table2 = {job.name for job in plan(tmp_path, "table2").jobs}
    assert table2 - set(names) == {
        f"table2/{f}/seed{s}" for f in ("f-sum", "f-sum4", "f-max") for s in (0, 1)
    }


def test_table_3_has_its_own_short_schedule_and_two_teachers(tmp_path: Path) -> None:
    jobs = {job.name: job for job in plan(tmp_path, "table3", seeds=None).jobs}
    own = jobs["table3/symmetry/seed0"].config
    assert (own.lr, own.lr_schedule, own.epochs, own.compile, own.augment) == (
        0.02,
        "onecycle",
        12,
        False,
        "flip",
    )
    teachers = {name: job.teacher.name for name, job in jobs.items() if job.teacher}
    assert teachers == {
        "table3/grad-at/seed0": "table1/nin-wide/seed0",
        "table3/kd/seed0": "table1/nin-wide/seed0",
        "table3/at/seed0": "table1/nin-wide-rawpool/seed0",
    }
    assert jobs["table1/nin-wide/seed0"].config.lr == 0.2
    assert jobs["table3/at/seed0"].config.taps == "convs"
    assert len(jobs) == 6 + 2


def test_table_4_finds_its_data_and_teachers_by_row(tmp_path: Path) -> None:
    jobs = {job.name: job for job in plan(tmp_path, "table4", schedule="paper", seeds=None).jobs}
    assert jobs["table4/scenes/at/seed0"].config.data_dir == tmp_path / "data/scenes"
    assert jobs["table4/cub/at/seed0"].config.data_dir == tmp_path / "data"
    for row in ("scenes", "cub"):
        teacher = jobs[f"table4/{row}/kd/seed0"].teacher
        assert teacher
        assert teacher.name == f"table4/{row}/teacher/seed0"
        assert teacher.config.data_dir == jobs[f"table4/{row}/at/seed0"].config.data_dir


def test_columns_choose_variants_and_keep_their_teacher(tmp_path: Path) -> None:
    chosen = plan(tmp_path, columns=["at-kd-code", "at"], seeds=1)
    assert [cell.column for cell in chosen.cells] == ["at", "at-kd-code"]
    assert [job.name for job in chosen.jobs] == [
        TEACHER,
        f"table1/{ROW}/at/seed0",
        f"table1/{ROW}/at-kd-code/seed0",
    ]


def test_the_transfer_term_starts_after_the_same_share_of_fewer_epochs(tmp_path: Path) -> None:
    for epochs, start in ((None, 60), (30, 18), (1, 0)):
        chosen = plan(tmp_path, "table5", schedule="paper", columns=["at", "at-code"], epochs=epochs)
        starts = {cell.column: cell.jobs[0].config.at_start_epoch for cell in chosen.cells}
        assert starts == {"at": start, "at-code": 0}


def test_the_learning_rate_falls_after_the_same_share_of_fewer_epochs(tmp_path: Path) -> None:
    for epochs, milestones in ((None, [60, 120, 160]), (20, [6, 12, 16]), (1, [1, 1, 1])):
        config = plan(tmp_path, schedule="paper", epochs=epochs).jobs[0].config
        assert config.lr_milestones == milestones


def test_keys_of_every_run(tmp_path: Path) -> None:
    words = "table1 --data-dir d --out o --set amp=bf16 channels-last=true compile=true --jobs 2"
    keys = dict(paper._parse(words.split()).set)
    jobs = plan(tmp_path, schedule="paper", keys=keys).jobs
    assert {job.config.student for job in jobs} == {"wrn-16-1", "wrn-16-2"}
    for job in jobs:
        config = job.config
        assert (config.amp, config.channels_last, config.compile, config.epochs) == ("bf16", True, True, 200)


def test_keys_may_be_typed_with_underscores_and_spaces() -> None:
    assert [paper._pair(text) for text in ("limit_train=9", " amp = bf16")] == [
        ("limit-train", "9"),
        ("amp", "bf16"),
    ]
    with pytest.raises(argparse.ArgumentTypeError, match="seed is given by the table"):
        paper._pair("seed =3")


@pytest.mark.parametrize("table", tables.TABLES)
def test_no_key_makes_a_cell_another_one(table: str, tmp_path: Path) -> None:
    columns = [column for row in tables.TABLES[table]["rows"].values() for column in row]
    cells = plan(tmp_path, table, schedule="paper", rows=None, seeds=1, columns=columns).cells
    for row in {cell.row for cell in cells}:
        own = [c.jobs[0].config for c in cells if c.row == row and not c.column.endswith("teacher")]
        keys = {key for config in own for key, value in config if value != getattr(own[0], key)}
        assert {key.replace("_", "-") for key in keys} <= {*paper.GIVEN_KEYS, *paper.CELL_KEYS}


def test_a_given_teacher_is_not_trained(tmp_path: Path) -> None:
    jobs = plan(tmp_path, teacher_checkpoint=tmp_path / "t.pt").jobs
    assert len(jobs) == 2 * 5
    assert all(job.teacher is None for job in jobs)
    assert {job.config.teacher_checkpoint for job in jobs} == {None, tmp_path / "t.pt"}
    assert not any(
        cell.column == "teacher" for cell in plan(tmp_path, teacher_checkpoint=tmp_path / "t.pt").cells
    )


# --- what is written ----------------------------------------------------------------------------------


def test_finished_runs_are_kept_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    errors = {"teacher": [10.0], "student": [13.0, 13.5], "at": [11.0, 11.4], "hints": [12.0, 12.0]}
    own = plan(tmp_path)
    for cell in own.cells:
        for job, error in zip(cell.jobs, errors.get(cell.column, [12.5, 12.25]), strict=True):
            finish(job, error)
    words = ["--schedule", "short", "--rows", ROW, "--seeds", "2", "--out", str(tmp_path)]
    assert paper.main(["table1", *words, "--data-dir", str(tmp_path / "data")]) == 0
    text = (tmp_path / "short/table1.md").read_text()
    assert text in capsys.readouterr().out
    pair = "| wrn-16-1 ← wrn-16-2"
    assert [line for line in text.splitlines() if line.startswith(pair)] == [
        f"{pair} | student alone | 13.25 ± 0.25 | 12.25 ± 0.25 | 2 |  | 8.77 |  |",
        f"{pair} | AT | 11.20 ± 0.20 | 10.20 ± 0.20 | 2 | −2.05 | 7.93 | −0.84 |",
        f"{pair} | F-ActT | 12.00 ± 0.00 | 11.00 ± 0.00 | 2 | −1.25 | 8.51 | −0.26 |",
        f"{pair} | KD | 12.38 ± 0.12 | 11.38 ± 0.12 | 2 | −0.88 | 7.41 | −1.36 |",
        f"{pair} | AT+KD | 12.38 ± 0.12 | 11.38 ± 0.12 | 2 | −0.88 | 7.51 | −1.26 |",
        f"{pair} | teacher | 10.00 | 9.00 | 1 |  | 6.31 |  |",
    ]
    assert "schedule `short` (12 epochs)" in text
    result = json.loads((tmp_path / "short/table1.json").read_text())
    (at,) = (cell for cell in result["cells"] if cell["column"] == "at")
    assert [run["last_test_error"] for run in at["runs"]] == [11.0, 11.4]
    assert [run["seed"] for run in at["runs"]] == [0, 1]
    assert at["runs"][0]["seconds"] == 12 * 3.0
    assert at["runs"][0]["train_error"] == [5.0] * 11 + [4.0]
    assert at["runs"][0]["ce_loss"] == [1.2346] * 12
    assert at["runs"][0]["at_loss"] == [0.0] * 11 + [0.5]
    assert "kd_loss" not in at["runs"][0]
    config = at["runs"][1]["config"]
    assert (config["method"], config["beta"], config["seed"], config["lr"]) == ("at", 1000.0, 1, 0.2)
    assert config["teacher-checkpoint"] == f"{TEACHER}/model.pt"
    assert str(tmp_path) not in json.dumps(result)
    assert (tmp_path / "short/table1.png").read_bytes().startswith(b"\x89PNG")


def test_known_runs_are_not_trained_again(tmp_path: Path) -> None:
    first = plan(tmp_path / "first", columns=["student", "at", "teacher"])
    for number, job in enumerate(first.jobs):
        finish(job, 10.0 + number)
    report.write(first)
    known = [tmp_path / "first/short/table1.json"]
    second = plan(tmp_path / "second", "table2", known=known)
    others = [f"table2/{column}/seed{seed}" for seed in (0, 1) for column in ("f-sum", "f-sum4", "f-max")]
    assert [job.name for job in second.jobs] == [TEACHER, *others]  # their teacher's weights are needed
    cells = {entry["column"]: entry["runs"] for entry in report.results(second)["cells"]}
    assert [run["last_test_error"] for run in cells["f-sum2"]] == [12.0, 14.0]
    assert [run["last_test_error"] for run in cells["student"]] == [11.0, 13.0]
    assert [run["last_test_error"] for run in cells["teacher"]] == [10.0]
    assert cells["f-max"] == []
    assert plan(tmp_path / "second", columns=["student", "at"], known=known).jobs == []
    finish(second.jobs[0], 20.0)  # one's own come first
    assert report.results(second)["cells"][-1]["runs"][0]["last_test_error"] == 20.0
    other = plan(tmp_path / "second", columns=["student", "at"], known=known, epochs=9)
    assert [job.name for job in other.jobs] == [job.name for job in first.jobs]
    given = tmp_path / "t.pt"
    own_teacher = plan(tmp_path / "second", columns=["at"], known=known, teacher_checkpoint=given)
    assert len(own_teacher.jobs) == 2  # another teacher's students are other runs


def test_of_several_known_files_any_may_match(tmp_path: Path) -> None:
    known = []
    for epochs in (3, 4):
        own = plan(tmp_path / str(epochs), columns=["student"], epochs=epochs)
        for job in own.jobs:
            finish(job, 10.0 + epochs)
        report.write(own)
        known.append(own.folder / "table1.json")
    for files in (known, known[::-1]):
        later = plan(tmp_path, columns=["student"], epochs=3, known=files)
        assert later.jobs == []
        assert report.results(later)["cells"][0]["median_last"] == 13.0


def test_a_folder_that_was_moved_holds_the_same_runs(tmp_path: Path) -> None:
    first = plan(tmp_path / "first", columns=["at"], seeds=1)
    for job in first.jobs:
        finish(job, 10.0)
    (tmp_path / "first").rename(tmp_path / "second")
    second = plan(tmp_path / "second", columns=["at"], seeds=1)
    assert all(job.summary() for job in second.jobs)
    (run,) = report.results(second)["cells"][0]["runs"]
    assert run["config"]["teacher-checkpoint"] == f"{TEACHER}/model.pt"


def test_a_given_teacher_is_told_by_its_path_or_name(tmp_path: Path) -> None:
    """In one's own folder the whole path counts, in a known file there is but the name."""

    def chosen(out: str, weights: str, **options: Any) -> Plan:
        given = tmp_path / weights
        return plan(tmp_path / out, columns=["at"], seeds=1, teacher_checkpoint=given, **options)

    own = chosen("own", "t.pt")
    finish(own.jobs[0], 10.0)
    report.write(own)
    with pytest.raises(ConfigError, match="teacher-checkpoint differ"):
        chosen("own", "x/t.pt").jobs[0].summary()
    known = [own.folder / "table1.json"]
    for weights, kept in (("x/t.pt", True), ("other.pt", False), (f"own/short/{TEACHER}/model.pt", False)):
        assert (chosen("other", weights, known=known).jobs == []) is kept


def test_a_run_that_max_steps_cut_short_is_not_finished(tmp_path: Path) -> None:
    """Not even in its last epoch; it is for a plan that asks for no more steps."""

    def chosen(out: str, steps: int | None, **options: Any) -> Plan:
        keys = {"max-steps": str(steps)} if steps else {}
        return plan(tmp_path / out, columns=["student"], seeds=1, keys=keys, **options)

    cut = chosen("own", 5)
    (job,) = cut.jobs
    finish(job, 10.0)
    report.write(cut)
    known = [cut.folder / "table1.json"]
    for steps, kept in ((5, True), (3, True), (7, False), (None, False)):
        assert (chosen("own", steps).jobs[0].summary() is not None) is kept
        assert (chosen("other", steps, known=known).jobs == []) is kept
    torch.save({"progress": {"history": [{}] * 12}}, job.folder / "checkpoint.pt")  # 5 steps were enough
    assert chosen("own", None).jobs[0].summary()
    finish(chosen("whole", None).jobs[0], 10.0)
    assert chosen("whole", 5).jobs[0].summary()


def test_top5_error_where_the_paper_has_it(tmp_path: Path) -> None:
    own = plan(tmp_path, "table5", schedule="paper", columns=["student", "at"])
    finish(own.cells[0].jobs[0], 40.0, last_test_top5_error=15.5)
    lines = report.write(own).splitlines()
    assert lines[2].endswith("| paper | its change | top 5 | its top 5 |")
    assert lines[4].endswith("| 40.00 | 39.00 | 1 |  | 30.40 |  | 15.50 | 10.80 |")
    assert lines[5].endswith("| not finished |  | 0 |  | 29.30 | −1.10 |  | 10.00 |")
    result = json.loads((tmp_path / "paper/table5.json").read_text())
    assert result["cells"][0]["runs"][0]["last_test_top5_error"] == 15.5
    assert report.markdown(result).splitlines() == lines


def test_a_second_teacher_has_no_change(tmp_path: Path) -> None:
    own = plan(tmp_path, "table3", seeds=None)
    for number, job in enumerate(own.jobs):
        finish(job, 20.0 + number)
    lines = report.write(own).splitlines()
    assert lines[-1].endswith("| teacher of AT | 21.00 | 20.00 | 1 |  |  |  |")
    assert lines[-3].endswith("| 11.20 | −2.30 |")


def test_unfinished_cells_say_so(tmp_path: Path) -> None:
    own = plan(tmp_path)
    finish(own.jobs[1], 13.0)
    text = report.write(own)
    assert "| AT | not finished |  | 0 |  | 7.93 | −0.84 |" in text
    assert "| student alone | 13.00 | 12.00 | 1 |" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_results_are_what_their_json_says(path: Path) -> None:
    """And so are the documentation's."""
    text = report.markdown(json.loads(path.read_text()))
    assert text == path.with_suffix(".md").read_text()
    rows = text.partition("\n\n")[2]
    assert rows in (ROOT / "docs/results.md").read_text()
    if path == ROOT / "benchmarks/results/cifar10-12-epochs/table1.json":
        assert rows in (ROOT / "README.md").read_text()


def test_figures_are_medians_over_seeds(tmp_path: Path) -> None:
    """Which of three differ from their means."""
    own = plan(tmp_path, "table5", schedule="paper", columns=["student", "at"], seeds=3)
    errors = {"student": [40.0, 44.0, 41.0], "at": [39.5, 36.0, 39.0]}
    for cell in own.cells:
        for job, error in zip(cell.jobs, errors[cell.column], strict=True):
            finish(job, error, last_test_top5_error=2 * error - 60)
    student, at = report.write(own).splitlines()[4:6]
    assert student.endswith("| 41.00 ± 2.00 | 40.00 ± 2.00 | 3 |  | 30.40 |  | 22.00 | 10.80 |")
    assert at.endswith("| 39.00 ± 1.75 | 38.00 ± 1.75 | 3 | −2.00 | 29.30 | −1.10 | 18.00 | 10.00 |")


def test_curves_are_medians_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[str, list[float]]] = []

    def plot(axes: Axes, x: Any, y: list[float], *args: Any, **style: Any) -> list[Any]:
        drawn.append((style.get("linestyle", "-"), y))
        return []

    monkeypatch.setattr(Axes, "plot", plot)
    own = plan(tmp_path, columns=["student", "at", "teacher"], epochs=3, seeds=3)
    for job, error in zip(own.jobs, (10.0, 13.0, 11.0, 17.0, 12.5, 14.0, 11.5), strict=True):
        finish(job, error)
    assert report.curves(report.results(own)).startswith(b"\x89PNG")
    assert drawn == [
        ("-", [15, 14, 14]),
        ("--", [5, 5, 4]),
        ("-", [12.5, 11.5, 11.5]),
        ("--", [5, 5, 4]),
    ]


def test_long_runs_have_a_panel_of_their_last_quarter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the same colours, with the teacher in sight; drawn from a committed TABLE.json."""
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    from reproduce import curves

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    picture = tmp_path / "curves.png"
    assert curves.main([str(ROOT / "benchmarks/results/cifar10-12-epochs/table2.json"), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    whole, quarter = drawn[0].axes
    assert quarter.get_title() == "the last quarter"
    for line, last in zip(whole.lines, quarter.lines, strict=True):
        assert (line.get_label(), line.get_color()) == (last.get_label(), last.get_color())
        if line.get_linestyle() == ":":
            low, high = quarter.get_ylim()
            assert low < last.get_ydata()[0] < high
            continue
        assert list(last.get_xdata()) == [10, 11, 12]
        assert list(last.get_ydata()) == list(line.get_ydata())[9:]
    solid = [line for line in whole.lines if line.get_linestyle() == "-"]
    assert len({to_hex(line.get_color()) for line in solid}) == len(solid) == 5


def test_every_column_has_a_colour_of_its_own() -> None:
    from reproduce.curves import COLOURS

    for table in tables.TABLES.values():
        for row in table["rows"].values():
            columns = [column for column in row if not column.endswith("teacher")]
            assert len({COLOURS[column] for column in columns}) == len(columns)


def test_another_run_is_not_taken_for_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(plan(tmp_path).jobs[1], 13.0)
    words = ["table1", "--schedule", "short", "--data-dir", "d", "--out", str(tmp_path), "--epochs", "9"]
    assert paper.main(words) == 2
    error = capsys.readouterr().err
    assert "table1/wrn-16-1/seed0 holds a different run: epochs differ" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        ("table6", "invalid choice: 'table6'"),
        ("table1 --rows wrn-16-3", f"table1 has no rows wrn-16-3; it has nin-thin-from-nin-wide, {ROW}"),
        ("table2 --columns at", "table2 has no columns at; it has student, f-sum, f-sum2"),
        ("table5 --schedule short", "table5 has no schedule short: paper"),
        ("table1 --seeds 0", "--seeds"),
        ("table1 --jobs 0", "--jobs: expected a whole number above 0, got '0'"),
        ("table1 --epochs -1", "--epochs: expected a whole number above 0, got '-1'"),
        ("table1 --teacher-checkpoint t.pt", "have table1/nin-wide, table1/wrn-16-2, table1/wrn-40-1, "),
        ("table3 --teacher-checkpoint t.pt", "have table1/nin-wide, table1/nin-wide-rawpool: choose"),
        ("table2 --teacher-checkpoint t.pt --columns teacher", "the chosen cells have no teacher"),
        ("table1 --dry-run", "no folder cifar-10-batches-py"),
        ("table1 --measure", "no folder cifar-10-batches-py"),
        ("table1 --set amp", "--set: expected KEY=VALUE, got 'amp'"),
        ("table1 --set seed=3", "--set: seed is given by the table or a flag of its own"),
        ("table1 --set data_dir=/x", "--set: data-dir is given by the table or a flag of its own"),
        ("table1 --set method=none", "--set: method is given by the table or a flag of its own"),
        ("table1 --set ampp=bf16", "unknown key ampp (did you mean amp?)"),
        ("table1 --set limit_trian=9", "unknown key limit_trian (did you mean limit-train?)"),
        ("table1 --known nothing.json", "nothing.json: No such file"),
        (f"table1 --known {__file__}", "not the JSON of a table's results"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper.main([*words.split(), "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("reproduce: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def refused(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> str:
    """What is said of a command that ends in one line with exit code 2."""
    assert paper.main(["table1", "--data-dir", str(out), "--out", str(out), *words]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    return error.removeprefix("reproduce: error: ")


def test_out_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "paper").write_text("")
    for out in (tmp_path / "paper", tmp_path / "paper/deeper"):
        for words in ([], ["--dry-run"]):
            told = refused(capsys, out, *words)
            assert told == f"argument --out: expected a folder, {tmp_path / 'paper'} is a file"
    assert refused(capsys, tmp_path) == f"out {tmp_path / 'paper'}: File exists"
    assert "no folder cifar-10-batches-py" in refused(capsys, tmp_path, "--dry-run")


def test_a_run_of_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = plan(tmp_path, schedule="paper").jobs[0]
    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").write_text("")
    assert refused(capsys, tmp_path, "--seeds", "2") == f"{job.folder}/config.yaml is not a run's"


def test_two_at_once_in_one_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce.jobs, "run", lambda *args: 0)
    with exclusive(tmp_path / "paper"):
        assert refused(capsys, tmp_path) == f"out {tmp_path / 'paper'}: another process is at work there"
    assert paper.main(["table1", "--data-dir", "d", "--out", str(tmp_path)]) == 0


def test_a_training_whose_parent_was_killed_still_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(reproduce.jobs, "_command", lambda config, recipe: sleep)
    with exclusive(tmp_path):
        training = reproduce.jobs.start(plan(tmp_path).jobs[0], tmp_path / "logs")
    with pytest.raises(ConfigError, match="another process is at work there"), exclusive(tmp_path):
        pass
    training.kill()
    training.wait()
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize(
    "fault, message",
    [
        ({"config": None}, "config is missing"),  # results from before runs told their configuration
        ({"config": []}, "config: expected the keys of a recipe"),
        ({"config": {}}, "student is required"),
        ({"config": "x"}, "config: expected the keys of a recipe"),
        ({"config": {"student": "wrn-10-1", "dataset": "digits", "method": "at"}}, "method at needs teacher"),
        ({"config": {"student": "wrn-10-1", "dataset": "digits", "teacher-checkpoint": 3}}, "(got '3')"),
        ({"last_test_error": "9"}, "last_test_error: expected a percentage"),
        ({"best_test_error": float("nan")}, "best_test_error: expected a percentage"),
        ({"last_test_top5_error": None}, "last_test_top5_error: expected a percentage"),
        ({"test_error": 9.0}, "test_error: expected percentages"),
        ({"train_error": [9.0, "9"]}, "train_error: expected percentages"),
        ({"train_error": []}, "train_error: expected percentages"),
        ({"train_error": [9.0]}, "test_error and train_error tell of different epochs"),
    ],
)
def test_known_runs_must_tell_all(
    fault: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"seed": 3, "config": {"student": "wrn-10-1", "dataset": "digits"}, "last_test_error": 9.0}
    run |= {"best_test_error": 8, "test_error": [8, 9.0], "train_error": [7.0, 6.0]}
    known = tmp_path / "table1.json"
    words = [str(w) for w in ("table1", "--known", known, "--data-dir", tmp_path, "--out", tmp_path / "out")]
    known.write_text(json.dumps({"cells": [{"recipe": "table1/x", "runs": [run]}]}))
    assert plan(tmp_path, known=[known]).jobs
    known.write_text(json.dumps({"cells": [{"recipe": "table1/x", "runs": [run | fault]}]}))
    assert paper.main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"reproduce: error: known {known}: table1/x/seed3: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_given_teacher_serves_those_columns_that_it_teaches(tmp_path: Path) -> None:
    chosen = plan(tmp_path, "table3", columns=["student", "grad-at", "kd"], teacher_checkpoint=tmp_path / "t")
    assert {job.config.teacher for job in chosen.jobs} == {None, "nin-wide"}


def test_says_why_a_table_can_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(keys: dict[str, Any]) -> Any:
        raise ConfigError("pretrained true is not available")

    monkeypatch.setattr(tables, "make_config", refuse)
    with pytest.raises(
        ConfigError, match=r"table4 can't run: recipes/table4/cub/student\.yaml: pretrained true"
    ):
        plan(tmp_path, "table4", schedule="paper").jobs  # noqa: B018


def test_estimate_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = plan(tmp_path, columns=["student", "at"])
    finish(own.jobs[0], 10.0)
    half_done = own.jobs[1]
    half_done.folder.mkdir(parents=True)
    (half_done.folder / "metrics.jsonl").write_text('{"test_error": 50}\n' * 6)
    measured: list[str] = []

    def measure(job: Job) -> float | None:
        measured.append(job.name)
        return None if "at/" in job.name else 0.5

    monkeypatch.setattr(reproduce.jobs, "measure", measure)
    monkeypatch.setattr(reproduce.jobs, "_sizes", lambda *key: reproduce.jobs.Sizes(1280, 384, 10))
    said: list[str] = []
    assert not reproduce.jobs.estimate(own.jobs, lambda line: said.append(f"{line} [{len(measured)}]"))
    assert [int(line[-2]) for line in said] == [0, 1, 2, 2, 2, 2], "each line as soon as it is known"
    assert [line[:-4] for line in said] == [
        f"{TEACHER}: finished",
        f"{STUDENT}: 6 epochs of 6 s (500 ms a step), 0 h 01 min",  # (1280 + 384 / 3) / 128 steps of 0.5 s
        f"table1/{ROW}/at/seed0: 12 epochs, not measured",
        "table1/wrn-16-1/seed1: 12 epochs of 6 s (500 ms a step), 0 h 01 min",
        f"table1/{ROW}/at/seed1: 12 epochs, not measured",
        "together 0 h 02 min, one at a time, without what was not measured",
    ]
    assert measured == [STUDENT, f"table1/{ROW}/at/seed0"]  # once per recipe
    assert reproduce.jobs.estimate(own.jobs[:2], said.append)
    assert reproduce.jobs.duration(3600 * 25 + 59.9 * 60) == "26 h 00 min"


def test_a_dry_run_lists_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce.jobs, "measure", lambda job: pytest.fail("nobody asked for it"))
    monkeypatch.setattr(reproduce.jobs, "_sizes", lambda *key: reproduce.jobs.Sizes(1280, 384, 10))
    own = plan(tmp_path, columns=["student"])
    finish(own.jobs[0], 10.0)
    own.jobs[1].folder.mkdir(parents=True)
    (own.jobs[1].folder / "metrics.jsonl").write_text('{"test_error": 50}\n' * 5)
    words = f"table1 --schedule short --rows {ROW} --columns student --seeds 3 --dry-run".split()
    assert paper.main([*words, "--data-dir", str(own.data_dir), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{STUDENT}: finished",
        "table1/wrn-16-1/seed1: 7 epochs (5 done)",
        "table1/wrn-16-1/seed2: 12 epochs",
        "3 runs, 2 to train; --measure estimates how long they take",
    ]


# --- training -----------------------------------------------------------------------------------------

TINY = {
    "title": "Tiny", "paper": "nothing", "seeds": 1, "schedules": ["paper"],
    "rows": {
        "student-from-teacher": {
            "student": {"recipe": "student", "paper": 9.0},
            "at": {"recipe": "at", "paper": 8.0},
            "teacher": {"recipe": "teacher", "paper": 7.0},
        }
    },
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digits in place of CIFAR, as the table `tiny`, by forks; returns the folder of its recipes."""
    fork_trainings(monkeypatch, reproduce.jobs)
    common = "dataset: digits\nlimit-train: 64\nlimit-test: 50\nepochs: 1\n"
    recipes = {
        "teacher": f"{common}student: wrn-10-2\n",
        "student": f"{common}student: wrn-10-1\n",
        "at": "base: student.yaml\nteacher: wrn-10-2\nmethod: at\n",
    }
    (tmp_path / "recipes").mkdir()
    for name, text in recipes.items():
        (tmp_path / f"recipes/{name}.yaml").write_text(text)
    monkeypatch.setattr(tables, "RECIPES", tmp_path / "recipes")
    monkeypatch.setitem(tables.TABLES, "tiny", TINY)
    return tmp_path / "recipes"


def call(out: Path, *words: str) -> int:
    return paper.main(["tiny", "--data-dir", str(out), "--out", str(out), "--threads", "1", *words])


@pytest.mark.slow
def test_trains_in_order_and_keeps_what_is_finished(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert call(out, "--jobs", "2") == 0
    summaries = [out / "paper" / name / "seed0/summary.json" for name in ("teacher", "at", "student")]
    times = [path.stat().st_mtime_ns for path in summaries]
    assert times[0] < times[1]
    assert json.loads(summaries[1].read_text())["method"] == "at"
    assert "not finished" not in (out / "paper/tiny.md").read_text()
    assert call(out) == 0
    assert times == [path.stat().st_mtime_ns for path in summaries]


@pytest.mark.slow
def test_what_max_steps_cut_short_goes_on_without_them(tiny: Path, tmp_path: Path) -> None:
    words = ["--columns", "student", "--set", "batch-size=32"]  # two steps
    results = tmp_path / "paper/student/seed0"
    for steps, reached in (("max-steps=1", 1), ("batch-size=32", 2), ("max-steps=9", 2)):
        assert call(tmp_path, *words, steps) == 0
        assert torch.load(results / "checkpoint.pt")["progress"]["step"] == reached


@pytest.mark.slow
def test_a_failure_costs_what_needs_it_only(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "paper/teacher/seed0"
    folder.mkdir(parents=True)
    (folder / "model.pt").write_text("somebody's")
    assert call(tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    (failed,) = (line for line in lines if " failed " in line)
    assert "failed teacher/seed0 (exit 2): train.py: error: " in failed
    assert any("skipped at/seed0: its teacher failed" in line for line in lines)
    table = (tmp_path / "paper/tiny.md").read_text()
    assert table.count("not finished") == 2
    assert (tmp_path / "paper/student/seed0/summary.json").exists()
    assert (folder / "model.pt").read_text() == "somebody's"


@pytest.mark.slow
def test_a_signal_stops_the_trainings_which_continue_later(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "teacher.yaml").write_text(
        "dataset: digits\nlimit-train: 256\nlimit-test: 50\nepochs: 40\nstudent: wrn-10-1\n"
    )
    code = (
        "import sys\nfrom pathlib import Path\nfrom reproduce import __main__ as paper, tables\n"
        f"tables.RECIPES = Path({str(tiny)!r})\ntables.TABLES['tiny'] = {TINY!r}\n"
        "sys.exit(paper.main(sys.argv[1:]))"
    )
    words = ["tiny", "--columns", "teacher", "--data-dir", "d", "--out", str(tmp_path), "--threads", "1"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT)
    log = tmp_path / "paper/logs/teacher-seed0.log"
    wait_until(lambda: log.exists() and "epoch 2/40" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "stopped by signal" in log.read_text()
    assert not (tmp_path / "paper/teacher/seed0/summary.json").exists()
    assert paper.main(words) == 0
    assert "continuing from step" in log.read_text()
    assert "finished teacher/seed0" in capsys.readouterr().out


def test_estimates_for_the_images_that_are_used(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--columns", "student", "--measure", "--set", "limit-train=512", "limit-test=384"]
    monkeypatch.setattr(reproduce.jobs, "measure", lambda job: 30.0)
    assert call(tmp_path, *words) == 0  # (512 + 384 / 3) / 128 steps
    assert "1 epochs of 150 s (30000 ms a step)" in capsys.readouterr().out
    monkeypatch.setattr(reproduce.jobs, "measure", lambda job: None)
    assert call(tmp_path, *words) == 1


@pytest.mark.slow
def test_measures_a_step_with_an_untrained_teacher(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (job,) = (job for job in Plan("tiny", "paper", tmp_path, tmp_path).jobs if job.name == "at/seed0")
    seconds = reproduce.jobs.measure(job)
    assert seconds
    assert 0 < seconds < 60
    assert not job.folder.exists()
    broken = Job(
        "x/seed0", make_config(job.config.model_dump(by_alias=True) | {"freeze": ["nothing"]}), job.teacher
    )
    assert reproduce.jobs.measure(broken) is None
    assert (
        "can't measure x/seed0: train.py: error: freeze nothing: wrn-10-1 has no such"
        in capsys.readouterr().err
    )
