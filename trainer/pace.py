"""How far and how fast a training goes."""

from __future__ import annotations

import time


class Pace:
    """Counts from now on, at step `done` of `steps`.

    Images per second are those of the current epoch's steps; the time left counts evaluations, too.
    """

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.first, self.done = steps, done, done
        self.begun = time.monotonic()
        self.epoch_images, self.epoch_begun = 0, self.begun

    def begin_epoch(self) -> None:
        self.epoch_images, self.epoch_begun = 0, time.monotonic()

    def step(self, done: int, images: int) -> None:
        self.done = done
        self.epoch_images += images

    def figures(self, loss: float | None) -> str:
        """`loss 1.234  567 images/s  1:02:03 left`."""
        now = time.monotonic()
        speed = self.epoch_images / max(now - self.epoch_begun, 1e-9)
        left = (now - self.begun) / max(self.done - self.first, 1) * (self.steps - self.done)
        parts = [] if loss is None else [f"loss {short(loss)}"]
        return "  ".join([*parts, f"{speed:.0f} images/s", f"{clock(left)} left"])


def short(loss: float) -> str:
    """Four digits behind the point, where there are few before it."""
    return f"{loss:.4f}" if abs(loss) < 1000 else f"{loss:.4g}"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
