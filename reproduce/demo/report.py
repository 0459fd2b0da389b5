"""The results of the demo's trainings: a table, curves, attention maps and a report."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.box import SIMPLE
from rich.table import Table

from at_fused.visualize import attention_grid
from reproduce.answers import Answers, map_likeness, network_answers
from trainer import charts, data, run_folder
from trainer.config import make_config
from trainer.data import LabelledImages
from trainer.data.in_memory import Split

if TYPE_CHECKING:
    from torch import Tensor

ROLES = {"teacher": "teacher", "student": "student alone", "student-at": "student with AT"}
COLOURS = {
    "teacher": charts.TEACHER,
    "student": charts.COLOURS["none"],
    "student-at": charts.COLOURS["at"],
}
PICTURES = 5  # rows of attention_maps.png
CPU = torch.device("cpu")

HEADINGS = ["", "model", "parameters", "images", "error, %", "each seed", "likeness of maps", "time, s"]
BRIEF = ["", "images", "error, %", "each seed", "time, s"]  # fits 80 columns

REPORT = """\
# A student with and without attention transfer

Handwritten digits (scikit-learn's, enlarged to 16×16 pixels), {test} test images. The students learn from
{few} images, others for each seed but the same with and without attention transfer (AT); the teacher has
learnt from {many}. AT adds to the student's cross-entropy a loss that pulls its attention maps towards the
teacher's, on those same {few} images.

{table}

Images: those trained on. Error: on the test images after the last epoch, the median over seeds. Likeness of
maps: cosine similarity to the teacher's maps on the test images, per group, the median over seeds. Time: the
steps of one training, start-up and evaluation excluded; everything together took {seconds:.0f} s.

![test error against epoch](curves.png)

## Where the networks look

{chosen} of these {shown} test images were picked because the student alone gets them wrong and the student
with AT right (the seed whose error with AT is the median). Below each map: its cosine similarity to the
teacher's.

![attention maps](attention_maps.png)

## Once more, by hand

```
python train.py --recipe recipes/demo/teacher.yaml --output-dir runs/teacher
python train.py --recipe recipes/demo/student.yaml --output-dir runs/alone
python train.py --recipe recipes/demo/student-at.yaml --output-dir runs/with-at \\
    --teacher-checkpoint runs/teacher/model.pt
```
"""


@dataclass(frozen=True)
class Run:
    """A finished training: its recipe (a key of ROLES) and the folder that holds its artefacts."""

    recipe: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return run_folder.read_config(self.folder)

    @cached_property
    def summary(self) -> dict[str, Any]:
        return run_folder.read_summary(self.folder)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return run_folder.read_metrics(self.folder)

    @property
    def error(self) -> float:
        """Test error after the last epoch, percent."""
        return self.summary["last_test_error"]

    @property
    def seconds(self) -> float:
        """Spent on training steps."""
        return sum(epoch["seconds"] for epoch in self.metrics)


def write_results(folder: Path, runs: Sequence[Run], seconds: float) -> Table:
    """Write curves.png, attention_maps.png and report.md into `folder`; returns the table to print."""
    groups = by_recipe(runs)
    sets = {recipe: data.load(make_config(group[0].config), CPU) for recipe, group in groups.items()}
    dataset = sets["teacher"]  # all have the same test images
    found = {run: answers(run, dataset) for run in runs}
    teacher = found[groups["teacher"][0]]
    likeness = {
        recipe: median_of([map_likeness(found[run], teacher) for run in group])
        for recipe, group in groups.items()
    }
    images = {recipe: f"{len(dataset.train):,}" for recipe, dataset in sets.items()}
    lines = rows(runs, images, likeness)

    curves(runs).savefig(folder / "curves.png")
    typical = groups["student-at"].index(middle(groups["student-at"]))
    alone, at = (found[groups[recipe][typical]] for recipe in ("student", "student-at"))
    assert isinstance(dataset.test, Split)
    places, chosen = telling_images(dataset.test.labels, alone.predictions, at.predictions, PICTURES)
    attention_maps(dataset.test, places, alone, at, teacher).savefig(folder / "attention_maps.png")

    text = REPORT.format(
        test=len(dataset.test),
        few=images["student"],
        many=images["teacher"],
        table=markdown(HEADINGS, lines),
        seconds=seconds,
        chosen=chosen,
        shown=len(places),
    )
    (folder / "report.md").write_text(text, encoding="utf-8")
    return terminal_table(lines)


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {recipe: [run for run in runs if run.recipe == recipe] for recipe in ROLES}


def middle(runs: Sequence[Run]) -> Run:
    """The run with the median error (the lower one of an even number)."""
    return sorted(runs, key=lambda run: run.error)[(len(runs) - 1) // 2]


def median_of(series: Sequence[Sequence[float]]) -> list[float]:
    """Position by position, the median of equally long series."""
    return [statistics.median(values) for values in zip(*series, strict=True)]


# --- tables -------------------------------------------------------------------------------------------


def rows(runs: Sequence[Run], images: dict[str, str], likeness: dict[str, list[float]]) -> list[list[str]]:
    """Under HEADINGS, a line for each role."""
    lines = []
    for recipe, group in by_recipe(runs).items():
        errors, first = [run.error for run in group], group[0]
        lines.append(
            [
                ROLES[recipe],
                first.config["student"],
                f"{first.summary['parameters']:,}",
                images[recipe],
                f"{statistics.median(errors):.2f}",
                " ".join(f"{error:.2f}" for error in errors),
                " ".join(f"{value:.2f}" for value in likeness[recipe]),
                f"{statistics.median(run.seconds for run in group):.1f}",
            ]
        )
    return lines


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, ["---"] * len(headings), *lines])


def terminal_table(lines: Sequence[Sequence[str]]) -> Table:
    """The columns BRIEF of `lines`."""
    table = Table(box=SIMPLE)
    for heading in BRIEF:
        table.add_column(heading, justify="left" if heading == "" else "right")
    for line in lines:
        table.add_row(*(line[HEADINGS.index(heading)] for heading in BRIEF))
    return table


# --- curves -------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run]) -> Figure:
    """Test error against epoch: each seed thin, the median over seeds thick."""
    longest = max(len(run.metrics) for run in runs)
    columns = charts.panel_count(longest)
    figure = Figure(figsize=(2.5 + 5.5 * columns, 4.5), dpi=120, layout="constrained")
    panels = charts.panels(figure.subplots(1, columns, squeeze=False)[0], longest)
    for panel in panels:
        for recipe, group in by_recipe(runs).items():
            draw_runs(panel, recipe, group, longest)
        panel.finish("Handwritten digits")
        panel.axes.set_ylabel("test error, %")
    axes = panels[0].axes
    axes.set(yscale="log", ylabel="test error, % (logarithmic)")
    axes.autoscale(axis="y")
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    legend = axes.legend(loc="upper right", title="thin: each seed\ndotted: the end of a shorter training")
    legend.get_frame().set(edgecolor="none", alpha=0.9)  # curves pass behind it
    return figure


def draw_runs(panel: charts.Panel, recipe: str, group: Sequence[Run], longest: int) -> None:
    """Draw the curves of one recipe."""
    colour = COLOURS[recipe]
    errors = [[epoch["test_error"] for epoch in run.metrics] for run in group]
    median = median_of(errors)
    if len(errors) > 1:
        for each in errors:
            panel.curve(each, linewidth=0.7, alpha=0.35, color=colour)
    seeds = f", median of {len(errors)} seeds" if len(errors) > 1 else ""
    label = f"{ROLES[recipe]}: {median[-1]:.2f} %{seeds}"
    panel.curve(median, linewidth=2, label=label, color=colour)
    if (rest := longest - len(median)) > 0:  # where a shorter run ended, to compare with
        panel.curve([median[-1]] * (rest + 1), len(median), linewidth=1, linestyle=":", color=colour)


# --- attention maps -----------------------------------------------------------------------------------


def answers(run: Run, dataset: LabelledImages) -> Answers:
    """The answers of a trained network to every test image."""
    return network_answers(run.config["student"], run.folder / run_folder.MODEL, dataset.names, dataset)


def telling_images(labels: Tensor, alone: Tensor, at: Tensor, count: int) -> tuple[list[int], int]:
    """`count` images in order of their class, and how many of them AT turned from wrong to right.

    Those come first, and of each kind one per class before a second; images both get right fill up.
    """
    turned, both = (alone != labels) & (at == labels), (alone == labels) & (at == labels)
    chosen: list[int] = []
    for kind in (turned, both):
        ranked = []  # (how many of its class came before it, place)
        seen: Counter[int] = Counter()
        for place in kind.nonzero().flatten().tolist():
            ranked.append((seen[int(labels[place])], place))
            seen[int(labels[place])] += 1
        chosen += [place for _, place in sorted(ranked)]
    chosen = sorted(chosen[:count], key=lambda place: int(labels[place]))
    return chosen, int(turned[chosen].sum())


def attention_maps(test: Split, places: list[int], alone: Answers, at: Answers, teacher: Answers) -> Figure:
    """The picture of the test images at `places`: each image, and each network's maps per group."""
    networks = {"alone": alone, "with AT": at, "teacher": teacher}
    return attention_grid(
        test.images[places].permute(0, 3, 1, 2),
        {name: [maps[places] for maps in network.maps] for name, network in networks.items()},
        labels=[
            f"a {test.labels[i]}\nalone: {alone.predictions[i]}\nwith AT: {at.predictions[i]}" for i in places
        ],
        compare_to="teacher",
    )
