"""Students and teachers of other libraries and of a user's own code: names, arguments, weights, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import check_refusal, make_folders, run
from user_code import NET

import models
from at_fused import _architectures
from models.importers import load_state
from trainer.command_line import parse_args
from trainer.config import Config, make_config
from trainer.errors import ConfigError


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("image-folder"), train=6, val=2)


def images_of(folder: Path, **keys: Any) -> dict[str, Any]:
    """A run of a few steps on a folder of images of three classes."""
    return {
        "dataset": "imagefolder", "data_dir": folder, "image_size": 32, "limit_train": 18, "limit_test": 6,
        "batch_size": 6, "epochs": 1, "lr": 0.01,
    } | keys  # fmt: skip


# --- names ------------------------------------------------------------------------------------------------


def test_torchvisions_models_are_torchvisions() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    expected = torchvision.models.mobilenet_v3_small(num_classes=7, width_mult=0.5).state_dict()
    torch.manual_seed(0)
    ours = models.architecture("torchvision:mobilenet_v3_small").create(7, width_mult=0.5).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_timms_models_are_timms() -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "depth": 2}
    torch.manual_seed(0)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=7, **options).state_dict()
    torch.manual_seed(0)
    ours = models.architecture("timm:vit_tiny_patch16_224").create(7, **options).state_dict()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_a_users_factories(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a file's path, or a module's name from the folder in which the command runs; a class is one, too."""
    (tmp_path / "ours_of_a_test").mkdir()
    (tmp_path / "ours_of_a_test/nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    for name in (f"{code}:small", f"{code}:Net", "ours_of_a_test.nets:small"):
        model: Any = models.architecture(name).create(5, width=4)
        assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
        assert model[0].out_channels == 4


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "torchvision:mobilenet_v3_smal",
            "torchvision has no model 'mobilenet_v3_smal'.* mobilenet_v3_small",
        ),
        ("timm:vit_tinny_patch16_224", "timm has no model 'vit_tinny_patch16_224'.* vit_tiny_patch16_224"),
        ("nowhere.net:small", r"no module nowhere, neither installed nor in .*path/to/file\.py:factory"),
        ("torch.nowhere:small", r"no module torch\.nowhere, neither"),
        ("nowhere.py:small", r"there is no file .*/nowhere\.py"),
        ("CODE", "a factory is named package.module:factory or path/to/file.py:factory"),
        ("CODE:", "a factory is named package.module:factory or"),
        (":small", "a factory is named package.module:factory or"),
        ("CODE:smal", "has no 'smal'; close names: small"),
        ("CODE:zzz", "has no 'zzz'; it has: Net, small, many, words, broken"),
        ("CODE:NUMBER", "'NUMBER' in .* is a int, not a function"),
        ("CODE:words", r"words\(num_classes=3\) returned a str, not an nn.Module"),
        ("CODE:broken", r"broken\(num_classes=3\) failed: KeyError: 'no such block' \(net\.py, line 26\)"),
        ("SYNTAX:small", r"syntax\.py can't be imported: SyntaxError: .*line 1"),
        (
            "ABSENT:small",
            r"absent\.py can't be imported: ModuleNotFoundError: .*'nowhere'.* \(absent\.py, line 2\)",
        ),
        ("resnet-19", "unknown model 'resnet-19'; there are: wrn-D-K.*; by train.py also torchvision:NAME"),
    ],
)
def test_names_of_nothing(name: str, message: str, code: Path, tmp_path: Path) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    (tmp_path / "syntax.py").write_text("def small(:\n")
    (tmp_path / "absent.py").write_text("import torch\nimport nowhere\n")
    for word, path in (
        ("CODE", code),
        ("SYNTAX", tmp_path / "syntax.py"),
        ("ABSENT", tmp_path / "absent.py"),
    ):
        name = name.replace(word, str(path))
    with pytest.raises(ValueError, match=message) as error:
        models.architecture(name).create(3)
    assert "\n" not in str(error.value)


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_architectures.importlib, "import_module", absent)
    monkeypatch.setattr(_architectures, "repository", lambda module: None)
    with pytest.raises(ValueError) as error:
        models.architecture("timm:resnet18")
    assert str(error.value) == "timm can't be imported: not installed: pip install timm"


# --- keys -------------------------------------------------------------------------------------------------


def config(**keys: Any) -> Config:
    return make_config({"dataset": "digits", "student": "wrn-10-1"} | keys)


@pytest.mark.parametrize(
    "text", ["{width: 4, rate: 1e-3, sizes: [1, 2]}", '{"width": 4, "rate": 0.001, "sizes": [1, 2]}']
)
def test_arguments_are_yaml_or_json(text: str) -> None:
    words = ["--dataset", "digits", "--student", "wrn-10-1", "--student-args", text]
    found, _ = parse_args(words)
    assert found.student_args == {"width": 4, "rate": 0.001, "sizes": [1, 2]}
    assert config(**yaml.safe_load(found.to_yaml())) == found
    assert parse_args([*words, "--student-args", "null"])[0].student_args == {}


@pytest.mark.parametrize(
    "value, message",
    [
        ("width", "student-args: is no mapping of names to values, such as {width_mult: 0.5} (got 'width')"),
        ("{width: ", "student-args: is no mapping in YAML"),
        ("{on: 2020-01-01}", "student-args: is no mapping of names"),
        ("{day: 2020-01-01}", "student-args: holds 2020-01-01, which is neither text nor a number"),
    ],
)
def test_arguments_that_are_none(value: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**{"student-args": value})
    assert str(error.value).startswith(message)


def test_a_users_file_is_found_from_every_folder(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(code.parent)
    assert config(student="net.py:small").student == f"{code}:small"
    assert config(student="torchvision:resnet18").student == "torchvision:resnet18"
    monkeypatch.setenv("HOME", str(code.parent))
    assert config(student="~/net.py:small").student == f"{code}:small"


# --- weights ----------------------------------------------------------------------------------------------


def test_published_weights_but_for_the_classes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last layer is new, and is named; as a teacher's it would know nothing."""
    torchvision = pytest.importorskip("torchvision")
    published = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: published)
    name = "torchvision:squeezenet1_1"
    made = models.architecture(name).pretrained(3)
    assert made.new == {"classifier.1": 1000}
    found = made.model.state_dict()
    assert [key for key in found if found[key].shape != published[key].shape] == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    assert all(torch.equal(found[k], published[k]) for k in found if not k.startswith("classifier.1."))
    assert made.model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)

    keys = images_of(folder, student=name, image_size=64, max_steps=1)
    assert run(tmp_path / "run", **keys, pretrained="true") == 0
    told = "pretrained: classifier.1 of torchvision:squeezenet1_1 starts anew, for 3 classes instead of 1000"
    assert told in capsys.readouterr().out
    keys |= {"method": "kd", "teacher": name, "teacher_checkpoint": "true"}
    check_refusal(run(tmp_path / "x", **keys), capsys, "teacher-checkpoint true", "1000 classes", "has 3")


def test_weights_that_cannot_be_had(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torchvision = pytest.importorskip("torchvision")

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", offline)
    for name in ("torchvision:squeezenet1_1", "resnet-18"):
        keys = images_of(folder, student=name, pretrained="true")
        check_refusal(
            run(tmp_path / "x", **keys), capsys, "error: pretrained true: ", "no network", "name a file"
        )
    assert not (tmp_path / "x").exists()


def test_a_file_of_other_classes_serves_any_student(code: Path) -> None:
    create = models.architecture(f"{code}:small").create
    theirs: Any = create(5)
    ours: Any = create(3)
    assert load_state(ours, theirs.state_dict(), new_classifier=True) == {"6": 5}
    assert torch.equal(ours[0].weight, theirs[0].weight)
    with pytest.raises(ValueError, match=r"6\.bias is \(5,\), not \(3,\)"):
        load_state(create(3), theirs.state_dict())
    with pytest.raises(ValueError, match=r"0\.bias is \(4,\), not \(8,\)"):  # another network
        load_state(create(3), create(5, width=4).state_dict(), new_classifier=True)


# --- runs -------------------------------------------------------------------------------------------------


def test_mistakes_of_networks(
    folder: Path, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is one line that names the key and says what to change, before a folder is made."""
    vit = "torchvision:vit_b_16"
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"student": f"{code}:many"}, ["net.py:many puts out (1, 4) for 1 images, not logits (1, 3)"]),
        (
            {"student": f"{code}:small", "student_args": "{depth: 2}"},
            ["small, student-args {depth: 2}: it is called as small(num_classes=3, depth=2): ", "'depth'"],
        ),
        (
            {"student": "wrn-10-1", "student_args": "{depth_mult: 2}"},
            ["student wrn-10-1, student-args {depth_mult: 2}: ", "unexpected keyword argument 'depth_mult'"],
        ),
        (
            {"student": "torchvision:resnet18", "student_args": "{groups: x}"},
            ["student-args {groups: x}: ValueError: BasicBlock only supports groups=1"],
        ),
        (
            {"student": vit, "student_args": "{image_size: 64}"},
            ["Expected 64 but got 32", "32 x 32: set image-size 224 or student-args {image_size: 32}"],
        ),
        (
            {"student": vit, "student_args": "{image_size: 64}", "dataset": "digits"},
            ["images of digits", "they are 16 x 16: set student-args {image_size: 16}"],
        ),
        (
            {"student": "torchvision:squeezenet1_1", "dataset": "digits", "image_size": 16},
            ["they are 16 x 16, and it is made for 224 x 224"],
        ),
        (
            {"student": "torchvision:googlenet", "image_size": 64},
            ["puts out a GoogLeNetOutputs in training for 2 images", "student-args {aux_logits: false}"],
        ),
    ]  # fmt: skip
    for keys, words in cases:
        check_refusal(run(tmp_path / "new", **images_of(folder) | keys), capsys, *words)
    assert not (tmp_path / "new").exists()
