"""The results of the small Tables 4 and 5: errors, the likeness of the maps, and pictures of them."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import torch
from matplotlib.figure import Figure

from at_fused.visualize import attention_grid
from benchmarks import report
from reproduce.answers import Answers, map_likeness, network_answers
from reproduce.mini.plan import Runs
from reproduce.tables import LABELS, TABLES, Job
from trainer import data, run_folder
from trainer.data import LabelledImages

LAYERS = ["layer3", "layer4"]  # whose maps both tables compare
FILES = ("mini.md", "maps-table5.png", "maps-table4.png")
ROWS = {"table5": "resnet-18-from-resnet-34", "table4": "scenes"}
HEADERS = ["", "network", "test error, %", "change", "paper, %", "its change", *LAYERS]
LEGEND = """\
One seed. Error: after the last epoch, ± its standard error on so few test images. Change: against the
student alone. Paper: ImageNet (Table 5) and Scenes (Table 4), not these images. layer3, layer4:
cosine similarity of the maps to the teacher's, the mean over the test images.
"""
PICTURES = 6  # rows of a picture
CPU = torch.device("cpu")


def write(folder: Path, runs: Runs) -> str:
    """Write the files of FILES, mini.csv and mini.json; returns the page."""
    tables, rows = [], []
    for name, jobs in (("table5", runs.table5), ("table4", runs.table4)):
        dataset = data.load(jobs["teacher"].config, CPU)
        seen = {column: answers(job, dataset) for column, job in jobs.items()}
        own = [row(name, column, job, seen, len(dataset.test)) for column, job in jobs.items()]
        shown = {"student": seen["student"], "student, AT": seen["at"], "teacher": seen["teacher"]}
        if name == "table4":
            before = answers(runs.table5["student"], dataset)
            shown = {"student before": before} | shown
            own.insert(1, {"table": name, "label": "student before", **likeness(before, seen["teacher"])})
        lines = [line(entry, own) for entry in own]
        tables.append(report.Table(heading(name, jobs["teacher"], dataset), HEADERS, lines))
        rows += own
        picture(dataset, shown).savefig(folder / f"maps-{name}.png")
    machine = report.describe_machine(CPU)
    page = report.markdown("Tables 4 and 5 in miniature", machine, tables) + "\n" + LEGEND
    report.write(folder, "mini", page, rows, {"machine": machine})
    return page


def answers(job: Job, dataset: LabelledImages) -> Answers:
    """The answers to the test images of the network that `job` trained, perhaps on other classes."""
    names = data.load(job.config, CPU).names
    return network_answers(job.config.student, job.folder / run_folder.MODEL, names, dataset, LAYERS)


def likeness(own: Answers, teacher: Answers) -> dict[str, float]:
    """Layer -> mean cosine similarity of the maps to the teacher's."""
    return dict(zip(LAYERS, map_likeness(own, teacher), strict=True))


# --- the table ------------------------------------------------------------------------------------------


def row(table: str, column: str, job: Job, seen: dict[str, Answers], images: int) -> report.Row:
    summary = job.summary()
    assert summary is not None
    return {
        "table": table,
        "label": LABELS.get(column, column),
        "network": job.config.student,
        "test_images": images,
        "test_error": summary["last_test_error"],
        "paper": TABLES[table]["rows"][ROWS[table]][column]["paper"],
        **likeness(seen[column], seen["teacher"]),
        "epochs": job.config.epochs,
        "seconds": sum(epoch["seconds"] for epoch in job.history()),
    }


def line(entry: report.Row, table: list[report.Row]) -> list[str]:
    """The cells of a row under HEADERS."""
    alike = [f"{entry[layer]:.2f}" for layer in LAYERS]
    if "network" not in entry:
        return [entry["label"], "", "", "", "", "", *alike]
    share = entry["test_error"] / 100
    error = f"{entry['test_error']:.1f} ± {100 * sqrt(share * (1 - share) / entry['test_images']):.1f}"
    alone = next(other for other in table if other["label"] == LABELS["student"])
    taught = entry["label"] not in (alone["label"], "teacher")
    changes = [
        f"{entry[k] - alone[k]:+.1f}".replace("-", "−") if taught else "" for k in ("test_error", "paper")
    ]
    paper = f"{entry['paper']:.1f}"
    alike = ["", ""] if entry["label"] == "teacher" else alike
    return [entry["label"], entry["network"], error, changes[0], paper, changes[1], *alike]


def heading(table: str, teacher: Job, dataset: LabelledImages) -> str:
    how = "from scratch" if table == "table5" else "fine-tuned from Table 5's networks"
    size = teacher.config.image_size
    return (
        f"Table {table[-1]}, {how}: {dataset.classes} classes, {len(dataset.train)} images of "
        f"{size}×{size}, {teacher.config.epochs} epochs"
    )


# --- the pictures ---------------------------------------------------------------------------------------


def picture(dataset: LabelledImages, networks: dict[str, Answers]) -> Figure:
    """Like Figure 6: evenly spaced test images, so of every class, and what each network sees and where."""
    count = min(PICTURES, len(dataset.test))
    places = [i * len(dataset.test) // count for i in range(count)]
    batches = dataset.evaluation_batches([slice(i, i + 1) for i in places])
    images = torch.cat([image for image, _ in batches])
    return attention_grid(
        (images * dataset.std[:, None, None] + dataset.mean[:, None, None]) / 255,
        {name: [maps[places] for maps in found.maps] for name, found in networks.items()},
        groups=LAYERS,
        labels=[dataset.names[label] for label in dataset.test.labels[places].tolist()],
        captions={
            name: [found.names[label] for label in found.predictions[places].tolist()]
            for name, found in networks.items()
        },
        compare_to="teacher",
    )
