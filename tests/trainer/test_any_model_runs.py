"""Students and teachers of other libraries and of a user's own code, trained: as a loop by hand, and on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import (
    SMALL,
    check_same,
    code_of,
    dashed,
    fork_ranks,
    in_a_child,
    make_folders,
    metrics,
    results,
    run,
)
from torch import Tensor, nn
from user_code import NET

import models
from trainer import data
from trainer import run as trainer_run
from trainer.config import make_config
from trainer.torch_settings import default_dtype

RESNET = "torchvision:resnet18"
MOBILENET = {
    "student": "torchvision:mobilenet_v3_small",
    "student_args": "{width_mult: 0.25, dropout: 0}",
    "taps": "[{student: features.1, teacher: layer2}, {student: features.8, teacher: layer3, weight: 0.5}]",
}
VIT = {
    "student": "timm:vit_tiny_patch16_224",
    "student_args": "{img_size: 64, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}",
    "taps": '{"blocks.1[:, 1:]": layer3}',
}


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run on a folder of images of three classes, with a ResNet-18 as its teacher."""
    folder = make_folders(tmp_path_factory.mktemp("image-folder"), train=8, val=2)
    torch.manual_seed(7)
    torch.save(models.architecture(RESNET).create(3).state_dict(), folder / "teacher.pt")
    return {
        "dataset": "imagefolder", "data_dir": folder, "image_size": 64, "limit_train": 24, "limit_test": 6,
        "batch_size": 6, "epochs": 2, "lr": 0.01, "lr_schedule": "constant", "method": "at",
        "teacher": RESNET, "teacher_checkpoint": folder / "teacher.pt",
    }  # fmt: skip


@pytest.fixture(scope="module")
def small_keys(code: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run of the user's network on digits, with a network of the zoo as its teacher."""
    path = tmp_path_factory.mktemp("teacher") / "model.pt"
    torch.manual_seed(7)
    torch.save(models.create("wrn-10-1").state_dict(), path)
    return {
        "student": f"{code}:small", "method": "at", "teacher": "wrn-10-1", "teacher_checkpoint": path,
        "taps": "{1: group2, 2: group3}", "lr": 0.01,
    }  # fmt: skip


def outputs(model: nn.Module, names: list[str], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: found.__setitem__(name, output)

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, [found[name] for name in names]


def squares(feature: Tensor) -> Tensor:
    """F_sum^2 of (B, C, H, W), and of 1 + 8 x 8 tokens (B, N, C), as (B, H, W)."""
    if feature.ndim == 3:
        return feature[:, 1:].pow(2).sum(2).unflatten(1, (8, 8))
    return feature.pow(2).sum(1)


def at_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The authors' at_loss, with the teacher's map resized."""
    s, t = squares(student), squares(teacher)
    t = F.interpolate(t[:, None], s.shape[1:], mode="bilinear")[:, 0] if s.shape != t.shape else t
    return (F.normalize(s.flatten(1)) - F.normalize(t.flatten(1))).pow(2).mean()


@pytest.mark.parametrize(
    "student, pairs",
    [
        (MOBILENET, [("features.1", "layer2", 1.0), ("features.8", "layer3", 0.5)]),
        (VIT, [("blocks.1", "layer3", 1.0)]),
    ],
    ids=["mobilenet", "vit"],
)
def test_the_same_weights_as_a_loop_by_hand(
    student: dict[str, str], pairs: list[tuple[str, str, float]], keys: dict[str, Any], tmp_path: Path
) -> None:
    """24 steps in fp64: maps of two sizes, weights, tokens against a grid."""
    if "timm" in student["student"]:
        pytest.importorskip("timm")
    keys = keys | {"epochs": 3, "batch_size": 3}
    config = make_config(
        SMALL | dashed(keys | student) | {"precision": "fp64", "output-dir": tmp_path / "run"}
    )
    assert run(tmp_path / "run", **keys, **student, precision="fp64") == 0
    assert all(line["at_loss"] > 0 for line in metrics(tmp_path / "run"))
    found = torch.load(tmp_path / "run/model.pt", weights_only=True)

    torch.manual_seed(0)
    with default_dtype(config):
        model = models.architecture(config.student).create(3, **config.student_args).train()
        guide = models.architecture(RESNET).create(3).eval().requires_grad_(False)
        guide.load_state_dict(torch.load(keys["teacher_checkpoint"], weights_only=True))
        images = data.load(config, torch.device("cpu"))
        start = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        for epoch in range(3):
            parts = [slice(i, i + 3) for i in range(0, 24, 3)]
            for x, y in images.training_batches(0, epoch, parts):
                teachers = outputs(guide, [t for _, t, _ in pairs], x)[1]
                logits, students = outputs(model, [s for s, _, _ in pairs], x)
                terms = [w * at_loss(s, t) for s, t, (_, _, w) in zip(students, teachers, pairs, strict=True)]
                loss = F.cross_entropy(logits, y) + 1000 * sum(terms)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    moved = max((found[name] - start[name]).abs().max().item() for name in start)
    assert moved > 1e-2  # so that the tolerance says something
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-10)


def test_bf16_learns_nearly_the_same(keys: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("timm")
    losses = {}
    for amp in ("none", "bf16"):
        assert run(tmp_path / amp, **keys | VIT | {"amp": amp, "epochs": 1, "lr": 1e-4}) == 0
        (line,) = metrics(tmp_path / amp)
        losses[amp] = [line["ce_loss"], line["at_loss"]]
    assert losses["bf16"] == pytest.approx(losses["none"], rel=16 * torch.finfo(torch.bfloat16).eps)


def test_a_killed_run_goes_on_from_another_folder(
    code: Path, small_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, dropout included; the command names the user's file from where it is given."""
    assert run(tmp_path / "whole", **small_keys) == 0
    monkeypatch.chdir(code.parent)
    keys = small_keys | {"student": "net.py:small", "checkpoint_every": 2}

    def killed() -> int:
        save = trainer_run.Run.save

        def deadly(self: trainer_run.Run, **options: Any) -> None:
            save(self, **options)
            if self.progress.step == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer_run.Run.save = deadly  # type: ignore[method-assign]
        return run(tmp_path / "run", **keys)

    assert code_of(in_a_child(killed)) == -signal.SIGKILL
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "run", **keys | {"student": f"{os.path.relpath(code)}:small"}) == 0
    check_same(tmp_path / "run", tmp_path / "whole")


def test_code_that_changed_in_between(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line names the files, also those that the factory's imports; a cache of such a teacher is refused."""
    net, blocks = tmp_path / "net_of_a_test.py", tmp_path / "blocks_of_a_test.py"
    net.write_text(f"import {blocks.stem}\n{NET}")
    blocks.write_text("WIDTH = 8\n")
    name, weights, cache = f"{net}:small", tmp_path / "teacher.pt", tmp_path / "cache"
    alone = {"student": name, "limit_train": 64, "max_steps": 1}
    taught = {"student": "wrn-10-1", "limit_train": 64, "epochs": 1, "method": "kd", "teacher": name}
    taught |= {"teacher_checkpoint": weights, "augment_cycle": 1, "teacher_cache": cache}

    def first() -> int:
        torch.save(models.architecture(name).create(10).state_dict(), weights)
        return run(tmp_path / "alone", **alone) or run(tmp_path / "taught", **taught)

    assert code_of(in_a_child(first)) == 0
    blocks.write_text("WIDTH = 8  # as published\n")
    net.write_text(f"{net.read_text()}\n")
    assert run(tmp_path / "alone", **alone | {"max_steps": 2}) == 0
    told = f"warning: student {name}: {net}, {blocks} changed since the checkpoint was written; "
    assert told in capsys.readouterr().out
    refused(taught, tmp_path, capsys, f"{cache} was made for something else: other teacher's code; ")
    assert run(tmp_path / "alone", **alone | {"max_steps": 3}) == 0
    assert "warning" not in capsys.readouterr().out


def test_two_ranks_train_the_same(small_keys: dict[str, Any], tmp_path: Path) -> None:
    keys = small_keys | {"student_args": "{drop: 0.0}", "precision": "fp64", "freeze_bn": "false"}
    for ranks in (1, 2):
        done = fork_ranks(ranks, tmp_path / str(ranks), **keys)
        assert done.returncode == 0, done.stderr
    (lines, weights), (expected_lines, expected) = (results(tmp_path / name) for name in ("2", "1"))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-10)
    assert lines[-1]["at_loss"] == pytest.approx(expected_lines[-1]["at_loss"], rel=1e-10)


@pytest.mark.slow
def test_compiled_it_learns_the_same(small_keys: dict[str, Any], tmp_path: Path) -> None:
    """The teacher is the user's, too."""
    own = {"student_args": "{drop: 0.0}", "teacher": small_keys["student"], "teacher_args": "{width: 4}"}
    torch.save(models.architecture(own["teacher"]).create(10, width=4).state_dict(), tmp_path / "t.pt")
    keys = small_keys | own | {"teacher_checkpoint": tmp_path / "t.pt", "taps": "1,2", "epochs": 1}
    keys |= {"limit_train": 64, "limit_test": 32, "batch_size": 32, "test_batch_size": 32}  # to compile once
    losses = {}
    for compiled in ("false", "true"):
        assert run(tmp_path / compiled, **keys, compile=compiled) == 0
        losses[compiled] = [metrics(tmp_path / compiled)[0][key] for key in ("ce_loss", "at_loss")]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)


# --- taps -------------------------------------------------------------------------------------------------


def refused(keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    from runs import check_refusal

    check_refusal(run(tmp_path / "new", **keys), capsys, *words)
    assert not (tmp_path / "new").exists()


def test_groups_of_any_networks(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The modules that end each resolution; where they are not as many, pairs of one size to write."""
    mobile = keys | MOBILENET | {"taps": "groups", "max_steps": 1, "epochs": 1}
    assert run(tmp_path / "run", **mobile) == 0
    out = capsys.readouterr().out
    assert "AT features.8 16x4x4 <- layer3 256x4x4: beta " in out
    more = mobile | {"teacher": "resnet-18"}  # the zoo's, which names four
    told = "{features.1: layer1, features.3: layer2, features.8: layer3, features: layer4}"
    refused(more, tmp_path, capsys, "taps groups: torchvision:mobilenet_v3_small has 5 and resnet-18 4", told)
    assert run(tmp_path / "told", **more | {"taps": told}) == 0  # it is what to write


def test_pairs_that_cannot_be_compared(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mobile = keys | MOBILENET
    cases: list[tuple[str, list[str]]] = [
        ("{features.8: layer9}", ["of teacher torchvision:resnet18: no submodule named 'layer9'; close"]),
        ("{features.99: layer3}", ["of student torchvision:mobilenet_v3_small: no submodule named"]),
        ("{features.8: fc}", ["'features.8'", "fc"]),
        ("[{student: features.8, teacher: layer3, wieght: 2}]", ["wieght is unknown (there are student,"]),
        ("[{teacher: layer3}]", ["student is missing"]),
        ("[{student: features.8, weight: -1}]", ["weight input should be greater than or equal to 0"]),
        ("{features.8: layer3", ["taps: is no YAML"]),
        ("{features.8: 1.5}", ["taps: 1.5 is no name of a module"]),
        ("[{student: features.8, teacher: layer3, channel-dim: 7}]", ["features.8", "channel_dim 7"]),
    ]  # fmt: skip
    for taps, words in cases:
        refused(mobile | {"taps": taps}, tmp_path, capsys, *words)


def test_where_the_channels_are(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found for each network; of tokens that fill no grid it has to be said, for the student alone."""
    pytest.importorskip("timm")
    tokens = "{student: 'blocks.1[:, 1:]', teacher: layer3, channel-dim: -1}"
    assert run(tmp_path / "run", **keys | VIT | {"taps": f"[{tokens}]", "max_steps": 1, "epochs": 1}) == 0
    assert "AT blocks.1[:, 1:] 16x64 <- layer3 256x4x4: " in capsys.readouterr().out
    odd = keys | VIT | {"taps": '{"blocks.1[:, 3:]": layer3}'}
    refused(odd, tmp_path, capsys, "blocks.1[:, 3:] of student is (B, 62, 16)", "channel-dim: DIM")


def test_hints_of_pairs(keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens, and a pair's weight, which the losses by tap show."""
    pytest.importorskip("timm")
    losses = []
    for weight in (1, 3):
        taps = f'[{{student: "blocks.1[:, 1:]", teacher: layer3, weight: {weight}}}]'
        folder = tmp_path / str(weight)
        assert run(folder, **keys | VIT | {"taps": taps, "method": "hints", "max_steps": 1, "epochs": 1}) == 0
        losses.append(metrics(folder)[0]["at_loss"])
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-5)
    assert "hints blocks.1[:, 1:] 16x64 <- layer3 256x4x4" in capsys.readouterr().out
