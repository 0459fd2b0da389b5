"""The recipes: that they resolve, name what exists, say what the paper says, and are all indexed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from paths import ROOT

import models
import train
from reproduce.tables import LABELS, TABLES, Plan
from trainer import methods
from trainer.command_line import parse_args
from trainer.config import Config, make_config
from trainer.errors import ConfigError
from trainer.recipes import load_recipe
from trainer.taps import compared

RECIPES = ROOT / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if path.name != "tables.yaml")
COMPLETE = [path for path in FILES if path.name != "base.yaml" and "student" in load_recipe(path)]


def named(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


def bases(path: Path) -> list[Path]:
    """The recipes that a recipe takes over, resolved."""
    base = yaml.safe_load(path.read_text()).get("base", [])
    return [(path.parent / name).resolve() for name in (base if isinstance(base, list) else [base])]


def resolve(name: str) -> Config:
    config, _ = parse_args(
        ["--recipe", f"{RECIPES / name}.yaml", "--data-dir", "d", "--teacher-checkpoint", "t"]
    )
    return config


@pytest.mark.parametrize("path", COMPLETE, ids=named)
def test_every_recipe_resolves_and_names_what_exists(path: Path) -> None:
    config = resolve(named(path))
    assert make_config(yaml.safe_load(config.to_yaml())) == config
    classes = 1000 if named(path).startswith("table5") else 10
    with torch.device("meta"):
        student = models.create(config.student, classes)
        if methods.METHODS[config.method].compares_features:
            teacher = models.create(str(config.teacher), classes)
            found = compared(config, student, teacher, torch.zeros(1, 3, 64, 64))
            for model, names in ((student, found.names), (teacher, found.t_names)):
                assert names
                for name in names:
                    model.get_submodule(name)
    for name in config.freeze:
        student.get_submodule(name)
    assert (config.teacher is not None) == methods.METHODS[config.method].needs_teacher


def test_taps_that_one_network_lacks_are_refused() -> None:
    nets = {name: models.create(name, 10) for name in ("nin-thin", "wrn-10-2")}
    keys = {"dataset": "digits", "method": "at", "teacher-checkpoint": "t", "taps": "convs"}
    for student, teacher in (("nin-thin", "wrn-10-2"), ("wrn-10-2", "nin-thin")):
        config = make_config(keys | {"student": student, "teacher": teacher})
        with pytest.raises(ConfigError, match=r"^taps convs: .*wrn-10-2 (has )?0.*; name the modules"):
            compared(config, nets[student], nets[teacher], torch.zeros(1, 3, 32, 32))


def test_incomplete_recipes_are_bases_or_schedules() -> None:
    used = {base for path in FILES for base in bases(path)}
    schedules = {RECIPES / "short/base.yaml", RECIPES / "table3/short.yaml"}
    assert set(FILES) - set(COMPLETE) <= used | schedules


def test_a_recipe_shows_only_what_differs() -> None:
    """A key that repeats its base's value is noise."""
    for path in FILES:
        own, below = yaml.safe_load(path.read_text()), {}
        for base in bases(path):
            below |= load_recipe(base)
        assert not [key for key in own if below.get(key) == own[key]], path


def test_a_method_is_defined_once() -> None:
    """The rows of a table share it by name."""
    keys = {"method", "beta", "beta-schedule", "distance", "p", "temperature", "alpha"}
    for path in FILES:
        if path.parent.parent.name in ("table1", "table4"):
            assert keys.isdisjoint(yaml.safe_load(path.read_text())), path


FACTS = """
table1/wrn-16-1: {lr: 0.1, batch-size: 128, epochs: 200, weight-decay: 5.0e-4, momentum: 0.9, method: none,
  lr-schedule: step, lr-milestones: [60, 120, 160], lr-gamma: 0.2, augment: crop-flip, amp: none}
table1/wrn-16-1-from-wrn-16-2/at: {student: wrn-16-1, teacher: wrn-16-2, method: at, beta: 1000,
  distance: mse, p: 2, mapping: sum, normalize: l2, taps: groups, beta-schedule: constant, lr: 0.1}
table1/wrn-16-1-from-wrn-16-2/at-eq2: {method: at, beta: 6.4, distance: norm, norm-order: 2, p: 2}
table1/wrn-16-1-from-wrn-40-1/kd: {method: kd, temperature: 4, alpha: 0.9, teacher: wrn-40-1}
table1/wrn-16-2-from-wrn-40-2/at-kd: {method: at+kd, beta: 1000, beta-schedule: linear, temperature: 4,
  alpha: 0.9, student: wrn-16-2, teacher: wrn-40-2, distance: mse}
table1/wrn-16-2-from-wrn-40-2/at-kd-code: {method: at+kd, beta: 1000, beta-schedule: constant}
table1/nin-thin-from-nin-wide/hints: {method: hints, beta-schedule: linear, teacher: nin-wide}
table1/nin-wide-rawpool: {augment: crop-flip, weight-decay: 5.0e-4}
table2/f-sum: {p: 1, mapping: sum, beta: 1000}
table2/f-sum4: {p: 4, mapping: sum, beta: 1000}
table2/f-max: {p: 1, mapping: max, beta: 1000}
groups/group1: {taps: group1, p: 2, beta: 1000}
groups/group2: {taps: group2}
groups/group3: {taps: group3}
table3/none: {student: nin-thin-nobn-rawpool, augment: flip, weight-decay: 0, deterministic: true}
table3/at: {student: nin-thin-nobn-rawpool, teacher: nin-wide-rawpool, taps: convs, weight-decay: 0}
table3/grad-at: {teacher: nin-wide, augment: flip, weight-decay: 0}
table4/cub/at: {dataset: cub, pretrained: true, freeze-bn: true, freeze: [layer1], taps: [layer3, layer4],
  student: resnet-18, teacher: resnet-34, method: at}
table4/scenes/teacher: {dataset: imagefolder, pretrained: true, freeze-bn: true, freeze: [layer1],
  student: resnet-34}
table5/at: {dataset: imagefolder, batch-size: 256, epochs: 100, lr: 0.1, lr-milestones: [30, 60, 90],
  lr-gamma: 0.1, weight-decay: 1.0e-4, taps: [layer3, layer4], at-start-epoch: 60, method: at, p: 2}
table5/at-code: {taps: groups, at-start-epoch: 0, beta: 2000}
"""


@pytest.mark.parametrize("name, facts", yaml.safe_load(FACTS).items())
def test_facts_of_the_paper_and_its_code(name: str, facts: dict[str, Any]) -> None:
    config = resolve(name).model_dump(mode="json", by_alias=True)
    assert {key: config[key] for key in facts} == facts


# By the folder of a recipe. CIFAR: section 4.1 and the authors' code. Table 3: section 4.1.3, flips alone, no
# weight decay; its rate is ours. Table 4: section 4.2.1; its schedule is ours. Table 5: section 4.2.2 and
# fb.resnet.torch. CIFAR-100: RepDistiller's train_student.py and dataset/cifar100.py.
SCHEDULES = """
table1: &cifar {dataset: cifar10, lr: 0.1, lr-schedule: step, lr-milestones: [60, 120, 160], lr-gamma: 0.2,
  epochs: 200, batch-size: 128, weight-decay: 5.0e-4, momentum: 0.9, nesterov: false, augment: crop-flip,
  crop-padding: reflect, freeze-bn: false, freeze: [], pretrained: false, accumulate: 1}
table2: *cifar
groups: *cifar
table3: {<<: *cifar, lr: 0.02, weight-decay: 0, augment: flip, deterministic: true}
table4: {lr: 0.01, lr-schedule: step, lr-milestones: [30, 45], lr-gamma: 0.1, epochs: 60, batch-size: 64,
  weight-decay: 1.0e-4, momentum: 0.9, nesterov: false, augment: crop-flip, image-size: 224,
  freeze-bn: true, freeze: [layer1], pretrained: true}
table5: {dataset: imagefolder, lr: 0.1, lr-schedule: step, lr-milestones: [30, 60, 90], lr-gamma: 0.1,
  epochs: 100, batch-size: 256, weight-decay: 1.0e-4, momentum: 0.9, nesterov: false, augment: crop-flip,
  image-size: 224, freeze-bn: false, freeze: [], pretrained: false}
cifar100: {dataset: cifar100, lr: 0.05, lr-schedule: step, lr-milestones: [150, 180, 210], lr-gamma: 0.1,
  epochs: 240, batch-size: 64, weight-decay: 5.0e-4, momentum: 0.9, nesterov: false, augment: crop-flip,
  crop-padding: zeros, freeze-bn: false, freeze: [], pretrained: false, accumulate: 1}
"""

# By the column of a table: sections 4.1 (temperature, alpha), 4.1.1 (AT), 4.1.2 (hints) and 4.1.3. The betas
# of hints and of Table 3's gradients are ours.
METHODS = """
none: &none {method: none}
student: *none
teacher: *none
at-teacher: *none
at: &at {method: at, beta: 1000, beta-schedule: constant, at-start-epoch: 0, distance: mse, p: 2,
  mapping: sum, normalize: l2, taps: groups}
at-eq2: {<<: *at, beta: 6.4, distance: norm, norm-order: 2}
kd: &kd {method: kd, temperature: 4, alpha: 0.9}
at-kd: &at-kd {<<: [*at, *kd], method: at+kd, beta-schedule: linear}
at-kd-code: {<<: *at-kd, beta-schedule: constant}
at-code: {<<: *at, beta: 2000}
hints: {method: hints, beta: 10, beta-schedule: linear, taps: groups}
f-sum: {<<: *at, p: 1}
f-sum2: *at
f-sum4: {<<: *at, p: 4}
f-max: {<<: *at, p: 1, mapping: max}
group1: {<<: *at, taps: group1}
group2: {<<: *at, taps: group2}
group3: {<<: *at, taps: group3}
all: *at
min-l2: {method: min-l2, beta: 1, beta-schedule: constant, at-start-epoch: 0}
grad-at: {method: grad-at, beta: 1, beta-schedule: constant, at-start-epoch: 0}
symmetry: {method: symmetry, beta: 1, beta-schedule: constant, at-start-epoch: 0, output-weight: 0.5}
table3/at: {<<: *at, taps: convs}
table4/at: &last-two {<<: *at, taps: [layer3, layer4]}
table5/at: {<<: *last-two, at-start-epoch: 60}
"""


@pytest.mark.parametrize("table", TABLES)
def test_figures_of_every_cell(table: str) -> None:
    """Whatever bases they come from."""
    schedules, methods = yaml.safe_load(SCHEDULES), yaml.safe_load(METHODS)
    for cells in TABLES[table]["rows"].values():
        for column, cell in cells.items():
            config = resolve(cell["recipe"]).model_dump(mode="json", by_alias=True)
            facts = schedules[cell["recipe"].split("/")[0]]
            facts = facts | methods.get(f"{table}/{column}", methods[column])
            assert {key: config[key] for key in facts} == facts, cell["recipe"]


def paper(table: str, row: str) -> list[float | None]:
    """Errors of a row as the paper prints them, teacher last, variants left out."""
    cells = TABLES[table]["rows"][row]
    return [cell["paper"] for cell in cells.values() if "paper" in cell]


def test_figures_of_the_paper() -> None:
    assert paper("table1", "nin-thin-from-nin-wide") == [9.38, 8.93, 9.05, 8.55, 8.33, 7.28]
    assert paper("table1", "wrn-16-1-from-wrn-16-2") == [8.77, 7.93, 8.51, 7.41, 7.51, 6.31]
    assert paper("table1", "wrn-16-1-from-wrn-40-1") == [8.77, 8.25, 8.62, 8.39, 8.01, 6.58]
    assert paper("table1", "wrn-16-2-from-wrn-40-2") == [6.31, 5.85, 6.24, 6.08, 5.71, 5.23]
    assert list(TABLES["table1"]["rows"]["nin-thin-from-nin-wide"]) == [
        "student", "at", "at-eq2", "hints", "kd", "at-kd", "at-kd-code", "teacher",
    ]  # fmt: skip
    (table2,), (groups,), (table3,), (table5,) = (
        TABLES[t]["rows"] for t in ("table2", "groups", "table3", "table5")
    )
    assert paper("table2", table2) == [8.77, 7.99, 7.93, 8.09, 8.08, 6.31]
    assert paper("groups", groups) == [8.77, 8.11, 7.96, 7.97, 7.93, 6.31]
    assert paper("table3", table3) == [13.5, 12.5, 12.1, 12.1, 11.8, 11.2]
    assert [paper("table4", row) for row in ("cub", "scenes")] == [
        [28.5, 27.0, 27.0, 26.5],
        [28.2, 28.1, 27.1, 26.0],
    ]
    assert paper("table5", table5) == [30.4, 29.3, 26.1]
    cells = TABLES["table5"]["rows"][table5].values()
    assert [cell["paper_top5"] for cell in cells if "paper" in cell] == [10.8, 10.0, 8.3]


def test_figures_of_repdistillers_readme() -> None:
    """It gives accuracies: of the student, with AT and KD, and of the teacher."""
    accuracies = {
        "wrn-16-2-from-wrn-40-2": [73.26, 74.08, 74.92, None, 75.61],
        "wrn-40-1-from-wrn-40-2": [71.98, 72.77, 73.54, None, 75.61],
        "resnet20-from-resnet56": [69.06, 70.55, 70.66, None, 72.34],
        "resnet20-from-resnet110": [69.06, 70.22, 70.67, None, 74.31],
        "resnet32-from-resnet110": [71.14, 72.31, 73.08, None, 74.31],
        "resnet8x4-from-resnet32x4": [72.50, 73.44, 73.33, None, 79.42],
    }
    assert list(TABLES["cifar100"]["rows"]) == list(accuracies)
    for row, values in accuracies.items():
        cells = TABLES["cifar100"]["rows"][row]
        assert list(cells) == ["student", "at", "kd", "at-kd", "teacher"]
        errors = [None if value is None else pytest.approx(100 - value) for value in values]
        assert paper("cifar100", row) == errors


@pytest.mark.parametrize("table", TABLES)
def test_every_cell_has_a_recipe_of_its_row(table: str) -> None:
    for row, cells in TABLES[table]["rows"].items():
        for column, cell in cells.items():
            config = resolve(cell["recipe"])
            assert (config.method == "none") == (column in ("student", "teacher", "at-teacher")), (
                row,
                column,
            )
            if "-from-" in row and column not in ("teacher", "at-teacher"):
                student, teacher = row.split("-from-")
                assert config.student.startswith(student)
                assert config.teacher is None or config.teacher.startswith(teacher)
            if config.teacher:
                teachers = resolve(cell.get("teacher", cells["teacher"]["recipe"]))
                assert (teachers.student, teachers.dataset) == (config.teacher, config.dataset)


def test_the_index_names_every_cell() -> None:
    text = (RECIPES / "README.md").read_text()
    for table in TABLES.values():
        section = text.partition(f"### {table['title']}\n")[2].partition("###")[0]
        for row, cells in table["rows"].items():
            for column, cell in cells.items():
                figure = "" if cell.get("paper") is None else f"{cell['paper']:.2f}"
                if "paper_top5" in cell:
                    figure += f" (top 5: {cell['paper_top5']:.2f})"
                recipe = cell["recipe"]
                label = LABELS.get(column, column)
                line = (
                    f"| {row.replace('-from-', ' ← ')} | {label} | [{recipe}]({recipe}.yaml) | {figure} |\n"
                )
                assert line in section


def test_the_short_recipes_are_those_of_table_1_in_short(tmp_path: Path) -> None:
    plan = Plan("table1", "short", tmp_path, tmp_path, rows=["wrn-16-1-from-wrn-16-2"], seeds=1)
    jobs = {cell.column: cell.jobs[0].config for cell in plan.cells}
    names = {
        "student": "wrn-16-1",
        "at": "wrn-16-1-at",
        "kd": "wrn-16-1-kd",
        "at-kd": "wrn-16-1-at-kd",
        "teacher": "wrn-16-2",
    }
    paths = ("data_dir", "output_dir", "teacher_checkpoint")
    for column, name in names.items():
        short = resolve(f"short/{name}").model_dump(exclude=set(paths))
        assert jobs[column].model_dump(exclude=set(paths)) == short


SHRUNK = {"image_size", "epochs", "batch_size", "lr", "lr_milestones", "at_start_epoch", "beta", "workers"}
FASTER = {"amp", "channels_last"}


@pytest.mark.parametrize("mini, whole", [("table5", "table5"), ("table4", "table4/scenes")])
def test_the_mini_recipes_differ_only_in_what_is_shrunk(mini: str, whole: str) -> None:
    """... and what is counted in epochs keeps its proportion."""
    paths = sorted((RECIPES / "mini" / mini).glob("*.yaml"))
    assert {path.stem for path in paths} >= {"base", "student", "teacher", "at"}
    for path in paths:
        if path.stem != "base":
            small, large = resolve(named(path)), resolve(f"{whole}/{path.stem}")
            assert {key for key, value in large if getattr(small, key) != value} <= SHRUNK | FASTER
            if methods.METHODS[small.method].has_term:  # as the positions of a map
                scale = (small.image_size / large.image_size) ** 2
                assert small.beta == pytest.approx(large.beta * scale, rel=0.05)
            counts, large_counts = ([c.at_start_epoch, *c.lr_milestones] for c in (small, large))
            assert [n * large.epochs for n in counts] == [n * small.epochs for n in large_counts]


def test_train_prints_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES / "table2/f-max.yaml"
    words = ["--recipe", str(recipe), "--print-config"]  # without the paths that a training needs
    assert train.main(words) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["mapping"], printed["p"], printed["epochs"], printed["teacher"]) == (
        "max",
        1.0,
        200,
        "wrn-16-2",
    )
