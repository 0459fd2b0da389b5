"""Charts of the results. `python -m benchmarks.plots DIR ...` draws those of committed JSON again.

A provider has one name, colour and marker in all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from at_fused.visualize.paths import user_path
from benchmarks import report
from benchmarks.loss import tables
from benchmarks.report import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Look(NamedTuple):
    """How a provider appears in every chart."""

    name: str
    colour: str
    marker: str


LOOKS = {
    "authors": Look("authors' form", "tab:blue", "o"),
    "authors-autocast": Look("authors' form, autocast", "tab:cyan", "h"),
    "vecdot": Look("best eager (vecdot)", "tab:orange", "s"),
    "compile": Look("torch.compile", "tab:green", "D"),
    "compile-vecdot": Look("torch.compile (vecdot)", "tab:olive", "^"),
    "ours-cpu": Look("ours", "tab:red", "v"),
    "ours-cpu-two-pass": Look("ours, two passes", "tab:pink", "P"),
    "ours-cuda": Look("ours (CUDA)", "tab:red", "v"),
    "ours-cuda-two-pass": Look("ours (CUDA), two passes", "tab:pink", "P"),
    "ours-triton": Look("ours (Triton)", "tab:purple", "<"),
    "ours-triton-two-pass": Look("ours (Triton), two passes", "tab:brown", "X"),
}
FLOOR = "floor: 3S + T bytes at the speed of a copy"  # S, T: activations of student and teacher
OVERVIEW = ("ours-cpu", "compile", "vecdot", "authors")


def look(provider: str) -> Look:
    return LOOKS.get(provider, Look(provider, "tab:gray", "*"))


def where(machine: Mapping[str, Any] | None) -> str:
    """A line that names the machine that the results were measured on; empty where it is not known."""
    if not machine:
        return ""
    device = machine.get("gpu") or f"{machine['cpu'].replace('(R)', '')}, {machine['threads']} threads"
    return f"\n{device}, torch {machine['torch'].partition('+')[0]}, {machine['date'].partition(' ')[0]}"


def times_floor(rows: Sequence[Row], path: Path, machine: Mapping[str, Any] | None = None) -> None:
    """Dots: each provider's multiple of the floor, a line per cell."""
    from matplotlib.figure import Figure  # seconds to import: only those who plot pay

    cells = list(dict.fromkeys(row["cell"] for row in rows))
    figure = Figure(figsize=(8.5, 2.1 + 0.32 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = {row["cell"]: row["times_floor"] for row in rows if row["provider"] == provider}
        name, colour, marker = look(provider)
        places = [cells.index(cell) for cell in mine]
        axes.plot(list(mine.values()), places, marker, color=colour, label=name, markersize=7, alpha=0.9)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--", label=FLOOR)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time in multiples of the floor; logarithmic: each grid line is twice the one before")
    axes.set_yticks(range(len(cells)), [cell.replace("_", "-") for cell in cells], fontsize=9)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    _finish(axes)
    figure.suptitle(f"Attention-transfer loss, forward and backward{where(machine)}", fontsize=11)
    figure.legend(loc="outside lower center", frameon=False, ncols=3, fontsize=9)
    figure.savefig(path, dpi=150)


def scaling(
    sweeps: Mapping[str, Sequence[Row]], path: Path, machine: Mapping[str, Any] | None = None
) -> None:
    """Time over batch size and over channels, one panel each, with the floor below.

    Args:
        sweeps: rows by what varies, "batch" or "channels"; each row has it as a key.
        path: the picture.
        machine: that the rows were measured on.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(sweeps), 4.9), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0])
    for axes, (varied, rows) in zip(panels, sweeps.items(), strict=True):
        for provider in dict.fromkeys(row["provider"] for row in rows):
            mine = [row for row in rows if row["provider"] == provider]
            name, colour, marker = look(provider)
            values, times = [row[varied] for row in mine], [row["median_ms"] for row in mine]
            axes.plot(values, times, f"{marker}-", color=colour, label=name, markersize=4)
        floors = {row[varied]: row["floor_ms"] for row in rows}
        axes.plot(list(floors), list(floors.values()), "k--", linewidth=0.8, label=FLOOR)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(floors), [str(value) for value in floors], fontsize=8)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel({"batch": "batch size", "channels": "channels of student and teacher"}[varied])
        _finish(axes)
    panels[0].set_ylabel("forward and backward, ms (logarithmic)")
    figure.suptitle(f"Attention-transfer loss of one pair at 28 × 28{where(machine)}", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=3, fontsize=9)
    figure.savefig(path, dpi=150)


def overview(measured: Sequence[tuple[Mapping[str, Any], Sequence[Row]]], path: Path) -> None:
    """Bars: the geometric mean over all cells of each method's multiple of the floor, a group per machine.

    Args:
        measured: each machine, and the rows measured on it.
        path: the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.7 + 1.05 * len(measured)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(OVERVIEW)
    for number, provider in enumerate(OVERVIEW):
        means = [tables.summarize(tables.main_group(rows))[provider]["times_floor"] for _, rows in measured]
        places = [group + height * (number - (len(OVERVIEW) - 1) / 2) for group in range(len(measured))]
        name, colour, _ = look(provider)
        bars = axes.barh(places, means, 0.9 * height, color=colour, label=name)
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the dashed line passes behind
        axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9, bbox=ground)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--", label=FLOOR)
    names = [machine["cpu"].replace("(R)", "").replace(" Processor", "") for machine, _ in measured]
    axes.set_yticks(range(len(measured)), names)
    axes.invert_yaxis()
    axes.set_xlabel("time of the loss, forward and backward, in multiples of the floor: less is better")
    _finish(axes)
    axes.grid(axis="y", visible=False)
    figure.suptitle("Attention-transfer loss: geometric means over 8 cells", fontsize=11)
    figure.legend(loc="outside lower center", frameon=False, ncols=3, fontsize=9)
    figure.savefig(path, dpi=150)


def _finish(axes: Axes) -> None:
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def sweeps(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The scaling suite's rows by what varies in them."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.get("varied") or row["cell"].partition("-")[0], []).append(row)
    return found


def redraw(folder: Path) -> list[Path]:
    """Draws loss-*.png and scaling-*.png beside the JSON files of these names; returns the pictures."""
    pictures = []
    for file in sorted([*folder.glob("loss-*.json"), *folder.glob("scaling-*.json")]):
        content, picture = report.read(folder, file.stem), file.with_suffix(".png")
        if file.stem.startswith("loss-"):
            times_floor(tables.main_group(content["rows"]), picture, content["machine"])
        else:
            scaling(sweeps(content["rows"]), picture, content["machine"])
        pictures.append(picture)
    return pictures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("folders", nargs="+", type=user_path, metavar="DIR", help="folders of results")
    parser.add_argument(
        "--overview", type=user_path, metavar="FILE", help="also one chart of the folders' loss-cpu.json"
    )
    options = parser.parse_args(argv)
    for folder in options.folders:
        pictures = redraw(folder)
        print("\n".join(map(str, pictures)) if pictures else f"{folder}: no loss-*.json or scaling-*.json")
    if options.overview:
        measured = [report.read(folder, "loss-cpu") for folder in options.folders]
        overview([(content["machine"], content["rows"]) for content in measured if content], options.overview)
        print(options.overview)
    return 0


if __name__ == "__main__":
    sys.exit(main())
