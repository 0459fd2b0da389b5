"""The demo: its report on small made-up trainings, its folder's safety, and once from end to end."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from paths import ROOT
from runs import fork_trainings

import models
from reproduce import runner
from reproduce.answers import Answers, map_likeness
from reproduce.demo import __main__ as demo
from reproduce.demo import report as demo_report
from reproduce.demo.report import Run

ERRORS = {"teacher": [3.0], "student": [30.0, 10.0, 20.0], "student-at": [15.0, 9.0, 12.0]}


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Untrained networks with the artefacts of trainings of three epochs (the teacher's: two)."""
    made = []
    for recipe, errors in ERRORS.items():
        name = "wrn-10-2" if recipe == "teacher" else "wrn-10-1"
        for seed, error in enumerate(errors):
            folder = tmp_path / f"{recipe}-{seed}"
            folder.mkdir()
            config = {
                "dataset": "digits",
                "student": name,
                "limit-train": None,
                "limit-test": 60,
                "seed": seed,
            }
            if recipe != "teacher":
                config["limit-train"] = 40
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            summary = {"last_test_error": error, "parameters": 1234567}
            (folder / "summary.json").write_text(json.dumps(summary))
            epochs = 2 if recipe == "teacher" else 3
            lines = [{"test_error": error + epochs - epoch, "seconds": 1.5} for epoch in range(1, epochs + 1)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            torch.manual_seed(len(made))
            torch.save(models.create(name).state_dict(), folder / "model.pt")
            made.append(Run(recipe, folder))
    return made


def test_writes_report_and_pictures(runs: list[Run], tmp_path: Path) -> None:
    table = demo_report.write_results(tmp_path, runs, seconds=83.4)
    for name in ("curves.png", "attention_maps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in (tmp_path / "report.md").read_text()
    report = (tmp_path / "report.md").read_text()
    lines = [line for line in report.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == demo_report.HEADINGS
    assert cells[2][:6] == ["teacher", "wrn-10-2", "1,234,567", "1,000", "3.00", "3.00"]
    assert cells[2][6:] == ["1.00 1.00 1.00", "3.0"]
    assert cells[3][:6] == ["student alone", "wrn-10-1", "1,234,567", "40", "20.00", "30.00 10.00 20.00"]
    assert cells[4][4:6] == ["12.00", "15.00 9.00 12.00"]
    assert all(0 < float(likeness) < 1 for line in cells[3:] for likeness in line[6].split())
    assert cells[4][7] == "4.5"
    assert "60 test images" in report
    assert "took 83 s" in report
    assert table.row_count == 3
    assert [column.header for column in table.columns] == demo_report.BRIEF


def test_curves_show_every_seed_and_the_median(runs: list[Run]) -> None:
    (axes,) = demo_report.curves(runs).axes
    lines = {line.get_label(): list(map(float, line.get_ydata())) for line in axes.lines}
    assert lines["teacher: 3.00 %"] == [4.0, 3.0]
    assert lines["student alone: 20.00 %, median of 3 seeds"] == [22.0, 21.0, 20.0]
    assert lines["student with AT: 12.00 %, median of 3 seeds"] == [14.0, 13.0, 12.0]
    assert len(axes.lines) == (1 + 1) + 4 + 4  # the teacher's ends early: a dotted line leads on to the end


def test_curves_of_long_runs_have_a_panel_of_the_last_quarter(runs: list[Run]) -> None:
    """There the shorter training is a dotted line only."""
    for run in runs:
        errors = [40.0] * 8 if run.recipe == "teacher" else [30.0 - epoch for epoch in range(12)]
        run.__dict__["metrics"] = [{"test_error": error} for error in errors]
    whole, quarter = demo_report.curves(runs).axes
    assert quarter.get_title() == "the last quarter"
    dotted, *others = sorted(quarter.lines, key=lambda line: -line.get_ydata()[0])
    assert dotted.get_linestyle() == ":"
    assert list(dotted.get_ydata()) == [40.0] * 3
    assert [list(line.get_ydata()) for line in others] == [[21.0, 20.0, 19.0]] * 8
    assert {tuple(line.get_xdata()) for line in quarter.lines} == {(10, 11, 12)}
    assert len(whole.lines) == (1 + 1) + 4 + 4


def test_middle_is_the_median_run(runs: list[Run]) -> None:
    assert demo_report.middle(runs[1:4]).error == 20.0
    assert demo_report.middle(runs[1:3]).error == 10.0


def test_likeness_is_the_mean_cosine_of_maps() -> None:
    def answers(*rows: list[float]) -> Answers:
        maps = torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.double), dim=1)
        return Answers(torch.zeros(len(rows)), [maps[:, :, None]])

    student, teacher = answers([1, 0], [1, 0], [1, 1]), answers([2, 0], [0, 1], [1, 0])
    assert map_likeness(student, teacher) == pytest.approx([(1 + 0 + 0.5**0.5) / 3])


def test_telling_images_prefers_those_that_at_turned() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    alone = torch.tensor([9, 9, 0, 9, 1, 9, 3])
    at = torch.tensor([0, 0, 0, 1, 1, 9, 3])
    # turned from wrong to right: 0, 1 (class 0) and 3 (class 1); right for both: 2, 4, 6; never right: 5
    assert demo_report.telling_images(labels, alone, at, 2) == ([0, 3], 2)
    assert demo_report.telling_images(labels, alone, at, 3) == ([0, 1, 3], 3)
    assert demo_report.telling_images(labels, alone, at, 5) == ([0, 1, 2, 3, 4], 3)
    assert demo_report.telling_images(labels, alone, at, 9) == ([0, 1, 2, 3, 4, 6], 3)


def test_only_replaces_folders_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "precious"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert demo.main(["--output-dir", str(foreign)]) == 2
    assert (foreign / "thesis.txt").read_text() == "years of work"
    message = capsys.readouterr().err
    assert "not made by the demo" in message
    assert message.count("\n") == 1

    own = tmp_path / "a" / "demo"
    demo.claim(own)
    (own / "old.txt").touch()
    demo.claim(own)
    assert [path.name for path in own.iterdir()] == [demo.MARK]


def test_a_failing_training_ends_the_demo_with_its_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--output-dir", str(tmp_path / "demo"), "--jobs", "1", "--epochs", "none"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("reproduce.demo: error: teacher stopped with code 2: ")
    assert "epochs" in message
    assert message.count("\n") == 1


def test_shows_how_far_the_trainings_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            (tmp_path / "enough").touch()

    monkeypatch.setattr(demo, "say", say)
    monkeypatch.setattr(demo, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    (tmp_path / "teacher.log").write_text("wrn\nepoch 1/24  test error\nepoch 2/24  test error\nstep 9/40\n")
    teacher = f"until [ -e {tmp_path}/enough ]; do sleep 0.05; done; exit 1"
    lasts = {"teacher": teacher, "student": "exec sleep 60"}
    monkeypatch.setattr(
        demo.Training, "start", lambda self: subprocess.Popen(["sh", "-c", lasts[self.recipe]])
    )
    with pytest.raises(demo.DemoError, match="stopped with code 1: step 9/40"):
        demo.train_all(tmp_path, 1, 2, [])
    assert len(said) > 2
    assert all(re.fullmatch(r" +\d+ s: teacher epoch 2/24, student-0 starts", line) for line in said[:2])


def test_recipes_differ_only_in_what_is_compared() -> None:
    from trainer.recipes import load_recipe

    student, taught = (
        load_recipe(ROOT / "recipes" / "demo" / f"{name}.yaml") for name in ("student", "student-at")
    )
    assert {key for key in taught if taught[key] != student.get(key)} == {"teacher", "method", "beta"}


@pytest.mark.slow
def test_runs_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PROGRESS_SECONDS", 0.0)
    fork_trainings(monkeypatch, demo)
    flags = ["--epochs", "1", "--limit-train", "32", "--limit-test", "40"]
    assert demo.main(["--output-dir", str(tmp_path / "demo"), "--seeds", "1", "--jobs", "2", *flags]) == 0
    assert {"report.md", "curves.png", "attention_maps.png"} <= {
        p.name for p in (tmp_path / "demo").iterdir()
    }
    output = capfd.readouterr().out
    assert "student with AT" in output
    assert "student-at-0" in output
    assert output.startswith("digits: 1 teacher, 1 students alone, 1 with attention transfer; 2 at a time\n")
    assert re.search(r"\d s: teacher (starts|epoch)", output)
