"""The sums of an epoch and of a test, against counts in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from trainer.config import make_config
from trainer.meter import EvaluationMeter, Meter
from trainer.objectives import Losses

AT = {"dataset": "digits", "student": "a", "teacher": "b", "teacher-checkpoint": "t", "method": "at"}
CPU = torch.device("cpu")


def batches(classes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of unequal size: means of means would be wrong."""
    return [(torch.randn(n, classes), torch.randint(classes, (n,))) for n in (70, 40)]


def errors(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """In percent: the label isn't the best, and isn't among the best five."""
    better = (logits > logits[range(len(labels)), labels][:, None]).sum(1)
    return 100 * int((better >= 1).sum()) / len(labels), 100 * int((better >= 5).sum()) / len(labels)


@pytest.mark.parametrize("classes", [10, 11])
def test_metrics_of_an_epoch(classes: int) -> None:
    meter = Meter(make_config(AT), classes, ["low", "high"])
    sums = torch.zeros(meter.size, dtype=torch.float64)
    given, terms = batches(classes), torch.rand(2, 5)
    for (logits, labels), values in zip(given, terms, strict=True):
        total, ce, at, *taps = values
        meter.add(sums, Losses(total, ce, at, torch.tensor(0.0), torch.stack(taps)), logits, labels)
    found = meter.metrics(sums.tolist())
    error, error5 = errors(*(np.concatenate(parts) for parts in zip(*given, strict=True)))
    keys = ["train_loss", "ce_loss", "at_loss", "at_loss/low", "at_loss/high"]
    means = (70 * terms[0].double() + 40 * terms[1].double()) / 110
    expected = dict(zip(keys, means.tolist(), strict=True)) | {"train_error": error}
    if classes > 10:
        expected["train_top5_error"] = error5
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("classes", [10, 11])
def test_metrics_of_a_test(classes: int) -> None:
    meter, given = EvaluationMeter(classes, CPU), batches(classes)
    for logits, labels in given:
        meter.add(logits, labels)
    found = meter.metrics(*meter.sums.tolist())
    logits, labels = (np.concatenate(parts) for parts in zip(*given, strict=True))
    error, error5 = errors(logits, labels)
    loss = -float(log_softmax(logits.astype(float), axis=1)[range(110), labels].mean())
    assert found.pop("test_loss") == pytest.approx(loss, rel=1e-6)
    assert found == {"test_error": error} | ({"test_top5_error": error5} if classes > 10 else {})


def test_half_precision_logits_count_in_fp32() -> None:
    """In fp16 the cross-entropy of such logits would have three digits."""
    meter = EvaluationMeter(3, CPU)
    logits = torch.tensor([[8.0, 0.0, 0.25]], dtype=torch.float16)
    meter.add(logits, torch.tensor([0]))
    assert meter.sums[1].item() == pytest.approx(
        -log_softmax(logits.double().numpy(), axis=1)[0, 0], rel=1e-4
    )
