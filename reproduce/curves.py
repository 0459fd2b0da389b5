"""Curves of a table's runs, as Figure 7; `python -m reproduce.curves TABLE.json PICTURE.png` redraws them."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from at_fused.visualize.paths import user_path
from reproduce.tables import TEACHER
from trainer import charts
from trainer.checkpoint import write_atomically

# A column of the tables has the colour of its method; F²_sum is AT as Table 1 has it.
COLOURS = {
    "student": charts.COLOURS["none"],
    "at": charts.COLOURS["at"],
    "f-sum2": charts.COLOURS["at"],
    "all": charts.COLOURS["at"],
    "at-eq2": "deepskyblue",
    "at-code": "deepskyblue",
    "hints": charts.COLOURS["hints"],
    "kd": charts.COLOURS["kd"],
    "at-kd": charts.COLOURS["at+kd"],
    "at-kd-code": "violet",
    "f-sum": "tab:orange",
    "f-sum4": "tab:olive",
    "f-max": "tab:pink",
    "group1": "tab:orange",
    "group2": "tab:olive",
    "group3": "tab:pink",
    "min-l2": charts.COLOURS["min-l2"],
    "grad-at": charts.COLOURS["grad-at"],
    "symmetry": charts.COLOURS["symmetry"],
}


def curves(result: dict[str, Any]) -> bytes:
    """A PNG of errors against the epoch, medians over seeds: test solid, training dashed.

    Each row of the table has a line of panels, the second of long runs showing their last quarter. A dotted
    line is the teacher's last test error. Errors are top-1 (the paper's Figure 7 (a) has the top-5 error).
    """
    from matplotlib.figure import Figure  # seconds to import: only those who plot pay

    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in result["cells"]:
        if entry["runs"]:
            rows.setdefault(entry["row"], []).append(entry)
    epochs = {
        row: max(len(run["test_error"]) for entry in entries for run in entry["runs"])
        for row, entries in rows.items()
    }
    columns = charts.panel_count(max(epochs.values()))
    figure = Figure(figsize=(1 + 5.5 * columns, 0.8 + 4.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, (row, entries) in zip(panels, rows.items(), strict=True):
        for panel in charts.panels(line, epochs[row]):
            _draw(panel, entries)
        legend = line[0].legend(fontsize=9, title="test error (dashed: training)", title_fontsize=9)
        legend.get_frame().set(edgecolor="none", alpha=0.9)  # curves pass behind it
    figure.suptitle(f"{result['title']}\nschedule {result['schedule']}", fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _draw(panel: charts.Panel, entries: Sequence[dict[str, Any]]) -> None:
    for entry in entries:
        label = f"{entry['label']}: {entry['median_last']:.2f} %"
        if entry["column"].endswith(TEACHER):
            panel.level(entry["median_last"], color=charts.TEACHER, linestyle=":", label=label)
            continue
        colour = COLOURS.get(entry["column"], "black")
        test, train = (_medians(entry["runs"], key) for key in ("test_error", "train_error"))
        panel.curve(test, color=colour, linewidth=2, label=label)
        panel.curve(train, color=colour, linewidth=1, linestyle="--", alpha=0.8)
    panel.finish(entries[0]["pair"])


def _medians(runs: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Epoch by epoch, the median over runs, up to the end of the shortest (max-steps may differ)."""
    return [median(values) for values in zip(*(run[key] for run in runs), strict=False)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reproduce.curves", description=__doc__)
    parser.add_argument("results", type=user_path, metavar="TABLE.json")
    parser.add_argument("picture", type=user_path, metavar="PICTURE.png")
    options = parser.parse_args(argv)
    result = json.loads(Path(options.results).read_text(encoding="utf-8"))
    write_atomically(options.picture, curves(result))
    print(options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
