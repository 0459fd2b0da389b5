"""A run, from its configuration to its artefacts: what it is made of, and where it starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

import models
from trainer import build, checkpoint, data, distributed, loop, reporting, results, resume, run_folder
from trainer.config import Config
from trainer.data.workers import deaths_named
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.meter import Meter
from trainer.methods import METHODS
from trainer.mixing import Mixing
from trainer.state import TrainState
from trainer.student import Student
from trainer.teacher_cache import TeacherCache
from trainer.torch_settings import default_dtype, fill_momentum, set_up_torch
from trainer.watch import Watch


class OutOfMemory(RuntimeError):
    """The device's memory does not hold a step."""


def train(config: Config) -> int:
    """Run or continue the training that `config` describes; returns the process's exit code.

    Whatever can be wrong (data, models, checkpoints, the output folder) is found, and raised as ConfigError,
    before the output folder is touched.
    """
    with deaths_named(config.workers), distributed.ranks(config) as ranks, default_dtype(config):
        set_up_torch(config, ranks)
        try:
            return Run(config, ranks).train()  # no name holds the run: see `distributed.ranks`
        except torch.OutOfMemoryError as error:
            mine = -(-config.batch_size // (ranks.world * config.accumulate))
            raise OutOfMemory(
                f"{ranks.device} is out of memory with {mine} images at a time (batch-size "
                f"{config.batch_size}, {ranks.world} ranks, accumulate {config.accumulate}): a higher "
                "accumulate gives the same gradients; a lower batch-size, amp bf16 and channels-last true "
                "also save memory "
                f"({str(error).splitlines()[0]})"
            ) from None


class Run:
    """The parts of one training, which `trainer.loop` trains."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.reporter = reporting.Reporter(ranks.first)
        self.found = run_folder.state_of(config.output_dir)
        self.start = resume.find_start(config)
        self.folder = self.start.folder
        self.dataset = data.load(config, ranks.device)
        size = len(self.dataset.train)
        tail = size % config.batch_size
        if min(config.batch_size, size, tail or size) < ranks.world:
            raise ConfigError(
                f"batch-size {config.batch_size}: a batch of {min(config.batch_size, size, tail or size)} "
                f"images (of {size}) cannot be shared by {ranks.world} ranks"
            )
        self.mixing = Mixing(config, self.dataset.classes, ranks)
        self.steps_per_epoch = -(-size // config.batch_size)
        self.last_step = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.last_step = min(self.last_step, config.max_steps)

        self._create_models()
        self.optimizer = build.optimizer(config, self.learner)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "fp16")
        self.watch = Watch(self.student, scaled=config.amp == "fp16")
        self.meter = Meter(config, self.dataset.classes, self.method.names)
        self.state = TrainState(self.learner, self.optimizer, self.scaler, ranks, self.meter.size, self.ema)
        if self.start.checkpoint is not None:
            resume.check_identity(self.start.checkpoint, self.identity, config)
            self.notes += resume.changed_code(self.start.checkpoint, self.identity, config)
            self.state.restore(self.start.checkpoint)
            self.watch.last_saved = f"{self.start.path} (step {self.state.progress.step})"
        self.progress, self.sums = self.state.progress, self.state.sums
        if config.amp == "fp16" and config.momentum and isinstance(self.optimizer, torch.optim.SGD):
            fill_momentum(self.optimizer)
        step, mid_epoch = self.progress.step, self.progress.step % self.steps_per_epoch
        self.finished = (self.folder / run_folder.SUMMARY).exists() and step >= self.last_step
        told = step == self.last_step and (not mid_epoch or self.progress.partial)
        if step >= self.last_step and not (self.finished or told):
            raise ConfigError(f"max-steps {config.max_steps}: the run is at step {step} already")

    def _create_models(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.student, self.teacher, self.notes = build.networks(config, self.dataset, self.ranks)
        self.ema = build.moving_average(self.student, config.ema) if config.ema else None
        network = None if self.teacher is None else self.teacher.network
        self.method = METHODS[config.method](config, self.student, network, self.dataset.example())
        if self.teacher is not None and not self.method.takes_gradients:  # which BatchNorm's mode changes
            self.teacher.fold()
        self.cache: TeacherCache | None = None
        if self.teacher is not None and config.teacher_cache != "off":
            self.cache = TeacherCache(config, self.ranks, self.dataset, self.method, self.teacher)
        self.learner = Student(self.student, self.method.trained)
        self.forward: nn.Module = self.learner
        if self.ranks.world > 1:
            self.forward = distributed.data_parallel(self.learner)
        if config.compile:
            build.compile_networks(config, self.forward, self.learner, self.teacher)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the run was made of, besides its configuration: data set, teacher's weights, users' code.

        Found when rank 0 saves or any rank resumes: it reads every path.
        """
        return {
            "data": self.dataset.identity(),
            "teacher": self.teacher and self.teacher.digest,
            "code": {key: models.code(getattr(self.config, key) or "") for key in ("student", "teacher")},
        }

    def train(self) -> int:
        """Train to the last step, unless that is done; returns the process's exit code."""
        if self.finished:
            self.reporter.say(f"the run in {self.config.output_dir} is already finished")
            return 0
        with self._folder_claimed():
            return loop.train(self)

    @contextmanager
    def _folder_claimed(self) -> Iterator[None]:
        """Rank 0 claims the output folder; what speaks against it is a ConfigError on every rank."""
        problem = None
        with ExitStack() as stack:
            if self.ranks.first:
                try:
                    stack.enter_context(results.claimed(self.folder, self.config, self.found))
                except ConfigError as error:
                    problem = str(error)
            if problem := self.ranks.gather(problem)[0]:
                raise ConfigError(problem)
            yield

    def save(self, *, keep_latest: bool = True) -> None:
        """Write checkpoint.pt."""
        if (state := self.state.collect()) is not None:
            config = self.config.model_dump(mode="json", by_alias=True)
            content = {"format": checkpoint.FORMAT, "config": config, **self.identity, **state}
            checkpoint.save_latest(self.folder, content, keep_latest=keep_latest)
        self.watch.last_saved = f"{self.folder / run_folder.CHECKPOINT} (step {self.progress.step})"

    def write_metrics(self) -> None:
        if self.ranks.first:
            results.write_metrics(self.folder, self.progress.lines)
