"""The test error and the export of a trained student; no file of a run is written."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer import build, checkpoint, data, distributed
from trainer.checkpoint import write_atomically
from trainer.config import Config
from trainer.data import LabelledImages
from trainer.data.workers import deaths_named
from trainer.distributed import Ranks
from trainer.errors import ConfigError, checkpoint_of
from trainer.evaluation import evaluate
from trainer.reporting import Reporter, test_errors
from trainer.torch_settings import default_dtype, in_layout, set_up_torch


def test(config: Config, weights: Path) -> int:
    """Print the test error of the student with `weights`, in a line; returns the process's exit code."""
    with deaths_named(config.workers), distributed.ranks(config) as ranks, default_dtype(config):
        set_up_torch(config, ranks)
        dataset = data.load(config, ranks.device)
        student = _student(config, weights, dataset, ranks)
        try:
            figures = evaluate(student, dataset, config, ranks)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"{ranks.device} is out of memory with {config.test_batch_size} images at a time: a lower "
                "test-batch-size gives the same figures"
            ) from None
        Reporter(ranks.first).say(
            f"{config.student} of {weights}: {test_errors(figures)}, test loss {figures['test_loss']:.4f}, "
            f"{len(dataset.test)} test images of {config.dataset}"
        )
    return 0


def export(config: Config, weights: Path, path: Path) -> int:
    """Write the student with `weights` to `path`, for any number of images; returns the process's exit code.

    A .pt2 is `torch.export`'s program, an .onnx torch's ONNX exporter's. Both take images as the training has
    them, normalised.

    Raises:
        ConfigError: `path` is there already, or has another suffix; or onnx is not installed.
    """
    if path.suffix not in WRITERS:
        raise ConfigError(f"export {path}: the file's name must end with {' or '.join(WRITERS)}")
    if path.exists():
        raise ConfigError(f"export {path}: there is such a file already")
    if not path.parent.is_dir():
        raise ConfigError(f"export {path}: there is no folder {path.parent}")
    ranks = Ranks(0, 1, torch.device("cpu"))
    with default_dtype(config):
        dataset = data.load(config, ranks.device)
        student = _student(config, weights, dataset, ranks).eval()
        images = in_layout(config, dataset.example().repeat(2, 1, 1, 1))  # one alone would be taken for fixed
        try:
            with _quiet():
                content = WRITERS[path.suffix](student, images)
        except ConfigError:
            raise
        except Exception as error:  # torch's exporters raise kinds of their own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"export {path}: torch cannot export {config.student}: {reason}") from None
    write_atomically(path, content)
    size = ", ".join(map(str, images.shape[1:]))
    mean, std = ([round(value, 2) for value in of.tolist()] for of in (dataset.mean, dataset.std))
    Reporter(True).say(
        f"{config.student} of {weights} exported to {path}; it takes images (B, {size}) "
        f"whose pixels, 0 to 255, are normalised by mean {mean} and deviation {std}"
    )
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what torch prints and logs while it traces; its error says what matters to the user."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _student(config: Config, weights: Path, dataset: LabelledImages, ranks: Ranks) -> nn.Module:
    student = build.networks(config, dataset, ranks).student
    with checkpoint_of("weights"):
        checkpoint.load_weights(student, weights, config.student)
    return student


def _pt2(model: nn.Module, images: Tensor) -> bytes:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _onnx(model: nn.Module, images: Tensor) -> bytes:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"export to .onnx: {error.name} is missing (pip install onnx onnxscript)") from None
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    if program is None:
        raise ConfigError("export to .onnx: torch's exporter gave no program")
    return bytes(program.model_proto.SerializeToString())


WRITERS = {".pt2": _pt2, ".onnx": _onnx}
