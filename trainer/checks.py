"""Which values of a run's keys contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import at_fused
from trainer.choices import flag_text
from trainer.data import DATASETS
from trainer.methods import METHODS

if TYPE_CHECKING:
    from trainer.config import Config


def check(config: Config, *, paths: bool) -> None:
    """What speaks against `config`; `paths`: it names those of data and teacher.

    Raises:
        ValueError: the first contradiction, by its keys and values.
    """
    method = METHODS[config.method]
    if method.needs_teacher and config.teacher is None:
        raise ValueError(f"method {config.method} needs teacher")
    if paths and method.needs_teacher and config.teacher_checkpoint is None:
        raise ValueError(f"method {config.method} needs teacher-checkpoint")
    if paths and DATASETS[config.dataset].needs_folder and config.data_dir is None:
        raise ValueError(f"dataset {config.dataset} needs data-dir")
    if config.skip_nonfinite and config.amp == "fp16":
        raise ValueError("skip-nonfinite is not for amp fp16, whose loss scaling skips such steps itself")
    if config.precision == "fp64" and config.amp != "none":
        raise ValueError(f"precision fp64 and amp {config.amp} contradict each other")
    if config.cuda_graphs and not config.compile:
        raise ValueError("cuda-graphs needs compile")
    _check_optimization(config)
    if config.backend not in ("auto", *at_fused.available_backends()):
        names = ", ".join(("auto", *at_fused.available_backends()))
        raise ValueError(f"backend {config.backend} is not available here (there are: {names})")
    if config.beta_schedule == "step" and method.has_term and not config.beta_milestones:
        raise ValueError("beta-schedule step needs beta-milestones")
    if method.has_term and config.at_start_epoch >= config.epochs:
        raise ValueError(
            f"at-start-epoch {config.at_start_epoch} is beyond the last of {config.epochs} epochs"
        )
    if config.teacher_cache != "off":
        _check_teacher_cache(config)
    for setting, reason in method.forbids.items():
        key, _, forbidden = setting.partition(" ")
        value = getattr(config, key.replace("-", "_"))
        if flag_text(value) == forbidden if forbidden else value:
            raise ValueError(f"method {config.method} cannot be combined with {setting}: {reason}")


def _check_optimization(config: Config) -> None:
    if config.nesterov and config.optimizer != "sgd":
        raise ValueError(f"nesterov is a form of sgd, not of optimizer {config.optimizer}")
    if config.nesterov and config.momentum == 0:
        raise ValueError("nesterov needs a momentum above 0")
    if config.warmup_epochs and config.lr_schedule == "onecycle":
        raise ValueError("warmup-epochs is not for lr-schedule onecycle, whose rate rises by lr-warmup")
    if config.warmup_epochs >= config.epochs:
        raise ValueError(
            f"warmup-epochs {config.warmup_epochs:g} leaves none of {config.epochs} epochs after it"
        )


def _check_teacher_cache(config: Config) -> None:
    method, where = METHODS[config.method], f"teacher-cache {config.teacher_cache}"
    if not method.teacher_can_be_kept:
        names = ", ".join(name for name, other in METHODS.items() if other.teacher_can_be_kept)
        raise ValueError(f"{where} is for the methods {names}, not for method {config.method}")
    if not config.augment_cycle:
        raise ValueError(f"{where} needs augment-cycle: without, no image comes a second time as it was")
    if config.mixup or config.cutmix:
        raise ValueError(f"{where} can't be combined with mixup or cutmix: mixed images are new each time")
    if config.teacher_cache_dtype == "fp16" and config.normalize == "none" and method.has_term:
        raise ValueError("teacher-cache-dtype fp16 can't hold the maps of normalize none; bf16 and fp32 can")
