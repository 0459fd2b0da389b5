"""`python -m at_fused.visualize`: which features of which images it draws, and the errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT
from PIL import Image
from torch import Tensor, nn

import at_fused
import at_fused.visualize.__main__ as cli
import models
from at_fused import _architectures
from at_fused.visualize import features, networks, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures in two subfolders, in different sizes and modes, and a file that is none."""
    path = tmp_path_factory.mktemp("images")
    draw = torch.Generator().manual_seed(0)
    for name, mode, size in (
        ("cat/a.png", "RGB", (40, 32)),
        ("cat/b.jpg", "L", (32, 32)),
        ("dog/c.png", "P", (64, 48)),
    ):
        (path / name).parent.mkdir(exist_ok=True)
        pixels = torch.randint(256, (size[0] * size[1] * 3,), generator=draw, dtype=torch.uint8)
        Image.frombytes("RGB", size, pixels.numpy().tobytes()).convert(mode).save(path / name)
    (path / "notes.txt").write_text("not an image")
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(models.create("wrn-10-1", 5).state_dict(), path)
    return path


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command line, and returns what it gave to `attention_grid`, and the figure that this drew."""

    def run(*words: object) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def grid(images: Tensor, networks: Any, **options: Any) -> Any:
            figure = at_fused.visualize.attention_grid(images, networks, **options)
            seen.update(options, images=images, networks=networks, figure=figure)
            return figure

        monkeypatch.setattr(cli, "attention_grid", grid)
        out = tmp_path / "x.png"
        assert cli.main([str(word) for word in (*words, "--out", out)]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
        return seen

    return run


def normalised(
    images: Tensor, mean: Any = _architectures.CIFAR10[0], std: Any = _architectures.CIFAR10[1]
) -> Tensor:
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_draws_the_features_of_a_checkpoint(drawing: Any, folder: Path, weights: Path) -> None:
    files = [folder / "cat/b.jpg", folder / "cat/a.png"]
    seen = drawing(
        "--model", "wrn-10-1", "--checkpoint", weights, "--images", *files, "--taps", "group1", "group3.0"
    )
    pixels = torch.tensor(list(Image.open(files[0]).convert("RGB").tobytes()), dtype=torch.uint8)
    torch.testing.assert_close(seen["images"][0], pixels.view(32, 32, 3).permute(2, 0, 1) / 255)
    assert seen["images"].shape == (2, 3, 32, 32)
    assert (seen["labels"], seen["groups"]) == (["b", "a"], ["group1", "group3.0"])
    model = models.load_pretrained(weights)
    with torch.no_grad(), at_fused.FeatureTaps(model, ["group1", "group3.0"]) as taps:
        model(normalised(seen["images"]))
        torch.testing.assert_close(seen["networks"], {"wrn-10-1": taps.features})


def test_picks_images_of_folders_evenly(drawing: Any, folder: Path) -> None:
    common = ("--model", "nin-thin", "--images", folder)
    assert drawing(*common, "--count", 2)["labels"] == ["cat", "cat"]
    assert drawing(*common)["labels"] == ["cat", "cat", "dog"]
    assert drawing(*common, folder / "dog", "--count", 1)["labels"] == ["cat", "c"]


def test_what_is_left_out_of_folders_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hidden files and folders, and files that are no images, in a line of their own."""
    shutil.copytree(folder, tmp_path / "images")
    shutil.copytree(folder / "cat", tmp_path / "images" / ".ipynb_checkpoints")
    shutil.copy(folder / "cat/b.jpg", tmp_path / "images" / "cat" / "._b.jpg")
    words = ["--model", "wrn-10-1", "--count", "9", "--out", str(tmp_path / "x.png"), "--images"]
    assert cli.main([*words, str(tmp_path / "images")]) == 0
    drawn, left_out = capsys.readouterr().out.splitlines()
    assert ": 3 images; " in drawn
    assert left_out == "left out: 2 hidden, 1 .txt"
    assert cli.main([*words, str(folder / "cat")]) == 0
    assert "left out" not in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.heic").touch()
    assert cli.main([*words, str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("none: no image files in this folder (left out: 1 .heic)")


def test_big_images_lose_the_border_that_evaluation_crops() -> None:
    assert 1 - 2 * pictures.BORDER == 224 / 256


GROUPS, LAYERS = ["group1", "group2", "group3"], ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("nin-thin", {"nin-thin": ["block1", "block2", "block3"]}),
        ("nin-thin --levels 1", {"nin-thin": ["block3"]}),
        ("nin-thin --taps convs", {"nin-thin": ["block1.conv3", "block2.conv3", "block3.conv3"]}),
        ("wrn-10-1 resnet-18", {"wrn-10-1": GROUPS, "resnet-18": LAYERS[1:]}),
        ("wrn-10-1 nin-thin --taps group3 --taps block3", {"wrn-10-1": ["group3"], "nin-thin": ["block3"]}),
        ("torchvision/resnet18", {"resnet18": ["relu", *LAYERS]}),
        (
            "torchvision/resnet18 --taps layer1.0.conv2 --gradient input layer4",
            {"resnet18": ["layer1.0.conv2", "gradient at input", "gradient at layer4"]},
        ),
        (
            "wrn-10-1 wrn-10-1 --titles a b --gradient",
            {"a": ["gradient at input"], "b": ["gradient at input"]},
        ),
    ],
)
def test_taps(
    drawing: Any, folder: Path, capsys: pytest.CaptureFixture[str], words: str, expected: dict[str, list[str]]
) -> None:
    seen = drawing("--model", *words.split(), "--images", folder / "cat/b.jpg")
    counts = {name: len(found) for name, found in seen["networks"].items()}
    assert counts == {name: len(taps) for name, taps in expected.items()}
    told = "; ".join(f"{name}: {', '.join(taps)}" for name, taps in expected.items())
    assert told in capsys.readouterr().out
    first, *others = expected.values()
    same = all(taps == first for taps in others)
    assert seen["groups"] == (first if same else [f"level {i + 1}" for i in range(len(first))])


def test_networks_of_different_depth_are_aligned_at_the_top(drawing: Any, folder: Path) -> None:
    seen = drawing("--model", "wrn-10-1", "resnet-18", "--images", folder / "cat/b.jpg")
    channels = {name: [f.shape[1] for f in found] for name, found in seen["networks"].items()}
    assert channels == {"wrn-10-1": [16, 32, 64], "resnet-18": [128, 256, 512]}


def test_gradients_are_those_of_the_predicted_class(drawing: Any, folder: Path, weights: Path) -> None:
    seen = drawing(
        "--model", "wrn-10-1", "--checkpoint", weights, "--images", folder, "--gradient", "input", "group2"
    )
    model = models.load_pretrained(weights)
    x = normalised(seen["images"])
    targets = model(x).argmax(1)
    expected = [at_fused.input_gradient(model, x, targets, layer=layer) for layer in (None, "group2")]
    torch.testing.assert_close(seen["networks"]["wrn-10-1"], expected)


def test_test_images_of_a_data_set(drawing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Prepared as the trainer does; the gradient's class is the true one, and a prediction is marked."""
    from trainer import data
    from trainer.config import make_config

    words = ("--model", "wrn-10-1", "wrn-16-1", "--dataset", "digits", "--indices", 5, 3)
    torch.manual_seed(0)
    seen = drawing(*words, "--gradient", "--predictions", "--compare-to", "wrn-16-1", "--p", 1, "--overlay")
    assert "random weights: wrn-10-1, wrn-16-1" in capsys.readouterr().err
    assert "random weights: wrn-10-1, wrn-16-1" in [text.get_text() for text in seen["figure"].texts]
    test = data.load(make_config({"student": "-", "dataset": "digits"}), torch.device("cpu")).test
    torch.testing.assert_close(
        seen["images"], test.images[[5, 3]].permute(0, 3, 1, 2) / 255, atol=1e-6, rtol=0
    )
    assert seen["labels"] == [str(label) for label in test.labels[[5, 3]].tolist()]
    assert (seen["compare_to"], seen["p"], seen["overlay"]) == ("wrn-16-1", 1.0, True)
    torch.manual_seed(0)
    model = models.create("wrn-10-1").eval()
    x = (test.images[[5, 3]].permute(0, 3, 1, 2) - 77.8) / 81.1
    torch.testing.assert_close(
        seen["networks"]["wrn-10-1"],
        [at_fused.input_gradient(model, x, test.labels[[5, 3]])],
        rtol=1e-4,
        atol=1e-6,
    )
    guesses = model(x).argmax(1).tolist()
    truths = test.labels[[5, 3]].tolist()
    marks = ["✓" if guess == truth else "✗" for guess, truth in zip(guesses, truths, strict=True)]
    assert seen["captions"]["wrn-10-1"] == [
        f"{mark} {guess}" for mark, guess in zip(marks, guesses, strict=True)
    ]


def test_the_statistics_are_the_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import data
    from trainer.config import make_config
    from trainer.data import folders

    class Empty:
        base_folder, train_list, test_list = "cifar", [], []
        data, targets, classes = torch.zeros(1, 32, 32, 3).numpy(), [0], ["airplane"]

        def __init__(self, root: str, train: bool, download: bool) -> None: ...

    (tmp_path / "cifar").mkdir()
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Empty)
    cifar = data.load(make_config({"student": "-", "data-dir": tmp_path}), torch.device("cpu"))
    for (mean, std), theirs in (
        (_architectures.CIFAR10, (cifar.mean, cifar.std)),
        (_architectures.IMAGENET, (folders.MEAN, folders.STD)),
    ):
        assert [255 * value for value in mean] == pytest.approx([float(m) for m in theirs[0]])
        assert [255 * value for value in std] == pytest.approx([float(s) for s in theirs[1]])


def test_predictions_are_named(drawing: Any, folder: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("zero\none\ntwo\nthree\nfour\n")
    words = ("--model", "wrn-10-1", "--checkpoint", weights, "--images", folder, "--predictions")
    seen = drawing(*words, "--classes", tmp_path / "names.txt")
    guesses = models.load_pretrained(weights)(normalised(seen["images"])).argmax(1).tolist()
    assert seen["captions"]["wrn-10-1"] == [
        ["zero", "one", "two", "three", "four"][guess] for guess in guesses
    ]
    seen = drawing(*words)
    assert seen["captions"]["wrn-10-1"] == [f"class {guess}" for guess in guesses]
    assert not any("random" in text.get_text() for text in seen["figure"].texts)
    assert _architectures.categories(1000)[283] == "Persian cat"  # type: ignore[index]


def shown(feature: Tensor, mapping: str = "sum") -> Tensor:
    """The map of an image of 32 x 32, scaled to a mean square of 1 and then enlarged."""
    squares = feature[0].double().square()
    attention = squares.sum(0) if mapping == "sum" else squares.amax(0)
    attention = attention / attention.square().mean().sqrt()
    return F.interpolate(attention[None, None], (32, 32), mode="bilinear", align_corners=False)[0, 0]


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("scale", ["own", "group"])
@pytest.mark.parametrize("colours", ["viridis", "magma"])
def test_how_maps_are_drawn(drawing: Any, folder: Path, mapping: str, scale: str, colours: str) -> None:
    """Each option by its picture; the first value of each is the default."""
    defaults = {"--mapping": "sum", "--scale": "own", "--colours": "viridis"}
    given = zip(defaults, (mapping, scale, colours), strict=True)
    words = [word for name, value in given if value != defaults[name] for word in (name, value)]
    taps = ("--taps", "group2", "--taps", "block2.conv3")
    seen = drawing("--model", "wrn-10-1", "nin-thin", *taps, "--images", folder / "cat/b.jpg", *words)
    expected = [shown(found[0], mapping) for found in seen["networks"].values()]
    most = [attention.max() for attention in expected]
    assert max(most) > 1.05 * min(most), "else both scales draw the same"
    _, *cells = [axes.images[0] for axes in seen["figure"].axes if axes.images]
    for attention, own, cell in zip(expected, most, cells, strict=True):
        drawn = torch.from_numpy(cell.get_array().data).double()
        largest = own if scale == "own" else max(most)
        torch.testing.assert_close(drawn, attention / largest, rtol=1e-4, atol=1e-6)
        assert cell.get_cmap().name == colours


def test_size_is_what_networks_get(drawing: Any, folder: Path, weights: Path) -> None:
    words = ("--model", "wrn-10-1", "--checkpoint", weights, "--images", folder, "--size", 48)
    seen = drawing(*words, "--taps", "group3")
    assert seen["images"].shape == (3, 3, 48, 48)
    model = models.load_pretrained(weights)
    with at_fused.FeatureTaps(model, ["group3"]) as taps, torch.no_grad():
        model(normalised(seen["images"]))
        torch.testing.assert_close(seen["networks"]["wrn-10-1"], taps.features)


def test_size_enlarges_the_images_of_a_data_set(drawing: Any, weights: Path) -> None:
    words = ("--model", "wrn-10-1", "--checkpoint", weights, "--taps", "group1", "--dataset", "digits")
    own, enlarged = drawing(*words), drawing(*words, "--size", 32)
    expected = F.interpolate(own["images"], (32, 32), mode="bilinear")
    torch.testing.assert_close(enlarged["images"], expected, atol=1e-5, rtol=0)
    model = models.load_pretrained(weights)
    with at_fused.FeatureTaps(model, ["group1"]) as taps, torch.no_grad():
        model((255 * expected - 77.8) / 81.1)
        found = enlarged["networks"]["wrn-10-1"]
        torch.testing.assert_close(found, taps.features, atol=1e-4, rtol=1e-4)


def test_a_network_of_other_classes_is_neither_right_nor_wrong(
    drawing: Any, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients are those of what it sees, too: index 7 of ten digits is none of its five classes."""
    losses: list[Tensor] = []

    def input_gradient(model: nn.Module, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        losses.append(targets)
        return at_fused.input_gradient(model, x, targets, **options)

    monkeypatch.setattr(cli, "input_gradient", input_gradient)
    words = ("--dataset", "digits", "--indices", 0, 1, 2, "--predictions", "--gradient")
    seen = drawing("--model", "wrn-10-1", "--checkpoint", weights, *words)
    assert seen["captions"]["wrn-10-1"] == [f"class {target}" for target in losses[0].tolist()]
    assert max(losses[0]) < 5
    (text, *_) = drawing("--model", "wrn-10-1", *words)["captions"]["wrn-10-1"]
    assert text[0] in "✓✗"


def test_a_torchvision_checkpoint_sets_the_number_of_classes(
    drawing: Any, folder: Path, tmp_path: Path
) -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval()
    state = {f"module.{k.replace('.conv', '._orig_mod.conv')}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": {"model": state}}, tmp_path / "c.pt")
    words = ("--model", "torchvision/resnet18", "--checkpoint", tmp_path / "c.pt", "--images", folder)
    seen = drawing(*words, "--taps", "layer4")
    with at_fused.FeatureTaps(model, ["layer4"]) as taps, torch.no_grad():
        logits = model(normalised(seen["images"], *_architectures.IMAGENET))
        torch.testing.assert_close(seen["networks"]["resnet18"], taps.features)
    assert logits.shape == (3, 7)
    assert seen["images"].shape == (3, 3, 224, 224)


@pytest.mark.parametrize(
    "content, message",
    [
        ({0: torch.zeros(1)}, "c.pt holds no model weights"),
        ({"fc.bias": torch.zeros(())}, "c.pt does not fit resnet18: 121 missing"),
        (normalised, "c.pt is damaged, truncated or not a checkpoint of weights alone"),
    ],
)
def test_another_file_for_a_torchvision_model(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=message):
        networks.load("torchvision/resnet18", str(tmp_path / "c.pt"))


def test_timm_models(drawing: Any, folder: Path) -> None:
    """Tokens after a class token, and channels last."""
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    seen = drawing(
        "--model", f"timm/{name}", "--images", folder / "cat/b.jpg", "--p", 1, 2, "--taps", "blocks.0"
    )
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with at_fused.FeatureTaps(model, ["blocks.0"]) as taps, torch.no_grad():
        model(normalised(seen["images"], model.pretrained_cfg["mean"], model.pretrained_cfg["std"]))
        tokens = taps.features[0]
    expected = at_fused.attention_map(tokens[:, 1:], channel_dim=-1).view(1, 14, 14)
    (found,) = seen["networks"][name]
    torch.testing.assert_close(at_fused.attention_map(found), expected)


def test_channels_are_found() -> None:
    x = torch.rand(2, 5, 4, 4)
    for layout in (
        x,
        x.movedim(1, -1),
        x.flatten(2).mT,
        torch.cat([torch.rand(2, 3, 5), x.flatten(2).mT], 1),
    ):
        assert features._is_spatial(layout)
        assert torch.equal(features._channels_first(layout), x)
    for other in (
        torch.rand(2, 5),
        torch.rand(2, 3, 4, 5),
        torch.rand(2, 1, 5),
        torch.ones(2, 3, 4, 4).long(),
        (x,),
    ):
        assert not features._is_spatial(other)


def test_last_of_each_size_passes_over_normalisations() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    assert features.last_of_each_size(model.eval(), torch.rand(1, 3, 8, 8)) == ["0", "2"]
    with pytest.raises(ValueError, match="no spatial features"):
        features.last_of_each_size(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.rand(1, 3, 8, 8)
        )


class Attention(nn.Module):
    """Keeps the size of its input (B, C, h, w); within, a matrix and windows as many as the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.windows = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        self.matrix((tokens.mT @ tokens)[:, None])
        self.windows(x.movedim(1, -1).unfold(1, 2, 2).unfold(2, 2, 2).flatten(0, 2))
        return x * 1


class Strided(nn.Module):
    """Halves its input, with one ReLU for both sizes, as torchvision's residual blocks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 2, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))))


def test_last_of_each_size_passes_over_what_blocks_work_on() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2, 2), Attention(), Strided(), Attention(), Strided(), Attention(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    for images in (1, 2):
        found = features.last_of_each_size(model.eval(), torch.rand(images, 3, 16, 16))
        assert found == ["1", "3", "5"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("torchvision/resnet50", ["relu", *LAYERS]),
        ("torchvision/maxvit_t", ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
        ("timm/swin_tiny_patch4_window7_224", ["layers.0", "layers.1", "layers.2", "layers"]),
        ("timm/pvt_v2_b0", ["stages.0", "stages.1", "stages.2", "stages"]),
    ],
)
def test_levels_of_known_networks(name: str, expected: list[str]) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    network = networks.load(name, None)
    size = network.architecture.size
    assert features.last_of_each_size(network.model, torch.rand(1, 3, size, size)) == expected


def test_in_place_layers_leave_recorded_features_alone() -> None:
    network = networks.load("torchvision/vgg11", None)
    assert not any(getattr(module, "inplace", False) for module in network.model.modules())


@pytest.mark.parametrize(
    "words, message",
    [
        ("--model wrn-10-1", "either --images or --dataset"),
        ("WRN --dataset digits", "either --images or --dataset"),
        ("--model resnet-19 --images FOLDER", "unknown model 'resnet-19'; close names: resnet-18"),
        ("--model wrn-11-1 --images FOLDER", "error: model 'wrn-11-1': a wide ResNet has depth 6n + 4"),
        ("--model hf/resnet18 --images FOLDER", "unknown library 'hf': zoo, torchvision or timm"),
        ("WRN --taps grop3", "error: wrn-10-1: no submodule named 'grop3'; close names: group3"),
        ("WRN --taps zzzz", "wrn-10-1: no submodule named 'zzzz'; its modules: conv, "),
        ("WRN --gradient grop3", "error: wrn-10-1: no submodule named 'grop3'; close names: group3"),
        ("WRN --taps fc", "fc puts out (3, 10), which has no image's positions"),
        ("WRN --gradient fc", "the gradient at fc is (3, 10), which has no image's positions"),
        ("--model wrn-10-1 --images nowhere.png", "nowhere.png: no such file"),
        ("--model wrn-10-1 --images FOLDER/notes.txt", "notes.txt: not an image"),
        ("WRN --checkpoint nowhere.pt", "checkpoint nowhere.pt: no such file"),
        ("WRN --checkpoint FOLDER/notes.txt", "notes.txt is damaged, truncated or not a checkpoint"),
        (
            "--model torchvision/resnet18 --images FOLDER --checkpoint WEIGHTS",
            "does not fit resnet18: 120 missing",
        ),
        ("WRN --checkpoint pretrained", "no pretrained weights of wrn-10-1"),
        ("WRN --model nin-thin wrn-10-1 wrn-16-1 --checkpoint a b", "2 checkpoints for 3 models"),
        ("WRN --titles a b", "--titles: 1 different ones are needed"),
        ("WRN --compare-to teacher", "'teacher' is not one of the networks: wrn-10-1"),
        ("WRN --taps group1 --taps group2", "--taps given 2 times for 1 networks"),
        (
            "WRN --model wrn-10-1 nin-thin --taps group2 group3 --taps block3",
            "--taps: 2 for wrn-10-1, 1 for nin-thin: give as many for each",
        ),
        ("WRN --colours zzzz", "unknown colour map 'zzzz'; there are: "),
        ("WRN --colours virids", "unknown colour map 'virids'; close names: viridis"),
        ("WRN --out x.pgn", "--out x.pgn: the name must end with one of ."),
        ("WRN --out x", ".png, .ps, .raw, .rgba, .svg, "),
        ("WRN --out FOLDER", "images0: is a folder"),
        ("WRN --out nowhere/x.png", "there is no folder nowhere"),
        ("WRN --p 0.5", "p must be"),
        ("WRN --mapping mean", "invalid choice: 'mean'"),
        ("WRN --count 0", "--count 0: must be at least 1"),
        ("WRN --size 0", "--size 0: must be at least 1"),
        ("", "the following arguments are required: --model (examples: --help)"),
        ("WRN --headings a", "1 group headings for 3 groups"),
        ("WRN --classes nowhere.txt", "--classes nowhere.txt: No such file or directory"),
        ("WRN --classes FOLDER/cat/b.jpg", "cat/b.jpg: not a text in UTF-8"),
        ("WRN --classes FOLDER/notes.txt", "notes.txt: 1 names for the 10 classes of wrn-10-1"),
        ("WRN --checkpoint FOLDER", "images0 is a folder: name its model.pt"),
        ("--model wrn-10-1 --images=", "--images: one of the paths is empty"),
        ("--model wrn-10-1 --dataset digits --indices 797", "index 797: digits has the test images 0 to 796"),
        ("--model wrn-10-1 --dataset cifar10", "needs data-dir"),
        ("--model wrn-10-1 --dataset cifar11", "cifar11"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    words: str,
    message: str,
    folder: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = words.replace("WRN", "--model wrn-10-1 --images FOLDER")
    words = words.replace("FOLDER", str(folder)).replace("WEIGHTS", str(weights))
    out = [] if "--out" in words else ["--out", "x.png"]
    assert cli.main([*words.split(), *out]) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("visualize: error: ")
    assert message in error
    assert all("random weights" in note for note in notes)
    assert not notes or "model '" not in error, "of networks that are not there"
    assert not any(tmp_path.iterdir())


def test_without_the_repository_there_is_no_zoo(folder: Path, tmp_path: Path) -> None:
    """Installed alone; somebody's own package `models` is neither used nor imported."""
    (tmp_path / "at_fused").symlink_to(ROOT / "at_fused")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/__init__.py").write_text("raise SystemExit('imported')")
    code = f"import sys; sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if p != {str(ROOT)!r}]\n"
    code += "from at_fused import _architectures\nassert _architectures.repository('models') is None\n"
    code += "try: _architectures.find('zoo/wrn-16-1')\nexcept ValueError as error: print(error)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "unknown model 'zoo/wrn-16-1'; zoo: only in a checkout\n", result.stderr


def test_libraries_that_cannot_be_imported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(_architectures.importlib, "import_module", broken)
    monkeypatch.setattr(_architectures, "repository", lambda module: None)
    with pytest.raises(ValueError) as error:
        _architectures.find("resnet18")
    missing = (
        "zoo: only in a checkout; torchvision: operator torchvision::nms does not exist; timm: not installed"
    )
    assert str(error.value) == f"unknown model 'resnet18'; {missing}"
    assert _architectures.categories(1000) is None


def test_close_names_of_several_libraries_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("_torchvision", "_timm"):
        monkeypatch.setattr(_architectures, library, lambda name: (None, ["resnet18", "resnet18d"]))
    with pytest.raises(ValueError, match=r"; close names: resnet18, ") as error:
        _architectures.find("resnet18x")
    assert str(error.value).count("resnet18d") == 1


@pytest.mark.parametrize("what", ["image", "link to an image", "checkpoint", "classes"])
def test_inputs_are_not_overwritten(
    what: str, folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"image": tmp_path / "a.png", "checkpoint": tmp_path / "c.png", "classes": tmp_path / "n.png"}
    paths["image"].write_bytes((folder / "cat/a.png").read_bytes())
    paths["checkpoint"].write_bytes(weights.read_bytes())
    paths["classes"].write_text("0\n1\n2\n3\n4\n")
    paths["link to an image"] = tmp_path / "link.png"
    paths["link to an image"].symlink_to("a.png")
    before = {path: path.read_bytes() for path in paths.values()}
    words = ["--model", "wrn-10-1", "--images", paths["image"], "--checkpoint", paths["checkpoint"]]
    words += ["--classes", paths["classes"], "--out", paths[what]]
    assert cli.main([str(word) for word in words]) == 2
    assert f"{paths[what]} is " in (error := capsys.readouterr().err)
    assert error.endswith(": choose another name\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_image_that_was_not_chosen_is_not_overwritten_either(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = (folder / "cat/b.jpg").read_bytes()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(image)
    words = ["--model", "wrn-10-1", "--images", str(tmp_path), "--count", "1", "--out"]
    assert cli.main([*words, str(tmp_path / "b.jpg")]) == 2
    assert capsys.readouterr().err.endswith("b.jpg is one of the images: choose another name\n")
    assert (tmp_path / "b.jpg").read_bytes() == image
    assert cli.main([*words, str(tmp_path / "c.png")]) == 0


def test_a_write_that_fails_leaves_the_old_picture(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    out.write_bytes(b"old")
    command = f"ulimit -f 8; exec {sys.executable} -m at_fused.visualize --model wrn-10-1 "
    command += f"--images {folder} --out {out}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.endswith(f"visualize: error: --out {out}: File too large\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {out: b"old"}


def test_no_prediction_and_no_map_of_numbers_that_are_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = models.create("wrn-10-1").state_dict()
    words = ["--model", "wrn-10-1", "--checkpoint", str(tmp_path / "c.pt"), "--images", str(folder)]
    words += ["--out", str(tmp_path / "x.png")]
    torch.save(state | {"fc.bias": torch.full((10,), torch.nan)}, tmp_path / "c.pt")
    for flag in ("--predictions", "--gradient"):
        assert cli.main([*words, flag]) == 2
        assert "wrn-10-1: the logits hold NaN or infinity" in capsys.readouterr().err
    assert cli.main(words) == 0
    key = next(key for key in state if key.startswith("group2") and key.endswith("weight"))
    torch.save(state | {key: torch.full_like(state[key], torch.nan)}, tmp_path / "c.pt")
    assert cli.main(words) == 2
    assert "wrn-10-1, group2: the map holds NaN or infinity" in capsys.readouterr().err


def test_levels_left_out_are_told(drawing: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing("--model", "wrn-10-1", "resnet-18", "--images", folder / "cat/b.jpg")
    told = capsys.readouterr()
    assert "visualize: left out, to have as many maps of each network: resnet-18: layer1\n" in told.err
    assert ": 1 image; " in told.out


@pytest.mark.parametrize(
    "names, titles",
    [
        ("wrn-10-1 torchvision/resnet18", "wrn-10-1 resnet18"),
        ("torchvision/resnet18 timm/resnet18", "torchvision/resnet18 timm/resnet18"),
        ("torchvision/vgg11 torchvision/vgg11", "vgg11_(1) vgg11_(2)"),
        ("a/r b/r a/r c", "a/r_(1) b/r a/r_(3) c"),
    ],
)
def test_titles(names: str, titles: str) -> None:
    assert cli._titles(names.split()) == [title.replace("_", " ") for title in titles.split()]


def test_warnings_take_a_line_each(drawing: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--model",
        "wrn-10-1",
        "--images",
        folder / "cat/b.jpg",
        "--titles",
        "\N{CJK UNIFIED IDEOGRAPH-65E5}",
    )
    drawing(*words)
    *_, warning = capsys.readouterr().err.splitlines()
    assert warning.startswith("visualize: warning: Glyph 26085 ")
    assert ".py" not in warning


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_draw", interrupted)
    assert cli.main(["--model", "wrn-10-1", "--dataset", "digits", "--out", "x.png"]) == 130
    assert capsys.readouterr().err == "visualize: error: interrupted\n"


def test_runs_as_a_module(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "at_fused.visualize", "--model", "wrn-10-1", "--images", folder, "--out"]
    good = subprocess.run([*command, tmp_path / "X.SVG"], cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert "<svg" in (tmp_path / "X.SVG").read_text()
    bad = subprocess.run([*command, tmp_path / "x.txt"], cwd=ROOT, capture_output=True, text=True)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
