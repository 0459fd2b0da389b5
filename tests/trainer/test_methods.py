"""The methods besides AT and KD in the trainer: against plain loops, resumed, and over several ranks."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import runs
import test_importers
import torch
import torch.nn.functional as F
import truth
import yaml
from cases import exact
from runs import SMALL, check_refusal, check_same, dashed, flags, metrics, run
from torch import Tensor, nn

import models
import train
from at_fused import _hooks
from trainer import data, loop
from trainer.config import Config, make_config
from trainer.data import in_memory
from trainer.distributed import Ranks
from trainer.methods import METHODS as TABLE
from trainer.methods import Batch
from trainer.objectives import objective
from trainer.run import Run

METHODS = ("hints", "grad-at", "symmetry", "min-l2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a teacher that knows a little."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert run(folder, student="wrn-10-2", epochs=2) == 0
    return folder / "model.pt"


def keys_of(method: str, teacher: Path) -> dict[str, Any]:
    return {"method": method, "teacher": "wrn-10-2", "teacher_checkpoint": teacher}


# --- the step -----------------------------------------------------------------------------------------


def groups(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    feats = []
    x = model.conv(x)
    for group in (model.group1, model.group2, model.group3):
        x = group(x)
        feats.append(x)
    return model.fc(F.relu(model.bn(x)).mean((2, 3))), feats


def gradient(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x, create_graph=True)[0]


def term_by_hand(
    method: str, plain: Any, guide: Any, hints: Any, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and transfer term of a batch."""
    x = x.detach().requires_grad_()
    logits, feats = groups(plain, x)
    ce = F.cross_entropy(logits, y)
    if method == "hints":
        with torch.no_grad():
            targets = groups(guide, x)[1]
        pairs = zip(hints.regressors, feats, targets, strict=True)
        units = [(F.normalize(r(s).flatten(1)), F.normalize(t.flatten(1))) for r, s, t in pairs]
        return [ce, torch.stack([(s - t).square().sum(1).mean() for s, t in units]).sum()]
    j = gradient(logits, x, y)
    if method == "min-l2":
        return [ce, j.square().sum() / (2 * len(x))]
    if method == "grad-at":
        other = gradient(groups(guide, x)[0], x, y).detach()
        return [ce, (j - other).square().sum() / (2 * len(x))]
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # the second pass leaves no trace
        norm.momentum = 0.0
    mirrored = x.detach().flip(3).requires_grad_()
    out = groups(plain, mirrored)[0]
    for norm in norms:
        norm.momentum = 0.1
    distance = (j - gradient(out, mirrored, y).flip(3)).square().sum() / 2
    return [ce, (distance + 0.25 * (logits - out).square().sum()) / len(x)]


@pytest.mark.parametrize("method", METHODS)
def test_training_step_against_a_plain_loop(method: str, teacher: Path, tmp_path: Path) -> None:
    keys = SMALL | {"epochs": 2, "lr-schedule": "constant", "lr": 0.01, "output-dir": str(tmp_path)}
    keys |= {key.replace("_", "-"): str(value) for key, value in keys_of(method, teacher).items()}
    keys |= {"beta": 3, "beta-schedule": "linear", "output-weight": 0.25, "weight-decay": 0.1}
    ours = Run(make_config(keys), Ranks(0, 1, torch.device("cpu")))
    plain: Any = models.create("wrn-10-1")
    plain.load_state_dict(ours.student.state_dict())
    guide = models.create("wrn-10-2").eval()
    guide.load_state_dict(torch.load(teacher, weights_only=True))
    hints = None
    if method == "hints":
        hints = nn.Module()
        hints.regressors = nn.ModuleList(nn.Conv2d(16 * 2**i, 32 * 2**i, 1) for i in range(3))
        hints.load_state_dict(ours.learner.beside["hints"].state_dict())
    parameters = [*plain.parameters(), *(hints.parameters() if hints else [])]
    optimizer = torch.optim.SGD(parameters, 0.01, 0.9, weight_decay=0.1)

    totals = []
    for epoch in range(2):
        plan = in_memory.plan_epoch(ours.dataset, 0, epoch)  # type: ignore[arg-type]
        totals.append(0.0)
        plain.train()
        for i in range(4):
            part = slice(64 * i, min(64 * i + 64, 200))
            x, y = in_memory.training_batch(ours.dataset, plan, part)  # type: ignore[arg-type]
            ce, term = term_by_hand(method, plain, guide, hints, x.contiguous(), y)
            loss = ce + 3 * (1 - (4 * epoch + i) / 8) * term
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals[-1] += loss.item() * len(y) / 200
    start = [weight.clone() for weight in ours.student.state_dict().values()]
    assert ours.train() == 0
    lines = metrics(tmp_path)
    assert [line["train_loss"] for line in lines] == pytest.approx(totals, rel=1e-3)
    for line in lines:
        assert line["train_loss"] == pytest.approx(line["ce_loss"] + line["at_loss"], rel=1e-6)
        assert line["at_loss"] > 0
    ends = zip(start, ours.student.state_dict().items(), plain.state_dict().values(), strict=True)
    for before, (name, after), expected in ends:
        if after.is_floating_point():
            assert (after - expected).norm() / (expected - before).norm() < 0.02, name
    if hints is not None:
        for (name, after), expected in zip(
            ours.learner.beside["hints"].named_parameters(),
            hints.parameters(),
            strict=True,
        ):
            torch.testing.assert_close(after, expected, rtol=1e-2, atol=1e-3, msg=name)


def exact_attention(config: Config, students: list[Tensor], teachers: list[Tensor]) -> float:
    """Before beta."""
    options = {"mapping": config.mapping, "distance": config.distance, "norm_order": config.norm_order}
    normalize = None if config.normalize == "none" else config.normalize
    feats = [[exact(feat) for feat in side] for side in (students, teachers)]
    return float(truth.attention_loss(*feats, config.p, normalize=normalize, **options).values.sum())


def exact_distillation(config: Config, logits: Tensor, teachers: Tensor, labels: Tensor) -> float:
    both = exact(logits), exact(teachers)
    return truth.distillation(*both, labels.numpy(), config.temperature, config.alpha)[0]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"p": 1},
        {"p": 4},
        {"p": 1, "mapping": "max"},
        {"normalize": "l1"},
        {"normalize": "none"},
        {"distance": "norm"},
        {"distance": "norm", "norm-order": 1},
        {"beta": 30},
        {"taps": ["group3"]},
        {"temperature": 2},
        {"alpha": 0.3},
    ],
    ids=lambda keys: ",".join(f"{key}={value}" for key, value in keys.items()) or "defaults",
)
def test_options_of_attention_and_distillation_reach_the_loss(keys: dict[str, Any]) -> None:
    """Each changes it to what its formula says: otherwise the rows of Table 2 could all be F²_sum."""
    both = {"student": "wrn-10-1", "teacher": "wrn-10-2", "teacher-checkpoint": "t", "method": "at+kd"}
    defaults = make_config({"dataset": "digits", **both})
    config = make_config({"dataset": "digits", **both, **keys})
    networks = [models.create(name).eval() for name in ("wrn-10-1", "wrn-10-2")]
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([3, 1, 4, 1])
    method = TABLE[config.method](config, *networks, images[:1])
    losses, _ = objective(method, networks[0], images, labels, config.beta / 2)

    with torch.no_grad():
        (logits, students), (t_logits, teachers) = (groups(net, images) for net in networks)
    compared = slice(2, 3) if "taps" in keys else slice(3)

    def expected(config: Config, compared: slice) -> list[float]:
        at = config.beta / 2 * exact_attention(config, students[compared], teachers[compared])
        return [at, exact_distillation(config, logits, t_logits, labels)]

    found = [losses.at.item(), losses.kd.item()]
    assert found == pytest.approx(expected(config, compared), rel=1e-5)
    assert losses.total.item() == pytest.approx(sum(found), rel=1e-6)
    assert (found == pytest.approx(expected(defaults, slice(3)), rel=1e-3)) is (keys == {})


def test_metrics_are_means_over_the_images(teacher: Path, tmp_path: Path) -> None:
    """Of weights that stand still, where batches and their parts are of unequal size."""
    keys = keys_of("at+kd", teacher) | {"beta_schedule": "constant", "lr": 1e-30, "freeze_bn": "true"}
    keys |= {"augment": "none", "limit_train": 40, "batch_size": 16, "limit_test": 30, "epochs": 2}
    keys |= {"accumulate": 3}
    assert run(tmp_path / "run", **keys, lr_schedule="cosine") == 0
    config = make_config(yaml.safe_load((tmp_path / "run/config.yaml").read_text()))
    plain, guide = models.create("wrn-10-1").eval(), models.create("wrn-10-2").eval()
    plain.load_state_dict(torch.load(tmp_path / "run/model.pt", weights_only=True))
    guide.load_state_dict(torch.load(teacher, weights_only=True))
    dataset = data.load(config, torch.device("cpu"))
    ((images, labels),) = dataset.training_batches(0, 0, [slice(0, 40)])
    with torch.no_grad():
        (logits, students), (t_logits, teachers) = groups(plain, images), groups(guide, images)
    at = config.beta * exact_attention(config, students, teachers)
    kd = exact_distillation(config, logits, t_logits, labels)
    for line, step in zip(metrics(tmp_path / "run"), (2, 5), strict=True):  # the last of an epoch
        assert line["lr"] == pytest.approx(1e-30 * (1 + math.cos(math.pi * step / 6)) / 2, abs=0)
        assert line["at_loss"] == pytest.approx(at, rel=1e-4)
        for name, pair in zip(
            ("group1", "group2", "group3"), zip(students, teachers, strict=True), strict=True
        ):
            part = config.beta * exact_attention(config, *([feature] for feature in pair))
            assert line[f"at_loss/{name}"] == pytest.approx(part, rel=1e-4)
        assert line["kd_loss"] == pytest.approx(kd, rel=1e-4)
        assert line["ce_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
        assert line["train_loss"] == pytest.approx(at + kd, rel=1e-4)
        assert line["train_error"] == 100 * (logits.argmax(1) != labels).sum().item() / 40


@pytest.mark.parametrize("bn", ["running", "update"])
def test_batch_norm_of_the_gradient_passes(bn: str, tmp_path: Path) -> None:
    """At beta 0 nothing is trained by the term: what differs is the statistics that `update` counts twice."""
    for method in ("none", "symmetry"):
        keys = {"method": method, "beta": 1e-30, "gradient_bn": bn, "epochs": 1, "limit_train": 64}
        assert run(tmp_path / method, **keys) == 0
    plain, other = (torch.load(tmp_path / m / "model.pt", weights_only=True) for m in ("none", "symmetry"))
    for name, value in plain.items():
        counts = name.endswith("num_batches_tracked")
        if counts and bn == "update":
            assert other[name] == 2 * value
        elif "running" not in name or bn == "running":
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-8)
    moved = not torch.equal(plain["bn.running_mean"], other["bn.running_mean"])
    assert moved is (bn == "update")


def test_terms_start_at_their_epoch(teacher: Path, tmp_path: Path) -> None:
    for method in ("hints", "min-l2"):
        keys = keys_of(method, teacher) | {"at_start_epoch": 1, "epochs": 2}
        assert run(tmp_path / method, **keys) == 0
        assert [line["at_loss"] > 0 for line in metrics(tmp_path / method)] == [False, True]


@pytest.mark.parametrize("method", METHODS)
def test_bf16_trains(method: str, teacher: Path, tmp_path: Path) -> None:
    keys = keys_of(method, teacher) | {"amp": "bf16", "channels_last": "true", "epochs": 1, "limit_train": 72}
    assert run(tmp_path / "run", **keys) == 0
    (line,) = metrics(tmp_path / "run")
    assert 0 < line["at_loss"] < 100


def test_hints_learn_under_fp16(teacher: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run", **keys_of("hints", teacher), amp="fp16", max_steps=2, batch_size=8) == 0
    assert 0 < metrics(tmp_path / "run")[0]["at_loss"] < 100


def test_table_3_student_and_taps_on_convolutions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    torch.save(models.create("nin-thin-rawpool").state_dict(), tmp_path / "teacher.pt")
    keys = {
        "student": "nin-thin-nobn-rawpool", "teacher": "nin-thin-rawpool", "method": "at", "taps": "convs",
        "teacher_checkpoint": tmp_path / "teacher.pt", "augment": "flip", "weight_decay": 0, "lr": 0.01,
        "limit_train": 64, "epochs": 1,
    }  # fmt: skip
    assert run(tmp_path / "run", **keys) == 0
    assert "AT block3.conv3 88x4x4 <- block3.conv3 88x4x4: beta 0.977 per element" in capsys.readouterr().out


def test_one_group_alone(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", **keys_of("at", teacher), taps="group2", epochs=1, limit_train=64) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("AT ")]
    assert lines == ["AT group2 32x8x8 <- group2 64x8x8: beta 0.244 per element"]


class Passes:
    """Counts a network's passes."""

    def __init__(self, network: nn.Module) -> None:
        self.count = 0
        network.register_forward_hook(lambda *_: setattr(self, "count", self.count + 1))


@pytest.mark.parametrize("method", ["at", "at+kd", "hints"])
def test_passes_are_recorded_where_the_term_is_used(
    method: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a test, nor while beta is 0: there the teacher runs for its logits alone."""
    recorded: list[str] = []
    tap = _hooks._Tap.tap
    monkeypatch.setattr(
        _hooks._Tap, "tap", lambda self, *args: recorded.append(self.selector.name) or tap(self, *args)
    )
    keys = dashed(keys_of(method, teacher)) | {"at-start-epoch": 1, "accumulate": 2}
    ours = Run(make_config(SMALL | keys | {"output-dir": tmp_path}), Ranks(0, 1, torch.device("cpu")))
    network = ours.teacher.network
    teachers = Passes(network)
    (batch,) = ours.dataset.training_batches(0, 0, [slice(0, 8)])
    recorded.clear()

    loop.evaluate(ours, ours.student)
    loop.evaluate(ours, network)
    assert not recorded
    seen, teachers.count = teachers.count, 0
    assert seen
    loop.train_step(ours, *batch, 8)
    always = method == "hints"  # whose regressors need a gradient in every step
    assert teachers.count == (0 if method == "at" else 2)
    assert len(recorded) == (12 if always else 0)
    recorded.clear()
    ours.progress.step = ours.steps_per_epoch
    loop.train_step(ours, *batch, 8)
    assert len(recorded) == 12  # three groups of two networks, in two parts
    assert ours.sums[2] > 0
    loop.evaluate(ours, ours.student)
    with pytest.raises(RuntimeError, match="has not reached the tapped modules"):  # nothing is left behind
        ours.method.term(Batch(*batch, batch[0], None), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["at", "at+kd", "hints"])
def test_compiled_terms_start_at_their_epoch(
    method: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.compile_without_code(monkeypatch)
    keys = keys_of(method, teacher) | {"at_start_epoch": 1, "epochs": 2, "limit_train": 128, "lr": 0.001}
    for compiled in ("false", "true"):
        assert run(tmp_path / compiled, **keys, compile=compiled) == 0
    eager, lines = metrics(tmp_path / "false"), metrics(tmp_path / "true")
    for ours, theirs in zip(lines, eager, strict=True):
        for key in ("train_loss", "ce_loss", "at_loss", "test_loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    assert [line["at_loss"] > 0 for line in lines] == [False, True]


# --- what is told, and what is refused ----------------------------------------------------------------


@pytest.mark.parametrize(
    "method, keys, told",
    [
        ("at", {}, ["beta 1000, constant", "AT group3 64x4x4 <- group3 128x4x4: beta 0.977 per element"]),
        ("at", {"distance": "norm"}, ["AT group3 64x4x4 <- group3 128x4x4: beta 15.6 per image"]),
        ("hints", {}, ["beta 10, linear", "beta 0.156 per image, regressor 1x1, 64 to 128"]),
        ("hints", {"student": "wrn-16-2"}, ["hints group3 128x4x4 <- group3 128x4x4: ", "regressor none"]),
        ("grad-at", {"beta": 32}, ["beta 32, constant", "grad-at at the input: beta/2 0.25 per image"]),
        ("min-l2", {"gradient_layer": "group1"}, ["min-l2 at the output of group1: beta/2 "]),
        ("symmetry", {"at_start_epoch": 1}, ["constant from epoch 1"]),
        ("none", {}, []),
    ],
)
def test_effective_weights_are_told(
    method: str,
    keys: dict[str, Any],
    told: list[str],
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path / "run", **keys_of(method, teacher), **keys, max_steps=1) == 0
    out = capsys.readouterr().out
    for line in told:
        assert line in out
    assert ("beta" in out) is bool(told)


def test_maps_of_one_position_are_told() -> None:
    """Once, by the run's description: normalised, such a map is 1 whatever the features are."""
    keys = dashed(keys_of("at", Path("t"))) | {
        "student": "resnet-18",
        "teacher": "resnet-18",
        "data-dir": "d",
    }
    for normalize in ("l2", "l1", "none"):
        config = make_config(keys | {"taps": ["layer2", "layer4"], "normalize": normalize})
        nets = [models.create("resnet-18").eval() for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            method = TABLE["at"](config, *nets, torch.zeros(1, 3, 16, 16))
            losses, _ = objective(method, nets[0], torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), 1000.0)
        lines = method.describe(50)[1:]
        assert lines[0] == "AT layer2 128x2x2 <- layer2 128x2x2: beta 5 per element"
        constant = "loss 0, a normalised map of one position is always 1"
        told = "beta 20 per element" if normalize == "none" else constant
        assert lines[1] == f"AT layer4 512x1x1 <- layer4 512x1x1: {told}"
        rounding = 1000 * (4 * torch.finfo(torch.float32).eps) ** 2
        assert (losses.taps[1] > rounding) == (normalize == "none")


@pytest.mark.parametrize(
    "method, keys, words",
    [
        ("grad-at", {"compile": "true"}, ["method grad-at", "torch.compile cannot differentiate twice"]),
        ("min-l2", {"amp": "fp16"}, ["method min-l2", "amp fp16", "bf16"]),
        ("symmetry", {"sync_bn": "true"}, ["method symmetry", "sync-bn"]),
        ("hints", {"beta_schedule": "step"}, ["beta-milestones"]),
        ("min-l2", {"gradient_layer": "group9"}, ["min-l2", "'group9'", "group1"]),
        ("grad-at", {"gradient_layer": "group1"}, ["student (1, 16, 16, 16) and teacher (1, 32, 16, 16)"]),
        ("hints", {"taps": "fc"}, ["taps", "pair 0: student (1, 10) and teacher (1, 10)"]),
        ("hints", {"taps": "group7"}, ["taps", "group7"]),
        ("hints", {"taps": ""}, ["taps []", "student_channels is empty"]),
        ("grad-at", {"teacher": "null"}, ["method grad-at needs teacher"]),
        ("grad-at", {"gradient_bn": "eval"}, ["gradient-bn", "'running'"]),
    ],
)
def test_refusals(
    method: str,
    keys: dict[str, Any],
    words: list[str],
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_refusal(run(tmp_path / "new", **keys_of(method, teacher) | keys), capsys, *words)
    assert not (tmp_path / "new").exists()


def test_hints_of_other_sizes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(models.create("resnet-18").state_dict(), tmp_path / "resnet.pt")
    keys = {"method": "hints", "teacher": "resnet-18", "teacher_checkpoint": tmp_path / "resnet.pt"}
    words = ("taps groups", "wrn-10-1 has 3", "resnet-18 4")
    check_refusal(run(tmp_path / "new", **keys), capsys, *words)
    keys |= {"student": "nin-thin", "taps": "fc"}
    check_refusal(run(tmp_path / "new", **keys), capsys, "must be (B, C, H, W)")


# --- teachers of other projects -----------------------------------------------------------------------


def test_authors_teacher_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = test_importers.authors_weights(1, 2)
    torch.save({"params": weights, "epoch": 3}, tmp_path / "model.pt7")
    keys = keys_of("at", tmp_path / "model.pt7") | {"epochs": 1, "limit_train": 64, "limit_test": 50}
    assert run(tmp_path / "run", **keys) == 0
    told = json.loads((tmp_path / "run/summary.json").read_text())["teacher_test_error"]
    test = data.load(make_config(SMALL | {"limit-test": 50}), torch.device("cpu")).test
    images = ((test.images.double() - 77.8) / 81.1).permute(0, 3, 1, 2)
    wrong = test_importers.authors_logits(weights, 1, images).argmax(1) != test.labels
    assert told == 100 * wrong.double().mean().item()
    del weights["group1.block0.bn0.bias"]
    torch.save(weights, tmp_path / "partial.pt7")
    keys |= {"teacher_checkpoint": tmp_path / "partial.pt7"}
    capsys.readouterr()
    words = ("partial.pt7", "does not fit wrn-10-2", "authors' WRN", "1 missing: group1.block0.bn0.bias")
    check_refusal(run(tmp_path / "new", **keys), capsys, *words)


# --- resuming and ranks -------------------------------------------------------------------------------


def stored_hints(folder: Path) -> Any:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["hints"]


@pytest.mark.parametrize("method", ["hints", "symmetry"])
def test_interrupted_run_is_the_same_run(method: str, teacher: Path, tmp_path: Path) -> None:
    """Bit-exactly, the regressors included."""
    keys = keys_of(method, teacher) | {"epochs": 2}
    assert run(tmp_path / "whole", **keys) == 0
    for steps in (1, 3, 4, 6, 8):
        assert run(tmp_path / "parts", **keys, max_steps=steps) == 0
    check_same(tmp_path / "parts", tmp_path / "whole")
    if method == "hints":
        parts, whole = (
            torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("parts", "whole")
        )
        assert len(parts["hints"]) == 6
        assert all(torch.equal(parts["hints"][key], whole["hints"][key]) for key in whole["hints"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_ranks_trains_the_same(method: str, teacher: Path, tmp_path: Path) -> None:
    """Double backward and regressors under DDP, with BatchNorm frozen, from before the term begins."""
    keys = keys_of(method, teacher) | {"at_start_epoch": 1, "beta": 3}
    values = runs.DISTRIBUTED | dashed(keys)
    assert train.main(flags(values | {"output-dir": tmp_path / "1"})) == 0
    done = runs.fork_ranks(2, tmp_path / "2", **keys)
    assert done.returncode == 0, done.stderr
    (alone_lines, alone), (lines, weights) = (runs.results(tmp_path / n) for n in ("1", "2"))
    for name, expected in alone.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-5)
    for line, expected_line in zip(lines, alone_lines, strict=True):
        for key in ("train_loss", "ce_loss", "at_loss", "train_error", "test_error"):
            assert line[key] == pytest.approx(expected_line[key], rel=1e-5), key
    assert [line["at_loss"] > 0 for line in lines] == [False, True]
    if method == "hints":
        checkpoints = [stored_hints(tmp_path / name) for name in ("1", "2")]
        for key, value in checkpoints[0].items():
            torch.testing.assert_close(checkpoints[1][key], value, rtol=1e-5, atol=1e-5)
