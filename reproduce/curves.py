"""Curves of a table's runs, as Figure 7; `python -m reproduce.curves TABLE.json PICTURE.png` redraws them."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from at_fused.visualize.paths import user_path
from reproduce.tables import TEACHER
from trainer.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A column of the tables has one colour in every picture; F²_sum is AT as Table 1 has it.
COLOURS = {
    "student": "tab:red",
    "at": "tab:blue",
    "f-sum2": "tab:blue",
    "all": "tab:blue",
    "at-eq2": "deepskyblue",
    "at-code": "deepskyblue",
    "hints": "tab:brown",
    "kd": "tab:green",
    "at-kd": "tab:purple",
    "at-kd-code": "violet",
    "f-sum": "tab:orange",
    "f-sum4": "tab:olive",
    "f-max": "tab:pink",
    "group1": "tab:orange",
    "group2": "tab:olive",
    "group3": "tab:pink",
    "min-l2": "tab:orange",
    "grad-at": "tab:cyan",
    "symmetry": "tab:pink",
}
LONG = 8  # epochs from which the last quarter has a panel of its own


def curves(result: dict[str, Any]) -> bytes:
    """PNG of errors against the epoch, medians over seeds: test solid, training dashed.

    A line of panels per row of the table, the second of long runs being their last quarter. The teacher's
    last test error is a dotted line. Errors are top-1 (the paper's Figure 7 (a) has the top-5 error).
    """
    from matplotlib.figure import Figure  # seconds to import: only those who plot pay

    rows = list(dict.fromkeys(entry["row"] for entry in result["cells"] if entry["runs"]))
    columns = 2 if max(entry["epochs"] for entry in result["cells"]) >= LONG else 1
    figure = Figure(figsize=(1 + 5.5 * columns, 0.8 + 4.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(panels, rows, strict=True):
        entries = [entry for entry in result["cells"] if entry["row"] == row and entry["runs"]]
        _draw(line[0], entries)
        line[0].set_title(entries[0]["pair"])
        legend = line[0].legend(fontsize=9, title="test error (dashed: training)", title_fontsize=9)
        legend.get_frame().set(edgecolor="none", alpha=0.9)  # curves pass behind it
        if columns == 2:
            _draw(line[1], entries, last_quarter=True)
            line[1].set_title("the last quarter")
    figure.suptitle(f"{result['title']}\nschedule {result['schedule']}", fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _draw(axes: Axes, entries: Sequence[dict[str, Any]], last_quarter: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    shown: list[float] = []  # the errors that must lie inside
    for entry in entries:
        label = f"{entry['label']}: {entry['median_last']:.2f} %"
        if entry["column"].endswith(TEACHER):
            axes.axhline(entry["median_last"], color="0.5", linestyle=":", label=label)
            shown += [entry["median_last"]] * last_quarter
            continue
        colour = COLOURS.get(entry["column"], "black")
        test, train = (_medians(entry["runs"], key) for key in ("test_error", "train_error"))
        first = 3 * len(test) // 4 if last_quarter else 0
        epochs = range(first + 1, len(test) + 1)
        axes.plot(epochs, test[first:], color=colour, linewidth=2, label=label)
        axes.plot(epochs, train[first:], color=colour, linewidth=1, linestyle="--", alpha=0.8)
        settled = max(first, len(test) // 4)
        shown += test[settled:] + train[settled:]
    if last_quarter and shown:
        margin = 0.05 * (max(shown) - min(shown)) or 1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    else:
        axes.set_ylim(0, 1.1 * max(shown, default=0) or None)
    axes.set(xlabel="epoch", ylabel="error, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _medians(runs: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Epoch by epoch, the median over runs, as far as all of them go (max-steps may differ)."""
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
