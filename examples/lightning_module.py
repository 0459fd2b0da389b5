"""Attention transfer in Lightning: a module that holds student and teacher and trains the student.

python examples/lightning_module.py --data imagenet/train     (one folder of images per class)
python examples/lightning_module.py --tiny                    (random weights and images: a trial run)
"""

import argparse
from collections.abc import Sequence

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import models
from torchvision.datasets import ImageFolder

import at_fused


class Distillation(lightning.LightningModule):
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        names: Sequence[str],
        beta: float = 1000,
        lr: float = 0.1,
    ) -> None:
        super().__init__()
        self.student, self.lr = student, lr
        self.teacher = teacher.eval().requires_grad_(False)  # Lightning keeps the mode it finds a module in
        self.transfer = at_fused.AttentionTransfer(student, teacher, names, beta=beta)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            self.teacher(images)
        cross_entropy = F.cross_entropy(self.student(images), labels)
        attention = self.transfer()
        self.log_dict({"cross_entropy": cross_entropy, "attention": attention}, prog_bar=True)
        return cross_entropy + attention

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="imagenet/train")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    weights = models.ResNet34_Weights.DEFAULT
    data: Dataset
    if arguments.tiny:
        data = TensorDataset(torch.randn(8, 3, 64, 64), torch.randint(1000, (8,)))
    else:
        data = ImageFolder(arguments.data, weights.transforms())
    loader = DataLoader(data, batch_size=4 if arguments.tiny else 256, shuffle=True, drop_last=True)
    teacher = models.resnet34(weights=None if arguments.tiny else weights)
    module = Distillation(models.resnet18(), teacher, ["layer3", "layer4"])
    lightning.Trainer(max_epochs=arguments.epochs, fast_dev_run=arguments.tiny).fit(module, loader)


if __name__ == "__main__":
    main()
