"""The training loop: steps, evaluation, and what is written when."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer import build, checkpoint, data, distributed, reporting, resume, run_folder, schedules
from trainer.config import Config
from trainer.data.dataset import too_many
from trainer.data.workers import deaths_named
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.hardware import computes
from trainer.meter import EvaluationMeter, Meter
from trainer.methods import METHODS
from trainer.objectives import objective
from trainer.state import TrainState
from trainer.student import Student
from trainer.torch_settings import AMP_DTYPES, default_dtype, fill_momentum, set_up_torch
from trainer.watch import Diverged, Watch


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
            return _run(config, ranks)
        except torch.OutOfMemoryError as error:
            mine = -(-config.batch_size // (ranks.world * config.accumulate))
            raise OutOfMemory(
                f"{ranks.device} is out of memory with {mine} images at a time (batch-size "
                f"{config.batch_size}, {ranks.world} ranks, accumulate {config.accumulate}): a higher "
                "accumulate gives the same gradients; a lower batch-size, amp bf16 and channels-last true "
                "also save memory "
                f"({str(error).splitlines()[0]})"
            ) from None


def _run(config: Config, ranks: Ranks) -> int:
    """In a frame of its own, so that the run is gone before the ranks part: see `distributed.ranks`."""
    run = Run(config, ranks)
    if run.finished:
        run.reporter.say(f"the run in {config.output_dir} is already finished")
        return 0
    return run.train()


class Run:
    """One training, from its configuration to its artefacts."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.reporter = reporting.Reporter(ranks.first)
        self.found = resume.state_of(config.output_dir)
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
        self.steps_per_epoch = -(-size // config.batch_size)
        self.last_step = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.last_step = min(self.last_step, config.max_steps)

        self._create_models()
        self.optimizer = build.optimizer(config, self.learner)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "fp16")
        self.watch = Watch(self.student, scaled=config.amp == "fp16")
        self.meter = Meter(config, self.dataset.classes, self.method.names)
        self.state = TrainState(self.learner, self.optimizer, self.scaler, ranks, self.meter.size)
        if self.start.checkpoint is not None:
            resume.check_identity(self.start.checkpoint, self.identity, config)
            self.state.restore(self.start.checkpoint)
            self.watch.last_saved = f"{self.start.path} (step {self.state.progress.step})"
        self.progress, self.sums = self.state.progress, self.state.sums
        if config.amp == "fp16" and config.momentum:
            fill_momentum(self.optimizer)
        step, mid_epoch = self.progress.step, self.progress.step % self.steps_per_epoch
        self.finished = (self.folder / "summary.json").exists() and step >= self.last_step
        told = step == self.last_step and (not mid_epoch or self.progress.partial)
        if step >= self.last_step and not (self.finished or told):
            raise ConfigError(f"max-steps {config.max_steps}: the run is at step {step} already")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the run has begun with, besides its configuration: data set and teacher's weights.

        Found when rank 0 saves or any rank resumes: it reads every path and every weight.
        """
        teacher = self.teacher and checkpoint.digest(self.teacher)
        return {"data": self.dataset.identity(), "teacher": teacher}

    # --- set-up ---------------------------------------------------------------------------------------

    def _create_models(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.student, self.teacher = build.networks(config, self.dataset, self.ranks)
        self.method = METHODS[config.method](config, self.student, self.teacher, self.dataset.example())
        self.learner = Student(self.student, self.method.trained)
        self.forward: nn.Module = self.learner
        if self.ranks.world > 1:
            self.forward = distributed.data_parallel(self.learner)
        if config.compile:
            build.compile_networks(config, self.forward, self.learner, self.teacher)

    def _new_pass(self) -> None:
        """Let CUDA graphs write over what they gave before: it has been used."""
        if self.config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    # --- training -------------------------------------------------------------------------------------

    def train(self) -> int:
        with ExitStack() as stack:
            problem = None
            if self.ranks.first:
                try:
                    stack.enter_context(run_folder.claimed(self.folder, self.config, self.found))
                except ConfigError as error:
                    problem = str(error)
            if problem := self.ranks.gather(problem)[0]:  # rank 0's, on every rank
                raise ConfigError(problem)
            return self._train()

    def _train(self) -> int:
        config, progress, reporter = self.config, self.progress, self.reporter
        parameters = sum(parameter.numel() for parameter in self.student.parameters())
        reporter.say(
            f"{config.student} ({parameters:,} parameters) on {config.dataset}: {len(self.dataset.train)} "
            f"training and {len(self.dataset.test)} test images of {self.dataset.classes} classes, "
            f"method {config.method}, seed {config.seed}, {self.ranks.world} x {self.ranks.device.type}"
        )
        slow = None
        if config.amp != "none" and not computes(config.amp, config.uses_cuda):
            slow = (
                f"amp {config.amp} is slow here, without instructions for it: none may be ten times as fast"
            )
        left_out = self.dataset.left_out and f"left out of data-dir: {self.dataset.left_out}"
        terms = self.method.describe(min(config.batch_size, len(self.dataset.train)))
        for line in (left_out, self.start.notice, slow, *terms):
            if line:
                reporter.say(line)
        if self.teacher is not None:
            if progress.teacher is None:
                progress.teacher = self.evaluate(self.teacher)
            reporter.say(f"teacher {config.teacher}: {reporting.test_errors(progress.teacher)}")
        if progress.step:
            reporter.say(f"continuing from step {progress.step} of {self.last_step}")
            if self.start.path != self.folder / checkpoint.LATEST:
                self._save(keep_latest=False)
            self._write_metrics()  # a line that the checkpoint does not know of belongs to a lost epoch
        with closing(distributed.StopRequest(self.ranks)) as stop, closing(reporter):
            ended = not progress.step % self.steps_per_epoch or progress.step == self.last_step
            last = progress.lines[-1] if progress.lines and ended else None
            reporter.open(self.folder, self.last_step, progress.step, last)
            while progress.step < self.last_step:
                signal = self._train_epoch(stop)
                if signal and progress.step < self.last_step:
                    reporter.say(
                        f"stopped by signal {signal} at step {progress.step}; resume auto continues here"
                    )
                    return 128 + signal
        if self.ranks.first:
            summary = run_folder.finish(self.folder, config, progress, self.student)
            last, best = (summary[f"{which}_test_error"] for which in ("last", "best"))
            reporter.say(f"test error: last {last:.2f} %, best {best:.2f} %; results in {self.folder}")
        return 0

    def _train_epoch(self, stop: distributed.StopRequest) -> int:
        """Train to the end of the epoch (or `max_steps`) and evaluate; the number of a signal that came."""
        config, progress = self.config, self.progress
        progress.partial = None
        epoch, first = divmod(progress.step, self.steps_per_epoch)
        build.train_mode(self.student, config.freeze_bn)
        begun = time.perf_counter() - progress.seconds
        self.reporter.begin_epoch(epoch + 1, config.epochs)
        signal = 0
        parts = [self._batch(step) for step in range(first, self.steps_per_epoch)]
        shares = [self.ranks.share(part.start, part.stop) for part in parts]
        batches = self.dataset.training_batches(config.seed, epoch, shares)
        for part, (images, labels) in zip(parts, batches, strict=True):
            self._train_step(images, labels, part.stop - part.start)
            progress.step += 1
            self.reporter.step(progress.step, part.stop - part.start, self.watch.loss)
            signal = stop.poll()
            if progress.step % self.steps_per_epoch == 0 or progress.step == self.last_step:
                break
            if signal or (config.checkpoint_every and progress.step % config.checkpoint_every == 0):
                progress.seconds = time.perf_counter() - begun
                self._save()
                if signal:
                    return signal
        self.watch.wait()
        sums = self.ranks.sum_(self.sums.clone()).tolist()
        images = sums[5]
        if not images:
            raise Diverged(f"every step of epoch {epoch + 1} was skipped: no gradient was finite")
        seconds = time.perf_counter() - begun
        self.reporter.begin_test()
        metrics = {
            "epoch": epoch + 1,
            "lr": schedules.learning_rate(config, progress.step - 1, self.steps_per_epoch),
            **self.meter.metrics(sums),
            **self.evaluate(self.forward),
            "images_per_second": images / seconds,
            "seconds": seconds,
        }
        if not all(bool(parameter.isfinite().all()) for parameter in self.student.parameters()):
            raise Diverged(f"the weights are not finite after epoch {epoch + 1}: a lower lr may help")
        if progress.step % self.steps_per_epoch:  # cut short by max-steps: a continuation takes it up again
            progress.partial, progress.seconds = metrics, seconds
        else:
            progress.history.append(metrics)
            progress.seconds = 0.0
            self.sums.zero_()
        self._save()
        self._write_metrics()
        self.reporter.epoch(metrics, config.epochs, progress.step)
        return signal  # one that came with the last step: the epoch is complete, and saved

    def _batch(self, step: int) -> slice:
        """Places in the epoch of the global batch of its `step`-th step."""
        size = self.config.batch_size
        return slice(step * size, min((step + 1) * size, len(self.dataset.train)))

    def _train_step(self, images: Tensor, labels: Tensor, batch: int) -> None:
        """One optimizer step on this rank's share of a global batch.

        Nothing here waits for the device, unless skip-nonfinite has to look at the gradients first.
        """
        config, step = self.config, self.progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = schedules.learning_rate(config, step, self.steps_per_epoch)
        beta = schedules.beta(config, step, self.steps_per_epoch)
        statistics = [b.clone() for b in self.student.buffers()] if config.skip_nonfinite else []
        sums = torch.zeros_like(self.sums)
        self.optimizer.zero_grad(set_to_none=True)
        self._new_pass()
        parts = list(zip(images.chunk(config.accumulate), labels.chunk(config.accumulate), strict=True))
        for i, (some_images, some_labels) in enumerate(parts):
            with self._gradients_stay_here(i + 1 < len(parts)):
                self._backward(self._format(some_images), some_labels, batch, beta, sums)
        trained = self.optimizer.param_groups[0]["params"]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if config.skip_nonfinite and not norm.isfinite():
            self.reporter.say(f"step {step + 1}: skipped, its gradients are not finite")
            for buffer, before in zip(self.student.buffers(), statistics, strict=True):
                buffer.copy_(before)
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums += sums
        self.watch.look(step + 1, sums[:4], norm, len(labels))

    def _backward(self, images: Tensor, labels: Tensor, batch: int, beta: float, sums: Tensor) -> None:
        """Add up the gradients of some images of a global batch, and in `sums` their losses and errors."""
        with self.method.recording(self.method.uses_term(beta)):
            with self._autocast():
                losses, logits = objective(self.method, self.forward, images, labels, beta)
            # DDP averages gradients over ranks: weighted by its share, each gives the global batch's mean.
            share = len(labels) * self.ranks.world / batch
            loss = losses.total if share == 1 else losses.total * share
            self.scaler.scale(loss).backward()
        self.meter.add(sums, losses, logits, labels)

    def _gradients_stay_here(self, stay: bool) -> AbstractContextManager[None]:
        """Where more parts of a batch follow, gradients are not yet sent to the other ranks."""
        if stay and isinstance(self.forward, DistributedDataParallel):
            return self.forward.no_sync()
        return nullcontext()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and errors of `model` (see EvaluationMeter); every test image counts once over all ranks.

        Buffers (BatchNorm's statistics) are those of rank 0; the other ranks get theirs back.
        """
        own = [buffer.clone() for buffer in self.student.buffers()] if self.ranks.world > 1 else []
        self.ranks.broadcast_(list(self.student.buffers()))
        model = model.module if isinstance(model, DistributedDataParallel) else model
        model.eval()
        share = self.ranks.share(0, len(self.dataset.test))
        size, meter = self.config.test_batch_size, EvaluationMeter(self.dataset.classes, self.ranks.device)
        starts = range(share.start, share.stop, size)
        parts = [slice(start, min(start + size, share.stop)) for start in starts]
        with self._autocast(), self.method.recording(False):
            for images, labels in self.dataset.evaluation_batches(parts):
                self._new_pass()
                meter.add(model(self._format(images)), labels)
        for buffer, value in zip(self.student.buffers(), own, strict=False):
            buffer.copy_(value)
        self._check_unreadable()
        seen, *sums = self.ranks.sum_(meter.sums).tolist()
        if not seen:
            raise ConfigError("no image of the test set can be read")
        return meter.metrics(seen, *sums)

    def _check_unreadable(self) -> None:
        """ConfigError on every rank where all together could not read more images than may be."""
        paths = {path for paths in self.ranks.gather(self.dataset.unreadable) for path in paths}
        if len(paths) > self.config.max_unreadable:
            raise ConfigError(too_many(paths, self.config.max_unreadable))

    def _autocast(self) -> torch.autocast:
        dtype = AMP_DTYPES.get(self.config.amp)
        return torch.autocast(self.ranks.device.type, dtype, enabled=dtype is not None)

    def _format(self, images: Tensor) -> Tensor:
        return images if self.config.channels_last else images.contiguous()

    # --- what is written ------------------------------------------------------------------------------

    def _save(self, *, keep_latest: bool = True) -> None:
        """Write checkpoint.pt."""
        if (state := self.state.collect()) is not None:
            config = self.config.model_dump(mode="json", by_alias=True)
            content = {"config": config, **self.identity, **state}
            checkpoint.save_latest(self.folder, content, keep_latest=keep_latest)
        self.watch.last_saved = f"{self.folder / checkpoint.LATEST} (step {self.progress.step})"

    def _write_metrics(self) -> None:
        if self.ranks.first:
            run_folder.write_metrics(self.folder, self.progress.lines)
