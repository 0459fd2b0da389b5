"""Learning rate and beta as plain functions of the step, so that a resumed run needs no state for them."""

from __future__ import annotations

from bisect import bisect_right
from math import cos, pi

from trainer.config import Config
from trainer.methods import METHODS

START_DIVISOR = 25.0  # one-cycle begins at lr / 25 and ends at lr / 25e4, as in torch's OneCycleLR
END_DIVISOR = 25e4


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Rate of optimizer step `step` (from 0) of `config.epochs * steps_per_epoch`.

    Over `warmup_epochs` it rises in equal steps, from above 0 to `lr`; `cosine` then falls over the rest.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "step":
        return config.lr * config.lr_gamma ** bisect_right(
            sorted(config.lr_milestones), step // steps_per_epoch
        )
    if config.lr_schedule == "cosine":
        return _cosine(config.lr, 0.0, (step - warmup) / (total - warmup))
    if config.lr_schedule == "onecycle":
        peak = config.lr_warmup * total - 1  # step at which the rate is highest
        if step <= peak:
            return _cosine(config.lr / START_DIVISOR, config.lr, step / peak if peak > 0 else 1.0)
        return _cosine(
            config.lr, config.lr / END_DIVISOR, (step - peak) / (total - 1 - peak) if total > 1 else 0.0
        )
    return config.lr


def beta(config: Config, step: int, steps_per_epoch: int) -> float:
    """Weight of the transfer term at `step`: 0 before `at_start_epoch`, then `beta`, decaying to the end."""
    first = config.at_start_epoch * steps_per_epoch
    if not METHODS[config.method].has_term or step < first:
        return 0.0
    done = (step - first) / (config.epochs * steps_per_epoch - first)
    if config.beta_schedule == "linear":
        return config.beta * (1 - done)
    if config.beta_schedule == "cosine":
        return _cosine(config.beta, 0.0, done)
    if config.beta_schedule == "step":
        return config.beta * config.beta_gamma ** bisect_right(
            sorted(config.beta_milestones), step // steps_per_epoch
        )
    return config.beta


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + cos(pi * done)) / 2
