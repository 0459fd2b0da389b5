"""The results of a table's runs: JSON, a Markdown table and curves."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.report import as_json
from reproduce.curves import curves
from reproduce.tables import BASELINE, TABLES, TEACHER, Cell, Job, Plan, without_paths
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
    """Write TABLE.json, TABLE.md and, of finished runs, TABLE.png; returns the Markdown."""
    result = results(plan)
    text = markdown(result)
    plan.folder.mkdir(parents=True, exist_ok=True)
    path = plan.folder / plan.table
    write_atomically(path.with_suffix(".json"), (as_json(result) + "\n").encode())
    write_atomically(path.with_suffix(".md"), text.encode())
    if any(entry["runs"] for entry in result["cells"]):
        write_atomically(path.with_suffix(".png"), curves(result))
    return text


def results(plan: Plan) -> Entry:
    """The content of TABLE.json: an entry per cell, with its finished runs and their statistics."""
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
        "config": without_paths(job.stored_config(), plan.folder),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


# --- the table ------------------------------------------------------------------------------------------


def markdown(result: Entry) -> str:
    """The results as a table; "not finished" where a cell has no finished run."""
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
