"""The networks of a run: student and teacher, with their weights and taps, and what they cannot do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import models
from trainer import creation
from trainer.config import Config, flag_text
from trainer.creation import check_images
from trainer.data import LabelledImages
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.methods import METHODS
from trainer.optimizers import OPTIMIZERS
from trainer.student import Student
from trainer.teacher import Teacher

BatchNorm = nn.modules.batchnorm._BatchNorm


class Networks(NamedTuple):
    """Both on the run's device; the teacher where the method has one."""

    student: nn.Module
    teacher: Teacher | None
    notes: list[str]  # to tell of their weights


def networks(config: Config, dataset: LabelledImages, ranks: Ranks) -> Networks:
    """The networks that `config` names, for the images of `dataset`.

    Raises:
        ConfigError: there is no such model, weights do not fit, or a network can't take such images, or the
            student can't be trained on them.
    """
    student, notes = _student(config, dataset, ranks.device)
    student = student.to(ranks.device)
    teacher: Teacher | None = None
    if METHODS[config.method].needs_teacher:
        network, more = creation.create("teacher", config, dataset)
        notes = notes + more
        teacher = Teacher(network, ranks.device)
        check_images("teacher", teacher.network, config, dataset)
    lone = _normalises_single_values(student, config, dataset) and not config.freeze_bn
    if lone and fewest_images(config, len(dataset.train), ranks.world) == 1:
        raise ConfigError(
            f"student {config.student} normalises single values of these images, and can't train on one "
            f"image alone, as a part of a batch is ({len(dataset.train)} images by {config.batch_size}, "
            f"{ranks.world} ranks, accumulate {config.accumulate}): choose another batch-size"
        )
    return Networks(student, teacher, notes)


def optimizer(config: Config, student: Student) -> torch.optim.Optimizer:
    """That of `config`, on what trains of the student and beside it."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return OPTIMIZERS[config.optimizer].make(trained, config)


def moving_average(student: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `student`, BatchNorm's statistics included.

    Made of one without hooks, which would be copied, too.
    """
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.requires_grad_(False)


def compile_networks(config: Config, forward: nn.Module, student: Student, teacher: Teacher | None) -> None:
    """Let torch.compile make kernels of them; `forward` is the student, as DDP wraps it."""
    # Static shapes: a kernel for each size of a batch is faster than one for all. Parts of batches, last
    # batches and tests make many sizes: beyond 8, its default, the compiler would give up.
    torch._dynamo.config.recompile_limit = 64
    options = {"triton.cudagraphs": config.cuda_graphs}
    for module in (forward, *student.beside.values()):
        module.compile(dynamic=False, options=options)
    if teacher is not None:
        teacher.compile(dynamic=False, options=options)


def train_mode(model: nn.Module, freeze_bn: bool) -> None:
    """`model.train()`, which leaves BatchNorm in eval mode where that is frozen."""
    model.train()
    if freeze_bn:
        for norm in _batch_norms(model):
            norm.eval()


def _student(config: Config, dataset: LabelledImages, device: torch.device) -> creation.Network:
    student, notes = creation.create("student", config, dataset)
    if config.sync_bn:
        if device.type != "cuda":
            raise ConfigError(f"sync-bn true needs CUDA devices, and this run is on {device.type}")
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    for word in config.freeze:
        for name in models.named_taps(student).get(word, [word]):
            try:
                student.get_submodule(name).requires_grad_(False)
            except AttributeError:
                raise ConfigError(f"freeze {name}: {config.student} has no such module") from None
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError(
            f"freeze {flag_text(config.freeze)} leaves no parameter of {config.student} to train"
        )
    return creation.Network(student, notes)


def fewest_images(config: Config, size: int, world: int) -> int:
    """The least number of images that BatchNorm sees together in an epoch of `size` images."""
    whole = config.max_steps is None or config.max_steps >= -(-size // config.batch_size)
    batches = {min(config.batch_size, size), size % config.batch_size if whole else 0} - {0}
    shares = {batch // world for batch in batches} | {-(-batch // world) for batch in batches}
    parts = (part for share in shares for part in torch.empty(share).chunk(config.accumulate))
    return min(map(len, parts)) * (world if config.sync_bn else 1)


def _normalises_single_values(student: nn.Module, config: Config, dataset: LabelledImages) -> bool:
    """Try the student on an image; whether some BatchNorm can't take a lone one in training."""
    lone: list[bool] = []  # of each BatchNorm: whether it sees one value per channel
    hooks = [
        norm.register_forward_pre_hook(lambda _, args: lone.extend(x.numel() == x.shape[1] for x in args))
        for norm in _batch_norms(student)
    ]
    try:
        check_images("student", student, config, dataset)
    finally:
        for hook in hooks:
            hook.remove()
    return any(lone)


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]
