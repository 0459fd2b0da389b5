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

from trainer import checkpoint, lock, run_folder
from trainer.checkpoint import write_atomically
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.state import Metrics, Progress


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
    title = f"{config.student} on {config.dataset}, method {config.method}, seed {config.seed}"
    write_curves(folder, history, title)
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


def write_curves(folder: Path, history: list[Metrics], title: str) -> None:
    """curves.png: errors and losses against the epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2))
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.12, top=0.84, wspace=0.18)
    FigureCanvasAgg(figure)
    error_axes, loss_axes = figure.subplots(1, 2)
    epochs = [metrics["epoch"] for metrics in history]
    last = history[-1]
    for name, colour in (("test_error", "tab:red"), ("train_error", "tab:blue")):
        label = f"{name.replace('_', ' ')} (last {last[name]:.2f} %)"
        error_axes.plot(
            epochs, [m[name] for m in history], color=colour, label=label, marker=".", markersize=4
        )
    error_axes.set(xlabel="epoch", ylabel="error, %", title="Error", ylim=(0, None))
    terms = {"ce_loss": "cross-entropy", "at_loss": "transfer term", "kd_loss": "distillation"}
    used = {name: label for name, label in terms.items() if any(m.get(name) for m in history)}
    for name, label in ({"train_loss": "total"} | used if len(used) > 1 else used).items():
        style = "-" if name == "train_loss" else "--"
        loss_axes.plot(epochs, [m.get(name, nan) for m in history], label=label, linestyle=style)
    loss_axes.set(xlabel="epoch", ylabel="loss", title="Training loss and its terms", ylim=(0, None))
    for axes in (error_axes, loss_axes):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(folder / run_folder.CURVES, image.getvalue())
