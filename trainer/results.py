"""What a run writes besides checkpoints: its configuration, its metrics, its results."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import nan
from pathlib import Path
from typing import Any

from torch import nn

from trainer import charts, checkpoint, lock, run_folder
from trainer.checkpoint import write_atomically
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.state import Metrics, Progress

# Parts of the training loss: their names and colours in curves.png.
TERMS = {
    "ce_loss": ("cross-entropy", "tab:red"),
    "at_loss": ("transfer term", "tab:blue"),
    "kd_loss": ("distillation", "tab:green"),
}


@contextmanager
def claimed(folder: Path, config: Config, found: object) -> Iterator[None]:
    """Make `folder` this run's alone meanwhile, with its configuration.

    Raises:
        ConfigError: another training is or, since it was looked at and `found` so, has been at work there;
            or it can't be written to.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.claimed(folder))
            if run_folder.state_of(folder) != found:
                raise ConfigError(f"output-dir {folder}: another training has just been at work there")
            (folder / run_folder.SUMMARY).unlink(missing_ok=True)  # the run is no longer finished
            write_atomically(folder / run_folder.CONFIG, config.to_yaml().encode())
        except OSError as error:
            raise ConfigError(f"output-dir {folder}: {error.strerror}") from None
        yield


def finish(
    folder: Path, config: Config, progress: Progress, student: nn.Module, average: nn.Module | None = None
) -> dict[str, Any]:
    """Write the results; returns those of summary.json, which comes last, as the mark of a finished run."""
    history, teacher = progress.lines, progress.teacher or {}
    last = history[-1]
    checkpoint.save(folder / run_folder.MODEL, checkpoint.weights(student))
    if average is not None:
        checkpoint.save(folder / run_folder.EMA_MODEL, checkpoint.weights(average))
    write_curves(folder, history, config)
    summary = {
        "last_test_error": last["test_error"],
        "best_test_error": min(metrics["test_error"] for metrics in history),
        "teacher_test_error": teacher.get("test_error"),
        "epochs": len(history),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "method": config.method,
        "seed": config.seed,
    }
    if average is not None:
        summary["last_ema_test_error"] = last["ema_test_error"]
        summary["best_ema_test_error"] = min(metrics["ema_test_error"] for metrics in history)
    if "test_top5_error" in last:
        summary["last_test_top5_error"] = last["test_top5_error"]
        summary["teacher_test_top5_error"] = teacher.get("test_top5_error")
    (folder / run_folder.PREVIOUS).unlink(missing_ok=True)
    write_summary(folder, summary)
    return summary


def write_metrics(folder: Path, history: list[Metrics]) -> None:
    """metrics.jsonl: one line per epoch, always written whole, so that it agrees with the checkpoint."""
    lines = "".join(json.dumps(metrics) + "\n" for metrics in history)
    write_atomically(folder / run_folder.METRICS, lines.encode())


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_atomically(folder / run_folder.SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def write_curves(folder: Path, history: list[Metrics], config: Config) -> None:
    """curves.png: errors and losses against the epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = charts.panel_count(len(history))
    figure = Figure(figsize=(5.5 + 5.5 * columns, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    *error_axes, loss_axes = figure.subplots(1, columns + 1)
    for panel in charts.panels(error_axes, len(history)):
        for name, style in (("test_error", "-"), ("train_error", "--")):
            errors = [metrics[name] for metrics in history]
            label = f"{name.replace('_', ' ')} (last {errors[-1]:.2f} %)"
            colour = charts.COLOURS.get(config.method, "black")
            panel.curve(errors, color=colour, linestyle=style, label=label, marker=".", markersize=4)
        panel.finish("Error")
    used = {name: look for name, look in TERMS.items() if any(metrics.get(name) for metrics in history)}
    for name, (label, colour) in (
        {"train_loss": ("total", "black")} | used if len(used) > 1 else used
    ).items():
        style = "-" if name == "train_loss" else "--"
        losses = [metrics.get(name, nan) for metrics in history]
        loss_axes.plot(range(1, len(losses) + 1), losses, color=colour, linestyle=style, label=label)
    loss_axes.set(ylabel="loss", title="Training loss and its terms", ylim=(0, None))
    charts.count_epochs(loss_axes)
    for axes in (error_axes[0], loss_axes):
        axes.legend(frameon=False)
    figure.suptitle(f"{config.student} on {config.dataset}, method {config.method}, seed {config.seed}")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(folder / run_folder.CURVES, image.getvalue())
