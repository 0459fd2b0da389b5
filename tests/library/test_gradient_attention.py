"""Gradient-based attention (section 3.2): a model differentiated by hand, differences, every zoo model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import at_fused
import models

ZOO = ["wrn-10-1", "wrn-16-2", "nin-thin", "nin-thin-rawpool", "nin-thin-nobn-rawpool", "resnet-18"]
LOSSES = ["gradient_attention", "symmetry", "norm"]


def loss_of(kind: str, model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    if kind == "gradient_attention":
        return at_fused.gradient_attention_loss(model, teacher, x, y, **options)
    if kind == "symmetry":
        return at_fused.symmetry_loss(model, x, y, output_weight=0.7, **options)
    return at_fused.input_gradient_norm(model, x, y, **options)


class Smooth(nn.Module):
    """Small, with BatchNorm, and without kinks: differences of it converge."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.Softplus()
        self.mix = nn.Conv2d(width, width, 3)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mix(self.act(self.bn(self.conv(x)))).tanh().mean((2, 3)))


@pytest.fixture
def model() -> Smooth:
    torch.manual_seed(0)
    model = Smooth().double()
    for tensor in (model.bn.weight, model.bn.bias, model.bn.running_mean, model.bn.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    return model


@pytest.fixture
def teacher() -> Smooth:
    torch.manual_seed(5)
    return Smooth(6).double().eval().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


Y = torch.tensor([2, 0, 1, 1])


# --- by hand: a linear classifier z = W x + b ---------------------------------------------------------


class Linear:
    """One sample's J = W' (softmax(z) - y) and what its change does to W, in NumPy."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray, x: np.ndarray, label: int) -> None:
        z = weight @ x + bias
        self.weight, self.x, self.z = weight, x, z
        self.softmax = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        self.error = self.softmax - np.eye(len(z))[label]
        self.j = weight.T @ self.error

    def pull(self, e: np.ndarray) -> np.ndarray:
        """Gradient of <e, J> with respect to W, for a constant e."""
        hessian = np.diag(self.softmax) - np.outer(self.softmax, self.softmax)
        return np.outer(self.error, e) + np.outer(hessian @ self.weight @ e, self.x)


@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient_by_hand(kind: str) -> None:
    draw = np.random.default_rng(0)
    shape, classes, batch = (2, 3, 4), 3, 5
    weight, bias, other = (draw.normal(size=s) for s in ((classes, 24), classes, (classes, 24)))
    x, labels = draw.normal(size=(batch, *shape)), draw.integers(classes, size=batch)
    value, grad = 0.0, np.zeros_like(weight)
    for image, label in zip(x, labels, strict=True):
        own = Linear(weight, bias, image.ravel(), label)
        if kind == "symmetry":
            flipped = Linear(weight, bias, image[..., ::-1].ravel(), label)
            e = own.j - flipped.j.reshape(shape)[..., ::-1].ravel()
            grad += own.pull(e) - flipped.pull(e.reshape(shape)[..., ::-1].ravel())
            between = own.z - flipped.z
            value += 0.7 * between @ between
            grad += 2 * 0.7 * np.outer(between, own.x - flipped.x)
        else:
            e = own.j - (Linear(other, bias, image.ravel(), label).j if kind == "gradient_attention" else 0.0)
            grad += own.pull(e)
        value += e @ e / 2

    def build(matrix: np.ndarray) -> nn.Module:
        layer = nn.Linear(24, classes).double()
        layer.weight.data, layer.bias.data = torch.tensor(matrix), torch.tensor(bias)
        return nn.Sequential(nn.Flatten(), layer)

    model = build(weight)
    loss = loss_of(kind, model, build(other), torch.tensor(x), torch.tensor(labels))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(value / batch, rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(model[1].weight.grad.numpy(), grad / batch, rtol=1e-10, atol=1e-13)


# --- J ------------------------------------------------------------------------------------------------


def test_j_is_each_samples_own_derivative(model: Smooth, x: Tensor) -> None:
    """The diagonal blocks of the Jacobian of the vector of cross-entropies; the others are 0 in eval mode."""
    model.eval()
    j = at_fused.input_gradient(model, x, Y)
    assert j.shape == x.shape
    assert j.dtype == x.dtype
    assert not j.requires_grad
    full = torch.autograd.functional.jacobian(lambda x: F.cross_entropy(model(x), Y, reduction="none"), x)
    for b in range(4):
        torch.testing.assert_close(j[b], full[b, b])
    with torch.no_grad():
        for b in range(4):  # whatever batch it is in
            torch.testing.assert_close(
                at_fused.input_gradient(model, x[b : b + 1], Y[b : b + 1])[0], j[b], rtol=1e-12, atol=1e-15
            )


def test_an_ignored_sample_has_no_gradient(model: Smooth, x: Tensor) -> None:
    j = at_fused.input_gradient(model.eval(), x, Y)
    j[2] = 0
    torch.testing.assert_close(at_fused.input_gradient(model, x, torch.tensor([2, 0, -100, 1])), j)


def test_targets_may_be_probabilities(model: Smooth, x: Tensor) -> None:
    soft = torch.rand(4, 3, dtype=torch.float64).softmax(1)
    j = at_fused.input_gradient(model.eval(), x, soft)
    each = [at_fused.input_gradient(model, x, torch.full((4,), label)) for label in range(3)]
    parts = sum(soft[:, label, None, None, None] * each[label] for label in range(3))
    torch.testing.assert_close(j, parts)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_means_over_the_batch(kind: str, model: Smooth, teacher: Smooth, x: Tensor) -> None:
    model.eval()
    whole = loss_of(kind, model, teacher, x, Y)
    single = [loss_of(kind, model, teacher, x[b : b + 1], Y[b : b + 1]) for b in range(4)]
    torch.testing.assert_close(whole, torch.stack(single).mean())
    assert loss_of(kind, model, teacher, x[:0], Y[:0]).item() == 0


class With(nn.Module):
    """`model` with other values of some parameters."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.values = model, values

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, self.values, (x,))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck(kind: str, training: bool, model: Smooth, teacher: Smooth, x: Tensor) -> None:
    """In the weights and in the images, which the penalty also depends on; and once more."""
    model.train(training)
    names = ["conv.weight", "bn.weight", "mix.weight", "fc.weight"]
    parameters = [model.get_parameter(name).detach().requires_grad_() for name in names]

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        return loss_of(kind, With(model, dict(zip(names, values, strict=False))), teacher, x, Y[:2])

    few = x[:2, :, :3, :3].clone().requires_grad_()
    if kind == "gradient_attention":  # J_T is a constant, also in x: compare in the weights
        fixed = few.detach()
        assert torch.autograd.gradcheck(lambda *values: loss(fixed, *values), parameters)
    else:
        assert torch.autograd.gradcheck(loss, (few, *parameters))
    if not training:  # torch's third derivative of BatchNorm in train mode is wrong (seen in 2.13)
        assert torch.autograd.gradgradcheck(lambda *values: loss(few.detach(), *values), parameters[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, training",
    # not resnet-50 in train mode: statistics of a few values make its J jump within any step
    [(name, training) for name in ZOO for training in (True, False) if training or "nobn" not in name]
    + [("resnet-50", False)],
)
def test_double_backward_through_every_zoo_model(name: str, training: bool) -> None:
    """The derivative along a random direction in all weights against a difference of the values, in fp64."""
    torch.manual_seed(0)
    model = models.create(name).double().train(training)
    teacher = models.create(name).double().eval().requires_grad_(False)
    x, y = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 7, 4])
    direction = [torch.randn_like(p) * p.abs().mean().clamp(min=1e-3) for p in model.parameters()]

    def value(step: float) -> float:
        for parameter, along in zip(model.parameters(), direction, strict=True):
            parameter.data.add_(along, alpha=step)
        total = sum(loss_of(kind, model, teacher, x, y) for kind in LOSSES).item()
        for parameter, along in zip(model.parameters(), direction, strict=True):
            parameter.data.add_(along, alpha=-step)
        return total

    sum(loss_of(kind, model, teacher, x, y) for kind in LOSSES).backward()
    slope = sum((p.grad * along).sum() for p, along in zip(model.parameters(), direction, strict=True)).item()
    step = 1e-8  # so short that hardly a ReLU switches, where J jumps
    assert abs(slope) > 1e-3
    assert (value(step) - value(-step)) / (2 * step) == pytest.approx(slope, rel=1e-5)
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name.endswith("weight"))


# --- what flows where ---------------------------------------------------------------------------------


def test_teacher_is_a_constant_and_no_grad_is_touched(model: Smooth, x: Tensor) -> None:
    torch.manual_seed(5)
    teacher = Smooth().double()  # trainable, and in train mode: neither may matter
    j_t = at_fused.input_gradient(teacher, x, Y)
    expected = (at_fused.input_gradient(model, x, Y, create_graph=True) - j_t).square().sum() / 8
    loss = at_fused.gradient_attention_loss(model, teacher, x, Y)
    assert all(p.grad is None for p in [*model.parameters(), *teacher.parameters()])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    grads = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter) if grad is None else grad)
    assert all(p.grad is None for p in teacher.parameters())
    assert x.grad is None


@pytest.mark.parametrize("kind", LOSSES)
def test_given_logits_save_a_pass_and_change_nothing(
    kind: str, model: Smooth, teacher: Smooth, x: Tensor
) -> None:
    passes = []
    model.register_forward_hook(lambda *args: passes.append(1))
    expected = loss_of(kind, model, teacher, x, Y)
    grads = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    before = len(passes)
    images = x.clone().requires_grad_()
    logits = model(images)
    loss = loss_of(kind, model, teacher, images, Y, logits=logits)
    assert len(passes) - before == before  # the one made here instead of one inside
    torch.testing.assert_close(loss, expected)
    (F.cross_entropy(logits, Y) * 0 + loss).backward()  # the graph is still there
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(parameter.grad, grad)


def test_flip_invariant_model_has_no_symmetry_loss(x: Tensor) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 1), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    model = nn.Sequential(*layers).double()
    assert at_fused.symmetry_loss(model, x, Y, output_weight=3.0).item() < 1e-28
    model[0] = nn.Conv2d(2, 4, 3).double()
    assert at_fused.symmetry_loss(model, x, Y).item() > 1e-8


# --- BatchNorm ----------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["batch", "running", "update"])
@pytest.mark.parametrize("kind", LOSSES)
def test_batch_norm_statistics(
    kind: str, mode: str, training: bool, model: Smooth, teacher: Smooth, x: Tensor
) -> None:
    model.train(training)
    passes = [x, x.flip(-1)] if kind == "symmetry" else [x]
    plain = Smooth().double().train(training)
    plain.load_state_dict(model.state_dict())
    for images in passes:
        plain(images)
    before = state(model)
    loss_of(kind, model, teacher, x, Y, batch_norm=mode).backward()
    expected = state(plain) if mode == "update" else before
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert torch.equal(state(plain)["bn.running_mean"], before["bn.running_mean"]) is not training
    assert model.bn.training is training
    assert model.bn.track_running_stats


@pytest.mark.parametrize("mode", ["batch", "running", "update"])
def test_batch_norm_of_a_teacher_that_trains(mode: str, model: Smooth, x: Tensor) -> None:
    """The choice is the teacher's, too: its statistics in use, and whether they change."""
    torch.manual_seed(5)
    teacher = Smooth(6).double()
    nn.init.uniform_(teacher.bn.running_mean, 0.5, 1.5)  # type: ignore[arg-type]
    twin = copy.deepcopy(teacher)
    j_t = at_fused.input_gradient(twin, x, Y, batch_norm=mode)
    j_s = at_fused.input_gradient(copy.deepcopy(model), x, Y, batch_norm=mode)
    loss = at_fused.gradient_attention_loss(model, teacher, x, Y, batch_norm=mode)
    torch.testing.assert_close(loss.detach(), (j_s - j_t).square().sum() / 8)
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name


def test_batch_norm_chooses_the_statistics_in_use(model: Smooth, x: Tensor) -> None:
    plain = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(model(plain), Y, reduction="sum"), plain)
    in_training = at_fused.input_gradient(model, x, Y, batch_norm="batch")
    torch.testing.assert_close(in_training, expected)
    fixed = at_fused.input_gradient(model, x, Y, batch_norm="running")
    alone = at_fused.input_gradient(model, x[:1], Y[:1], batch_norm="running")
    torch.testing.assert_close(fixed[:1], alone)
    assert model.training
    torch.testing.assert_close(fixed, at_fused.input_gradient(model.eval(), x, Y))
    assert not torch.allclose(fixed, in_training)


def test_batch_norm_without_running_statistics(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)).double()
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3).double()))
    for mode in ("batch", "running", "update"):
        assert at_fused.input_gradient(model, x, Y, batch_norm=mode).isfinite().all()
        assert model[1].track_running_stats is False


def test_modes_are_restored_after_an_error(model: Smooth, x: Tensor) -> None:
    for mode in ("batch", "running"):
        with pytest.raises(RuntimeError):
            at_fused.input_gradient(model, x[:, :1], Y, batch_norm=mode)
        assert model.bn.training
        assert model.bn.track_running_stats
    with pytest.raises(RuntimeError):
        at_fused.input_gradient(model, x[:, :1], Y, layer="conv")
    assert not model.conv._forward_hooks


# --- intermediate layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_at_a_layer(frozen: bool, model: Smooth, x: Tensor) -> None:
    model.eval().requires_grad_(not frozen)
    with at_fused.FeatureTaps(model, ["act"]) as taps:
        model(x)
        feature = taps.features[0].detach()
    rest = lambda a: model.fc(model.mix(a).tanh().mean((2, 3)))  # noqa: E731
    full = torch.autograd.functional.jacobian(lambda a: F.cross_entropy(rest(a), Y, reduction="sum"), feature)
    with torch.no_grad():
        torch.testing.assert_close(at_fused.input_gradient(model, x, Y, layer="act"), full)
    assert not model.act._forward_hooks


def test_a_layer_of_two_names_and_two_calls(x: Tensor) -> None:
    """Either name will do; the gradient is that at the last output."""
    torch.manual_seed(0)
    first, act, last = nn.Conv2d(2, 3, 3), nn.Softplus(), nn.Conv2d(3, 3, 3)
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(first, act, last, act, *ends).double()  # the names 1 and 3 of one module
    with torch.no_grad():
        feature = model[:4](x)
    rest = lambda a: F.cross_entropy(model[4:6](a), Y, reduction="sum")  # noqa: E731
    expected = torch.autograd.functional.jacobian(rest, feature)
    for name in ("1", "3"):
        torch.testing.assert_close(at_fused.input_gradient(model, x, Y, layer=name), expected)
    model.unused = nn.Identity()
    model.forward = model[:6].forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no forward pass has reached layer 'unused'"):
        at_fused.input_gradient(model, x, Y, layer="unused")


def test_layer_before_work_in_place() -> None:
    """torchvision's BatchNorms are followed by ReLUs in place: the gradient is still the one before them."""
    torch.manual_seed(0)
    model = models.create("resnet-18").eval()
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    j = at_fused.input_gradient(model, x, y, layer="layer1.0.bn1")
    model.layer1[0].relu = nn.ReLU(inplace=False)
    kept: list[Tensor] = []
    model.layer1[0].bn1.register_forward_hook(lambda module, args, output: kept.append(output))
    (expected,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), kept[0])
    torch.testing.assert_close(j, expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_at_a_layer(kind: str, model: Smooth, teacher: Smooth, x: Tensor) -> None:
    model.eval()
    options = {"teacher_layer": "conv"} if kind == "gradient_attention" else {}
    same = Smooth().double().eval().requires_grad_(False)
    j = at_fused.input_gradient(model, x, Y, layer="act")
    if kind == "gradient_attention":
        other = at_fused.input_gradient(same, x, Y, layer="conv")
    elif kind == "symmetry":
        other = at_fused.input_gradient(model, x.flip(-1), Y, layer="act").flip(-1)
    else:
        other = torch.zeros_like(j)
    expected = (j - other).square().sum() / 8
    if kind == "symmetry":
        expected = expected + 0.7 * (model(x) - model(x.flip(-1))).square().sum().detach() / 4
    loss = loss_of(kind, model, same, x, Y, layer="act", **options)
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert model.conv.weight.grad.abs().max() > 0  # below the layer too: J depends on its output


# --- precision, autocast, errors ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_autocast_returns_fp32(kind: str) -> None:
    torch.manual_seed(0)
    model, teacher = models.create("wrn-10-1"), models.create("wrn-10-2").eval()
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4])
    exact = loss_of(kind, model, teacher, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert at_fused.input_gradient(model, x, y).dtype == torch.float32
        loss = loss_of(kind, model, teacher, x, y)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.1)  # bf16 keeps 8 bits
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_dtypes(model: Smooth, x: Tensor) -> None:
    assert at_fused.input_gradient_norm(model, x, Y).dtype == torch.float64
    half = Smooth().to(torch.bfloat16)
    assert at_fused.input_gradient(half, x.bfloat16(), Y).dtype == torch.bfloat16
    assert at_fused.input_gradient_norm(half, x.bfloat16(), Y).dtype == torch.float32


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda m, x: at_fused.input_gradient(m, x.long(), Y), TypeError, "int64 (4, 2, 5, 6)"),
        (lambda m, x: at_fused.input_gradient(m, [1], Y), TypeError, "list"),
        (lambda m, x: at_fused.input_gradient(lambda x: x, x, Y), TypeError, "torch.nn.Module"),
        (lambda m, x: at_fused.input_gradient(m, x, Y.int()), TypeError, "int32 (4,)"),
        (lambda m, x: at_fused.input_gradient(m, x, Y[:3]), ValueError, "(4, 2, 5, 6) and targets (3,)"),
        (
            lambda m, x: at_fused.input_gradient(m, x, Y[:, None]),
            ValueError,
            "(4, 1) do not fit logits (4, 3)",
        ),
        (lambda m, x: at_fused.input_gradient(m, x, Y.double()), ValueError, "float64 (4,) do not fit"),
        (lambda m, x: at_fused.input_gradient(m, x, torch.rand(4, 5)), ValueError, "(4, 5) do not fit"),
        (lambda m, x: at_fused.input_gradient(m, x, Y + 1), ValueError, "expected classes from 0 to 2"),
        (lambda m, x: at_fused.symmetry_loss(m, x, Y - 1), ValueError, "int64 (4,) do not fit logits (4, 3)"),
        (lambda m, x: at_fused.input_gradient(m.conv, x, Y), ValueError, "got float64 (4, 4, 5, 6)"),
        (lambda m, x: at_fused.input_gradient(m, x, Y, batch_norm="eval"), ValueError, "'eval'"),
        (lambda m, x: at_fused.input_gradient(m, x, Y, layer="convs"), ValueError, "close names: conv"),
        (lambda m, x: at_fused.input_gradient_norm(m, x, Y, logits=m(x)), ValueError, "requires grad"),
        (
            lambda m, x: at_fused.symmetry_loss(m, x.requires_grad_(), Y, logits=m(x), layer="conv"),
            ValueError,
            "layer",
        ),
        (
            lambda m, x: at_fused.gradient_attention_loss(m, Smooth(6).double(), x, Y, layer="conv"),
            ValueError,
            "student (4, 4, 5, 6) and teacher (4, 6, 5, 6)",
        ),
    ],
)
def test_mistakes(
    call: Callable[[Smooth, Tensor], Tensor], kind: type[Exception], words: str, model: Smooth, x: Tensor
) -> None:
    with pytest.raises(kind) as error:
        call(model, x)
    assert words in str(error.value)
