"""Keys, flags, recipes and schedules: numbers against formulas, mistakes against their one line."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from paths import ROOT
from runs import dashed

import at_fused
from trainer import schedules
from trainer.command_line import FIRST, GROUPS, Action, parse_args
from trainer.config import KEYS, Config, make_config
from trainer.errors import ConfigError
from trainer.hardware import computes
from trainer.recipes import load_recipe
from trainer.resume import differences, differences_told

BASE = {"dataset": "digits", "student": "wrn-10-1"}
CONTRACT = [
    "dataset",
    "data-dir",
    "student",
    "teacher",
    "teacher-checkpoint",
    "method",
    "taps",
    "p",
    "mapping",
    "normalize",
    "distance",
    "beta",
    "beta-schedule",
    "at-start-epoch",
    "temperature",
    "alpha",
    "epochs",
    "batch-size",
    "lr",
    "lr-schedule",
    "weight-decay",
    "seed",
    "amp",
    "channels-last",
    "compile",
    "backend",
    "workers",
    "output-dir",
    "resume",
    "max-steps",
    "limit-train",
    "limit-test",
    "threads",
    "freeze-bn",
    "freeze",
    "sync-bn",
    "pretrained",
]


def config(**keys: object) -> Config:
    return make_config(BASE | dashed(keys))


def test_every_key_of_the_contract_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_args(["--help"])
    assert end.value.code == 0
    help_ = capsys.readouterr().out
    words = help_.split()
    assert [key for key in CONTRACT if f"--{key}" not in words] == []
    assert set(CONTRACT) <= set(yaml.safe_load(config().to_yaml()))
    others = {"recipe", "print-config", "eval-only", "export", "weights", "version"}
    assert set(re.findall(r"^  --([\w-]+)", help_, re.M)) == {*KEYS, *others}
    assert [f"{title}:" for title in GROUPS.values()] == re.findall(r"^\w.*:$", help_, re.M)[1:]
    assert max(map(len, help_.splitlines())) <= 80


def test_help_gives_betas_defaults_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split("--beta VALUE")[1].split("--beta-schedule")[0].split())
    assert text == "weight of the transfer term; default 1000 for at and at+kd, 10 for hints, else 1"
    expected = {"at": 1000, "at+kd": 1000, "hints": 10, "grad-at": 1, "symmetry": 1, "min-l2": 1}
    assert {method: config(**AT, method=method).beta for method in expected} == expected


def test_nothing_named_names_something_to_begin_with() -> None:
    """Which is there, needs no data, and is all that has to be typed."""
    with pytest.raises(ConfigError, match=f"python train.py {re.escape(FIRST)}") as caught:
        parse_args([])
    words = re.search(r"train\.py (.*) \(", str(caught.value))[1].split()  # type: ignore[index]
    found, action = parse_args(words)
    assert (found.dataset, found.method, action) == ("digits", "none", Action())
    with pytest.raises(ConfigError, match="student is required, such as wrn-16-1"):
        parse_args(["--dataset", "digits"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_args(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"at_fused {at_fused.__version__}, torch {torch.__version__}\n"


def test_defaults_are_the_authors() -> None:
    c = config()
    assert (c.lr, c.momentum, c.nesterov, c.weight_decay) == (0.1, 0.9, False, 5e-4)
    assert (c.batch_size, c.epochs, c.lr_milestones, c.lr_gamma) == (128, 200, [60, 120, 160], 0.2)
    assert (c.beta, c.p, c.temperature, c.alpha) == (1000.0, 2.0, 4.0, 0.9)


def test_flags_win_over_the_recipe_and_the_recipe_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text("dataset: digits\nlr: 0.5\nepochs: 7\nseed: 1\n")
    (tmp_path / "deep/own.yaml").write_text(
        "base: ../base.yaml\nstudent: wrn-10-1\nlr: 0.25\nweight-decay: 1e-4\n"
    )
    found, action = parse_args(["--recipe", str(tmp_path / "deep/own.yaml"), "--seed", "3", "--print-config"])
    assert action == Action(print_config=True)
    assert (found.epochs, found.lr, found.seed, found.weight_decay) == (7, 0.25, 3, 1e-4)


def test_of_several_bases_each_lies_over_those_before_it(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("lr: 0.5\nepochs: 7\nseed: 1\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\nlr: 0.25\nseed: 2\n")
    (tmp_path / "three.yaml").write_text("epochs: 9\n")
    (tmp_path / "own.yaml").write_text("base: [two.yaml, three.yaml]\nseed: 3\n")
    assert load_recipe(tmp_path / "own.yaml") == {"lr": 0.25, "epochs": 9, "seed": 3}


def test_printed_config_reads_back_as_itself(tmp_path: Path) -> None:
    once = config(
        taps=["group1", "group3"], freeze=["conv"], lr_schedule="onecycle", limit_train=100, amp="bf16"
    )
    (tmp_path / "printed.yaml").write_text(once.to_yaml())
    again, _ = parse_args(["--recipe", str(tmp_path / "printed.yaml")])
    assert again == once
    assert again.to_yaml() == once.to_yaml()


@pytest.mark.parametrize(
    "flags, key, value",
    [
        (["--channels-last"], "channels_last", True),
        (["--channels-last", "false"], "channels_last", False),
        (["--taps", "blocks"], "taps", "blocks"),
        (["--taps", "group1,group2"], "taps", ["group1", "group2"]),
        (["--taps", "group1", "group2"], "taps", ["group1", "group2"]),
        (["--freeze", "conv", "group1"], "freeze", ["conv", "group1"]),
        (["--lr-milestones", "3,5"], "lr_milestones", [3, 5]),
        (["--lr-milestones"], "lr_milestones", []),
        (["--max-steps", "null"], "max_steps", None),
        (["--normalize", "none"], "normalize", "none"),
        (["--pretrained", "true"], "pretrained", True),
        (["--pretrained", "w.pt"], "pretrained", Path("w.pt")),
    ],
)
def test_flag_values(flags: list[str], key: str, value: object) -> None:
    found, _ = parse_args(["--dataset", "digits", "--student", "wrn-10-1", *flags])
    assert getattr(found, key) == value


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "none"),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"architecture": "arm64", "neon": True, "bf16": True}, "bf16"),
        ({"architecture": "arm64", "neon": True, "bf16": False}, "none"),
    ],
)
def test_amp_auto_is_bf16_on_processors_made_for_it(
    capabilities: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    keys = {"amp": "auto", "device": "cpu"}
    assert config(**keys).amp == expected
    assert yaml.safe_load(config(**keys).to_yaml())["amp"] == expected  # a run is continued as it was begun
    assert config(**keys, precision="fp64").amp == "none"
    assert not computes("fp16", cuda=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": True})
    assert computes("fp16", cuda=False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert config(**keys).amp == "none"


@pytest.mark.parametrize("native", [True, False])
def test_amp_auto_is_bf16_on_gpus_made_for_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not native})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    for device in ("auto", "cuda"):
        assert config(amp="auto", device=device).amp == ("bf16" if native else "none")
    assert config(amp="auto", device="cpu").amp == ("none" if native else "bf16")
    assert computes("fp16", cuda=True)


AT = {"teacher": "wrn-10-2", "teacher-checkpoint": "t.pt"}


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"bata": 3}, ["bata", "did you mean beta"]),
        ({"method": "at"}, ["method at needs teacher"]),
        ({"method": "kd", "teacher": "wrn-10-2"}, ["method kd needs teacher-checkpoint"]),
        ({"method": "hints"}, ["method hints needs teacher"]),
        ({"method": "grad-at"}, ["method grad-at needs teacher"]),
        ({"method": "min-l2", "compile": True}, ["method min-l2", "compile"]),
        ({"method": "symmetry", "amp": "fp16"}, ["method symmetry", "amp fp16"]),
        ({"method": "symmetry", "beta-schedule": "step"}, ["beta-milestones"]),
        ({"dataset": "cifar10"}, ["cifar10 needs data-dir"]),
        ({"dataset": "mnist"}, ["dataset", "'mnist'"]),
        ({"dataset": "imagefolder"}, ["imagefolder needs data-dir"]),
        ({"skip-nonfinite": True, "amp": "fp16"}, ["skip-nonfinite", "loss scaling"]),
        ({"cuda-graphs": True}, ["cuda-graphs needs compile"]),
        ({"p": 0.5}, ["p: ", "'0.5'"]),
        ({"beta": -1}, ["beta: ", "'-1'"]),
        ({"lr": "fast"}, ["lr: ", "'fast'"]),
        ({"lr": float("nan")}, ["lr: "]),
        ({"seed": 10**20}, ["seed: "]),
        ({"threads": 10**20}, ["threads: "]),
        ({"accumulate": 10**20}, ["accumulate: "]),
        ({"lr-milestones": [30, -5]}, ["lr-milestones: "]),
        ({"output-dir": ""}, ["output-dir: is empty"]),
        ({"resume": ""}, ["resume: is empty"]),
        ({"output-dir": "a\0b"}, ["output-dir: holds a null character"]),
        ({"epochs": 0}, ["epochs: ", "'0'"]),
        ({"alpha": 1.5}, ["alpha: "]),
        ({"temperature": 0}, ["temperature: "]),
        ({"lr-schedule": "bumpy"}, ["lr-schedule: ", "'onecycle'", "'bumpy'"]),
        ({"beta-schedule": "bumpy"}, ["beta-schedule: ", "'bumpy'"]),
        ({"backend": "abacus"}, ["backend abacus", "reference"]),
        ({**AT, "method": "at", "beta-schedule": "step"}, ["beta-milestones"]),
        (
            {"method": "min-l2", "epochs": 9, "at-start-epoch": 9},
            ["at-start-epoch 9 is beyond the last of 9"],
        ),
        ({"epochs": 0, "lr": -1}, ["epochs: ", "lr: "]),
    ],
)
def test_mistakes_are_refused_in_one_line(keys: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(BASE | keys)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text, word",
    [
        ("- a\n", "mapping"),
        ("a: [", "not valid YAML"),
        ("at-start-epoch: 1\nat_start_epoch: 2\n", "not valid YAML, line 2: at-start-epoch stands twice$"),
        ("base: own.yaml\n", "its own base"),
        ("base: nope.yaml\n", "nope"),
        ("base: [own.yaml]\n", "its own base"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=word):
        load_recipe(tmp_path / "own.yaml")


def test_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown flag --epoch .did you mean --epochs"):
        parse_args(["--student", "wrn-10-1", "--epoch", "3"])


def test_underscores_and_hyphens_are_one_key(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("batch-size: 5\nlr: 0.1\n")
    (tmp_path / "mid.yaml").write_text("base: base.yaml\nbatch_size: 6\n")
    (tmp_path / "top.yaml").write_text("base: mid.yaml\nbatch-size: 7\n")
    assert load_recipe(tmp_path / "mid.yaml") == {"batch-size": 6, "lr": 0.1}
    assert load_recipe(tmp_path / "top.yaml") == {"batch-size": 7, "lr": 0.1}


def test_no_pretrained_weights_are_none() -> None:
    for word in (None, "null", "none", False, "false"):
        assert config(pretrained=word).pretrained is False


def test_names_that_config_yaml_cannot_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="is not UTF-8"):
        parse_args(["--student", "wrn-10-1", "--output-dir", os.fsdecode(b"runs/caf\xe9")])


def test_beta_is_each_methods_own_unless_given() -> None:
    for method in ("at", "at+kd"):
        assert config(**AT, method=method).beta == 1000
    assert config(**AT, method="hints").beta < 1000
    for method in ("hints", "symmetry"):
        assert config(**AT, method=method, beta=7).beta == 7
        assert config(**AT, method=method, beta="null").beta == config(**AT, method=method).beta


def test_a_method_without_beta_has_no_start() -> None:
    assert config(epochs=9, at_start_epoch=9).at_start_epoch == 9
    assert config(method="min-l2", epochs=9, at_start_epoch=8).at_start_epoch == 8


def test_beta_decays_beside_distillation_and_for_hints() -> None:
    assert config(**AT, method="at").beta_schedule == "constant"
    assert config(**AT, method="hints").beta_schedule == "linear"
    assert config(method="min-l2").beta_schedule == "constant"
    assert config(**AT, method="at+kd").beta_schedule == "linear"
    assert config(**AT, method="at+kd", beta_schedule="constant").beta_schedule == "constant"


def test_differences() -> None:
    old = yaml.safe_load(config(seed=1, output_dir="a", max_steps=3, data_dir="x").to_yaml())
    assert differences(old, config(seed=1, output_dir="b", resume="never", workers=2)) == {}
    found = differences(old, config(seed=2, lr=0.3, compile=True, limit_test=5, taps=["a", "b"]))
    assert list(found) == ["compile", "limit-test", "lr", "seed", "taps"]
    assert differences_told(found) == (
        "compile, limit-test, lr, seed, taps differ (compile false, now true; limit-test null, now 5; "
        "lr 0.1, now 0.3; seed 1, now 2; taps groups, now a,b)"
    )
    assert list(differences(old, config(seed=2, lr=0.3), ["lr"])) == ["seed"]
    older = {key: value for key, value in old.items() if key != "nesterov"}  # from before that key existed
    assert differences(older, config(seed=1)) == {}
    assert differences(older, config(seed=1, nesterov=True)) == {"nesterov": (False, True)}


def test_what_a_continuation_may_change() -> None:
    """Where files lie and how fast it goes, and no more: any other key alters what is learned."""
    now = config()
    stored = yaml.safe_load(now.to_yaml())
    kept = {key for key in stored if differences(stored | {key: "another"}, now)}
    paths = {"data-dir", "output-dir", "resume"}
    speed = {"workers", "threads", "cuda-graphs"}
    extent = {"max-steps", "checkpoint-every", "max-unreadable"}
    assert set(stored) - kept == paths | speed | extent


RECIPES = sorted({*(ROOT / "recipes").rglob("*.yaml")} - {ROOT / "recipes" / "tables.yaml"})


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.relative_to(ROOT / "recipes").as_posix())
def test_recipes_are_valid(path: Path) -> None:
    some = {"student": "wrn-16-1", "teacher": "wrn-16-2", "data-dir": "d", "teacher-checkpoint": "t.pt"}
    assert make_config(some | load_recipe(path))


# --- schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs, per_epoch, warmup", [(12, 391, 0.3), (3, 7, 0.2)])
def test_onecycle_is_torchs(epochs: int, per_epoch: int, warmup: float) -> None:
    c = config(lr=0.2, epochs=epochs, lr_schedule="onecycle", lr_warmup=warmup)
    total = epochs * per_epoch
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, total_steps=total, pct_start=warmup, cycle_momentum=False
    )
    for step in range(total):
        assert schedules.learning_rate(c, step, per_epoch) == pytest.approx(
            torchs.get_last_lr()[0], rel=1e-12
        )
        optimizer.step()
        if step + 1 < total:
            torchs.step()


@pytest.mark.parametrize("total, warmup", [(1, 0.3), (2, 0.5), (3, 0.3), (5, 0.0)])
def test_onecycle_of_few_steps_starts_at_its_peak_and_ends_low(total: int, warmup: float) -> None:
    c = config(lr=0.2, epochs=total, lr_schedule="onecycle", lr_warmup=warmup)
    rates = [schedules.learning_rate(c, step, 1) for step in range(total)]
    assert rates[0] == pytest.approx(0.2, rel=0.5)
    assert total == 1 or rates[-1] == pytest.approx(0.2 / 25e4)


@pytest.mark.parametrize("keys", [{}, {"lr_milestones": [160, 60, 120]}], ids=["defaults", "any order"])
def test_step_schedule_is_the_authors(keys: dict[str, list[int]]) -> None:
    c = config(**keys)
    at_epochs = {0: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 159: 0.004, 160: 0.0008, 199: 0.0008}
    for epoch, rate in at_epochs.items():
        for step in (epoch * 391, epoch * 391 + 390):
            assert schedules.learning_rate(c, step, 391) == pytest.approx(rate, rel=1e-12)


def test_cosine_and_constant_schedules() -> None:
    c = config(lr=0.4, epochs=4, lr_schedule="cosine")
    for step in range(40):
        assert schedules.learning_rate(c, step, 10) == pytest.approx(
            0.2 * (1 + math.cos(math.pi * step / 40))
        )
    assert schedules.learning_rate(config(lr=0.4, lr_schedule="constant"), 7, 10) == 0.4


@pytest.mark.parametrize(
    "schedule, expected",  # at the beginning of epochs 0..5, of 6, with AT from epoch 2 on
    [
        ("constant", [0, 0, 8, 8, 8, 8]),
        ("linear", [0, 0, 8, 6, 4, 2]),
        ("cosine", [0, 0, 8, 4 + 4 * math.sqrt(0.5), 4, 4 - 4 * math.sqrt(0.5)]),
        ("step", [0, 0, 8, 8, 2, 0.5]),
    ],
)
def test_beta_schedules(schedule: str, expected: list[float]) -> None:
    keys = {"beta": 8, "epochs": 6, "at_start_epoch": 2, "beta_milestones": [5, 4], "beta_gamma": 0.25}
    c = config(**AT, **keys, method="at", beta_schedule=schedule)
    assert [schedules.beta(c, 5 * epoch, 5) for epoch in range(6)] == pytest.approx(expected, abs=1e-12)
    assert schedules.beta(config(), 0, 5) == 0
