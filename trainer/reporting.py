"""What a run reports while it trains: lines or a progress bar, and TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.errors import ConfigError
from trainer.state import Metrics


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
            if metrics.get(name)
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
