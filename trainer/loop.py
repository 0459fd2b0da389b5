"""The training loop, from the top down: epochs, steps, evaluation."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer import build, distributed, evaluation, reporting, results, run_folder, schedules
from trainer.hardware import computes
from trainer.methods import Taught
from trainer.objectives import objective
from trainer.teacher_cache.layout import parts_of
from trainer.torch_settings import autocast, in_layout, new_pass
from trainer.watch import Diverged

if TYPE_CHECKING:
    from trainer.run import Run


def train(run: Run) -> int:
    """Train to the run's last step and write its results; returns the process's exit code."""
    config, progress, reporter = run.config, run.progress, run.reporter
    _introduce(run)
    if run.cache is not None:
        reporter.say(run.cache.open())
    if progress.step:
        reporter.say(f"continuing from step {progress.step} of {run.last_step}")
        if run.start.path != run.folder / run_folder.CHECKPOINT:
            run.save(keep_latest=False)
        run.write_metrics()  # a line that the checkpoint does not know of belongs to a lost epoch
    with closing(distributed.StopRequest(run.ranks)) as stop, closing(reporter):
        ended = not progress.step % run.steps_per_epoch or progress.step == run.last_step
        last = progress.lines[-1] if progress.lines and ended else None
        reporter.open(run.folder, run.last_step, progress.step, last)
        while progress.step < run.last_step:
            signal = train_epoch(run, stop)
            if signal and progress.step < run.last_step:
                reporter.say(
                    f"stopped by signal {signal} at step {progress.step}; resume auto continues here"
                )
                return 128 + signal
    if run.ranks.first:
        average = None if run.ema is None else run.ema.module
        summary = results.finish(run.folder, config, progress, run.student, average)
        of_average = f"; of the moving average: {reporting.last_and_best(summary, 'ema_')}" if average else ""
        reporter.say(f"test error: {reporting.last_and_best(summary)}{of_average}; results in {run.folder}")
    return 0


def _introduce(run: Run) -> None:
    """Report what is trained on what, and how."""
    config, dataset = run.config, run.dataset
    parameters = sum(parameter.numel() for parameter in run.student.parameters())
    run.reporter.say(
        f"{config.student} ({parameters:,} parameters) on {config.dataset}: {len(dataset.train)} "
        f"training and {len(dataset.test)} test images of {dataset.classes} classes, "
        f"method {config.method}, seed {config.seed}, {run.ranks.world} x {run.ranks.device.type}"
    )
    slow = None
    if config.amp != "none" and not computes(config.amp, config.uses_cuda):
        slow = f"amp {config.amp} is slow here, without instructions for it: none may be ten times as fast"
    left_out = dataset.left_out and f"left out of data-dir: {dataset.left_out}"
    terms = run.method.describe(min(config.batch_size, len(dataset.train)))
    for line in (left_out, run.start.notice, slow, *run.notes, *terms):
        if line:
            run.reporter.say(line)


def train_epoch(run: Run, stop: distributed.StopRequest) -> int:
    """Train to the end of the epoch (or `max_steps`), evaluate and save; the number of a signal that came."""
    config, progress = run.config, run.progress
    progress.partial = None
    epoch = progress.step // run.steps_per_epoch
    begun = time.perf_counter() - progress.seconds
    if signal := ready_cache(run, stop):
        return signal
    signal = train_steps(run, stop, begun)
    if progress.step % run.steps_per_epoch and progress.step < run.last_step:
        return signal
    run.watch.wait()
    sums = run.ranks.sum_(run.sums.clone()).tolist()
    images = sums[5]
    if not images:
        raise Diverged(f"every step of epoch {epoch + 1} was skipped: no gradient was finite")
    seconds = time.perf_counter() - begun
    run.reporter.begin_test()
    metrics = {
        "epoch": epoch + 1,
        "lr": schedules.learning_rate(config, progress.step - 1, run.steps_per_epoch),
        **run.meter.metrics(sums),
        **evaluate(run, run.forward),
        **_of_average(run),
        "images_per_second": images / seconds,
        "seconds": seconds,
    }
    if not all(bool(parameter.isfinite().all()) for parameter in run.student.parameters()):
        raise Diverged(f"the weights are not finite after epoch {epoch + 1}: a lower lr may help")
    if progress.step % run.steps_per_epoch:  # cut short by max-steps: a continuation takes it up again
        progress.partial, progress.seconds = metrics, seconds
    else:
        progress.history.append(metrics)
        progress.seconds = 0.0
        run.sums.zero_()
    if run.teacher is not None and progress.teacher is None:
        progress.teacher = evaluate(run, run.teacher.network)
        run.reporter.say(f"teacher {config.teacher}: {reporting.test_errors(progress.teacher)}")
    run.save()
    run.write_metrics()
    run.reporter.epoch(metrics, config.epochs, progress.step)
    return signal  # one that came with the last step: the epoch is complete, and saved


def _of_average(run: Run) -> dict[str, float]:
    """The test errors of the student's moving average, if the run keeps one."""
    if run.ema is None:
        return {}
    return {f"ema_{name}": value for name, value in evaluate(run, run.ema.module).items()}


def train_steps(run: Run, stop: distributed.StopRequest, begun: float) -> int:
    """Train to the end of the epoch, the last step or a signal, whose number it returns; else 0.

    `begun` is when the epoch has begun by `time.perf_counter`, without the time between two attempts at it.
    """
    config, progress = run.config, run.progress
    epoch, first = divmod(progress.step, run.steps_per_epoch)
    build.train_mode(run.student, config.freeze_bn)
    run.reporter.begin_epoch(epoch + 1, config.epochs)
    parts = [_batch_places(run, step) for step in range(first, run.steps_per_epoch)]
    places = [run.mixing.places(part) for part in parts]
    batches = run.dataset.training_batches(config.seed, epoch, places, config.augment_cycle)
    signal = 0
    for step, (part, (images, labels)) in enumerate(zip(parts, batches, strict=True), first):
        images, targets = run.mixing(images, labels, epoch, step)
        taught = run.cache.taught(part, images) if run.cache is not None else None
        train_step(run, images, targets, part.stop - part.start, taught)
        progress.step += 1
        run.reporter.step(progress.step, part.stop - part.start, run.watch.loss)
        signal = stop.poll()
        if progress.step % run.steps_per_epoch == 0 or progress.step == run.last_step:
            break
        if signal or (config.checkpoint_every and progress.step % config.checkpoint_every == 0):
            progress.seconds = time.perf_counter() - begun
            run.save()
            if signal:
                break
    return signal


def ready_cache(run: Run, stop: distributed.StopRequest) -> int:
    """Ready the teacher's cache, if there is one, for the epoch; returns the number of a signal, else 0."""
    if run.cache is None:
        return 0
    every = [_batch_places(run, step) for step in range(run.steps_per_epoch)]
    epoch = run.progress.step // run.steps_per_epoch
    return run.cache.begin_epoch(epoch, every, stop.poll, run.reporter.say)


def _batch_places(run: Run, step: int) -> slice:
    """Places in the epoch of the global batch of its `step`-th step."""
    size = run.config.batch_size
    return slice(step * size, min((step + 1) * size, len(run.dataset.train)))


def train_step(run: Run, images: Tensor, targets: Tensor, batch: int, taught: Taught | None = None) -> None:
    """One optimizer step on this rank's share of a global batch of so many images.

    `targets`: labels (n,) int64 or probabilities (n, classes). `taught` serves in place of the teacher.

    Nothing here waits for the device, unless skip-nonfinite has to look at the gradients first.
    """
    config, step = run.config, run.progress.step
    for group in run.optimizer.param_groups:
        group["lr"] = schedules.learning_rate(config, step, run.steps_per_epoch)
    beta = schedules.beta(config, step, run.steps_per_epoch)
    statistics = [b.clone() for b in run.student.buffers()] if config.skip_nonfinite else []
    sums = torch.zeros_like(run.sums)
    run.optimizer.zero_grad(set_to_none=True)
    new_pass(config)
    count = config.accumulate
    known = parts_of(taught, count) if taught is not None else [None] * count
    parts = list(zip(images.chunk(count), targets.chunk(count), known, strict=False))
    for i, (some_images, some_targets, some_taught) in enumerate(parts):
        with _gradients_stay_here(run, i + 1 < len(parts)):
            backward(run, in_layout(config, some_images), some_targets, some_taught, batch, beta, sums)
    if config.clip_grad_norm is not None:
        run.scaler.unscale_(run.optimizer)  # the norm is that of the gradients, not of fp16's scaled ones
    trained = run.optimizer.param_groups[0]["params"]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if config.skip_nonfinite and not norm.isfinite():
        run.reporter.say(f"step {step + 1}: skipped, its gradients are not finite")
        for buffer, before in zip(run.student.buffers(), statistics, strict=True):
            buffer.copy_(before)
        return
    if config.clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, config.clip_grad_norm, norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.ema is not None:
        run.ema.update_parameters(run.student)
    run.sums += sums
    run.watch.look(step + 1, sums[:4], norm, len(targets))


def backward(
    run: Run, images: Tensor, targets: Tensor, taught: Taught | None, batch: int, beta: float, sums: Tensor
) -> None:
    """Add up the gradients of some images of a global batch, and in `sums` their losses and errors."""
    with run.method.recording(run.method.uses_term(beta)):
        with autocast(run.config, run.ranks.device):
            losses, logits = objective(run.method, run.forward, images, targets, beta, taught)
        # DDP averages gradients over ranks: weighted by its share, each gives the global batch's mean.
        share = len(targets) * run.ranks.world / batch
        loss = losses.total if share == 1 else losses.total * share
        run.scaler.scale(loss).backward()
    run.meter.add(sums, losses, logits, targets)


def _gradients_stay_here(run: Run, stay: bool) -> AbstractContextManager[None]:
    """Where more parts of a batch follow, gradients are not yet sent to the other ranks."""
    if stay and isinstance(run.forward, DistributedDataParallel):
        return run.forward.no_sync()
    return nullcontext()


def evaluate(run: Run, model: nn.Module) -> dict[str, float]:
    """`evaluation.evaluate` of a network of the run, of whose passes the method takes no note."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    with run.method.recording(False):
        return evaluation.evaluate(model, run.dataset, run.config, run.ranks)
