"""A leading ~ is the home folder in every key, flag and tool, however the shell has left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import SMALL, flags, picture

import models
import train
from at_fused.visualize import __main__ as visualize
from at_fused.visualize.paths import UnknownHome, expand
from benchmarks import __main__ as bench
from benchmarks import gpu, predictions
from reproduce import __main__ as paper
from reproduce.demo import __main__ as demo
from reproduce.mini import __main__ as mini
from trainer.config import Config, make_config

NOBODY = "~nobody-of-this-name"
PATH_KEYS = [
    name.replace("_", "-")
    for name, field in Config.model_fields.items()
    if "Path" in str(field.annotation) or name == "resume"
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder; the current one is another, and must stay empty."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def check_here_is_empty() -> None:
    assert list(Path.cwd().iterdir()) == []


def test_only_a_leading_tilde_is_a_home(home: Path) -> None:
    assert expand("~") == str(home)
    assert expand("~root/a").endswith("/a")
    assert "~" not in expand("~root/a")
    for text in ("", "a", "a/~", "./~", "a~", "/~/a", "auto", "random"):
        assert expand(text) == text
    with pytest.raises(UnknownHome, match=f"no home folder {NOBODY}; a file of that name is ./{NOBODY}"):
        expand(f"{NOBODY}/a")


@pytest.mark.parametrize("key", PATH_KEYS)
def test_every_path_key(key: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys: dict[str, Any] = {"student": "wrn-10-1", "dataset": "digits"}
    if key == "teacher-cache":
        keys |= {"method": "at", "teacher": "wrn-10-1", "teacher-checkpoint": "t.pt", "augment-cycle": 1}
    config = make_config(keys | {key: "~/a b/c"})
    assert str(getattr(config, key.replace("-", "_"))) == f"{home}/a b/c"
    assert yaml.safe_load(config.to_yaml())[key] == f"{home}/a b/c", "a run's own recipe serves anybody"
    assert train.main([*flags(keys), f"--{key}={NOBODY}/a"]) == 2
    error = f"train.py: error: {key}: there is no home folder {NOBODY}; a file of that name is ./{NOBODY}"
    assert capsys.readouterr().err == f"{error} (got '{NOBODY}/a')\n"


def test_there_are_path_keys() -> None:
    assert {"data-dir", "teacher-checkpoint", "output-dir", "resume", "pretrained"} <= set(PATH_KEYS)


def test_a_recipe_at_home_writes_there(home: Path) -> None:
    """As `--recipe=~/a.yaml`, whose base and output-dir begin with ~, too."""
    (home / "base.yaml").write_text(yaml.safe_dump(SMALL | {"limit-train": 64, "epochs": 1}))
    (home / "own.yaml").write_text("base: ~/base.yaml\noutput-dir: ~/runs/a\nmax-steps: 1\n")
    assert train.main(["--recipe=~/own.yaml"]) == 0
    assert (home / "runs/a/model.pt").exists()
    check_here_is_empty()


@pytest.mark.parametrize("words", [f"--recipe={NOBODY}/a.yaml", "--recipe=base.yaml"])
def test_a_recipe_of_nobody(words: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("base.yaml").write_text(f"base: {NOBODY}/a.yaml\n")
    assert train.main([words]) == 2
    error = capsys.readouterr().err
    assert f"there is no home folder {NOBODY}" in error
    assert error.count("\n") == 1


def test_visualize(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "images").mkdir()
    picture(0).save(home / "images/0.png")
    torch.save(models.create("wrn-10-1", 2).state_dict(), home / "model.pt")
    (home / "names.txt").write_text("ant\nbee\n")
    words = ["--model", "wrn-10-1", "--images=~/images", "--checkpoint=~/model.pt", "--classes=~/names.txt"]
    assert visualize.main([*words, "--predictions", "--out=~/maps.png"]) == 0, capsys.readouterr().err
    assert (home / "maps.png").exists()
    check_here_is_empty()
    capsys.readouterr()
    for flag in ("--images", "--checkpoint", "--classes", "--out", "--data-dir"):
        assert visualize.main(["--model", "wrn-10-1", "--out=a.png", f"{flag}={NOBODY}/a"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"visualize: error: argument {flag}: there is no home folder {NOBODY}")


def test_the_tools_of_benchmarks(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timed = bench.arguments(["--suite", "trainer", "--out=~/a", "--cifar=~/b", "--folder=~/c"])
    assert [timed.out, timed.cifar, timed.folder] == [home / "a", home / "b", home / "c"]
    small = mini._parse(["--data-dir=~/a", "--out=~/b"])
    assert [small.data_dir, small.out] == [home / "a", home / "b"]
    table = paper._parse(
        ["table1", "--data-dir=~/a", "--out=~/b", "--teacher-checkpoint=~/c", "--known", "~/d", "~/e"]
    )
    assert [table.data_dir, table.out, table.teacher_checkpoint, *table.known] == [home / x for x in "abcde"]
    assert predictions.main(["--out=~/predicted"]) in (0, None)
    assert (home / "predicted/gpu-predictions.md").exists()
    assert gpu.main(["--results=~/gpu", "--cifar=~/cifar", "--device", "cpu", "--dry-run"]) == 0
    assert f"{home}/gpu/" in (commands := capsys.readouterr().out)
    assert "~" not in commands
    check_here_is_empty()


@pytest.mark.parametrize("tool", [mini, paper])
def test_a_tool_and_nobody(tool: Any, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["table1"] if tool is paper else []
    assert tool.main([*words, "--data-dir", ".", f"--out={NOBODY}/a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: argument --out: there is no home folder {NOBODY}" in line
    check_here_is_empty()


def test_the_demo_at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed: list[Path] = []

    def claim(folder: Path) -> None:
        claimed.append(folder)
        raise demo.DemoError("enough")

    monkeypatch.setattr(demo, "claim", claim)
    assert demo.main(["--output-dir=~/demo"]) == 2
    assert claimed == [home / "demo"]
