"""The model zoo: sizes known from the paper, what the taps give, and the registry's errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT
from torch import Tensor, nn

import at_fused
import models
from models.wide_resnet import Block


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tapped(model: nn.Module, images: Tensor, names: list[str]) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad(), at_fused.FeatureTaps(model.eval(), names) as taps:
        return model(images), list(taps.features)


@pytest.mark.parametrize(
    "name, count",
    [("wrn-16-1", 175_066), ("wrn-16-2", 691_674), ("wrn-40-1", 563_930), ("wrn-40-2", 2_243_546)],
)
def test_wide_resnet_has_the_authors_parameter_count(name: str, count: int) -> None:
    assert parameters(models.create(name)) == count


def test_wide_resnet_follows_the_authors_forward() -> None:
    """One block with and one without projection, against the formula written out on the same weights."""
    torch.manual_seed(0)
    model = models.create("wrn-16-2").double().eval()
    for module in model.modules():  # statistics and scales that would expose a BatchNorm in the wrong place
        if isinstance(module, nn.BatchNorm2d):
            for tensor in [*module.parameters(), module.running_mean, module.running_var]:
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    weights = model.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (weights[f"{name}.{key}"][:, None, None] for key in keys)
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    images = torch.randn(2, 3, 12, 12, dtype=torch.double)
    x = F.conv2d(images, weights["conv.weight"], padding=1)
    for group, stride in (("group1", 1), ("group2", 2), ("group3", 2)):
        for block, step in ((f"{group}.0", stride), (f"{group}.1", 1)):
            activated = norm(x, f"{block}.bn1")
            y = F.conv2d(activated, weights[f"{block}.conv1.weight"], stride=step, padding=1)
            y = F.conv2d(norm(y, f"{block}.bn2"), weights[f"{block}.conv2.weight"], padding=1)
            if block.endswith(".0"):
                x = y + F.conv2d(activated, weights[f"{block}.shortcut.weight"], stride=step)
            else:
                x = y + x
    logits = F.linear(norm(x, "bn").mean((2, 3)), weights["fc.weight"], weights["fc.bias"])
    torch.testing.assert_close(model(images), logits)


def test_wide_resnet_projects_only_where_channels_change() -> None:
    blocks = [block for block in models.create("wrn-16-1").modules() if isinstance(block, Block)]
    assert [block.shortcut is not None for block in blocks] == [False, False, True, False, True, False]


def test_wide_resnet_starts_from_he_fan_out() -> None:
    torch.manual_seed(0)
    weight = models.create("wrn-16-4").get_parameter("group2.0.conv1.weight")  # 64 -> 128 channels, 3 x 3
    expected = (2 / (128 * 9)) ** 0.5
    # The relative error of a standard deviation estimated from n normal numbers is 1 / sqrt(2 n).
    assert weight.std().item() == pytest.approx(expected, rel=5 / (2 * weight.numel()) ** 0.5)


def test_wide_resnet_group_taps_are_raw_and_in_order() -> None:
    torch.manual_seed(0)
    model = models.create("wrn-16-2")
    assert model.taps["groups"] == ["group1", "group2", "group3"]
    _, features = tapped(model, torch.randn(2, 3, 32, 32), model.taps["groups"])
    assert [feature.shape for feature in features] == [(2, 32, 32, 32), (2, 64, 16, 16), (2, 128, 8, 8)]
    for feature in features:  # after a ReLU nothing would be negative, before it about half is
        assert 0.2 < (feature < 0).float().mean().item() < 0.8


@pytest.mark.parametrize("name, blocks", [("wrn-10-1", 1), ("wrn-16-1", 2), ("wrn-40-1", 6)])
def test_wide_resnet_taps_every_block(name: str, blocks: int) -> None:
    model = models.create(name)
    assert len(model.taps["blocks"]) == 3 * blocks
    names = model.taps["blocks"] + model.taps["groups"]
    _, features = tapped(model, torch.randn(1, 3, 16, 16), names)
    for group, feature in enumerate(features[-3:]):  # a group's output is its last block's
        assert torch.equal(feature, features[(group + 1) * blocks - 1])


@pytest.mark.parametrize("size, sizes", [(8, [8, 4, 2]), (9, [9, 5, 3]), (28, [28, 14, 7])])
def test_wide_resnet_takes_any_image_size_and_channels(size: int, sizes: list[int]) -> None:
    model = models.create("wrn-10-1", num_classes=7, in_channels=1)
    logits, features = tapped(model, torch.randn(2, 1, size, size), model.taps["groups"])
    assert logits.shape == (2, 7)
    assert [feature.shape[-1] for feature in features] == sizes


NIN_OPTIONS = ("", "-nobn", "-rawpool", "-nobn-rawpool")


@pytest.mark.parametrize(
    "name, count",
    [("nin-thin", 190_706), ("nin-thin-nobn", 189_914), ("nin-wide", 971_010), ("nin-wide-nobn", 969_210)],
)
def test_nin_has_about_the_papers_size(name: str, count: int) -> None:
    for variant in (name, f"{name}-rawpool"):
        assert parameters(models.create(variant)) == count
    assert round(count, -5) == (200_000 if "thin" in name else 1_000_000)


@pytest.mark.parametrize("name", [f"nin-{size}{o}" for size in ("thin", "wide") for o in NIN_OPTIONS])
def test_nin_is_conv_bn_relu_and_pooling(name: str) -> None:
    """Against the formula written out; the blocks' ends, and their last convolutions, are tapped."""
    torch.manual_seed(0)
    model = models.create(name, num_classes=7, in_channels=2).double().eval()
    for tensor in model.state_dict().values():  # values that would expose what is in a wrong place
        if tensor.ndim == 1 and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    weights = model.state_dict()
    images = torch.randn(2, 2, 10, 12, dtype=torch.double)
    x, ends, convs = images, [], []
    for block in ("block1", "block2", "block3"):
        for i, pad in ((1, 1), (2, 0), (3, 0)):
            x = F.conv2d(x, weights[f"{block}.conv{i}.weight"], padding=pad)
            if "nobn" in name:
                x = x + weights[f"{block}.conv{i}.bias"][:, None, None]
            if i == 3:
                convs.append(x)
            if "nobn" not in name:
                keys = ("running_mean", "running_var", "weight", "bias")
                mean, var, scale, shift = (weights[f"{block}.bn{i}.{key}"][:, None, None] for key in keys)
                x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
            if i < 3 or "rawpool" not in name:
                x = x.clamp(min=0)
        ends.append(x)
        if block != "block3":
            pool = F.max_pool2d if block == "block1" else F.avg_pool2d
            x = pool(x, 3, 2, ceil_mode=True)
    expected = F.linear(x.mean((2, 3)), weights["fc.weight"], weights["fc.bias"])
    logits, features = tapped(model, images, [*model.taps["groups"], *model.taps["convs"]])
    torch.testing.assert_close(logits, expected)
    for feature, end in zip(features, [*ends, *convs], strict=True):
        torch.testing.assert_close(feature, end)
    assert model.taps["blocks"] == model.taps["groups"] == ["block1", "block2", "block3"]


def test_nin_keeps_the_size_of_its_signal() -> None:
    """He's fan-in: without BatchNorm the last block's outputs are about as large as the image's values."""
    torch.manual_seed(0)
    _, features = tapped(models.create("nin-thin-nobn"), torch.randn(8, 3, 32, 32), ["block1", "block3"])
    assert all(0.2 < feature.square().mean().sqrt().item() < 5 for feature in features)


@pytest.mark.parametrize(
    "name, count, widths",
    [
        ("resnet-18", 11_689_512, (64, 128, 256, 512)),
        ("resnet-34", 21_797_672, (64, 128, 256, 512)),
        ("resnet-50", 25_557_032, (256, 512, 1024, 2048)),
        ("resnet-101", 44_549_160, (256, 512, 1024, 2048)),
    ],
)
def test_resnet_is_torchvisions(name: str, count: int, widths: tuple[int, ...]) -> None:
    model = models.create(name, num_classes=1000)
    import torchvision.models  # importable once a ResNet has been made, also next to a CPU-only torch

    with torch.device("meta"):
        theirs = getattr(torchvision.models, name.replace("-", ""))()
    assert parameters(model) == count
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert all(model.state_dict()[key].shape == value.shape for key, value in theirs.state_dict().items())
    assert model.taps["groups"] == ["layer1", "layer2", "layer3", "layer4"]
    logits, features = tapped(model, torch.randn(1, 3, 64, 64), model.taps["groups"])
    assert logits.shape == (1, 1000)
    assert [feature.shape for feature in features] == [
        (1, width, size, size) for width, size in zip(widths, (16, 8, 4, 2), strict=True)
    ]


def test_resnet_taps_every_block() -> None:
    model = models.create("resnet-34")
    counts = [sum(name.startswith(group) for name in model.taps["blocks"]) for group in model.taps["groups"]]
    assert counts == [3, 4, 6, 3]
    _, features = tapped(model, torch.randn(1, 3, 32, 32), model.taps["blocks"])
    assert [feature.shape[1] for feature in features] == [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3


def test_resnet_takes_grey_images() -> None:
    model = models.create("resnet-18", num_classes=4, in_channels=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)


@pytest.mark.parametrize("name, torchvisions", [("18", 11_689_512), ("34", 21_797_672)])
def test_authors_resnet_has_no_norms_on_shortcuts(name: str, torchvisions: int) -> None:
    """Else it is torchvision's; "34" has two more of the blocks with 512 channels."""
    model = models.create(f"authors-resnet-{name}", num_classes=1000)
    norms, blocks = 2 * (128 + 256 + 512), 2 * (2 * 9 * 512**2 + 4 * 512)
    assert parameters(model) == torchvisions - norms + (blocks if name == "34" else 0)
    _, features = tapped(model, torch.randn(1, 3, 64, 64), model.taps["groups"])
    assert [feature.shape[1:] for feature in features] == [
        (64, 16, 16),
        (128, 8, 8),
        (256, 4, 4),
        (512, 2, 2),
    ]


# In millions, for 100 classes, as papers that use RepDistiller's networks give them.
SMALL_RESNETS = {
    "resnet20": 0.28,
    "resnet32": 0.47,
    "resnet56": 0.86,
    "resnet110": 1.74,
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
}


@pytest.mark.parametrize("name, millions", SMALL_RESNETS.items())
def test_small_resnets(name: str, millions: float) -> None:
    model = models.create(name, num_classes=100)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.005)
    assert model.taps["groups"] == ["layer1", "layer2", "layer3"]
    depth = int(name.removeprefix("resnet").removesuffix("x4"))
    assert len(model.taps["blocks"]) == (depth - 2) // 2
    if depth > 32:
        return
    logits, features = tapped(model, torch.randn(2, 3, 32, 32), model.taps["groups"])
    width = 4 if name.endswith("x4") else 1
    assert [f.shape for f in features] == [
        (2, 16 * width, 32, 32),
        (2, 32 * width, 16, 16),
        (2, 64 * width, 8, 8),
    ]
    assert logits.shape == (2, 100)
    assert all(feature.min() >= 0 for feature in features)


def test_small_resnets_take_grey_images_of_any_size() -> None:
    model = models.create("resnet8", num_classes=7, in_channels=1)
    assert model(torch.randn(2, 1, 9, 14)).shape == (2, 7)


def test_student_and_teacher_features_can_be_compared() -> None:
    images = torch.randn(2, 3, 16, 16)
    student, teacher = models.create("wrn-16-1"), models.create("wrn-40-2")
    with at_fused.FeatureTaps(student, student.taps["groups"]) as taps:
        student(images)
        loss = at_fused.attention_loss(taps.features, tapped(teacher, images, teacher.taps["groups"])[1])
        loss.backward()
    gradient = student.get_parameter("group3.1.conv2.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(models.UnknownModel) as error:
        models.create("vgg-16")
    assert "vgg-16" in str(error.value)
    for name in models.available():
        assert name in str(error.value)
    assert {
        "wrn-D-K",
        "nin-thin[-nobn][-rawpool]",
        "resnet-18",
        "resnet-34",
        "resnet-50",
        "resnet-101",
    } <= set(models.available())


@pytest.mark.parametrize(
    "name, reason",
    [
        ("wrn-17-1", "6n \\+ 4"),
        ("wrn-4-1", "6n \\+ 4"),
        ("wrn-0-1", "6n \\+ 4"),
        ("wrn-16-0", "width"),
        ("wrn-16", "unknown model"),
        ("wrn-16-1.5", "unknown model"),
        ("WRN-16-1", "unknown model"),
        (" wrn-16-1", "unknown model"),
        ("wrn-16-1\n", "unknown model"),
        ("resnet-20", "unknown model"),
        ("resnet18", "unknown model"),
        ("resnet50", "unknown model"),
        ("resnet20x2", "unknown model"),
        ("authors-resnet-50", "unknown model"),
        ("nin", "unknown model"),
        ("nin-thin-rawpool-nobn", "unknown model"),
    ],
)
def test_impossible_names_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        models.create(name)
    assert isinstance(error.value, models.UnknownModel) == (reason == "unknown model")


@pytest.mark.parametrize("name", ["wrn-16-1", "nin-thin", "resnet-18", "resnet20"])
def test_impossible_sizes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="num_classes"):
        models.create(name, num_classes=0)
    with pytest.raises(ValueError, match="in_channels"):
        models.create(name, in_channels=0)


def test_torchvision_imports_in_a_fresh_process() -> None:
    code = """
from models import torchvision_compat
import torchvision, torchvision.datasets
from torchvision.transforms import v2
import torch
declared = torchvision_compat._library is not None
assert declared != torchvision.extension._has_ops(), "declared where, and only where, operators are missing"
print(tuple(v2.Resize((4, 6))(torch.zeros(3, 8, 8)).shape))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(3, 4, 6)"


@pytest.mark.parametrize("name", ["_C.so", "_C_stable.so"])
def test_nothing_is_declared_where_torchvisions_operators_load(tmp_path: Path, name: str) -> None:
    loadable = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    (tmp_path / "torchvision" / name).symlink_to(loadable)
    code = "from models import torchvision_compat; import torchvision; print(torchvision_compat._library)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "None", result.stderr


@pytest.mark.parametrize("needed", [True, False])
def test_an_environment_can_import_torchvision(needed: bool, tmp_path: Path) -> None:
    """`make setup` leaves it in site-packages: no script in the environment has to know of it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torchvision").mkdir()
    package = (
        "import torch\nif not hasattr(torch.ops.torchvision, 'nms'): raise SystemExit('nothing declared')"
    )
    (tmp_path / "site" / "torchvision" / "__init__.py").write_text(package)
    loadable = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    library = tmp_path / "site" / "torchvision" / "_C.so"
    library.write_bytes(b"for another torch") if needed else library.symlink_to(loadable)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    code = "import pathlib, sys; from models import torchvision_compat as compat\n"
    code += "print(compat.install(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, tmp_path / "site"]
    made = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert made.stdout == f"{needed}\n", made.stderr
    assert (tmp_path / "site" / "at_fused_torchvision.pth").exists() is needed
    if needed:
        code = "import site, sys; site.addsitedir(sys.argv[1])\n"
        code += "assert 'torch' not in sys.modules, 'no start of Python waits for torch'\nimport torchvision"
        environment["PYTHONPATH"] = str(tmp_path / "site")
        command = [sys.executable, "-c", code, tmp_path / "site"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_registry_does_not_import_torchvision_by_itself() -> None:
    code = "import sys, models; models.create('wrn-10-1'); print('torchvision' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
