"""The trainer end to end, on a few digits: artefacts, losses, determinism, exit codes, resuming, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from paths import ROOT
from PIL import Image
from runs import (
    ENVIRONMENT,
    SMALL,
    Forked,
    check_refusal,
    check_same,
    dashed,
    flags,
    metrics,
    run,
    wait_until,
)
from torch.utils._python_dispatch import TorchDispatchMode

import models
from trainer import checkpoint, data, distributed, loop
from trainer.config import make_config
from trainer.data import in_memory
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.folding import fold_batch_norms
from trainer.run import Run
from trainer.state import TrainState
from trainer.student import Student
from trainer.torch_settings import set_up_torch

CPU = torch.device("cpu")


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file under `folder` with a hash of its bytes and its time of modification."""
    return {
        str(
            path.relative_to(folder)
        ): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a teacher."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert run(folder, student="wrn-10-2", epochs=2) == 0
    return folder


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a student with AT and KD, the longest code path."""
    folder = tmp_path_factory.mktemp("student") / "run"
    assert run(folder, **at_kd(teacher)) == 0
    return folder


def at_kd(teacher: Path) -> dict[str, Any]:
    weights = teacher / "model.pt"
    return {"method": "at+kd", "teacher": "wrn-10-2", "teacher_checkpoint": weights, "channels_last": "true"}


# --- what a run leaves ------------------------------------------------------------------------------


def test_artefacts(teacher: Path, student: Path) -> None:
    names = {path.name for path in student.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoint.pt",
        "model.pt",
        "curves.png",
    }
    assert len(list(student.glob("events.out.tfevents*"))) == 1
    assert (student / "curves.png").read_bytes().startswith(b"\x89PNG")
    stored = yaml.safe_load((student / "config.yaml").read_text())
    assert stored["beta-schedule"] == "linear"

    lines = metrics(student, timing=True)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert list(line) == [
            "epoch", "lr", "train_loss", "ce_loss", "at_loss", "at_loss/group1", "at_loss/group2",
            "at_loss/group3", "kd_loss", "train_error", "test_loss", "test_error", "images_per_second",
            "seconds",
        ]  # fmt: skip
        assert line["train_loss"] == pytest.approx(line["at_loss"] + line["kd_loss"], rel=1e-6)
        assert line["at_loss"] > 0
        assert line["images_per_second"] == pytest.approx(200 / line["seconds"])
    assert lines[2]["at_loss"] < lines[0]["at_loss"]  # beta decays

    summary = json.loads((student / "summary.json").read_text())
    errors = [line["test_error"] for line in lines]
    assert summary == {
        "last_test_error": errors[-1],
        "best_test_error": min(errors),
        "teacher_test_error": metrics(teacher)[-1]["test_error"],  # reproduced from its weights
        "epochs": 3,
        "parameters": sum(p.numel() for p in models.create("wrn-10-1").parameters()),
        "method": "at+kd",
        "seed": 0,
    }


@pytest.mark.parametrize("method", ["none", "at", "kd", "hints", "symmetry"])
def test_keys_that_a_method_does_not_use_are_absent(method: str, teacher: Path, tmp_path: Path) -> None:
    """From metrics.jsonl and TensorBoard, which have the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = at_kd(teacher) | {"method": method, "limit_train": 16, "limit_test": 10}
    assert run(tmp_path / "run", **keys, max_steps=1) == 0
    (line,) = metrics(tmp_path / "run", timing=True)
    taps = ["at_loss/group1", "at_loss/group2", "at_loss/group3"] * (method in ("at", "hints"))
    used = {"none": [], "kd": ["kd_loss"]}.get(method, ["at_loss", *taps])
    assert [key for key in line if key.startswith(("at_", "kd_"))] == used
    if taps:
        assert line["at_loss"] == pytest.approx(sum(line[tap] for tap in taps), rel=1e-6)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == line.keys() - {"epoch"}
    for key in line.keys() - {"epoch"}:
        assert [event.value for event in events.Scalars(key)] == [pytest.approx(line[key], rel=1e-6)]


def test_summary_of_a_run_that_was_best_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And that ended after 3 of 5 epochs, of a step each."""
    errors = iter([40.0, 10.0, 25.0])
    monkeypatch.setattr(loop, "evaluate", lambda run, model: {"test_error": next(errors)})
    assert run(tmp_path / "run", limit_train=8, limit_test=10, epochs=5, max_steps=3, seed=6) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["last_test_error"], summary["best_test_error"]) == (25.0, 10.0)
    assert (summary["epochs"], summary["seed"]) == (3, 6)
    assert "test error: last 25.00 %, best 10.00 %" in capsys.readouterr().out


def test_model_has_the_reported_test_error(student: Path) -> None:
    model = models.create("wrn-10-1")
    model.load_state_dict(torch.load(student / "model.pt", weights_only=True))
    config = make_config(SMALL)
    test = data.load(config, CPU).test
    images = ((test.images.float() - 77.8) / 81.1).permute(0, 3, 1, 2)
    with torch.no_grad():
        wrong = sum(
            int(model.eval()(image[None]).argmax() != label)
            for image, label in zip(images, test.labels, strict=True)
        )
    assert metrics(student)[-1]["test_error"] == 100 * wrong / 100


def test_top5_error_of_more_than_ten_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table 5 gives both: here those of the saved weights, by the ranks of the labels."""
    draw = np.random.default_rng(0)
    names = ("train/{:02}/0.png", "val/{:02}/0.png", "val/{:02}/1.png", "val/{:02}/2.png")
    for name in [name.format(label) for label in range(12) for name in names]:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(256, size=(24, 24, 3), dtype=np.uint8)).save(path)
    files = {
        "dataset": "imagefolder", "data_dir": tmp_path / "images", "image_size": 16, "limit_train": 12,
        "limit_test": 36, "batch_size": 4, "epochs": 2,
    }  # fmt: skip
    assert run(tmp_path / "teacher", student="wrn-10-2", **files) == 0
    assert run(tmp_path / "student", **at_kd(tmp_path / "teacher"), **files) == 0
    ours, teachers = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("student", "teacher"))
    assert ours["teacher_test_top5_error"] == teachers["last_test_top5_error"]
    assert teachers["teacher_test_top5_error"] is None

    last = metrics(tmp_path / "student")[-1]
    dataset = data.load(make_config(yaml.safe_load((tmp_path / "student/config.yaml").read_text())), CPU)
    ((images, labels),) = dataset.evaluation_batches([slice(0, 36)])
    model = models.create("wrn-10-1", num_classes=12).eval()
    model.load_state_dict(torch.load(tmp_path / "student/model.pt", weights_only=True))
    with torch.no_grad():
        logits = model(images)
    better = (logits > logits[range(36), labels][:, None]).sum(1)  # classes that are ranked above the label
    errors = [100 * int((better >= k).sum()) / 36 for k in (1, 5)]
    assert 0 < errors[1] < errors[0]
    assert [last["test_error"], last["test_top5_error"]] == errors
    assert 0 < last["train_top5_error"] < last["train_error"]
    assert last["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert [ours["last_test_error"], ours["last_test_top5_error"]] == errors
    assert f"test error {errors[0]:.2f} % (top 5: {errors[1]:.2f} %)" in capsys.readouterr().out


def test_same_seed_same_run_and_another_seed_another(teacher: Path, student: Path, tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        assert run(folder, **at_kd(teacher), seed=seed) == 0
        assert (metrics(folder) == metrics(student)) is same
        assert ((folder / "model.pt").read_bytes() == (student / "model.pt").read_bytes()) is same


@pytest.mark.parametrize("method", ["none", "at+kd"])
def test_the_seed_alone_decides_the_first_weights(method: str, teacher: Path, tmp_path: Path) -> None:
    """Which a student alone and one with a teacher have in common."""
    for seed in (0, 5):
        torch.manual_seed(seed)
        expected = models.create("wrn-10-1").state_dict()
        torch.randn(3)
        keys = dashed(at_kd(teacher))
        keys |= {"method": method, "seed": seed, "output-dir": tmp_path}
        found = Run(make_config(SMALL | keys), Ranks(0, 1, CPU)).student.state_dict()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["none", "at", "kd", "at+kd"])
def test_training_step_against_a_plain_loop(method: str, teacher: Path, tmp_path: Path) -> None:
    """Two epochs, the tail batch and augmentation included, as anybody would write them."""
    keys = SMALL | {
        "epochs": 2,
        "lr-schedule": "constant",
        "lr": 0.01,
        "output-dir": str(tmp_path),
        "method": method,
    }
    keys |= {
        "teacher": "wrn-10-2",
        "teacher-checkpoint": str(teacher / "model.pt"),
        "beta": 300,
        "weight-decay": 0.1,
    }
    ours = Run(make_config(keys), Ranks(0, 1, CPU))
    plain = models.create("wrn-10-1")
    plain.load_state_dict(ours.student.state_dict())
    guide = models.create("wrn-10-2").eval()
    guide.load_state_dict(torch.load(teacher / "model.pt", weights_only=True))
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, 0.9, weight_decay=0.1)

    def groups(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = model.conv(x)
        feats = []
        for group in (model.group1, model.group2, model.group3):
            x = group(x)
            feats.append(x)
        return model.fc(F.relu(model.bn(x)).mean((2, 3))), feats

    totals = []
    for epoch in range(2):
        plan = in_memory.plan_epoch(ours.dataset, 0, epoch)
        total = 0.0
        plain.train()
        for i in range(4):
            x, y = in_memory.training_batch(ours.dataset, plan, slice(64 * i, min(64 * i + 64, 200)))
            x = x.contiguous()
            logits, s_feats = groups(plain, x)
            with torch.no_grad():
                t_logits, t_feats = groups(guide, x)
            ce = F.cross_entropy(logits, y)
            soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(t_logits / 4, 1), reduction="batchmean")
            at = sum(
                (F.normalize(s.pow(2).mean(1).flatten(1)) - F.normalize(t.pow(2).mean(1).flatten(1)))
                .pow(2)
                .mean()
                for s, t in zip(s_feats, t_feats, strict=True)
            )
            beta = 300 * (1 - (4 * epoch + i) / 8) if method == "at+kd" else 300
            loss = 0.9 * 16 * soft + 0.1 * ce if "kd" in method else ce
            loss = loss + beta * at if "at" in method else loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        totals.append(total / 200)
    start = [weight.clone() for weight in ours.student.state_dict().values()]
    assert ours.train() == 0
    # Rounding differs (fp32, another order of sums), and early training magnifies it.
    assert [line["train_loss"] for line in metrics(tmp_path)] == pytest.approx(totals, rel=1e-3)
    ends = zip(start, ours.student.state_dict().items(), plain.state_dict().values(), strict=True)
    for before, (name, after), expected in ends:
        if after.is_floating_point():
            difference = (after - expected).norm() / (expected - before).norm()
            assert difference < 0.02, name


def test_at_starts_at_its_epoch(teacher: Path, tmp_path: Path) -> None:
    keys = at_kd(teacher) | {"method": "at"}
    assert run(tmp_path / "late", **keys, at_start_epoch=1, epochs=2) == 0
    assert [line["at_loss"] > 0 for line in metrics(tmp_path / "late")] == [False, True]


@pytest.mark.parametrize("method", ["kd", "at", "hints", "grad-at"])
def test_the_teacher_is_fixed(
    method: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a run continues: its BatchNorms must never learn."""
    monkeypatch.setattr(distributed.StopRequest, "poll", lambda self: signal.SIGTERM)
    keys = dashed(at_kd(teacher)) | {"method": method}
    keys |= {"limit-train": 24, "batch-size": 8, "limit-test": 10, "output-dir": tmp_path / "run"}
    loaded = models.create("wrn-10-2")
    loaded.load_state_dict(torch.load(teacher / "model.pt", weights_only=True))
    digest = checkpoint.digest(loaded)
    if method != "grad-at":  # which runs BatchNorm by the batch's statistics
        taps = [] if method == "kd" else loaded.taps["groups"]
        assert fold_batch_norms(loaded.eval(), taps) == 4 - bool(taps)
    weights = loaded.state_dict()
    for step in (0, 1):
        run = Run(make_config(SMALL | keys), Ranks(0, 1, CPU))
        assert run.progress.step == step
        assert run.teacher.digest == digest
        guide = run.teacher.network
        modes: list[bool] = []
        guide.bn.register_forward_hook(lambda bn, *_, modes=modes: modes.append(bn.training))
        assert run.train() == 143
        assert modes
        assert not any(modes)
        assert not any(parameter.requires_grad for parameter in guide.parameters())
        torch.testing.assert_close(guide.state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize("amp, native", [("bf16", True), ("bf16", False), ("fp16", True), ("fp16", False)])
def test_autocast_trains(
    amp: str,
    native: bool,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loop, "computes", lambda amp, cuda: native)
    assert run(tmp_path / "run", **at_kd(teacher), amp=amp, epochs=1, limit_train=72, limit_test=20) == 0
    assert (f"amp {amp} is slow here" in capsys.readouterr().out) == (not native)
    (line,) = metrics(tmp_path / "run")
    assert np.isfinite(line["train_loss"])
    saved = torch.load(tmp_path / "run/model.pt", weights_only=True)
    assert saved["conv.weight"].dtype == torch.float32
    if amp == "fp16":
        assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["scaler"]["scale"] > 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "amp, dtype", [("none", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_passes_are_in_the_chosen_precision_and_layout(
    amp: str, dtype: torch.dtype, layout: torch.memory_format, teacher: Path, tmp_path: Path
) -> None:
    """Of both networks, in training as in tests."""
    keys = dashed(at_kd(teacher))
    keys |= {"amp": amp, "channels-last": layout is torch.channels_last, "output-dir": tmp_path}
    run = Run(make_config(SMALL | keys | {"limit-test": 4}), Ranks(0, 1, CPU))
    seen: list[tuple[torch.dtype, bool]] = []
    for network in (run.student, run.teacher.network):
        conv = network.group2[0].conv1
        assert conv.weight.is_contiguous(memory_format=layout)
        conv.register_forward_hook(
            lambda _, inputs, output: seen.append(
                (output.dtype, inputs[0].is_contiguous(memory_format=layout))
            )
        )
    (batch,) = run.dataset.training_batches(0, 0, [slice(0, 4)])
    loop.train_step(run, *batch, 4)
    loop.evaluate(run, run.student)
    loop.evaluate(run, run.teacher.network)
    assert seen == [(dtype, True)] * 4


def test_the_optimizer_is_the_chosen_one(tmp_path: Path) -> None:
    """Two steps of Nesterov's momentum by hand (Sutskever et al., 2013, as torch has it)."""
    keys = {"nesterov": True, "momentum": 0.8, "weight-decay": 0.01, "lr": 0.1, "output-dir": tmp_path}
    run = Run(make_config(SMALL | keys), Ranks(0, 1, CPU))
    weight = run.student.fc.weight
    expected, velocity = weight.detach().double(), torch.zeros_like(weight, dtype=torch.float64)
    for step in (1, 2):
        for parameter in run.student.parameters():
            parameter.grad = torch.full_like(parameter, step)
        run.optimizer.step()
        gradient = step + 0.01 * expected
        velocity = 0.8 * velocity + gradient
        expected = expected - 0.1 * (gradient + 0.8 * velocity)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_fp16_undoes_its_loss_scale(tmp_path: Path) -> None:
    """A step moves the weights about as far as in fp32; a thousand times as far if it forgot to."""
    moves = []
    for amp in ("none", "fp16"):
        run = Run(make_config(SMALL | {"amp": amp, "output-dir": tmp_path}), Ranks(0, 1, CPU))
        run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=amp == "fp16")
        before = run.student.fc.weight.detach().clone()
        (batch,) = run.dataset.training_batches(0, 0, [slice(0, 64)])
        loop.train_step(run, *batch, 64)
        moves.append(run.student.fc.weight.detach() - before)
    assert (moves[1] - moves[0]).norm() < 0.05 * moves[0].norm()


def test_momentum_is_there_before_a_first_step_that_is_skipped(tmp_path: Path) -> None:
    """Fused SGD allocates it, and leaves it unset where fp16 overflows: zeros give the same first step."""
    config = make_config(SMALL | {"amp": "fp16", "output-dir": tmp_path / "run"})
    run = Run(config, Ranks(0, 1, CPU))
    buffers = [run.optimizer.state[p]["momentum_buffer"] for p in run.student.parameters()]
    assert all(torch.count_nonzero(buffer) == 0 for buffer in buffers)
    gradients = [torch.randn_like(p) for p in run.student.parameters()]
    before = [p.detach().clone() for p in run.student.parameters()]
    for parameter, gradient in zip(run.student.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    run.optimizer.step()
    decay, lr = config.weight_decay, config.lr
    for now, old, gradient in zip(run.student.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(now, old - lr * (gradient + decay * old))


def test_accumulation_gives_the_gradient_of_the_whole_batch(teacher: Path, tmp_path: Path) -> None:
    """With BatchNorm frozen; 64 and 8 images in 3 parts of unequal size."""
    keys = at_kd(teacher) | {"freeze_bn": "true", "epochs": 1, "lr": 0.02}
    for count in (1, 3):
        assert run(tmp_path / str(count), **keys, accumulate=count) == 0
    whole, parts = (torch.load(tmp_path / n / "model.pt", weights_only=True) for n in "13")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)
    first, second = metrics(tmp_path / "1")[0], metrics(tmp_path / "3")[0]
    assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-5)


def test_pretrained_from_a_file(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, or, of another number of classes, all but the classifier; nothing of another model."""
    weights = torch.load(teacher / "model.pt", weights_only=True)
    keys = {"student": "wrn-10-2", "epochs": 1, "max_steps": 1, "lr": 1e-30}
    assert run(tmp_path / "same", **keys, pretrained=teacher / "model.pt") == 0
    other = weights | {"fc.weight": torch.zeros(7, 128), "fc.bias": torch.zeros(7)}
    torch.save(other, tmp_path / "other.pt")
    assert run(tmp_path / "new", **keys, pretrained=tmp_path / "other.pt") == 0
    for name in ("same", "new"):
        state = torch.load(tmp_path / name / "model.pt", weights_only=True)
        kept = [
            key
            for key in weights
            if key.endswith(("weight", "bias")) and torch.equal(state[key], weights[key])
        ]
        assert ("fc.weight" in kept) == (name == "same")
        assert "conv.weight" in kept
    capsys.readouterr()
    check_refusal(run(tmp_path / "x", pretrained=teacher / "model.pt"), capsys, "pretrained wrn-10-1")
    check_refusal(run(tmp_path / "x", pretrained="true"), capsys, "no weights of wrn-10-1")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("freeze, modules", [("conv,group1", "conv. group1."), ("groups", "group")])
def test_frozen_parts_do_not_move(freeze: str, modules: str, tmp_path: Path) -> None:
    """Names of modules, or of taps."""
    keys = {"freeze": freeze, "freeze_bn": "true", "epochs": 1, "lr": 0.1}
    assert run(tmp_path / "run", **keys) == 0
    torch.manual_seed(0)
    start = models.create("wrn-10-1").state_dict()
    end = torch.load(tmp_path / "run/model.pt", weights_only=True)
    parts = tuple(modules.split())
    frozen = [n for n in start if n.startswith(parts) or "running" in n or "tracked" in n]
    assert len(frozen) > 10
    for name in start:
        assert torch.equal(start[name], end[name]) is (name in frozen), name


@pytest.mark.slow
def test_compiled_run_learns_the_same(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in parts, and with CUDA graphs: each step and each batch of a test is a pass of its own."""
    passes: list[None] = []
    mark = torch.compiler.cudagraph_mark_step_begin
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: passes.append(mark()))
    keys = at_kd(teacher) | {"limit_train": 64, "batch_size": 32, "accumulate": 2, "epochs": 2, "lr": 0.01}
    keys |= {"limit_test": 32, "test_batch_size": 16}  # batches of one size, to compile once
    variants = {"plain": {}, "compiled": {"compile": "true"}}
    variants["graphs"] = variants["compiled"] | {"cuda_graphs": "true"}
    losses = {}
    for name, variant in variants.items():
        assert not passes
        assert run(tmp_path / name, **keys, **variant) == 0
        losses[name] = [line["train_loss"] for line in metrics(tmp_path / name)]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["graphs"] == pytest.approx(losses["compiled"], rel=1e-6)
    assert (
        len(passes) == 2 * 2 + 3 * 2
    )  # steps; the tests of the teacher, and of the student after each epoch


class Reads(TorchDispatchMode):
    """Notes operations whose outcome the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [index for index in args[1] if index is not None] if "index." in func.name() else []
        waits = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:
            waits = any(mask.dtype in (torch.bool, torch.uint8) for mask in masks)
        if waits:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["none", "at", "kd", "at+kd", "hints", "grad-at", "symmetry", "min-l2"])
def test_a_step_waits_for_nothing(
    method: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host runs ahead of a GPU. Left out: the watch (there of the step before), the CPU kernel."""
    keys = dashed(at_kd(teacher)) | {"method": method, "accumulate": 2}
    keys |= {"backend": "reference"}
    config = make_config(SMALL | keys | {"output-dir": tmp_path / "run"})
    run = Run(config, Ranks(0, 1, CPU))
    monkeypatch.setattr(run.watch, "look", lambda *_: None)
    with Reads() as reads:
        (batch,) = run.dataset.training_batches(0, 0, [slice(0, 64)])
        assert reads.found == []
        loop.train_step(run, *batch, 64)
        assert reads.found == []
        run.sums[0].item()
        assert len(reads.found) == 1
    assert run.sums[5] == 64


def test_cudnn_chooses_by_speed_only_where_it_may(tmp_path: Path) -> None:
    for deterministic in ("false", "true"):
        assert run(tmp_path / deterministic, deterministic=deterministic, max_steps=1) == 0
        assert torch.backends.cudnn.benchmark is (deterministic == "false")


def test_threads_are_as_many_as_asked_for() -> None:
    for threads, expected in ((2, 2), (0, 2)):  # 0 leaves them alone
        set_up_torch(make_config(SMALL | {"threads": threads}), Ranks(0, 1, CPU))
        assert torch.get_num_threads() == expected


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"student": "wrn-11-1"}, ["student wrn-11-1: ", "depth 6n + 4"]),
        ({"student": "lenet"}, ["student lenet: ", "wrn-D-K"]),
        (
            {"method": "at", "teacher": "wrn-17-1", "teacher_checkpoint": "t.pt"},
            ["teacher wrn-17-1: a wide ResNet"],
        ),
        ({"pretrained": "/nowhere.pt"}, ["error: pretrained /nowhere.pt: No such"]),
        ({"method": "min-l2", "gradient_layer": "nope"}, ["gradient-layer nope: no submodule"]),
        ({"dataset": "cifar10", "data_dir": "/nowhere"}, ["/nowhere", "cifar-10-batches-py", "data_batch_1"]),
        (
            {"method": "at", "teacher": "wrn-10-2", "teacher_checkpoint": "/nowhere.pt"},
            ["error: teacher-checkpoint /nowhere.pt: No such"],
        ),
        ({"freeze": "group9"}, ["freeze group9: wrn-10-1"]),
        ({"sync_bn": "true", "device": "cpu"}, ["sync-bn true"]),
        ({"resume": "/nowhere.pt"}, ["error: resume /nowhere.pt: No such"]),
        ({"limit_test": 9999}, ["limit-test 9999"]),
        ({"freeze": "conv,group1,group2,group3,bn,fc"}, ["freeze conv,group1,", "no parameter"]),
        ({"student": "resnet-18", "limit_train": 33, "batch_size": 32}, ["single values", "33 images by 32"]),
        ({"student": "resnet-18", "limit_train": 20, "batch_size": 10, "accumulate": 4}, ["single values"]),
        ({"data_dir": "/" + 300 * "x", "dataset": "cifar10"}, ["File name too long"]),
    ],
)
def test_mistakes_leave_no_folder(
    keys: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(run(tmp_path / "new", **keys), capsys, *words)
    assert not (tmp_path / "new").exists()


def test_wrong_teacher_checkpoints(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (teacher / "model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not weights")
    torch.save({"conv.weight": 3}, tmp_path / "odd.pt")
    torch.save(models.create("wrn-10-2", num_classes=7).state_dict(), tmp_path / "classes.pt")
    torch.save(os.system, tmp_path / "code.pt")  # must not be run, nor even named as loadable
    expected = {
        "cut.pt": "truncated", "empty.pt": "truncated", "text.pt": "truncated", "code.pt": "truncated",
        "odd.pt": "no model weights", "classes.pt": "fc.bias is (7,), not (10,)",
    }  # fmt: skip
    for name, word in expected.items():
        keys = {"method": "at", "teacher": "wrn-10-2", "teacher_checkpoint": tmp_path / name}
        check_refusal(run(tmp_path / "new", **keys), capsys, name, word)
    keys = {"method": "at", "teacher": "wrn-16-2", "teacher_checkpoint": teacher / "model.pt"}
    check_refusal(run(tmp_path / "new", **keys), capsys, "not fit wrn-16-2", "missing: group1.1.bn1.bias")
    keys = {"method": "at", "teacher": "wrn-10-2", "teacher_checkpoint": teacher / "model.pt"}
    check_refusal(
        run(tmp_path / "new", **keys, taps="group1,group7"), capsys, "taps group1,group7, of student wrn-10-1"
    )
    assert not (tmp_path / "new").exists()
    keys["teacher_checkpoint"] = teacher / "checkpoint.pt"  # a whole checkpoint serves as well
    assert run(tmp_path / "new", **keys, epochs=1, max_steps=1) == 0


def test_blocks_of_unequal_number_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(models.create("wrn-16-1").state_dict(), tmp_path / "deep.pt")
    keys = {
        "method": "at",
        "teacher": "wrn-16-1",
        "teacher_checkpoint": tmp_path / "deep.pt",
        "taps": "blocks",
    }
    check_refusal(run(tmp_path / "new", **keys), capsys, "taps blocks", "wrn-10-1 has 3", "wrn-16-1 6")


def test_a_run_is_never_overwritten(
    teacher: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint(student)
    other = {"lr": 0.3, "seed": 4, "batch_size": 32, "amp": "bf16"}
    words = (
        f"output-dir {student} holds a different run: amp, batch-size, lr, seed differ (amp none, now bf16; "
        "batch-size 64, now 32; lr 0.1, now 0.3; seed 0, now 4); choose another output-dir",
    )
    check_refusal(run(student, **at_kd(teacher), **other), capsys, *words)
    check_refusal(run(student, **at_kd(teacher), resume="never"), capsys, "not empty")
    check_refusal(run(student, **at_kd(teacher), resume=teacher), capsys, "would overwrite")
    assert run(student, **at_kd(teacher)) == 0  # the same, finished
    assert "already finished" in capsys.readouterr().out
    assert fingerprint(student) == before

    for damage in ("config.yaml", "checkpoint.pt"):
        folder = tmp_path / damage
        folder.mkdir()
        for name in ("config.yaml", "checkpoint.pt", "metrics.jsonl"):
            (folder / name).write_bytes((student / name).read_bytes())
        (folder / damage).write_bytes((student / damage).read_bytes()[:200])
        if damage == "config.yaml":
            (folder / damage).unlink()
        before = fingerprint(folder)
        check_refusal(run(folder, **at_kd(teacher)), capsys, damage)
        assert fingerprint(folder) == before

    for name in ("config.yaml", "summary.json", "model.pt"):
        (tmp_path / "kept").mkdir(exist_ok=True)
        (tmp_path / "kept" / name).write_bytes((student / name).read_bytes())
    check_refusal(run(tmp_path / "kept", **at_kd(teacher)), capsys, "summary.json, model.pt", "no checkpoint")
    assert (tmp_path / "kept/summary.json").exists()

    (tmp_path / "file").write_text("mine")
    check_refusal(run(tmp_path / "file"), capsys, "not a folder")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    check_refusal(run(tmp_path / "notes", resume="never"), capsys, "not empty")


def test_command_line_exits() -> None:
    """As a process: the code, the one line, and a printed configuration."""
    command = [sys.executable, "train.py", "--dataset", "digits", "--student", "wrn-10-1"]
    bad = subprocess.run([*command, "--epochs", "many"], cwd=ROOT, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("train.py: error: epochs: ")
    assert bad.stderr.count("\n") == 1
    good = subprocess.run(
        [*command, "--epochs", "5", "--print-config"], cwd=ROOT, capture_output=True, text=True
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert yaml.safe_load(good.stdout)["epochs"] == 5
    alone = subprocess.run([sys.executable, "train.py"], cwd=ROOT, capture_output=True, text=True)
    assert (alone.returncode, alone.stdout, alone.stderr.count("\n")) == (2, "", 1)
    assert "begin with: python train.py --recipe recipes/demo/student.yaml" in alone.stderr
    # What only the variables of torchrun's ranks would make sense of.
    variables = os.environ | {"WORLD_SIZE": "2"}
    lost = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert (lost.returncode, lost.stderr.count("\n")) == (2, 1)
    assert "not by torchrun" in lost.stderr


# --- stopping and resuming --------------------------------------------------------------------------


def start(folder: Path, how: type[subprocess.Popen[str]] = Forked, **keys: Any) -> subprocess.Popen[str]:
    values = SMALL | dashed(keys) | {"output-dir": folder}
    command = [sys.executable, str(ROOT / "train.py"), *flags(values)]
    return how(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def steps_done(folder: Path) -> int:
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True)["progress"]["step"] if path.exists() else 0


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until this process (not one before it) has written a checkpoint in mid-epoch, at `step` or later."""
    before = steps_done(folder)

    def written() -> bool:
        done = steps_done(folder)
        return done > before and done >= step and done % 4 != 0

    wait_until(written, process)


@pytest.mark.slow
def test_killed_run_resumes_bit_exactly(teacher: Path, tmp_path: Path) -> None:
    """SIGKILL in mid-epoch, twice, then SIGTERM: weights and metrics are an undisturbed run's, bitwise."""
    keys = at_kd(teacher) | {"epochs": 16, "checkpoint_every": 3}
    assert run(tmp_path / "whole", **keys | {"checkpoint_every": 0}) == 0
    folder = tmp_path / "killed"
    for step, number in ((6, signal.SIGKILL), (17, signal.SIGKILL), (25, signal.SIGTERM)):
        process = start(folder, subprocess.Popen if number == signal.SIGTERM else Forked, **keys)
        wait_for_step(folder, step, process)
        process.send_signal(number)
        code = process.wait(60)
        assert code == (-9 if number == signal.SIGKILL else 143)
        assert not (folder / "model.pt").exists()
    assert 25 <= steps_done(folder) < 64
    process = start(folder, **keys)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "continuing from step" in output
    check_same(folder, tmp_path / "whole")


@pytest.mark.parametrize("step", [1, 4, 6])  # 4 ends an epoch
def test_signal_at_a_step(
    step: int, teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that continues after it is bitwise the undisturbed one, no epoch lost."""
    polls = iter(range(1, 99))
    with monkeypatch.context() as patch:
        patch.setattr(distributed.StopRequest, "poll", lambda self: signal.SIGTERM * (next(polls) == step))
        assert run(tmp_path / "run", **at_kd(teacher)) == 128 + signal.SIGTERM
    assert steps_done(tmp_path / "run") == step
    assert run(tmp_path / "run", **at_kd(teacher)) == 0
    check_same(tmp_path / "run", student)


def test_a_finished_run_that_goes_on_is_no_longer_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"limit_train": 32, "batch_size": 8, "limit_test": 10}
    assert run(tmp_path / "run", **keys, max_steps=1) == 0
    assert (tmp_path / "run/summary.json").exists()
    monkeypatch.setattr(distributed.StopRequest, "poll", lambda self: signal.SIGTERM)
    assert run(tmp_path / "run", **keys) == 143
    assert not (tmp_path / "run/summary.json").exists()


def test_the_time_between_two_attempts_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that gives a second to each step, and a hundred to each pause."""
    now, steps = [0.0], [0]

    def poll(self: Any) -> int:
        now[0] += 1
        steps[0] += 1
        return signal.SIGTERM * (steps[0] == 3)

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(distributed.StopRequest, "poll", poll)
    keys = {"limit_train": 32, "batch_size": 8, "limit_test": 10, "epochs": 3}
    for last_step, code in ((3, 143), (6, 0), (12, 0)):
        assert run(tmp_path / "run", **keys, max_steps=max(last_step, 6)) == code
        now[0] += 100
        assert steps[0] == last_step
    lines = metrics(tmp_path / "run", timing=True)
    assert [line["seconds"] for line in lines] == [4, 4, 4]
    assert [line["images_per_second"] for line in lines] == [8, 8, 8]


def test_max_steps_below_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", max_steps=3) == 0
    assert run(tmp_path / "run", max_steps=2) == 0
    assert "is already finished" in capsys.readouterr().out
    (tmp_path / "run/summary.json").unlink()  # as if it had been stopped
    check_refusal(run(tmp_path / "run", max_steps=2), capsys, "max-steps 2: the run is at step 3 already")


def test_max_steps_where_the_run_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In mid-epoch there are no figures to end with."""
    with monkeypatch.context() as patch:
        patch.setattr(distributed.StopRequest, "poll", lambda self: signal.SIGTERM)
        assert run(tmp_path / "run") == 143
    capsys.readouterr()
    check_refusal(run(tmp_path / "run", max_steps=1), capsys, "max-steps 1: the run is at step 1 already")
    assert run(tmp_path / "run", max_steps=2) == 0


def test_a_partial_epoch_is_told_once_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(tmp_path / "run", max_steps=2) == 0
    assert run(tmp_path / "run") == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [4, 8, 12]


def test_a_command_that_resumes_may_be_given_again(
    teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As Slurm and torchrun do, with what the first attempt has made of it."""
    keys, polls = at_kd(teacher), iter(range(1, 99))
    monkeypatch.setattr(
        distributed.StopRequest, "poll", lambda self: signal.SIGTERM * (next(polls) in (2, 5))
    )
    assert run(tmp_path / "old", **keys) == 143
    assert run(tmp_path / "new", **keys, resume=tmp_path / "old") == 143
    assert steps_done(tmp_path / "new") == 5
    assert run(tmp_path / "new", **keys, resume=tmp_path / "old") == 0
    assert "already continues" in capsys.readouterr().out
    check_same(tmp_path / "new", student)


def test_a_run_that_was_overtaken_before_it_began(tmp_path: Path) -> None:
    """Between looking at the folder and claiming it lie the data and the models."""
    late = Run(make_config(SMALL | {"seed": 7, "output-dir": tmp_path / "run"}), Ranks(0, 1, CPU))
    assert run(tmp_path / "run") == 0
    before = fingerprint(tmp_path / "run")
    with pytest.raises(ConfigError, match="another training has just been at work there"):
        late.train()
    assert fingerprint(tmp_path / "run") == before


def test_a_tail_that_max_steps_never_reaches_may_be_one_image(tmp_path: Path) -> None:
    keys = {"student": "resnet-18", "limit_train": 33, "batch_size": 32, "epochs": 1}
    assert run(tmp_path / "run", **keys, max_steps=1) == 0


@pytest.mark.slow
def test_two_trainings_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    process = start(folder, epochs=50, checkpoint_every=1)
    try:
        wait_for_step(folder, 1, process)
        assert run(folder, epochs=50, checkpoint_every=1) == 2
        assert "another training is at work there" in capsys.readouterr().err
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert run(folder, epochs=50, checkpoint_every=1, max_steps=steps_done(folder) + 1) == 0, (
        "freed by the kill"
    )


def test_signal_at_the_last_step_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.StopRequest, "poll", lambda self: signal.SIGTERM)
    assert run(tmp_path / "run", max_steps=1) == 0
    assert (tmp_path / "run/summary.json").exists()


def test_interrupted_at_every_step_is_the_same_run(teacher: Path, student: Path, tmp_path: Path) -> None:
    """Continued at each step (max-steps), also where an epoch is cut, and from a path."""
    folder = tmp_path / "run"
    for steps in (1, 3, 4, 6, 8, 11, 12):
        assert run(folder, **at_kd(teacher), max_steps=steps) == 0
        assert len(metrics(folder)) == -(-steps // 4)
    check_same(folder, student)
    assert run(tmp_path / "copy", **at_kd(teacher), resume=folder, max_steps=12) == 0
    check_same(tmp_path / "copy", student)


def test_random_numbers_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the dropout of a model would draw them, one at each step."""
    keys = {"limit_train": 32, "batch_size": 8, "limit_test": 10, "epochs": 2}
    drawn: list[float] = []

    def poll_that_stops_after(*steps: int) -> Any:
        def poll(self: Any) -> int:
            drawn.append(torch.rand(1).item())
            return signal.SIGTERM * (len(drawn) in steps)

        return poll

    monkeypatch.setattr(distributed.StopRequest, "poll", poll_that_stops_after())
    assert run(tmp_path / "whole", **keys) == 0
    whole = drawn.copy()
    assert len(set(whole)) == 8
    drawn.clear()
    monkeypatch.setattr(distributed.StopRequest, "poll", poll_that_stops_after(3, 4))
    for code in (143, 143, 0):
        assert run(tmp_path / "parts", **keys) == code
    assert drawn == whole


def test_each_rank_gets_its_own_random_numbers_and_sums_back() -> None:
    def state(rank: int, world: int) -> TrainState:
        learner = Student(torch.nn.Linear(2, 2), {})
        optimizer = torch.optim.SGD(learner.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return TrainState(learner, optimizer, scaler, Ranks(rank, world, CPU))

    expected, ranks, stored = [], [], {}
    for rank in range(2):
        alone = state(0, 1)
        alone.sums += rank + 1
        torch.manual_seed(rank)
        stored = alone.collect() or {}
        ranks += stored["ranks"]
        expected.append(torch.rand(1))
    for rank in range(2):
        again = state(rank, 2)
        again.restore(stored | {"ranks": ranks})
        assert torch.rand(1) == expected[rank]
        assert again.sums.tolist() == [rank + 1] * 6


def test_the_teacher_of_a_run_may_move_but_not_change(
    teacher: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "first/model.pt"
    weights.parent.mkdir()
    shutil.copy(teacher / "model.pt", weights)
    assert run(tmp_path / "run", **at_kd(weights.parent), max_steps=5) == 0
    moved = weights.parent.rename(tmp_path / "second")
    state = torch.load(moved / "model.pt", weights_only=True)
    torch.save(state | {"fc.bias": state["fc.bias"] + 1e-3}, moved / "model.pt")
    before = fingerprint(tmp_path / "run")
    capsys.readouterr()
    check_refusal(
        run(tmp_path / "run", **at_kd(moved)), capsys, "second/model.pt holds different weights from"
    )
    assert fingerprint(tmp_path / "run") == before
    torch.save({"model": state}, moved / "model.pt")  # the same in another wrapping
    assert run(tmp_path / "run", **at_kd(moved)) == 0
    assert (tmp_path / "run/model.pt").read_bytes() == (student / "model.pt").read_bytes()

    old = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    del old["teacher"]  # as earlier versions wrote it: of the teacher its path is known
    torch.save(old, tmp_path / "run/checkpoint.pt")
    assert run(tmp_path / "run", **at_kd(moved)) == 0
    capsys.readouterr()
    check_refusal(run(tmp_path / "run", **at_kd(teacher)), capsys, "teacher-checkpoint differ")


@pytest.mark.parametrize("step, known", [(4, True), (6, False)])
def test_a_checkpoint_from_before_there_were_losses_by_tap(
    step: int, known: bool, teacher: Path, student: Path, tmp_path: Path
) -> None:
    """Continued, it is the same run; its epoch has none, rather than wrong ones."""
    folder = tmp_path / "run"
    assert run(folder, **at_kd(teacher), max_steps=step) == 0
    old = torch.load(folder / "checkpoint.pt", weights_only=True)
    for rank in old["ranks"]:
        rank["sums"] = rank["sums"][:6].clone()
    checkpoint.save(folder / "checkpoint.pt", old)
    assert run(folder, **at_kd(teacher)) == 0
    assert (folder / "model.pt").read_bytes() == (student / "model.pt").read_bytes()
    expected = metrics(student)
    if not known:
        expected[1] = {key: value for key, value in expected[1].items() if "/" not in key}
    assert metrics(folder) == expected


def test_killed_before_its_results(teacher: Path, student: Path, tmp_path: Path) -> None:
    """Between the last checkpoint and summary.json, and with a line of metrics that the checkpoint lacks."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "checkpoint.pt"):
        (folder / name).write_bytes((student / name).read_bytes())
    (folder / "metrics.jsonl").write_text((student / "metrics.jsonl").read_text() * 2)
    assert run(folder, **at_kd(teacher)) == 0
    check_same(folder, student)


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write_atomically(tmp_path / "a", b"old")

    def crash(fd: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(
        ConfigError, match=r"cannot write .*a: power cut \(the file that was there is intact\)"
    ):
        checkpoint.write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_diverged_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", lr=1e30, lr_schedule="constant") == 1
    assert "not finite at step 2: loss" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoint.pt").exists()  # none with broken weights


def test_weights_that_are_not_finite_after_the_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of which neither a loss nor a gradient has told yet."""
    assert run(tmp_path / "run", lr=1e300, lr_schedule="constant", max_steps=1) == 1
    assert "the weights are not finite after epoch 1" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.parametrize("keys, code", [({}, 0), ({"lr": 1e300}, 1)], ids=["finished", "diverged"])
def test_signals_are_given_back(
    keys: dict[str, Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To whoever had them; in between they are the training's."""

    def mine(number: int, frame: Any) -> None: ...

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    during: list[Any] = []
    monkeypatch.setattr(
        distributed.StopRequest, "poll", lambda self: during.extend(map(signal.getsignal, numbers))
    )
    before = [signal.signal(number, mine) for number in numbers]
    try:
        assert run(tmp_path / "run", **keys, lr_schedule="constant", max_steps=1) == code
        assert [signal.getsignal(number) for number in numbers] == [mine] * 3
        assert len(during) == 3
        assert mine not in during
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
