"""Pictures of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"


def times_floor(rows: Sequence[Row], path: Path) -> None:
    """Dots: each provider's multiple of the floor, a line per cell; 1 is a copy of what must move."""
    from matplotlib.figure import Figure  # seconds to import: only those who plot pay

    cells = list(dict.fromkeys(row["cell"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))

    figure = Figure(figsize=(8, 1.4 + 0.32 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for number, provider in enumerate(providers):
        mine = {row["cell"]: row["times_floor"] for row in rows if row["provider"] == provider}
        axes.plot(
            list(mine.values()),
            [cells.index(cell) for cell in mine],
            MARKERS[number % len(MARKERS)],
            label=provider,
            markersize=7,
            alpha=0.85,
        )
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time / floor (the bytes that must move, at copy speed)")
    axes.set_yticks(range(len(cells)), cells, fontsize=9)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.grid(axis="both", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", frameon=False, ncols=min(len(providers), 4), fontsize=9)
    figure.savefig(path, dpi=150)


def scaling(sweeps: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Time over batch size and over channels, one panel each, with the floor below.

    Args:
        sweeps: rows by what varies, "batch" or "channels"; each row has it as a key.
        path: the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(sweeps), 4.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0])
    for axes, (varied, rows) in zip(panels, sweeps.items(), strict=True):
        for number, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
            mine = [row for row in rows if row["provider"] == provider]
            axes.plot(
                [row[varied] for row in mine],
                [row["median_ms"] for row in mine],
                f"{MARKERS[number % len(MARKERS)]}-",
                label=provider,
                markersize=4,
            )
        floors = {row[varied]: row["floor_ms"] for row in rows}
        axes.plot(list(floors), list(floors.values()), "k--", linewidth=0.8, label="floor")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(floors), [str(value) for value in floors], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel({"batch": "batch size", "channels": "channels of student and teacher"}[varied])
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("forward and backward, ms")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=4, fontsize=9)
    figure.savefig(path, dpi=150)
