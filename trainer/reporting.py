"""What a run reports while it trains: lines or a progress bar, and TensorBoard events."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from trainer.errors import ConfigError
from trainer.pace import Pace, short
from trainer.state import Metrics

WIDTH = 80  # columns that an epoch's line has
LINE_SECONDS = 15.0  # without a bar: at least one line in so many
BAR_SECONDS = 0.1  # between updates of the bar


class Reporter:
    """Speaks and writes for the run; one that is not `active` (ranks other than 0) does nothing."""

    def __init__(self, active: bool) -> None:
        self.active = active
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True, emoji=False)
        self._pace, self._title = Pace(0, 0), ""
        self._bar: Progress | None = None
        self._tensorboard: Any = None
        self._spoke = 0.0  # when, by the monotonic clock

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)
        self._spoke = time.monotonic()

    def open(self, folder: Path, steps: int, done: int, last: Metrics | None) -> None:
        """Start TensorBoard and, on a terminal, the progress bar.

        Events from step `done` on are superseded; those of `last`, an epoch that ended there, are written
        again, since the run may have been killed before they were.
        """
        self._pace = Pace(steps, done)
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only runs that train pay for it

        self._tensorboard = SummaryWriter(str(folder), purge_step=done or None)  # type: ignore[no-untyped-call]
        if last:
            self._write_events(last, done)
        if self.console.is_interactive:
            figures = TextColumn("{task.completed}/{task.total}  {task.fields[figures]}")
            columns = TextColumn("{task.description}"), BarColumn(bar_width=None), figures
            self._bar = Progress(*columns, console=self.console, expand=True, auto_refresh=False)
            self._bar.add_task("training", total=steps, completed=done, figures="")
            self._bar.start()

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        self._title = f"epoch {epoch}/{epochs}"
        self._pace.begin_epoch()
        self._phase(self._title)

    def begin_test(self) -> None:
        self._phase("testing")

    def step(self, done: int, images: int, loss: float | None) -> None:
        """After a step over so many `images`, whose mean loss is `loss`, where that is known yet."""
        self._pace.step(done, images)
        wait = BAR_SECONDS if self._bar else LINE_SECONDS
        if not self.active or (time.monotonic() - self._spoke < wait and done > self._pace.first + 1):
            return
        figures = self._pace.figures(loss)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, figures=figures, refresh=True)
            self._spoke = time.monotonic()
        elif time.monotonic() - self._spoke >= wait:
            self.say(f"step {done}/{self._pace.steps}  {self._title}  {figures}")

    def epoch(self, metrics: Metrics, epochs: int, step: int) -> None:
        """Report one epoch's figures, in a line and to TensorBoard."""
        self.say(epoch_line(metrics, epochs))
        self._write_events(metrics, step)

    def _phase(self, title: str) -> None:
        if self._bar:
            done = self._pace.done
            self._bar.update(self._bar.task_ids[0], description=title, completed=done, refresh=True)

    def _write_events(self, metrics: Metrics, step: int) -> None:
        if self._tensorboard:
            try:
                for name in metrics.keys() - {"epoch"}:
                    self._tensorboard.add_scalar(name, metrics[name], step)
                self._tensorboard.flush()
            except OSError as error:
                raise ConfigError(f"cannot write TensorBoard's events: {error.strerror or error}") from None

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        if self._tensorboard:
            self._tensorboard.close()


def epoch_line(metrics: Metrics, epochs: int) -> str:
    """An epoch's figures, the most telling first: as many as fit."""
    parts = [
        test_errors(metrics),
        *([f"EMA {metrics['ema_test_error']:.2f} %"] if "ema_test_error" in metrics else []),
        f"train {metrics['train_error']:.2f} %",
        f"loss {short(metrics['train_loss'])}",
        *(f"{n[:2].upper()} {short(metrics[n])}" for n in ("at_loss", "kd_loss") if metrics.get(n)),
        f"{metrics['images_per_second']:.0f} images/s",
        f"{metrics['seconds']:.0f} s",
        f"lr {metrics['lr']:.3g}",
    ]
    line = f"epoch {metrics['epoch']}/{epochs}"
    for part in parts:
        if len(line) + 2 + len(part) > WIDTH:
            break
        line += f"  {part}"
    return line


def test_errors(metrics: Metrics) -> str:
    """Of an epoch, or of a teacher."""
    top5 = f" (top 5: {metrics['test_top5_error']:.2f} %)" if "test_top5_error" in metrics else ""
    return f"test error {metrics['test_error']:.2f} %{top5}"


def last_and_best(summary: Metrics, of: str = "") -> str:
    """The test errors of a run's summary; `of` ema_: those of the moving average."""
    return f"last {summary[f'last_{of}test_error']:.2f} %, best {summary[f'best_{of}test_error']:.2f} %"
