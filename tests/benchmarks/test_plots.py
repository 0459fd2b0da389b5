"""Charts: every provider looks the same in all of them, and the committed results can be drawn again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from benchmarks import plots

RESULTS = ROOT / "benchmarks/results"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that are saved, by file name."""
    from matplotlib.figure import Figure

    saved: dict[str, Any] = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: saved.update({path.name: figure}))
    return saved


def colours(figure: Any) -> dict[str, set[Any]]:
    """Of the lines and bars in all panels, by their labels."""
    from matplotlib.colors import to_hex

    found: dict[str, set[Any]] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            colour = handle[0].get_facecolor() if hasattr(handle, "patches") else handle.get_color()
            found.setdefault(label, set()).add(to_hex(colour))
    return found


def test_a_provider_looks_the_same_in_every_chart(tmp_path: Path, figures: dict[str, Any]) -> None:
    epyc, xeon = (RESULTS / name for name in ("amd-epyc", "intel-xeon"))
    for folder in (epyc, xeon):
        for file in (*folder.glob("loss-cpu.json"), *folder.glob("scaling-cpu.json")):
            (tmp_path / folder.name).mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / folder.name)
    folders = [str(tmp_path / folder.name) for folder in (epyc, xeon)]
    assert plots.main([*folders, "--overview", str(tmp_path / "speed.png")]) == 0
    assert set(figures) == {"loss-cpu.png", "scaling-cpu.png", "speed.png"}
    seen = {name: colours(figure) for name, figure in figures.items()}
    assert {"ours", "authors' form", "best eager (vecdot)", "torch.compile"} <= set(seen["speed.png"])
    for label in set.union(*map(set, seen.values())):
        assert len(set.union(*(found[label] for found in seen.values() if label in found))) == 1, label
    assert all(plots.FLOOR in found for found in seen.values())
    assert "EPYC" in figures["scaling-cpu.png"].get_suptitle()
    assert "logarithmic" in figures["loss-cpu.png"].axes[0].get_xlabel()


def test_every_provider_that_was_measured_has_a_look_of_its_own() -> None:
    files = [*RESULTS.rglob("loss-*.json"), *RESULTS.rglob("scaling-*.json")]
    measured = {row["provider"] for file in files for row in json.loads(file.read_text())["rows"]}
    assert measured
    assert measured <= set(plots.LOOKS)
    for other in ("cpu", "cuda|triton"):  # of which no chart shows both
        shown = [look for name, look in plots.LOOKS.items() if not re.match(f"ours-({other})", name)]
        assert len({look.colour for look in shown}) == len({look.name for look in shown}) == len(shown)


def test_the_overview_shows_the_geometric_means(tmp_path: Path, figures: dict[str, Any]) -> None:
    machine = {"cpu": "A", "threads": 2, "torch": "2", "date": "2026-11-28 09:00 UTC"}
    times = {"ours-cpu": (0.5, 2.0), "compile": (2.0, 8.0), "vecdot": (3.0, 3.0), "authors": (1.0, 16.0)}
    rows = [
        {"provider": name, "cell": cell, "times_floor": value, "median_ms": value}
        | {"mode": "both", "timing": "eager"}
        for name, values in times.items()
        for cell, value in zip("ab", values, strict=True)
    ]
    plots.overview([(machine, rows)], tmp_path / "x.png")
    (axes,) = figures["x.png"].axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1, 4, 3, 4])
