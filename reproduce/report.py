"""What the runs of a table have given: JSON, a Markdown table and curves, none of it typed by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from reproduce.tables import BASELINE, TABLES, TEACHER, Cell, Job, Plan, told
from trainer.checkpoint import write_atomically

HEADINGS = [
    "student ← teacher",
    "method",
    "last epoch",
    "best epoch",
    "seeds",
    "change",
    "paper",
    "its change",
]
TOP5_HEADINGS = ["top 5", "its top 5"]  # where the paper has it
TERMS = ("ce_loss", "at_loss", "kd_loss")  # of the training loss, epoch by epoch
Entry = dict[str, Any]


def write(plan: Plan) -> str:
    """TABLE.json, TABLE.md and, of finished runs, TABLE.png in the plan's folder; returns the Markdown."""
    result = results(plan)
    text = markdown(result)
    plan.folder.mkdir(parents=True, exist_ok=True)
    path = plan.folder / plan.table
    write_atomically(path.with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(path.with_suffix(".md"), text.encode())
    if any(entry["runs"] for entry in result["cells"]):
        write_atomically(path.with_suffix(".png"), curves(result))
    return text


def results(plan: Plan) -> Entry:
    """All there is to say of the plan: a cell per entry, with its finished runs and their statistics."""
    return {
        "table": plan.table,
        "title": plan.title,
        "schedule": plan.schedule,
        "paper_says": TABLES[plan.table]["paper"],
        "cells": [_entry(cell, plan) for cell in plan.cells],
    }


def _entry(cell: Cell, plan: Plan) -> Entry:
    runs = [run for job in cell.jobs if (run := _finished(job, plan) or plan.known_run(job))]
    entry: Entry = {
        name: getattr(cell, name) for name in ("row", "column", "pair", "label", "recipe", "paper")
    }
    entry |= {"epochs": cell.jobs[0].config.epochs, "runs": runs}
    if cell.paper_top5 is not None:
        entry["paper_top5"] = cell.paper_top5
    if top5 := [run["last_test_top5_error"] for run in runs if "last_test_top5_error" in run]:
        entry["median_last_top5"] = median(top5)
    for kind in ("last", "best"):
        errors = [run[f"{kind}_test_error"] for run in runs]
        entry[f"median_{kind}"] = median(errors) if errors else None
        entry[f"half_range_{kind}"] = (max(errors) - min(errors)) / 2 if errors else None
    return entry


def _finished(job: Job, plan: Plan) -> Entry | None:
    summary = job.summary()
    if summary is None:
        return None
    history = job.history()
    kinds = ("last_test_error", "best_test_error", "last_test_top5_error")
    return {
        "seed": job.config.seed,
        **{kind: summary[kind] for kind in kinds if kind in summary},
        "seconds": sum(epoch["seconds"] for epoch in history),
        "test_error": [epoch["test_error"] for epoch in history],
        "train_error": [epoch["train_error"] for epoch in history],
        **{
            term: values
            for term in TERMS
            if any(values := [_rounded(epoch.get(term, 0.0)) for epoch in history])
        },
        "config": told(job.stored_config(), plan.folder),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


# --- the table ------------------------------------------------------------------------------------------


def markdown(result: Entry) -> str:
    """The results as a table; cells without a finished run say so."""
    epochs = sorted({entry["epochs"] for entry in result["cells"]})
    top5 = any("paper_top5" in entry for entry in result["cells"])
    headings = HEADINGS + TOP5_HEADINGS if top5 else HEADINGS
    lines = [
        f"{result['title']}. Test error in percent, schedule `{result['schedule']}` "
        f"({', '.join(map(str, epochs))} epochs): the median over seeds, ± half of their range. "
        f"Change: against the student alone. Paper: {result['paper_says']}.",
        "",
        f"| {' | '.join(headings)} |",
        "|" + "---|" * len(headings),
    ]
    baselines = {entry["row"]: entry for entry in result["cells"] if entry["column"] == BASELINE}
    for entry in result["cells"]:
        base = baselines.get(entry["row"], {})
        measured = [_spread(entry, "last"), _spread(entry, "best"), str(len(entry["runs"]))]
        changes = [_change(entry, base, key) for key in ("median_last", "paper")]
        cells = [entry["pair"], entry["label"], *measured, changes[0], _figure(entry, "paper"), changes[1]]
        cells += [_figure(entry, key) for key in ("median_last_top5", "paper_top5") if top5]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figure(entry: Entry, key: str) -> str:
    return "" if entry.get(key) is None else f"{entry[key]:.2f}"


def _spread(entry: Entry, kind: str) -> str:
    if not entry["runs"]:
        return "not finished" if kind == "last" else ""
    spread = f" ± {entry[f'half_range_{kind}']:.2f}" if len(entry["runs"]) > 1 else ""
    return f"{entry[f'median_{kind}']:.2f}{spread}"


def _change(entry: Entry, base: Entry, key: str) -> str:
    alone = entry["column"] == BASELINE or entry["column"].endswith(TEACHER)
    if alone or entry[key] is None or base.get(key) is None:
        return ""
    return f"{entry[key] - base[key]:+.2f}".replace("-", "−")


# --- the curves -----------------------------------------------------------------------------------------


def curves(result: Entry) -> bytes:
    """Figure 7 as PNG: errors (top-1; the paper's (a) has the top-5 one) against the epoch, test solid and
    training dashed, medians over seeds.

    A panel per row of the table; the teacher's last test error is a dotted line.
    """
    from matplotlib.figure import Figure  # seconds to import: only those who plot pay
    from matplotlib.ticker import MaxNLocator

    rows = list(dict.fromkeys(entry["row"] for entry in result["cells"] if entry["runs"]))
    figure = Figure(figsize=(6.5 * min(len(rows), 2), 4.4 * -(-len(rows) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(rows) // 2), min(len(rows), 2), squeeze=False).flat
    for axes, row in zip(panels, rows, strict=False):
        entries = [entry for entry in result["cells"] if entry["row"] == row and entry["runs"]]
        top = 0.0
        for number, entry in enumerate(entries):
            colour = f"C{number}"
            label = f"{entry['label']}: {entry['median_last']:.2f} %"
            if entry["column"].endswith(TEACHER):
                axes.axhline(entry["median_last"], color="0.5", linestyle=":", label=label)
                continue
            test, train = (_medians(entry["runs"], key) for key in ("test_error", "train_error"))
            epochs = range(1, len(test) + 1)
            axes.plot(epochs, test, color=colour, linewidth=2, label=label)
            axes.plot(epochs, train, color=colour, linewidth=1, linestyle="--", alpha=0.8)
            top = max(top, *test[len(test) // 4 :], *train[len(train) // 4 :])
        axes.set(title=entries[0]["pair"], xlabel="epoch", ylabel="error, %", ylim=(0, 1.1 * top or None))
        legend = axes.legend(fontsize=9, title="test error (dashed: training)", title_fontsize=9)
        legend.get_frame().set(edgecolor="none", alpha=0.9)  # curves pass behind it
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:  # an odd number of rows leaves one
        axes.set_visible(False)
    figure.suptitle(f"{result['title']}\nschedule {result['schedule']}", fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _medians(runs: Sequence[Entry], key: str) -> list[float]:
    """Epoch by epoch, the median over runs, as far as all of them go (max-steps may differ)."""
    return [median(values) for values in zip(*(run[key] for run in runs), strict=False)]
