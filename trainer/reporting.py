"""What a run tells: lines or a progress bar, metrics.jsonl, summary.json, TensorBoard events, curves.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.checkpoint import write_atomically
from trainer.config import ConfigError

Metrics = dict[str, Any]


class Reporter:
    """Speaks and writes for the run; one that is not `active` (ranks other than 0) does nothing."""

    def __init__(self, active: bool) -> None:
        self.active = active
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._tensorboard: Any = None

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def open(self, folder: Path, steps: int, done: int, *, retold: bool) -> None:
        """Start the progress bar (terminals only) and TensorBoard.

        Events after step `done` are superseded, with `retold` also those of that step.
        """
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only runs that train pay for it

        self._tensorboard = SummaryWriter(str(folder), purge_step=done + (not retold) if done else None)  # type: ignore[no-untyped-call]
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.add_task("training", total=steps, completed=done, speed="")
            self._progress.start()

    def step(self, done: int) -> None:
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=done)

    def epoch(self, metrics: Metrics, epochs: int, step: int) -> None:
        """Tell one epoch's figures."""
        terms = [
            f"{name[:2].upper()} {metrics[name]:.4f}"
            for name in ("ce_loss", "at_loss", "kd_loss")
            if metrics[name]
        ]
        self.say(
            f"epoch {metrics['epoch']}/{epochs}  loss {metrics['train_loss']:.4f}"
            f"{' (' + ', '.join(terms) + ')' if terms else ''}  "
            f"train error {metrics['train_error']:.2f} %  {test_errors(metrics)}  "
            f"lr {metrics['lr']:.3g}  {metrics['images_per_second']:.0f} images/s  {metrics['seconds']:.0f} s"
        )
        if self._progress:
            self._progress.update(
                self._progress.task_ids[0], speed=f"{metrics['images_per_second']:.0f} images/s"
            )
        if self._tensorboard:
            try:
                for name in metrics.keys() - {"epoch"}:
                    self._tensorboard.add_scalar(name, metrics[name], step)
                self._tensorboard.flush()
            except OSError as error:
                raise ConfigError(f"cannot write TensorBoard's events: {error.strerror or error}") from None

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        if self._tensorboard:
            self._tensorboard.close()


def test_errors(metrics: Metrics) -> str:
    """Of an epoch, or of a teacher."""
    top5 = f" (top 5: {metrics['test_top5_error']:.2f} %)" if "test_top5_error" in metrics else ""
    return f"test error {metrics['test_error']:.2f} %{top5}"


def write_metrics(folder: Path, history: list[Metrics]) -> None:
    """metrics.jsonl: one line per epoch, always written whole, so that it agrees with the checkpoint."""
    lines = "".join(json.dumps(metrics) + "\n" for metrics in history)
    write_atomically(folder / "metrics.jsonl", lines.encode())


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def write_curves(folder: Path, history: list[Metrics], title: str) -> None:
    """curves.png: errors and losses against the epoch."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
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
    used = {name: label for name, label in terms.items() if any(metrics[name] for metrics in history)}
    for name, label in ({"train_loss": "total"} | used if len(used) > 1 else used).items():
        style = "-" if name == "train_loss" else "--"
        loss_axes.plot(epochs, [metrics[name] for metrics in history], label=label, linestyle=style)
    loss_axes.set(xlabel="epoch", ylabel="loss", title="Training loss and its terms", ylim=(0, None))
    for axes in (error_axes, loss_axes):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(folder / "curves.png", image.getvalue())
