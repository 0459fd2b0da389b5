"""The state of a training, besides its configuration: from it a killed run continues bit-exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer import checkpoint
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.student import Student

SUMS = 6  # of total, CE, AT and KD losses, of wrong answers, of images: what every checkpoint has

Metrics = dict[str, Any]  # of an epoch, by name


@dataclass
class Progress:
    """How far the training is, without weights and optimizer; everything else follows from `step`."""

    step: int = 0
    history: list[Metrics] = field(default_factory=list)
    partial: Metrics | None = None  # of an epoch that max-steps cut short, until it is continued
    seconds: float = 0.0  # spent in the current epoch so far
    teacher: dict[str, float] | None = None  # its test errors, as `loop.evaluate` gives them

    @property
    def lines(self) -> list[Metrics]:
        """What metrics.jsonl holds."""
        return self.history + ([self.partial] if self.partial else [])


class TrainState:
    """All that the rest of a training depends on, on every rank: what a checkpoint stores and restores."""

    def __init__(
        self,
        student: Student,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ranks: Ranks,
        sums: int = SUMS,
        ema: nn.Module | None = None,
    ) -> None:
        self.student, self.optimizer, self.scaler, self.ranks = student, optimizer, scaler, ranks
        self.ema = ema  # the moving average of the student
        self.progress = Progress()
        self.sums = torch.zeros(sums, dtype=torch.float64, device=ranks.device)  # over the current epoch

    @property
    def parts(self) -> dict[str, Any]:
        """What has a state of its own, by its name in the checkpoint."""
        networks: dict[str, nn.Module] = {"model": self.student.model, **dict(self.student.beside.items())}
        if self.ema is not None:
            networks["ema"] = self.ema
        return {**networks, "optimizer": self.optimizer, "scaler": self.scaler}

    def collect(self) -> dict[str, Any] | None:
        """The state, on rank 0; all ranks must call."""
        buffers = list(self.student.model.buffers()) if self.ranks.world > 1 else []
        mine = {
            "sums": self.sums.cpu(),
            "rng": _rng_state(self.ranks.device),
            "buffers": [buffer.cpu() for buffer in buffers],
        }
        ranks = self.ranks.gather(mine)
        if not self.ranks.first:
            return None
        states = {
            name: checkpoint.weights(part) if isinstance(part, nn.Module) else part.state_dict()
            for name, part in self.parts.items()
        }
        return states | {"progress": asdict(self.progress), "ranks": ranks}

    def restore(self, stored: dict[str, Any]) -> None:
        """Restore what `collect` returned; ConfigError if it does not fit."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(stored[name])
            self.progress = Progress(**stored["progress"])
            if not isinstance(self.progress.step, int) or not isinstance(self.progress.history, list):
                raise TypeError("its progress is not one of a run")
            self._restore_rank(stored["ranks"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise ConfigError(f"the checkpoint to resume from does not fit this run: {error}") from None

    def _restore_rank(self, states: list[dict[str, Any]]) -> None:
        if len(states) == self.ranks.world:
            mine = states[self.ranks.rank]
            self._restore_sums(mine["sums"])
            _set_rng_state(mine["rng"], self.ranks.device)
            for buffer, value in zip(self.student.model.buffers(), mine.get("buffers", ()), strict=False):
                buffer.copy_(value)
        elif self.ranks.first:  # another number of ranks: the totals count, whoever holds them
            self._restore_sums(torch.stack([state["sums"] for state in states]).sum(0))

    def _restore_sums(self, stored: Tensor) -> None:
        """Earlier versions kept the first six: of an epoch that they began, the others are not known."""
        if len(stored) not in (SUMS, len(self.sums)):
            raise ValueError(f"it has {len(stored)} sums for {len(self.sums)}")
        self.sums[: len(stored)] = stored.to(self.sums)
        self.sums[len(stored) :] = torch.nan if stored[5] else 0.0


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
