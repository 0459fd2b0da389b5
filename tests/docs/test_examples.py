"""Every example on tiny random inputs: the attention term falls, and only the student learns."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from models import torchvision_compat  # noqa: F401  (before whatever imports torchvision)

EXAMPLES = ROOT / "examples"
NEEDS = {
    "plain_loop": "sklearn",
    "offline_teacher": "sklearn",
    "torchvision_pair": "torchvision",
    "timm_pair": "timm",
    "vit_tokens": "timm",
    "lightning_module": "lightning",
    "huggingface_trainer": "transformers",
}
ON_DIGITS = ("plain_loop", "offline_teacher")
STEPS = 12


def example(name: str) -> ModuleType:
    pytest.importorskip(NEEDS[name])
    return importlib.import_module(f"examples.{name}")


def one_batch(*shape: int) -> TensorDataset:
    """`shape` (B, C, H, W), again and again, so that a loss has to fall."""
    images, labels = torch.randn(shape), torch.randint(10, shape[:1])
    return TensorDataset(images.repeat(STEPS, 1, 1, 1), labels.repeat(STEPS))


def networks(name: str) -> tuple[nn.Module, nn.Module, TensorDataset]:
    """A student and a teacher as the example pairs them, but small, and what to train them on."""
    if name in ON_DIGITS:
        network = example(name).network
        return network(4), network(6), one_batch(8, 1, 8, 8)
    if name in ("torchvision_pair", "lightning_module"):
        from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

        student, teacher = (ResNet(block, [1, 1, 1, 1], num_classes=10) for block in (BasicBlock, Bottleneck))
        return student, teacher, one_batch(4, 3, 64, 64)
    if name == "huggingface_trainer":
        from transformers import ResNetConfig, ResNetForImageClassification

        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
        configs = [ResNetConfig(**sizes, num_labels=10, layer_type=kind) for kind in ("basic", "bottleneck")]
        student, teacher = map(ResNetForImageClassification, configs)
        return student, teacher, one_batch(4, 3, 64, 64)
    import timm

    if name == "timm_pair":
        names = ["mobilenetv3_small_050", "resnet18"]
        student, teacher = (timm.create_model(name, num_classes=10) for name in names)
        return student, teacher, one_batch(4, 3, 64, 64)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 4, "num_heads": 2, "num_classes": 10}
    student, teacher = (
        timm.create_model("deit_tiny_patch16_224", **sizes, embed_dim=dim) for dim in (16, 24)
    )
    return student, teacher, one_batch(4, 3, 32, 32)


def distill(
    name: str, student: nn.Module, teacher: nn.Module, data: TensorDataset, folder: Path
) -> list[float]:
    """Runs the example's own training on `data`; the attention term of every step."""
    module = example(name)
    batch = len(data) // STEPS
    if name == "lightning_module":
        return distill_lightning(module, student, teacher, DataLoader(data, batch))
    if name == "huggingface_trainer":
        return distill_huggingface(module, student, teacher, data, batch, folder)
    return module.distill(student, teacher, DataLoader(data, batch), epochs=1)


def distill_lightning(module: Any, student: nn.Module, teacher: nn.Module, loader: DataLoader) -> list[float]:
    history = []

    class Recorder(module.lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            history.append(trainer.callback_metrics["attention"].item())

    trainer = module.lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[Recorder()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module.Distillation(student, teacher, ["layer3", "layer4"]), loader)
    return history


def distill_huggingface(
    module: Any, student: nn.Module, teacher: nn.Module, data: TensorDataset, batch: int, folder: Path
) -> list[float]:
    options = module.TrainingArguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        use_cpu=True,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = module.DistillationTrainer(student, options, module.collate, data, teacher=teacher)
    history: list[float] = []
    trainer.attention.register_forward_hook(lambda m, args, out: history.append(out.item()))
    trainer.train()
    return history


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_the_student_learns_the_teachers_attention(name: str, tmp_path: Path) -> None:
    student, teacher, data = networks(name)
    before = state(student), state(teacher)
    history = distill(name, student, teacher, data, tmp_path)
    assert len(history) == STEPS
    assert sum(history[-3:]) < 0.8 * sum(history[:3]), history
    # BatchNorm's statistics included: nothing of the teacher has moved, and everything that trains has.
    assert all(
        torch.equal(old, new)
        for old, new in zip(before[1].values(), teacher.state_dict().values(), strict=True)
    )
    assert all(parameter.grad is None for parameter in teacher.parameters())
    still = [key for key, value in student.named_parameters() if torch.equal(value, before[0][key])]
    assert not still


def test_vit_compares_patch_by_patch() -> None:
    student, teacher, data = networks("vit_tokens")
    images = data.tensors[0][: len(data) // STEPS]
    unit = []
    for model in (student, teacher):
        tokens = model.get_intermediate_layers(images, n=[1, 3])  # timm's own: without the class token
        unit.append([F.normalize(x.square().mean(2)) for x in tokens])
    expected = 1000 * sum((s - t).square().mean() for s, t in zip(*unit, strict=True))
    first = distill("vit_tokens", student, teacher, data, Path())[0]
    torch.testing.assert_close(torch.tensor(first), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_runs_as_its_text_says(name: str, tmp_path: Path) -> None:
    """In a process of its own, as a user starts it: nothing that these tests have imported helps it."""
    pytest.importorskip(NEEDS[name])
    command = f"python examples/{name}.py" + ("" if name in ON_DIGITS else " --tiny")
    assert command in (EXAMPLES / f"{name}.py").read_text().split('"""')[1]
    (tmp_path / "examples").symlink_to(EXAMPLES)  # whatever it writes goes to the current folder
    words = [sys.executable, *command.split()[1:], *(["--epochs", "1"] if name in ON_DIGITS else [])]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_example_is_tested_and_short() -> None:
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert set(files) == {*NEEDS, "__init__"}
    for name in NEEDS:
        assert len(files[name].read_text().splitlines()) < 80, name
