"""The closed tables: an entry reaches the command line, its help and the checks, and is what is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import dashed, flags, metrics, run
from torch import Tensor

import at_fused
from at_fused import reference
from at_fused.backends import BackendError, cpu, cuda, triton
from at_fused.reference import DISTANCES, MAPPINGS, NORMS, RESIZES, Mapping
from at_fused.visualize import arguments, pictures
from trainer.command_line import parse_args
from trainer.config import Config, ConfigError, make_config
from trainer.data import DATASETS
from trainer.data.in_memory import InMemory, Split, Splits

AT = {"dataset": "digits", "student": "a", "teacher": "b", "teacher-checkpoint": "t", "method": "at"}


def parsed(**keys: object) -> Config:
    return parse_args(flags(AT | dashed(keys)))[0]


def help_of(key: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The text of a flag, unwrapped."""
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out.partition(f"  --{key} ")[2].partition("\n  --")[0]
    return " ".join(text.split())


def check_key(key: str, table: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """`key` takes what is in `table`, which has an entry "mine", and nothing else."""
    assert f"({', '.join(table)}" in help_of(key, capsys)
    for name in table:
        assert getattr(parsed(**{key: name}), key) == name
    with pytest.raises(ConfigError, match=rf"^{key}: input should be .*'mine'.* \(got 'yours'\)$"):
        parsed(**{key: "yours"})


def features() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(2, 5, 4, 4, generator=draw, dtype=torch.float64)


def compiled(function, *args: object):  # type: ignore[no-untyped-def]
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*args)


def test_a_distance(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def largest(difference: Tensor, norm_order: float) -> Tensor:
        return difference.abs().max() * norm_order

    monkeypatch.setitem(DISTANCES, "mine", largest)
    check_key("distance", DISTANCES, capsys)
    student, teacher = features()
    maps = [at_fused.attention_map(feature, normalize="l2") for feature in (student, teacher)]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return at_fused.attention_loss(student, teacher, distance="mine", norm_order=3)

    for found in (loss(student, teacher), compiled(loss, student, teacher)):
        torch.testing.assert_close(found, 3 * (maps[0] - maps[1]).abs().max())
    with pytest.raises(ValueError, match=r"distance must be one of \('mse', 'norm', 'mine'\), got 'yours'"):
        at_fused.attention_loss(student, teacher, distance="yours")


def test_a_mapping(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What no kernel knows is refused by them, and computed by the reference."""

    def mean(feat: Tensor, p: float) -> Tensor:
        return feat.abs().pow(p).mean(1)

    monkeypatch.setitem(MAPPINGS, "mine", Mapping(mean, lambda grad, feat: grad / feat.shape[1]))
    check_key("mapping", MAPPINGS, capsys)
    parser = arguments.parse(
        ["--model", "m", "--images", "i", "--out", "o.png", "--checkpoint", "random", "--mapping", "mine"]
    )
    assert parser.mapping == "mine"
    student, _ = features()
    expected = student.square().mean(1)
    found = at_fused.attention_map(student, mapping="mine")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        compiled(lambda x: at_fused.attention_map(x, mapping="mine"), student), expected
    )
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    slopes = torch.ones_like(expected)
    torch.testing.assert_close(reference.attention_map_backward(student, slopes, 2, "mine"), gradient)
    for backend in (cpu, cuda, triton):
        assert "not mapping 'mine'" in str(backend.unsupported([student], 2.0, "mine"))
    if "cpu" in at_fused.available_backends():
        with pytest.raises(BackendError, match="not mapping 'mine'"):
            at_fused.attention_map(student, mapping="mine", backend="cpu")


def test_a_norm_and_a_resize(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(NORMS, "mine", 3)
    monkeypatch.setitem(RESIZES, "mine", lambda maps, size: maps[..., : size[0], : size[1]])
    check_key("normalize", NORMS, capsys)
    student, teacher = features()
    found = at_fused.attention_map(student, normalize="mine")
    norms = torch.linalg.vector_norm(student.square().sum(1).flatten(1), 3, dim=1)
    torch.testing.assert_close(found, student.square().sum(1) / norms[:, None, None])
    small = student[..., :2, :3]
    found = at_fused.attention_loss(small, teacher, resize="mine")
    torch.testing.assert_close(found, at_fused.attention_loss(small, teacher[..., :2, :3]))


def test_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is trained on, drawn with its own names, and asked for no folder where it needs none."""

    def read(root: Path | None) -> Splits:
        images = torch.arange(64 * 8 * 8 * 3).remainder(251).to(torch.uint8).view(64, 8, 8, 3)
        split = Split(images, torch.arange(64) % 3)
        return Splits(split, split, ["ant", "bee", "cat"])

    mine = InMemory(read, (10.0, 20.0, 30.0), (2.0, 4.0, 5.0), pad=1, flip=False, needs_folder=False)
    monkeypatch.setitem(DATASETS, "mine", mine)
    assert f"({', '.join(DATASETS)}); default cifar10" in help_of("dataset", capsys)
    assert "(not needed: digits, mine)" in help_of("data-dir", capsys)
    with pytest.raises(ConfigError, match=r"^dataset: input should be .* or 'mine' \(got 'yours'\)$"):
        make_config({"student": "a", "dataset": "yours"})
    with pytest.raises(ConfigError, match="dataset cub needs data-dir"):
        make_config({"student": "a", "dataset": "cub"})
    keys = {"dataset": "mine", "limit_train": 60, "limit_test": 40, "epochs": 1, "student": "wrn-10-1"}
    assert run(tmp_path / "run", **keys) == 0
    assert "60 training and 40 test images of 3 classes" in capsys.readouterr().out
    assert metrics(tmp_path / "run")[0]["train_loss"] > 0
    seen = pictures.read_dataset("mine", None, [0, 4], 8)
    assert (seen.labels, seen.classes) == (["ant", "bee"], ["ant", "bee", "cat"])
    torch.testing.assert_close(seen.shown(8)[0, :, 0, 0], torch.tensor([0.0, 1.0, 2.0]) / 255)
