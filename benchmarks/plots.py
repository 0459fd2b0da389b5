"""Pictures of the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Row


def times_floor(rows: Sequence[Row], path: Path) -> None:
    """Bars: each provider's multiple of the floor, per cell; 1 is a copy of the bytes that must move."""
    from matplotlib.figure import Figure  # seconds to import: only those who plot pay

    cells = list(dict.fromkeys(row["cell"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    values = {(row["cell"], row["provider"]): row["times_floor"] for row in rows}
    width = 0.8 / len(providers)

    figure = Figure(figsize=(1.5 + 1.2 * len(cells), 4), layout="constrained")
    axes = figure.subplots()
    for number, provider in enumerate(providers):
        left = [position + (number - (len(providers) - 1) / 2) * width for position in range(len(cells))]
        bars = axes.bar(left, [values[cell, provider] for cell in cells], width, label=provider)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(cells)), [cell.replace("-", "\n") for cell in cells], fontsize=8)
    axes.set_ylabel("time / floor (3S + T bytes at copy speed)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(providers))
    figure.savefig(path, dpi=150)
