"""The loss suite's rows as tables to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean

from benchmarks.report import Row, Table


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Per provider, over all cells: its time in multiples of the floor and of our best backend's (geometric
    means), and the least and greatest multiple of the latter."""
    baseline = best_of_ours(rows)
    ours = {row["cell"]: row for row in rows if row["provider"] == baseline}
    summary: dict[str, dict[str, float]] = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == provider]
        entry = {"times_floor": geometric_mean([row["times_floor"] for row in mine])}
        speedups = [row["median_ms"] / ours[row["cell"]]["median_ms"] for row in mine if row["cell"] in ours]
        if speedups:
            entry["times_ours"] = geometric_mean(speedups)
            entry["least_times_ours"] = min(speedups)
            entry["most_times_ours"] = max(speedups)
        summary[provider] = entry
    return summary


def best_of_ours(rows: Sequence[Row]) -> str | None:
    """The provider that others are compared with: the first of ours."""
    return next((row["provider"] for row in rows if row["provider"].startswith("ours")), None)


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each mode and timing, under what both mean."""
    modes = {"both": "Forward and backward", "forward": "Forward", "backward": "Backward"}
    timings = {"eager": "called from Python", "graph": "replayed as a CUDA graph"}
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{modes[row['mode']]}, {timings[row['timing']]}", []).append(row)
    return found


def main_group(rows: Sequence[Row]) -> list[Row]:
    """The group to draw: forward and backward, as CUDA graphs where there are such."""
    order = sorted(groups(rows).values(), key=lambda group: (group[0]["mode"] == "both", group[0]["timing"]))
    return order[-1]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Times of each mode and timing, then what each provider moves, launches and holds."""
    return [*(times_table(heading, group) for heading, group in groups(rows).items()), details_table(rows)]


def times_table(heading: str, rows: Sequence[Row]) -> Table:
    """A line per cell: each provider's time and multiple of the floor; geometric means below."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    baseline = best_of_ours(rows)
    others = [name for name in providers if not name.startswith("ours")] if baseline else []
    headers = ["cell", "floor ms", *(f"{name} ms (×floor)" for name in providers)]
    headers += [f"{name} / {baseline}" for name in others]
    lines = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        here = {row["provider"]: row for row in rows if row["cell"] == cell}
        line = [cell, f"{next(iter(here.values()))['floor_ms']:.3g}"]
        for name in providers:
            row = here.get(name)
            line.append(f"{row['median_ms']:.3g} ({row['times_floor']:.2f})" if row else "-")
        for name in others:
            row, ours = here.get(name), here.get(baseline or "")
            line.append(f"{row['median_ms'] / ours['median_ms']:.2f}" if row and ours else "-")
        lines.append(line)
    summary = summarize(rows)
    means = [f"({summary[name]['times_floor']:.2f})" for name in providers]
    speedups = [f"{summary[name].get('times_ours', math.nan):.2f}" for name in others]
    lines.append(["geometric mean", "", *means, *speedups])
    return Table(heading, headers, lines)


def details_table(rows: Sequence[Row]) -> Table:
    """A line per measurement: what was moved (as declared) at which rate, launched, and held beside it."""
    headers = [
        "cell",
        "mode",
        "timing",
        "provider",
        "median ms (p20 to p80)",
        "MB moved",
        "GB/s",
        "% of copy",
    ]
    headers += ["launches (expected)", "peak extra MB (% of activations)", "host overhead µs"]
    lines = []
    for row in rows:
        extra, launched, host = row["peak_extra_bytes"], row["launches"], host_overhead_us(row, rows)
        expected = row["launches_expected"]
        lines.append(
            [
                row["cell"],
                row["mode"],
                row["timing"],
                row["provider"] + (" (one pass)" if row["one_pass"] else ""),
                f"{row['median_ms']:.3g} ({row['p20_ms']:.3g} to {row['p80_ms']:.3g})",
                f"{row['declared_bytes'] / 1e6:.1f}",
                f"{row['gb_per_s']:.1f}" if row["declared_bytes"] else "-",
                f"{row['percent_of_copy']:.0f}" if row["declared_bytes"] else "-",
                "-" if launched is None else f"{launched}" + (f" (≤ {expected})" if expected else ""),
                "-" if extra is None else f"{extra / 1e6:.3g} ({extra_percent(row):.2f})",
                "-" if host is None else f"{host:.0f}",
            ]
        )
    return Table("Details", headers, lines)


def extra_percent(row: Row) -> float:
    """Peak extra memory in percent of the activations S + T."""
    return float(row["peak_extra_bytes"] / (row["student_bytes"] + row["teacher_bytes"]) * 100)


def host_overhead_us(row: Row, rows: Sequence[Row]) -> float | None:
    """What the host adds: the time of the call less that of the same kernels as a CUDA graph."""
    if row["timing"] != "eager":
        return None
    keys = ("cell", "provider", "mode", "batch")
    for other in rows:
        if other["timing"] == "graph" and all(other[key] == row[key] for key in keys):
            return float(row["median_ms"] - other["median_ms"]) * 1e3
    return None
