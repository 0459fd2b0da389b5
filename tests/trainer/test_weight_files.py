"""Files of weights as people have them: containers, wrappers, objects beside the weights, safetensors."""

from __future__ import annotations

import collections
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import models
from at_fused import _weights
from at_fused.visualize.__main__ import main as visualize
from models.importers import load_state

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Nothing in it is what a new model has."""
    state = models.create("wrn-10-1").state_dict()
    return {k: torch.rand_like(v) if v.is_floating_point() else v + 3 for k, v in state.items()}


class Settings:
    """Somebody's own class."""

    def __init__(self) -> None:
        self.lr = 0.1


class Trap:
    """What unpickling it would run."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


OTHER = {"conv.weight": torch.zeros(2, 2)}  # a model that is not asked for
BESIDE: dict[str, Any] = {
    "a NumPy scalar": np.float64(93.1),
    "a NumPy array": np.arange(3.0),
    "a path": Path("x"),
    "a defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "a deque": collections.deque([1.0, 2.0]),
    "somebody's own object": Settings(),
    "a function": runs.flags,
    "a call": Trap(exec, "raise SystemExit(77)"),
}
HOLDERS: dict[str, Any] = {
    **{name: lambda s, name=name: {"epoch": 3, name: s} for name in _weights.CONTAINERS},
    "the only one that is a model's": lambda s: {"epoch": 3, "weights": s, "rng": {"cpu": torch.zeros(9)}},
    "beside an optimiser": lambda s: {
        "model_state_dict": s,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "param_groups": [{"lr": 0.1}]},
    },
    "student and teacher": lambda s: {"teacher": OTHER, "student": s},
    "student's and teacher's": lambda s: {"teacher_weights": OTHER, "student_weights": s},
    "flat, beside a number": lambda s: {**s, "accuracy": 93.1},
    "an AveragedModel": lambda s: {"n_averaged": torch.tensor(4), **prefixed("module.", s)},
    "an AveragedModel of DDP's": lambda s: {"n_averaged": torch.tensor(4), **prefixed("module.module.", s)},
    "an AveragedModel in Lightning": lambda s: {
        "state_dict": prefixed("ema.", OTHER)
        | prefixed("student.module.", s)
        | {"student.n_averaged": torch.tensor(4)}
    },
    "Lightning's": lambda s: {"state_dict": prefixed("model.", s), "pytorch-lightning_version": "2.5.0"},
    "Lightning's net": lambda s: {"state_dict": prefixed("net.", s)},
    "Lightning's with a teacher": lambda s: {
        "state_dict": prefixed("model.", s) | prefixed("teacher.", OTHER)
    },
    "a distiller with a regressor": lambda s: {
        "model": prefixed("module.student.", s)
        | prefixed("module.teacher.", OTHER)
        | prefixed("module.regressor.", OTHER)
    },
    "compiled, then wrapped": lambda s: prefixed("module._orig_mod.", s),
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS.keys())
def test_weights_are_found(holder: Any, state: State, tmp_path: Path) -> None:
    torch.save(holder(state), tmp_path / "w.pt")
    check_weights(tmp_path / "w.pt", state)


def check_weights(path: Path, state: State) -> None:
    found = models.load_pretrained(path).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE.keys())
def test_objects_beside_the_weights_are_not_made(beside: Any, state: State, tmp_path: Path) -> None:
    torch.save({"model": state, "beside": beside}, tmp_path / "w.pt")
    check_weights(tmp_path / "w.pt", state)
    held = _weights.read(tmp_path / "w.pt")["beside"]
    kind = held if isinstance(held, type) else type(held)
    assert kind in (dict, list) or issubclass(kind, _weights.Inert)


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE.keys())
def test_files_from_before_torch_1_6(beside: Any, state: State, tmp_path: Path) -> None:
    torch.save({"model": state, "best": beside}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    check_weights(tmp_path / "w.pt", state)


def test_an_averaged_model_as_torch_saves_it(tmp_path: Path) -> None:
    average = AveragedModel(models.create("wrn-10-1"), use_buffers=True)
    average.update_parameters(models.create("wrn-10-1"))
    torch.save(average.state_dict(), tmp_path / "w.pt")
    check_weights(tmp_path / "w.pt", average.module.state_dict())


def test_a_models_own_names_are_no_wrapper() -> None:
    """Somebody's model that calls a part of itself `model`, alone and in a wrapper of that name."""
    own = nn.ModuleDict({"model": nn.Linear(2, 3)})
    state = own.state_dict()
    for prefix in ("", "module.", "model.", "student."):
        assert _weights.find(prefixed(prefix, state), state.keys()).keys() == state.keys()
    load_state(own, _weights.find({"model": state}, state.keys()))


def test_safetensors(state: State, tmp_path: Path) -> None:
    for name in ("model.safetensors", "renamed.pt"):
        safetensors.torch.save_file(prefixed("module.", state), tmp_path / name)
        check_weights(tmp_path / name, state)


@pytest.mark.parametrize("size", [-1, 30, 4, 0])
def test_damaged_safetensors(size: int, state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save(state)[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, truncated or not a checkpoint"):
        models.load_pretrained(path)


def test_safetensors_without_the_library(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        models.load_pretrained(tmp_path / "w.safetensors")


REFUSED: dict[str, tuple[Any, str]] = {
    "a whole model": (
        lambda s: nn.Linear(2, 2),
        "(it holds a pickled torch.nn.modules.linear.Linear, not its state_dict)",
    ),
    "a whole model in a checkpoint": (
        lambda s: {"epoch": 3, "model": nn.Linear(2, 2)},
        "its keys are epoch, model; model is a pickled torch.nn.modules.linear.Linear; expected are tensors",
    ),
    "no weights": (
        lambda s: {"epoch": 3, "optimizer": {"state": {}}},
        "holds no model weights: its keys are epoch, optimizer; expected are tensors by name, as",
    ),
    "two models": (
        lambda s: {"generator": s, "discriminator": s},
        "holds the weights of several models: generator, discriminator; save one of them",
    ),
    "NumPy's arrays": (
        lambda s: {"model": {key: value.numpy() for key, value in s.items()}},
        "conv.weight is a pickled numpy.",
    ),
    "a list": (lambda s: [1], "holds no model weights but a list"),
    "a shell's command": (
        lambda s: {"model": s, "beside": Trap(os.system, "exit")},
        "not a checkpoint of weights alone (it holds posix.system, which is code)",
    ),
}


@pytest.mark.parametrize("content, words", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_what_was_found(content: Any, words: str, state: State, tmp_path: Path) -> None:
    torch.save(content(state), tmp_path / "w.pt")
    with pytest.raises(ValueError) as error:
        models.load_pretrained(tmp_path / "w.pt")
    text = str(error.value)
    assert words in text
    assert f"{tmp_path}/w.pt" in text
    assert text.isprintable()  # no line end, no escape code


def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt is damaged, .*torchscript"):
        models.load_pretrained(tmp_path / "w.pt")


# --- as a user meets them -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_takes_safetensors_and_lightnings(state: State, tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "teacher.safetensors")
    torch.save({"state_dict": prefixed("model.", state), "best": np.float64(1)}, tmp_path / "student.ckpt")
    teacher = {"teacher": "wrn-10-1", "teacher_checkpoint": tmp_path / "teacher.safetensors"}
    keys = {"method": "at", "pretrained": tmp_path / "student.ckpt", "max_steps": 1}
    assert runs.run(tmp_path / "run", **teacher, **keys) == 0
    assert (tmp_path / "run/model.pt").exists()


def test_train_refuses_in_one_line(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"generator": state, "discriminator": state}, tmp_path / "gan.pt")
    code = runs.run(tmp_path / "run", pretrained=tmp_path / "gan.pt")
    runs.check_refusal(code, capsys, "holds the weights of several models: generator, discriminator")
    assert not (tmp_path / "run/model.pt").exists()


@pytest.mark.slow
def test_visualize_takes_safetensors_and_names_what_it_refuses(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.torch.save_file(prefixed("module.", state), tmp_path / "w.safetensors")
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "w.pt")

    def draw(weights: str, out: Path) -> int:
        words = ["--model", "wrn-10-1", "--dataset", "digits", "--indices", "0"]
        return visualize([*words, "--checkpoint", str(tmp_path / weights), "--out", str(out)])

    assert draw("w.safetensors", tmp_path / "maps.png") == 0
    assert (tmp_path / "maps.png").exists()
    capsys.readouterr()
    assert draw("w.pt", tmp_path / "none.png") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "its keys are epoch, optimizer" in error
