"""Tables 4 and 5 in miniature: which images and weights each training gets, and once from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from runs import fork_trainings

from reproduce import jobs
from reproduce.answers import Answers
from reproduce.command_line import exclusive
from reproduce.mini import __main__ as mini
from reproduce.mini import plan, report
from reproduce.tables import Job

CLASSES = ["ant", "bee", "cat", "dog", "n03028079"]  # the last one is Imagenette's church


def make_images(root: Path, held_out: str = "val", classes: list[str] = CLASSES) -> Path:
    """Three images of each class to train on, one to test on."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 3), (held_out, 1)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(256, size=(36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def found(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*"))


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_more_than_half_of_the_classes_are_for_pretraining(tmp_path: Path, held_out: str) -> None:
    images = make_images(tmp_path / "images", held_out)
    for _ in range(2):  # links that are there are right
        pretraining, finetuning = plan.split(images, tmp_path / "out")
        assert found(pretraining) == [
            f"{s}/{name}" for s in ("train", "val") for name in ("ant", "bee", "cat")
        ]
        assert found(finetuning) == [f"{s}/{name}" for s in ("train", "val") for name in ("church", "dog")]
    assert (finetuning / "train/church").samefile(images / "train/n03028079")
    assert (finetuning / "val/church").samefile(images / held_out / "n03028079")


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", classes=[".ipynb_checkpoints", *CLASSES])
    (images / "train/.cache").mkdir()
    parts = plan.split(images, tmp_path / "out")
    assert [len(found(part)) for part in parts] == [6, 4]
    assert not any(".ipynb_checkpoints" in name for part in parts for name in found(part))


def test_ten_classes_are_six_and_four(tmp_path: Path) -> None:
    pretraining, finetuning = plan.split(
        make_images(tmp_path / "images", classes=list("abcdefghij")), tmp_path
    )
    assert [len(found(part)) / 2 for part in (pretraining, finetuning)] == [6, 4]


def test_weights_come_from_where_they_should(tmp_path: Path) -> None:
    runs = plan.plan(tmp_path, tmp_path / "first", tmp_path / "second", epochs=2)
    teacher, student = (tmp_path / f"table5/{name}/model.pt" for name in ("teacher", "student"))
    tuned = tmp_path / "table4/teacher/model.pt"
    expected: dict[str, dict[str, tuple[Path | bool, Path | None]]] = {
        "table5": {"teacher": (False, None), "student": (False, None), "at": (False, teacher)},
        "table4": {
            "teacher": (teacher, None),
            "student": (student, None),
            "kd": (student, tuned),
            "at": (student, tuned),
        },
    }
    for table, data in (("table5", "first"), ("table4", "second")):
        jobs: dict[str, Job] = getattr(runs, table)
        sources = {k: (job.config.pretrained, job.config.teacher_checkpoint) for k, job in jobs.items()}
        assert sources == expected[table]
        for name, job in jobs.items():
            assert (job.config.data_dir, job.config.epochs) == (tmp_path / data, 2)
            assert job.config.student == ("resnet-34" if name == "teacher" else "resnet-18")
            assert job.config.freeze_bn == (table == "table4")
    assert runs.table5["at"].config.at_start_epoch == 1  # as 6 of 10


def broken(tmp_path: Path, fault: str) -> list[str]:
    images = make_images(tmp_path / "images", classes=CLASSES[:4] if fault == "4 classes" else CLASSES)
    out = tmp_path / "out"
    if fault == "val has no bee":
        (images / "val/bee").rename(images / "val/wasp")
    if fault == "train has no wasp":
        (images / "val/wasp").mkdir()
    if "other Unicode form" in fault:
        (images / "train/bee").rename(images / "train/caf\u00e9")
        (images / "val/bee").rename(images / "val/cafe\u0301")
    if fault == "links to other images":
        plan.split(make_images(tmp_path / "others"), out / "data")
    if fault == "expected a folder":
        out.write_text("")
    if fault == "No such file":
        images = tmp_path / "nothing"
    return ["--data-dir", str(images), "--out", str(out), *(["--jobs", "0"] if "--jobs" in fault else [])]


@pytest.mark.parametrize(
    "fault",
    [
        "4 classes",
        "val has no bee",
        "train has no wasp",
        r"train has no 'cafe\u0301', but 'caf\xe9', which is its other Unicode form",
        "links to other images",
        "No such file",
        "expected a folder",
        "--jobs: expected a whole number above 0, got '0'",
    ],
)
def test_a_mistake_is_told_in_one_line(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mini.main(broken(tmp_path, fault)) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("reproduce.mini: error: ")
    assert fault in told


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(tmp_path / "out"):
        assert mini.main(broken(tmp_path, "none")) == 2
    assert capsys.readouterr().err.endswith("another process is at work there\n")


def test_likeness_of_maps() -> None:
    def answers(*maps: list[list[float]]) -> Answers:
        return Answers(torch.zeros(2), [torch.tensor(layer)[:, None] for layer in maps])

    teacher = answers([[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
    student = answers([[2.0, 0.0], [5.0, 0.0]], [[3.0, 3.0], [1.0, 0.0]])
    assert report.likeness(student, teacher) == pytest.approx({"layer3": 0.5, "layer4": 0.5 + 0.5**1.5})


def test_lines_of_the_table() -> None:
    alone: dict[str, Any] = {
        "label": "student alone",
        "network": "resnet-18",
        "test_error": 20.0,
        "paper": 30.4,
    }
    alone |= {"test_images": 400, "layer3": 0.5, "layer4": 0.25}
    taught = alone | {"label": "AT", "test_error": 18.5, "paper": 29.3}
    teacher = alone | {"label": "teacher", "network": "resnet-34"}
    before = {"label": "student before", "layer3": 0.125, "layer4": 1.0}
    rows = [teacher, before, alone, taught]
    assert [report.line(row, rows) for row in rows] == [
        ["teacher", "resnet-34", "20.0 ± 2.0", "", "30.4", "", "", ""],
        ["student before", "", "", "", "", "", "0.12", "1.00"],
        ["student alone", "resnet-18", "20.0 ± 2.0", "", "30.4", "", "0.50", "0.25"],
        ["AT", "resnet-18", "18.5 ± 1.9", "−1.5", "29.3", "−1.1", "0.50", "0.25"],
    ]


@pytest.mark.slow
def test_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One epoch of everything. The fine-tuned keep their BatchNorm and their first group as they were."""
    fork_trainings(monkeypatch, jobs)
    out = tmp_path / "out"
    words = [
        "--data-dir",
        str(make_images(tmp_path / "images")),
        "--out",
        str(out),
        "--epochs",
        "1",
        "--jobs",
        "2",
    ]
    assert mini.main(words) == 0
    printed = capsys.readouterr().out
    page = (out / "mini.md").read_text()
    assert page in printed
    assert page.count("\n| teacher | resnet-34 |") == 2
    assert "| student before |" in page.partition("Table 4")[2]
    for name in report.FILES[1:]:
        with Image.open(out / name) as image:
            assert min(image.size) > 300
    rows = json.loads((out / "mini.json").read_text())["rows"]
    errors = {(row["table"], row["label"]): row.get("test_error") for row in rows}
    assert len(errors) == len(rows) == 3 + 5
    summary = json.loads((out / "table4/at/summary.json").read_text())
    assert errors["table4", "AT"] == summary["last_test_error"]

    before, alone = (
        next(row for row in rows if (row["table"], row["label"]) == ("table4", label))
        for label in ("student before", "student alone")
    )
    assert before["layer4"] != alone["layer4"], "the one has not seen these classes, the other has"

    metrics = json.loads((out / "table4/at/metrics.jsonl").read_text())
    assert metrics["at_loss"] > 0
    before, after = (torch.load(out / name / "model.pt") for name in ("table5/student", "table4/at"))
    assert (len(before["fc.weight"]), len(after["fc.weight"])) == (3, 2)
    kept = {name for name in before if name != "fc.weight" and torch.equal(before[name], after[name])}
    fixed = {
        name for name in before if name.startswith("layer1.") or "running" in name or "num_batches" in name
    }
    assert fixed <= kept
    assert "layer2.0.conv1.weight" not in kept

    assert mini.main(words) == 0, "what is finished is kept"
    assert "finished" not in capsys.readouterr().out


def test_the_guide_shows_what_came_out() -> None:
    page = (ROOT / "benchmarks/results/imagenette-mini/mini.md").read_text()
    guide = (ROOT / "docs/folders.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 5 + 7
    assert [line for line in guide.splitlines() if line.startswith("|")] == lines
