"""Charts of errors against the epoch."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer import charts, results
from trainer.config import make_config
from trainer.methods import METHODS


@pytest.mark.parametrize("epochs, titles", [(4, ["Error"]), (12, ["Error", "the last quarter"])])
def test_a_long_run_has_a_panel_of_its_last_quarter(
    epochs: int, titles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    test = [90.0 * 0.8**epoch + 5 for epoch in range(epochs)]
    history = [
        {"epoch": i + 1, "test_error": error, "train_error": error - 2, "train_loss": 1.0, "ce_loss": 1.0}
        for i, error in enumerate(test)
    ]
    config = make_config({"dataset": "digits", "student": "wrn-10-1", "method": "none", "output-dir": "o"})
    results.write_curves(tmp_path, history, config)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    *errors, losses = drawn[0].axes
    assert [axes.get_title() for axes in errors] == titles
    assert list(errors[0].lines[0].get_ydata()) == test
    for axes, first in zip(errors, (1, 10), strict=False):
        solid, dashed = axes.lines
        assert list(solid.get_xdata()) == list(dashed.get_xdata()) == list(range(first, epochs + 1))
        assert list(solid.get_ydata()) == test[first - 1 :]
        assert {solid.get_color(), dashed.get_color()} == {charts.COLOURS["none"]}
    if len(errors) == 2:
        low, high = errors[1].get_ylim()
        assert test[-1] - 4 < low < test[-1] - 2 < test[9] < high < test[9] + 2
    assert [line.get_label() for line in losses.lines] == ["cross-entropy"]


def test_every_method_has_a_colour_of_its_own() -> None:
    assert charts.COLOURS.keys() == METHODS.keys()
    assert len({*charts.COLOURS.values(), charts.TEACHER}) == len(METHODS) + 1
