"""What people train with: AdamW, warm-up, other labels, clipping, a moving average; and what comes after."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from runs import (
    SMALL,
    check_refusal,
    check_same,
    dashed,
    flags,
    fork_ranks,
    make_folders,
    metrics,
    results,
    run,
)
from torch import Tensor

import models
import train
from trainer import checkpoint, data, distributed, loop, run_folder, schedules
from trainer.config import make_config
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.meter import wrong
from trainer.methods import Batch
from trainer.methods.kd import Distillation
from trainer.mixing import Mixing
from trainer.objectives import cross_entropy
from trainer.run import Run

CPU = torch.device("cpu")
BASE = {"dataset": "digits", "student": "wrn-10-1"}
FEW = {"limit_train": 72, "limit_test": 40, "batch_size": 32, "epochs": 2}  # 3 steps an epoch, the last of 8
ALL = {
    "optimizer": "adamw", "lr": 0.01, "adam_betas": "0.8,0.99", "lr_schedule": "cosine", "warmup_epochs": 0.5,
    "label_smoothing": 0.1, "mixup": 0.4, "cutmix": 1.0, "clip_grad_norm": 0.5, "ema": 0.7,
}  # fmt: skip


def config(**keys: object) -> Any:
    return make_config(BASE | dashed(keys))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keys of AT+KD with a teacher, which need not know anything."""
    path = tmp_path_factory.mktemp("teacher") / "weights.pt"
    torch.manual_seed(1)
    torch.save(models.create("wrn-10-2").state_dict(), path)
    return {"method": "at+kd", "teacher": "wrn-10-2", "teacher_checkpoint": path}


@pytest.fixture(scope="module")
def whole(teacher: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with every option."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, **FEW, **ALL, **teacher) == 0
    return folder


# --- optimizer and learning rate ------------------------------------------------------------------------


def test_adamw_is_that_of_the_paper(tmp_path: Path) -> None:
    """Two steps by hand (Loshchilov & Hutter, 2019, algorithm 2), in fp64."""
    keys = {
        "optimizer": "adamw",
        "adam_betas": "0.8,0.9",
        "weight_decay": 0.1,
        "lr": 0.03,
        "precision": "fp64",
    }
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float64)
        try:
            made = Run(config(**keys, output_dir=tmp_path), Ranks(0, 1, CPU))
        finally:
            torch.set_default_dtype(torch.float32)
    weight = made.student.fc.weight
    expected, mean, square = weight.detach().clone(), 0.0, 0.0
    for step in (1, 2):
        for parameter in made.student.parameters():
            parameter.grad = torch.full_like(parameter, step)
        made.optimizer.step()
        mean, square = 0.8 * mean + 0.2 * step, 0.9 * square + 0.1 * step**2
        unbiased = mean / (1 - 0.8**step), square / (1 - 0.9**step)
        expected = expected * (1 - 0.03 * 0.1) - 0.03 * unbiased[0] / (unbiased[1] ** 0.5 + 1e-8)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_unset_rates_are_those_of_the_optimizer() -> None:
    assert [(c.lr, c.weight_decay) for c in (config(), config(optimizer="adamw"))] == [
        (0.1, 5e-4),
        (1e-3, 0.01),
    ]
    chosen = config(optimizer="adamw", lr=0.2, weight_decay=0)
    assert (chosen.lr, chosen.weight_decay, chosen.adam_betas) == (0.2, 0, [0.9, 0.999])


def test_warm_up() -> None:
    """A rise in equal steps; the cosine after it is that of a shorter training, step and constant go on."""
    rising = [0.3 * step / 15 for step in range(1, 16)]
    for schedule in ("cosine", "step", "constant"):
        keys = {"lr": 0.3, "lr_schedule": schedule, "lr_milestones": "2", "lr_gamma": 0.1}
        c = config(**keys, warmup_epochs=1.5, epochs=4)
        rates = [schedules.learning_rate(c, step, 10) for step in range(40)]
        assert rates[:15] == pytest.approx(rising, rel=1e-12)
        after = {
            "cosine": 0.15 * (1 + torch.cos(torch.arange(25, dtype=torch.float64) / 25 * torch.pi)),
            "step": torch.tensor([0.3] * 5 + [0.03] * 20, dtype=torch.float64),
            "constant": torch.full((25,), 0.3, dtype=torch.float64),
        }[schedule]
        assert rates[15:] == pytest.approx(after.tolist(), rel=1e-12, abs=1e-15)


# --- labels ---------------------------------------------------------------------------------------------


def test_smoothed_and_mixed_targets_in_cross_entropy_distillation_and_error() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, guides = torch.randn(2, 6, 5, generator=draw, dtype=torch.float64)
    labels = torch.randint(5, (6,), generator=draw)
    mixed = torch.rand(6, 5, generator=draw, dtype=torch.float64).softmax(1)
    for targets, probabilities in ((labels, F.one_hot(labels, 5)), (mixed, mixed)):
        smooth = 0.8 * probabilities + 0.2 / 5
        ce = -(smooth * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
        torch.testing.assert_close(cross_entropy(logits, targets, 0.2), ce)
        c = config(method="kd", teacher="a", teacher_checkpoint="b", label_smoothing=0.2, alpha=0.75)
        method = Distillation(c, torch.nn.Identity(), torch.nn.Identity(), logits)
        found = method.distillation(Batch(logits, targets, logits, guides))
        p, q = ((x / 4).exp() / (x / 4).exp().sum(1, keepdim=True) for x in (guides, logits))
        torch.testing.assert_close(found, 0.75 * 16 * (p * (p / q).log()).sum(1).mean() + 0.25 * ce)
    best = logits.argsort(1, descending=True)
    for k in (1, 2):
        hit = sum(mixed[i, j] for i in range(6) for j in best[i, :k].tolist())
        torch.testing.assert_close(wrong(logits, mixed, k), 6 - hit)
        assert wrong(logits, labels, k) == sum(labels[i] not in best[i, :k] for i in range(6))


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(9, 3, 8, 8, generator=draw).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(9)


def mixed(keys: dict[str, Any], step: int, world: int = 1) -> tuple[Tensor, Tensor]:
    """The batch's images and targets, put together from the shares of all ranks."""
    images, labels = batch()
    parts = []
    for rank in range(world):
        mixing = Mixing(config(**keys), 9, Ranks(rank, world, CPU))
        places = mixing.places(slice(0, 9))
        parts.append(mixing(images[places], labels[places], 3, step))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_mixup_and_cutmix() -> None:
    """Of an image and the one before it, by the shares that the targets say (Zhang et al., Yun et al.)."""
    images, labels = batch()
    others, own = images.roll(1, 0), torch.arange(9)
    shares = []
    for step in range(6):
        found, targets = mixed({"mixup": 0.8}, step)
        lam = targets[own, labels][:, None, None, None]
        torch.testing.assert_close(found, lam * images + (1 - lam) * others)
        torch.testing.assert_close(targets[own, labels.roll(1)], 1 - lam.flatten())
        assert found.is_contiguous(memory_format=torch.channels_last)
        shares.append(lam[0].item())
        pasted, targets = mixed({"cutmix": 1.0}, step)
        kept = (pasted == images).all(1)
        assert torch.equal(torch.where(kept[:, None], images, others), pasted)
        assert targets[own, labels].tolist() == pytest.approx(kept.double().mean((1, 2)).tolist())
        assert len({tuple(image.flatten().tolist()) for image in kept}) == 1  # a rectangle for all
    assert len(set(shares)) == 6
    assert mixed({"mixup": 0.8, "seed": 1}, 0)[1].tolist() != mixed({"mixup": 0.8}, 0)[1].tolist()
    kinds = {bool((mixed({"mixup": 0.8, "cutmix": 1.0}, step)[0] == images).any()) for step in range(12)}
    assert kinds == {True, False}  # with both, each has its turns


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_mixes_the_same(world: int) -> None:
    for step in range(4):
        for alone, together in zip(
            mixed({"mixup": 0.8, "cutmix": 1.0}, step),
            mixed({"mixup": 0.8, "cutmix": 1.0}, step, world),
            strict=True,
        ):
            assert torch.equal(alone, together)


def test_places_of_image_files_may_be_a_list(tmp_path: Path) -> None:
    """As those of a rank that mixes: the same images as where all are read."""
    keys = {"dataset": "imagefolder", "data_dir": make_folders(tmp_path / "images", 3, 1), "image_size": 16}
    dataset = data.load(config(**keys), CPU)
    ((images, labels),) = dataset.training_batches(0, 1, [slice(0, 9)])
    ((some, few),) = dataset.training_batches(0, 1, [[8, 0, 1]])
    assert torch.equal(some, images[[8, 0, 1]])
    assert torch.equal(few, labels[[8, 0, 1]])


def test_student_and_teacher_see_the_same_mixed_images(teacher: dict[str, Any], tmp_path: Path) -> None:
    keys = teacher | {"mixup": 1.0, "output_dir": tmp_path, **FEW}
    made = Run(make_config(SMALL | dashed(keys)), Ranks(0, 1, CPU))
    seen: list[Tensor] = []
    for network in (made.student, made.teacher.network):  # type: ignore[union-attr]
        network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ((images, labels),) = made.dataset.training_batches(0, 0, [slice(0, 8)])
    images, targets = made.mixing(images, labels, 0, 0)
    loop.train_step(made, images, targets, 8)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], images)
    assert made.sums[5] == 8


# --- gradients and weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_clipped_step_goes_no_further_than_it_may(amp: str, tmp_path: Path) -> None:
    """lr times the norm, whatever fp16's loss scaling made of the gradients; a small one is left alone."""
    moves = {}
    for limit in (None, 0.01, 1e9):
        keys = {"amp": amp, "momentum": 0, "weight_decay": 0, "lr": 0.1, "lr_schedule": "constant"}
        keys |= {"clip_grad_norm": limit or "null", "output_dir": tmp_path}
        made = Run(make_config(SMALL | dashed(keys)), Ranks(0, 1, CPU))
        before = torch.cat([p.detach().flatten() for p in made.student.parameters()])
        (images,) = made.dataset.training_batches(0, 0, [slice(0, 16)])
        loop.train_step(made, *images, 16)
        moves[limit] = torch.cat([p.detach().flatten() for p in made.student.parameters()]) - before
    assert moves[None].norm() > 0.01
    assert moves[0.01].norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    torch.testing.assert_close(
        moves[0.01] / moves[0.01].norm(), moves[None] / moves[None].norm(), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(moves[1e9], moves[None], rtol=1e-3, atol=1e-5)


def test_the_moving_average_is_that_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first step's on, BatchNorm's statistics included; its errors are those of model-ema.pt."""
    made = Run(
        make_config(SMALL | dashed({**FEW, "ema": 0.7, "output_dir": tmp_path / "run"})), Ranks(0, 1, CPU)
    )
    expected: dict[str, Tensor] = {}

    def poll(self: Any) -> int:
        for name, value in made.student.state_dict().items():
            value = value.double()
            expected[name] = 0.7 * expected[name] + 0.3 * value if name in expected else value
        return 0

    monkeypatch.setattr(distributed.StopRequest, "poll", poll)
    assert made.train() == 0
    saved = torch.load(tmp_path / "run" / run_folder.EMA_MODEL, weights_only=True)
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
    average = models.create("wrn-10-1")
    average.load_state_dict(saved)
    found = loop.evaluate(made, average)
    lines = metrics(tmp_path / "run")
    assert {f"ema_{name}": value for name, value in found.items()}.items() <= lines[-1].items()
    assert lines[-1]["ema_test_loss"] != lines[-1]["test_loss"]
    summary = json.loads((tmp_path / "run" / run_folder.SUMMARY).read_text())
    errors = [line["ema_test_error"] for line in lines]
    assert (summary["last_ema_test_error"], summary["best_ema_test_error"]) == (errors[-1], min(errors))


# --- all of it together ---------------------------------------------------------------------------------


def test_a_run_with_every_option_continues_bit_exactly_after_each_step(
    whole: Path, teacher: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed.StopRequest, "poll", lambda self: 15)
    codes = []
    while not codes or codes[-1]:
        codes.append(run(tmp_path / "run", **FEW, **ALL, **teacher))
    assert codes == [143] * 5 + [0]
    check_same(tmp_path / "run", whole)
    assert (tmp_path / "run" / run_folder.EMA_MODEL).read_bytes() == (
        whole / run_folder.EMA_MODEL
    ).read_bytes()


def test_every_option_for_any_number_of_ranks(teacher: dict[str, Any], tmp_path: Path) -> None:
    """The same weights, and moving average, to fp64's rounding."""
    keys = FEW | ALL | teacher | {"precision": "fp64", "freeze_bn": "true", "limit_train": 75}
    for ranks in (1, 2, 4):
        done = fork_ranks(ranks, tmp_path / str(ranks), **keys)
        assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    start = models.create("wrn-10-1").state_dict()
    expected_lines, expected = results(tmp_path / "1")
    assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-3
    for ranks in ("2", "4"):
        lines, weights = results(tmp_path / ranks)
        torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)
        ours, alone = (
            torch.load(tmp_path / n / run_folder.EMA_MODEL, weights_only=True) for n in (ranks, "1")
        )
        torch.testing.assert_close(ours, alone, rtol=1e-10, atol=1e-10)
        for key in ("train_loss", "ce_loss", "train_error", "test_loss", "ema_test_loss", "ema_test_error"):
            assert lines[-1][key] == pytest.approx(expected_lines[-1][key], rel=1e-10), key


def test_a_checkpoint_from_before_these_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It has their defaults and format 1; another format is refused."""
    new = [key.replace("_", "-") for key in ALL if key not in ("lr", "lr_schedule")]
    assert run(tmp_path / "whole", **FEW) == 0
    with monkeypatch.context() as patch:
        patch.setattr(distributed.StopRequest, "poll", lambda self: 15)
        assert run(tmp_path / "run", **FEW) == 143
    path = tmp_path / "run" / run_folder.CONFIG
    old = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key not in new}
    path.write_text(yaml.safe_dump(old))
    path = tmp_path / "run" / run_folder.CHECKPOINT
    stored = checkpoint.load(path)
    assert stored["format"] == 1
    capsys.readouterr()
    checkpoint.save(path, stored | {"format": 2})
    check_refusal(
        run(tmp_path / "run", **FEW), capsys, f"checkpoint {path}", "it has format 2", "reads format 1"
    )
    del stored["format"]
    checkpoint.save(path, stored | {"config": {k: v for k, v in stored["config"].items() if k not in new}})
    assert run(tmp_path / "run", **FEW) == 0
    check_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "keys, line",
    [
        ({"optimizer": "adamw", "nesterov": True}, "nesterov is a form of sgd, not of optimizer adamw"),
        ({"adam_betas": "0.9"}, r"adam-betas: list should have at least 2 items .*"),
        ({"adam_betas": "0.9,1"}, r"adam-betas: input should be less than 1 \(got '1'\)"),
        ({"warmup_epochs": 5, "lr_schedule": "onecycle"}, "warmup-epochs is not for lr-schedule onecycle.*"),
        ({"warmup_epochs": 5, "epochs": 5}, "warmup-epochs 5 leaves none of 5 epochs after it"),
        (
            {"mixup": 0.2, "method": "min-l2"},
            "method min-l2 cannot be combined with mixup: .* label of each image",
        ),
        ({"cutmix": 1, "method": "symmetry"}, "method symmetry cannot be combined with cutmix: .*"),
        ({"clip_grad_norm": 0}, "clip-grad-norm: input should be greater than 0 .*"),
        ({"ema": 1}, "ema: input should be less than 1 .*"),
        ({"label_smoothing": -0.1}, "label-smoothing: input should be greater than or equal to 0 .*"),
    ],
)
def test_what_makes_no_sense(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}$"):
        config(**keys)


# --- afterwards -----------------------------------------------------------------------------------------


def command(folder: Path, *words: object, **keys: object) -> int:
    return train.main([*flags(SMALL | dashed(keys) | {"output-dir": folder}), *map(str, words)])


def test_eval_only(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """From the run's folder, or of any weights; a teacher isn't needed, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    before, last = {path: path.stat().st_mtime_ns for path in whole.iterdir()}, metrics(whole)[-1]
    recipe = ["--recipe", whole / run_folder.CONFIG, "--teacher-checkpoint", "null", "--eval-only"]
    recipe += ["--teacher-cache", "memory"]
    for weights, of in ((), ""), (("--weights", whole / run_folder.EMA_MODEL), "ema_"):
        capsys.readouterr()
        assert train.main([*map(str, recipe), *map(str, weights)]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert f"test error {last[of + 'test_error']:.2f} %, test loss {last[of + 'test_loss']:.4f}" in line
        assert "40 test images of digits" in line
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_export(whole: Path, tmp_path: Path, capsys) -> None:
    """The program gives the student's logits, of any number of images."""
    path = tmp_path / "student.pt2"
    assert command(whole, "--export", path) == 0
    assert f"exported to {path}; it takes images (B, 3, 16, 16)" in capsys.readouterr().out
    student = models.create("wrn-10-1").eval()
    student.load_state_dict(torch.load(whole / run_folder.MODEL, weights_only=True))
    program = torch.export.load(path).module()
    for count in (1, 3):
        images = torch.randn(count, 3, 16, 16)
        torch.testing.assert_close(program(images), student(images), rtol=1e-5, atol=1e-5)
    content = path.read_bytes()
    check_refusal(command(whole, "--export", path), capsys, f"export {path}: there is such a file already")
    assert path.read_bytes() == content


def test_export_to_onnx(whole: Path, tmp_path: Path) -> None:
    """Of any number of images, the logits to fp32's rounding, which those of the student in fp64 tell."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "student.onnx"
    assert command(whole, "--export", path) == 0
    student = models.create("wrn-10-1").eval()
    student.load_state_dict(torch.load(whole / run_folder.MODEL, weights_only=True))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        images = torch.randn(count, 3, 16, 16)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        with torch.no_grad():
            expected = student.double()(images.double())
        assert found.dtype == torch.float32
        atol = 16 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


def test_neither_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Each mistake is a line, and makes no file."""
    weights = tmp_path / "weights.pt"
    torch.save(models.create("wrn-10-1").state_dict(), weights)
    given, nowhere = ("--weights", weights), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "onnx", None)
    for words, told in (
        (["--eval-only"], f"eval-only: there is no {nowhere / 'model.pt'}"),
        (["--eval-only", "--output-dir", "null"], "eval-only needs weights, or the output-dir of"),
        (["--eval-only", "--weights", "/nowhere.pt"], "weights /nowhere.pt: No such file"),
        (["--eval-only", *given, "--student", "wrn-10-2"], f"weights {weights} does not fit wrn-10-2"),
        (given, f"weights {weights} is for eval-only and export"),
        (["--export", tmp_path / "a.pth", *given], "name must end with .pt2 or .onnx"),
        (["--export", tmp_path / "no/a.pt2", *given], f"there is no folder {tmp_path / 'no'}"),
        (["--export", tmp_path / "a.onnx", *given], "onnx is missing (pip install onnx onnxscript)"),
    ):
        check_refusal(command(nowhere, *words), capsys, told)
    assert list(tmp_path.iterdir()) == [weights]


def test_a_network_that_torch_cannot_export(tmp_path: Path, capsys) -> None:
    """As one that asks for the values that it computes: a line, and no file."""
    (tmp_path / "odd.py").write_text(
        "import torch\n\n\nclass Odd(torch.nn.Linear):\n    def forward(self, images):\n"
        "        logits = super().forward(images.mean((2, 3)))\n"
        "        return logits if logits.sum() > 0 else -logits\n\n\n"
        "def odd(num_classes):\n    return Odd(3, num_classes)\n"
    )
    torch.save(torch.nn.Linear(3, 10).state_dict(), tmp_path / "weights.pt")
    student, path = f"{tmp_path / 'odd.py'}:odd", tmp_path / "odd.pt2"
    words = "--weights", tmp_path / "weights.pt", "--export", path
    check_refusal(
        command(tmp_path / "run", *words, student=student), capsys, f"export {path}: torch cannot export"
    )
    assert not path.exists()
