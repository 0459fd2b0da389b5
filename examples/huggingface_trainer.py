"""Attention transfer with the Hugging Face Trainer: a ResNet-18 learns from a pretrained ResNet-50.

Hugging Face models return their stages' features themselves, so no taps are needed.

python examples/huggingface_trainer.py --data imagenet/train     (one folder of images per class)
python examples/huggingface_trainer.py --tiny                    (random weights and images: a trial run)
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet50_Weights
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, Trainer, TrainingArguments

import at_fused


class DistillationTrainer(Trainer):
    def __init__(self, *args: Any, teacher: nn.Module, beta: float = 1000, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.attention = at_fused.AttentionLoss(p=2, beta=beta)
        self.model_accepts_loss_kwargs = False  # the loss is the batch's mean: average accumulated gradients

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        outputs = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            example = self.teacher(inputs["pixel_values"], output_hidden_states=True)
        transfer = self.attention(outputs.hidden_states[-2:], example.hidden_states[-2:])
        loss = outputs.loss + transfer
        return (loss, outputs) if return_outputs else loss


def collate(samples: list) -> dict[str, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.as_tensor(labels)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="imagenet/train")
    parser.add_argument("--output", default="runs/huggingface")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    data: Dataset
    if arguments.tiny:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
        teacher = AutoModelForImageClassification.from_config(config)
        data = TensorDataset(torch.randn(8, 3, 64, 64), torch.randint(2, (8,)))
    else:
        config = AutoConfig.from_pretrained("microsoft/resnet-18")
        teacher = AutoModelForImageClassification.from_pretrained("microsoft/resnet-50")
        data = ImageFolder(arguments.data, ResNet50_Weights.DEFAULT.transforms())
    student = AutoModelForImageClassification.from_config(config)
    options = TrainingArguments(
        arguments.output,
        max_steps=2 if arguments.tiny else -1,
        per_device_train_batch_size=4 if arguments.tiny else 256,
        learning_rate=1e-3,
        remove_unused_columns=False,
        report_to="none",
    )
    DistillationTrainer(student, options, collate, data, teacher=teacher).train()


if __name__ == "__main__":
    main()
