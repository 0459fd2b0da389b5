"""The closed tables: an entry reaches the command line, its help and the checks, and is what is computed."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
from runs import ROOT, check_same, dashed, flags, metrics, run
from torch import Tensor, nn

import at_fused
import models
from at_fused import reference
from at_fused.backends import BackendError, cpu, cuda, triton
from at_fused.reference import DISTANCES, MAPPINGS, NORMS, RESIZES, Mapping
from at_fused.visualize import arguments, pictures
from trainer import distributed
from trainer.command_line import parse_args
from trainer.config import KEYS, Config, ConfigError, make_config
from trainer.data import DATASETS
from trainer.data.in_memory import InMemory, Split, Splits
from trainer.methods import METHODS, Batch, Method
from trainer.methods.gradients import OfGradients
from trainer.optimizers import OPTIMIZERS, Choice

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
    def largest(difference: Tensor, counted: int | Tensor, norm_order: float) -> Tensor:
        return difference.abs().amax(1) * norm_order

    monkeypatch.setitem(DISTANCES, "mine", largest)
    check_key("distance", DISTANCES, capsys)
    student, teacher = features()
    maps = [at_fused.attention_map(feature, normalize="l2") for feature in (student, teacher)]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return at_fused.attention_loss(student, teacher, distance="mine", norm_order=3)

    for found in (loss(student, teacher), compiled(loss, student, teacher)):
        torch.testing.assert_close(found, 3 * (maps[0] - maps[1]).abs().amax((1, 2)).mean())
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


# --- methods --------------------------------------------------------------------------------------------


class Mine(Method):
    """Keeps a learnt multiple of the logits small, and says more of itself than any other."""

    has_term = True
    default_beta = 5.0
    default_schedule = "cosine"
    forbids: ClassVar[dict[str, str]] = {"channels-last": "it is for rows", "amp bf16": "it needs digits"}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.trained = {"scale": nn.Linear(1, 1)}

    def term(self, batch: Batch, beta: float) -> Tensor:
        return beta * self.trained["scale"](batch.logits.flatten()[:, None]).square().mean()

    def compared(self, per_image: float) -> list[str]:
        return [f"mine: {per_image:g}"]


def test_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "mine", Mine)
    check_key("method", METHODS, capsys)
    assert help_of("beta", capsys).endswith(
        "; default 1000 for at and at+kd, 10 for hints, 5 for mine, else 1"
    )
    schedules = "; unset: linear for at+kd and hints, cosine for mine, else constant"
    assert help_of("beta-schedule", capsys).endswith(schedules)
    config = parsed(method="mine")
    assert (config.beta, config.beta_schedule) == (5.0, "cosine")
    for key, value, text in (
        ("channels-last", "true", "channels-last: it is for rows"),
        ("amp", "bf16", "amp bf16: it"),
    ):
        with pytest.raises(ConfigError, match=f"method mine cannot be combined with {text}"):
            parsed(method="mine", **{key: value})
    assert parsed(method="mine", channels_last="false", amp="none").amp == "none"

    whole = {"method": "mine", "epochs": 2, "limit_train": 64, "checkpoint_every": 1, "batch_size": 32}
    assert run(tmp_path / "whole", **whole) == 0
    out = capsys.readouterr().out
    assert "beta 5, cosine" in out
    assert "mine: 0.15625" in out
    assert all(line["at_loss"] > 0 for line in metrics(tmp_path / "whole"))
    stored = torch.load(tmp_path / "whole/checkpoint.pt", weights_only=True)["scale"]
    monkeypatch.setattr(distributed.StopRequest, "poll", lambda self: 15)
    while run(tmp_path / "parts", **whole):
        pass
    check_same(tmp_path / "parts", tmp_path / "whole")
    for name, value in torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["scale"].items():
        assert torch.equal(value, stored[name])


def test_a_method_without_its_term_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not another method's."""

    class Forgotten(OfGradients):
        pass

    monkeypatch.setitem(METHODS, "forgotten", Forgotten)
    with pytest.raises(NotImplementedError):
        run(tmp_path / "run", method="forgotten")


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_of_itself_is_so(name: str) -> None:
    method = METHODS[name]
    assert method.default_schedule in get_args(get_args(Config.model_fields["beta_schedule"].annotation)[0])
    for setting in method.forbids:
        assert setting.partition(" ")[0] in KEYS
    assert method.__doc__ != Method.__doc__ or name == "none"


def test_the_examples_of_contributing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is a file, and the line after it the entry in its table."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", page, re.S)]
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    monkeypatch.setitem(METHODS, "small-logits", names["SmallLogits"])
    monkeypatch.setitem(DATASETS, "noise", names["NOISE"])
    assert run(tmp_path / "run", method="small-logits", dataset="noise", epochs=1) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["at_loss"] > 0


def test_an_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(parameters: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
        made.append(len(parameters))
        return torch.optim.Adagrad(parameters, config.lr)

    made: list[int] = []

    monkeypatch.setitem(OPTIMIZERS, "mine", Choice(make, lr=3.0, weight_decay=0.0))
    check_key("optimizer", OPTIMIZERS, capsys)
    assert help_of("lr", capsys).endswith("; default 0.001 for adamw, 3 for mine, else 0.1")
    assert (parsed(optimizer="mine").lr, parsed(optimizer="mine", lr=2).lr) == (3.0, 2.0)
    keys = {"optimizer": "mine", "lr": 0.01, "limit_train": 8, "limit_test": 4, "epochs": 1}
    assert run(tmp_path / "run", **keys) == 0
    assert made == [len(list(models.create("wrn-10-1").parameters()))]
