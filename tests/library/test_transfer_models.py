"""AttentionTransfer on what well-known libraries' models return: small ones with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import at_fused


def compare_with_features(
    student: nn.Module,
    teacher: nn.Module,
    names: list[str],
    run: Callable[[nn.Module], Tensor],
    channel_dim: int = 1,
) -> list[Tensor]:
    """Term and gradient are those of `attention_loss` on the same features, by FeatureTaps; returns them."""
    found = []
    options = {"channel_dim": channel_dim}
    parameters = [*student.parameters()]
    with (
        at_fused.AttentionTransfer(student, teacher, names, **options) as transfer,
        at_fused.FeatureTaps(student, names) as s_taps,
        at_fused.FeatureTaps(teacher, names) as t_taps,
    ):
        with torch.no_grad():
            run(teacher)
        out = run(student)
        on_features = 1000 * at_fused.attention_loss(s_taps.features, t_taps.features, **options)
        terms = [transfer(), on_features]
        for term in terms:
            assert term > 0
            grads = torch.autograd.grad(out + term, parameters, retain_graph=True, allow_unused=True)
            found.append(torch.cat([g.flatten() for g in grads if g is not None]))
        features = [feature.detach() for feature in s_taps.features]
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-6, atol=0)
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert error < 2**8 * torch.finfo(torch.float32).eps, "sums of fp32 terms in another order"
    return features


@pytest.mark.parametrize("widths", [(8, 16)])
def test_hidden_states_of_transformers(widths: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")

    def model(width: int) -> nn.Module:
        sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width], "depths": [1, 1]}
        return transformers.ResNetModel(transformers.ResNetConfig(**sizes)).eval()

    torch.manual_seed(0)
    owners = [nn.ModuleDict({"net": model(width)}) for width in widths]
    images = torch.rand(2, 3, 32, 32)
    for owner in owners:
        owner.forward = lambda x, net=owner["net"]: net(x, output_hidden_states=True)
    names = ["net['hidden_states'][1]", "net['last_hidden_state']", "net.encoder.stages.0"]
    features = compare_with_features(*owners, names, lambda owner: owner(images)[0].square().mean())
    assert [tuple(f.shape[1:]) for f in features] == [(8, 8, 8), (16, 4, 4), (8, 8, 8)]


def test_tokens_of_a_transformers_vit() -> None:
    transformers = pytest.importorskip("transformers")

    def model(width: int) -> nn.Module:
        config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=width,
            image_size=32,
            patch_size=8,
        )
        return transformers.ViTModel(config).eval()

    torch.manual_seed(0)
    networks = [nn.ModuleDict({"net": model(width)}) for width in (8, 16)]
    images = torch.rand(2, 3, 32, 32)
    for owner in networks:
        owner.forward = lambda x, net=owner["net"]: net(x)
    features = compare_with_features(
        *networks,
        ["net['last_hidden_state'][:, 1:]"],
        lambda owner: owner(images)["last_hidden_state"].square().mean(),
        channel_dim=-1,
    )
    assert features[0].shape == (2, 16, 8)


def test_pyramid_of_a_detection_model() -> None:
    detection = pytest.importorskip("torchvision").models.detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import mobilenet_backbone

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        backbone = mobilenet_backbone("mobilenet_v3_small", weights=None, fpn=True, trainable_layers=6)
        anchors = AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
        return detection.RetinaNet(backbone, 3, min_size=64, max_size=64, anchor_generator=anchors)

    images = [torch.rand(3, 64, 64) for _ in range(2)]
    boxes = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    features = compare_with_features(
        model(0),
        model(1),
        ["backbone['0']", "backbone['1']", "head:input[0][0]"],
        lambda network: torch.stack([*network(images, [boxes, boxes]).values()]).sum(),
    )
    assert torch.equal(features[2], features[0])


def test_output_of_a_segmentation_model() -> None:
    segmentation = pytest.importorskip("torchvision").models.segmentation

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        options = {"weights": None, "weights_backbone": None, "num_classes": 3}
        return segmentation.lraspp_mobilenet_v3_large(**options).eval()

    images = torch.rand(2, 3, 64, 64)
    names = ["backbone['low']", "backbone['high']", "['out']"]
    features = compare_with_features(model(0), model(1), names, lambda net: net(images)["out"].mean())
    assert [tuple(f.shape[1:]) for f in features] == [(40, 8, 8), (960, 4, 4), (3, 64, 64)]


def test_stages_of_a_swin_transformer() -> None:
    swin = pytest.importorskip("torchvision").models.SwinTransformer

    def model(width: int) -> nn.Module:
        torch.manual_seed(width)
        sizes = {"depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4]}
        return swin([4, 4], width, stochastic_depth_prob=0.0, num_classes=3, **sizes).eval()

    images = torch.rand(2, 3, 32, 32)
    features = compare_with_features(
        model(16), model(32), ["features.1", "features.3"], lambda net: net(images).mean(), channel_dim=-1
    )
    assert [tuple(f.shape[1:]) for f in features] == [(8, 8, 16), (4, 4, 32)]
    at_fused._checks._warned_shapes.clear()
    student, teacher = model(16), model(32)
    with (
        at_fused.AttentionTransfer(student, teacher, ["features.1"]),
        pytest.warns(UserWarning, match=r"'features.1': the feature \(2, 8, 8, 16\) looks .*channel_dim=-1"),
    ):
        student(images)
