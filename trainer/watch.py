"""Losses and gradients that are not finite end a run, at once and by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Diverged(RuntimeError):
    """Training has become meaningless; the last checkpoint is from before that."""


class Watch:
    """Looks at every step's losses and gradients.

    On a GPU the step before is looked at, so that no step waits for its own figures.
    """

    def __init__(self, student: nn.Module, scaled: bool) -> None:
        self.student = student
        self.scaled = scaled  # fp16's gradients may be infinite: its loss scaling skips such steps
        self.last_saved = "none"
        self.loss: float | None = None  # of the last step that was looked at, over this rank's images
        self._pending: tuple[int, Tensor, int, torch.cuda.Event] | None = None

    def look(self, step: int, losses: Tensor, norm: Tensor, images: int) -> None:
        """Note a step's losses (total, CE, AT, KD), summed over `images`, and the norm of its gradients.

        Raises:
            Diverged: they, or on a GPU those of the step before, are not finite.
        """
        figures = losses if self.scaled else torch.cat([losses, norm.to(losses.dtype)[None]])
        if figures.device.type == "cpu":
            return self._check(step, figures, images)
        self.wait()
        on_host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        on_host.copy_(figures, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = step, on_host, images, copied

    def wait(self) -> None:
        """Look at the step that is still pending, if there is one."""
        if self._pending is not None:
            step, figures, images, copied = self._pending
            self._pending = None
            copied.synchronize()
            self._check(step, figures, images)

    def _check(self, step: int, figures: Tensor, images: int) -> None:
        if bool(figures.isfinite().all()):
            self.loss = figures[0].item() / images
            return
        values = zip(("loss", "CE", "AT", "KD"), figures.tolist(), strict=False)
        found = [name for name, value in values if not math.isfinite(value)]
        gradients = [
            name
            for name, parameter in self.student.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        found += [f"gradient of {name}" for name in gradients[:3]]
        found = found or ["the norm of the gradients"]
        more = f" and of {len(gradients) - 3} more" if len(gradients) > 3 else ""
        raise Diverged(
            f"not finite at step {step}: {', '.join(found)}{more}; last good checkpoint: {self.last_saved}; "
            "a lower lr may help, and skip-nonfinite true leaves such steps out"
        )
