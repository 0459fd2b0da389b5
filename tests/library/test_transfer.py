"""AttentionTransfer: the numbers of `attention_loss` on the features, or an error that says what to do."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import at_fused

NAMES = ["layer1", "layer2", "layer3"]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Three blocks and a head; `reentrant` says how blocks are checkpointed, `skip` leaves one out."""

    def __init__(self, width: int, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layer1, self.layer2, self.layer3 = (Block(width, width) for _ in range(3))
        self.head = nn.Linear(width, 5)
        self.reentrant = reentrant
        self.skip: str | None = None
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in NAMES:
            if name != self.skip:
                block, mode = self.get_submodule(name), self.reentrant
                x = block(x) if mode is None else checkpoint(block, x, use_reentrant=mode)
            if self.fail:
                raise KeyError("half-way")
            x = F.avg_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def networks(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Net, Net]:
    torch.manual_seed(0)
    return Net(4, **options).to(dtype), Net(6).to(dtype).eval()


def batch(dtype: torch.dtype = torch.float64, size: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.arange(size) % 5


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def expected(dtype: torch.dtype = torch.float64, beta: float = 1000, **options: Any) -> tuple[Tensor, Tensor]:
    """The transfer term on features made by hand, without hooks, and the gradient of the whole loss."""
    student, teacher = networks(dtype)
    images, targets = batch(dtype)

    def features(net: Net) -> tuple[list[Tensor], Tensor]:
        x, found = net.stem(images), []
        for name in NAMES:
            found.append(net.get_submodule(name)(x))
            x = F.avg_pool2d(found[-1], 2)
        return found, net.head(x.mean((2, 3)))

    with torch.no_grad():
        theirs, _ = features(teacher)
    ours, logits = features(student)
    term = beta * at_fused.attention_loss(ours, theirs, backend="reference", **options)
    return term.detach(), gradients(F.cross_entropy(logits, targets) + term.sum(), student)


def one_step(
    student: Net, teacher: Net, transfer: at_fused.AttentionTransfer, run: Callable | None = None
) -> tuple[Tensor, Tensor]:
    dtype = student.head.weight.dtype
    images, targets = batch(dtype)
    with torch.no_grad():
        teacher(images)
    logits = (student if run is None else run)(images)
    term = transfer()
    return term.detach(), gradients(F.cross_entropy(logits, targets) + term.sum(), student)


def assert_same(got: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], roundings: float = 64) -> None:
    """Relative errors of the term and of the gradient, by the rounding of their dtype."""
    for value, truth in zip(got, right, strict=True):
        error = (value.double() - truth.double()).norm() / truth.double().norm()
        assert error <= roundings * torch.finfo(value.dtype).eps, error


# --- the numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p": 1},
        {"p": 2.5},
        {"mapping": "max"},
        {"distance": "norm"},
        {"normalize": "l1"},
        {"normalize": None},
        {"weights": [1.0, 0.0, 2.0]},
        {"reduction": "none"},
        {"beta": 3.0},
    ],
    ids=str,
)
def test_same_numbers_as_the_loss_on_the_features(
    options: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    student, teacher = networks(dtype)
    with at_fused.AttentionTransfer(student, teacher, NAMES, backend=backend, **options) as transfer:
        got = one_step(student, teacher, transfer)
    assert_same(got, expected(dtype, **options), roundings=2**10)


def test_terms_by_the_students_names() -> None:
    student, teacher = networks()
    pairs = {"layer1": "layer2", "layer3": "layer3"}
    with at_fused.AttentionTransfer(student, teacher, pairs, beta=7.0) as transfer:
        images, _ = batch()
        teacher(images)
        student(images)
        total = transfer()
    assert list(transfer.losses) == ["layer1", "layer3"]
    assert not any(term.requires_grad for term in transfer.losses.values())
    torch.testing.assert_close(sum(transfer.losses.values()), total.detach())


def test_beta_is_scheduled_by_assignment() -> None:
    student, teacher = networks()
    with at_fused.AttentionTransfer(student, teacher, NAMES, beta=1.0) as transfer:
        transfer.beta = 10.0
        got = one_step(student, teacher, transfer)
    assert_same(got, expected(beta=10.0))


def test_maps_of_other_sizes_are_resized() -> None:
    student, teacher = networks()
    with at_fused.AttentionTransfer(student, teacher, {"layer2": "layer1"}) as transfer:
        images, _ = batch()
        with torch.no_grad():
            teacher(images)
            student(images)
            with (
                at_fused.FeatureTaps(student, ["layer2"]) as s,
                at_fused.FeatureTaps(teacher, ["layer1"]) as t,
            ):
                student(images), teacher(images)
                loss = 1000 * at_fused.attention_loss(s.features, t.features)
            torch.testing.assert_close(transfer(), loss)


def test_second_derivatives() -> None:
    student, teacher = networks()
    student.eval()
    images = batch()[0].requires_grad_()

    def penalty(term: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            teacher(images)
        loss = student(images).square().sum() + term()
        (at_images,) = torch.autograd.grad(loss, images, create_graph=True)
        return gradients(at_images.square().sum(), student)

    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        got = penalty(transfer)
    with at_fused.FeatureTaps(student, NAMES) as s, at_fused.FeatureTaps(teacher, NAMES) as t:
        right = penalty(lambda: 1000 * at_fused.attention_loss(s.features, t.features, backend="reference"))
    assert_same((got,), (right,), roundings=2**12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_autocast_and_gradient_scaling(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images, targets = (batch(torch.float32)[0].to(memory_format=layout), batch()[1])

    def step(make: Callable) -> tuple[Tensor, Tensor]:
        student, teacher = networks(torch.float32)
        student.to(memory_format=layout), teacher.to(memory_format=layout)
        term = make(student, teacher)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                teacher(images)
            ce = F.cross_entropy(student(images), targets)
            at = term()
        return at.detach(), gradients(1024 * (ce + at), student)

    def on_features(student: Net, teacher: Net) -> Callable[[], Tensor]:
        s, t = at_fused.FeatureTaps(student, NAMES), at_fused.FeatureTaps(teacher, NAMES)
        return lambda: 1000 * at_fused.attention_loss(s.features, t.features)

    got = step(lambda student, teacher: at_fused.AttentionTransfer(student, teacher, NAMES))
    right = step(on_features)
    torch.testing.assert_close(got[0], right[0], rtol=1e-6, atol=0)
    error = (got[1] - right[1]).norm() / right[1].norm()
    assert error < 4 * torch.finfo(torch.bfloat16).eps, "one rounding less than autograd's addition"


def test_the_gradient_keeps_its_format_and_gets_one_rounding() -> None:
    """The sum of both gradients is rounded once: to the nearest bf16 of the exact sum."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Identity())
    feature = torch.randn(2, 16, 5, 5).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    teacher = nn.Sequential(nn.Identity())
    upstream = torch.randn(2, 16, 5, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)
    with at_fused.AttentionTransfer(student, teacher, ["0"], beta=1.0) as transfer:
        teacher(torch.rand(2, 3, 5, 5))
        out = student(feature)
        (at_out, at_map) = (upstream, transfer())
        (grad,) = torch.autograd.grad([out, at_map], feature, [at_out, torch.ones(())])
    exact = feature.detach().double().requires_grad_()
    with at_fused.AttentionTransfer(student, teacher, ["0"], beta=1.0, backend="reference") as transfer:
        torch.manual_seed(0)
        torch.randn(2, 16, 5, 5), torch.randn(2, 16, 5, 5)
        teacher(torch.rand(2, 3, 5, 5).double())
        out = student(exact)
        (right,) = torch.autograd.grad(
            [out, transfer()], exact, [upstream.double(), torch.ones((), dtype=torch.float64)]
        )
    assert grad.stride() == feature.stride()
    spacing = torch.finfo(torch.bfloat16).eps * right.abs().clamp_min(1e-30)
    assert ((grad.double() - right).abs() <= 0.501 * spacing).all()


# --- every way of running a model -------------------------------------------------------------------


def checkpointed_model(student: Net, reentrant: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(student, x.requires_grad_(), use_reentrant=reentrant)


@pytest.mark.parametrize("compiled", ["neither", "student", "both", "step"])
@pytest.mark.parametrize("way", ["plain", "blocks checkpointed", "model checkpointed", "skipped before"])
def test_the_right_gradient(way: str, compiled: str) -> None:
    student, teacher = networks(reentrant=False if way == "blocks checkpointed" else None)
    fullgraph = way == "plain"
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        if way == "skipped before":  # what a pass skipped before does not matter to the next
            student.skip = "layer2"
            student(batch()[0])
            student.skip = None
            student.load_state_dict(networks()[0].state_dict())
        if compiled == "step":
            images, targets = batch()
            inner = checkpointed_model(student, False) if way == "model checkpointed" else student

            def step(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                with torch.no_grad():
                    logits = teacher(images)
                ce = F.cross_entropy(inner(images), targets)
                term = transfer()
                return ce + term, term, logits

            loss, term, _ = torch.compile(step, backend="aot_eager", fullgraph=fullgraph)(images, targets)
            got = term.detach(), gradients(loss, student)
        else:
            run: Callable = student
            if compiled != "neither":
                run = torch.compile(student, backend="aot_eager", fullgraph=fullgraph)
            if compiled == "both":
                teacher.compile(backend="aot_eager", fullgraph=True)
            if way == "model checkpointed":
                inner_run = run
                run = lambda x: checkpoint(inner_run, x, use_reentrant=False)  # noqa: E731
            got = one_step(student, teacher, transfer, run)
    assert_same(got, expected(), roundings=2**8)


@pytest.mark.parametrize("way", ["model", "blocks", "a part through a function", "sequential"])
def test_a_reentrant_checkpoint_is_refused(way: str) -> None:
    student, teacher = networks(reentrant=True if way == "blocks" else None)
    images, _ = batch()
    run: Callable = student
    if way == "model":
        run = checkpointed_model(student, True)
    elif way == "a part through a function":
        student.layer2.forward = lambda x: checkpoint(  # type: ignore[method-assign]
            lambda x: F.relu(student.layer2.norm(student.layer2.conv(x))), x, use_reentrant=True
        )
    names = ["layer2.norm"] if way == "a part through a function" else NAMES
    if way == "sequential":
        blocks = nn.Sequential(student.stem, student.layer1, student.layer2, student.layer3)
        student, names = blocks, ["1", "3"]  # type: ignore[assignment]
        teacher = copy.deepcopy(blocks)  # type: ignore[assignment]
        run = lambda x: checkpoint_sequential(blocks, 2, x.requires_grad_(), use_reentrant=True)  # noqa: E731
    with at_fused.AttentionTransfer(student, teacher, names) as transfer:
        with torch.no_grad():
            teacher(images)
        run(images)
        with pytest.raises(RuntimeError, match=rf"student: the feature of '{names[0]}'.*use_reentrant=False"):
            transfer()


@pytest.mark.parametrize("names", [["layer1"], ["layer1.conv"], ["layer1.norm", "layer1"]])
def test_no_grad_within_the_student_is_refused(names: list[str]) -> None:
    student, teacher = networks()
    original = student.layer1.forward
    student.layer1.forward = torch.no_grad()(original)  # type: ignore[method-assign]
    images, _ = batch()
    with at_fused.AttentionTransfer(student, teacher, names) as transfer:
        teacher(images)
        student(images)
        with pytest.raises(RuntimeError, match=r"has no gradient, and parameters before it are trained"):
            transfer()


@pytest.mark.parametrize("reentrant", [None, True])
def test_a_frozen_part_has_no_gradient_by_right(reentrant: bool | None) -> None:
    student, teacher = networks(reentrant=reentrant)
    for module in (student.stem, student.layer1):
        module.requires_grad_(False)
    images, _ = batch()
    with at_fused.AttentionTransfer(student, teacher, ["layer1"]) as transfer:
        with torch.no_grad():
            teacher(images)
        student(images)
        assert not transfer().requires_grad


def test_measuring_without_gradients() -> None:
    student, teacher = networks()
    images, _ = batch()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        with torch.no_grad():
            teacher(images), student(images)
            assert torch.isfinite(transfer())
            teacher(images), student(images)
        with pytest.raises(
            RuntimeError, match=r"student: the feature of 'layer1' has no gradient.*made under no_grad"
        ):
            transfer()


# --- passes -----------------------------------------------------------------------------------------


def test_a_call_uses_up_both_passes() -> None:
    student, teacher = networks()
    images, _ = batch()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        with pytest.raises(RuntimeError, match=r"student: .*has not reached"):
            transfer()
        for last in (teacher, student):
            teacher(images), student(images)
            transfer()
            last(images)  # the other one's features would be those of an earlier batch
            missing = "teacher" if last is student else "student"
            with pytest.raises(RuntimeError, match=f"{missing}: this model's latest forward pass has not"):
                transfer()


class Maps(TorchDispatchMode):
    """Counts the maps that the fused operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == "at_fused::attention_maps"
        return func(*args, **(kwargs or {}))


def test_passes_while_paused_are_none() -> None:
    """They make no map, leave none behind, and what was recorded before is still there."""
    student, teacher = networks()
    images, targets = batch()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:

        def evaluate() -> int:
            with transfer.paused(), transfer.paused(), Maps() as maps:
                teacher(images[:2]), student(images[:2])
            return maps.count

        buffers = copy.deepcopy(dict(student.named_buffers()))
        assert evaluate() == 0
        with pytest.raises(RuntimeError, match="student: this model's latest forward pass has not reached"):
            transfer()
        for name, buffer in student.named_buffers():
            buffer.copy_(buffers[name])
        with torch.no_grad(), Maps() as maps:
            teacher(images)
        if "cpu" in at_fused.available_backends():
            assert maps.count == 3
        logits = student(images)
        evaluate()
        with pytest.raises(KeyError), transfer.paused():
            raise KeyError
        term = transfer()
        got = term.detach(), gradients(F.cross_entropy(logits, targets) + term, student)
    assert_same(got, expected())


def test_paused_in_a_compiled_model() -> None:
    student, teacher = networks()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
        with transfer.paused(), torch.no_grad():
            student.eval()
            compiled(batch()[0])
            student.train()
        assert_same(one_step(student, teacher, transfer, compiled), expected(), roundings=2**10)
        with transfer.paused():
            compiled(batch()[0])
        with pytest.raises(RuntimeError, match="student: this model's latest forward pass has not reached"):
            transfer()


def test_a_skipped_block_is_named() -> None:
    student, teacher = networks()
    images, _ = batch()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        teacher(images), student(images)
        student.skip = "layer2"
        student(images)
        with pytest.raises(RuntimeError, match=r"student: .*has not reached the tapped modules \['layer2'\]"):
            transfer()


def test_a_pass_that_failed_half_way() -> None:
    student, teacher = networks()
    images, _ = batch()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        teacher(images), student(images)
        student.fail = True
        with pytest.raises(KeyError):
            student(2 * images)
        with pytest.raises(RuntimeError, match=r"student: .*\['layer2', 'layer3'\]"):
            transfer()


def test_a_replaced_module_is_named() -> None:
    student, teacher = networks()
    images, _ = batch()
    with at_fused.AttentionTransfer(student, teacher, ["layer1.norm", "layer3"]) as transfer:
        teacher(images), student(images)
        nn.SyncBatchNorm.convert_sync_batchnorm(student)
        with pytest.raises(RuntimeError, match=r"\['layer1.norm'\] are no longer part of this model"):
            transfer()


def test_unequal_batches_are_refused() -> None:
    student, teacher = networks()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        teacher(batch(size=4)[0]), student(batch(size=6)[0])
        with pytest.raises(
            RuntimeError, match=r"'layer1' \(6, 16, 16\).*\(4, 16, 16\).*batch size.*same images"
        ):
            transfer()


def test_gradient_accumulation() -> None:
    student, teacher = networks()
    student.eval()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        total = torch.zeros(())
        for seed in (1, 2):
            images, _ = batch(seed=seed)
            with torch.no_grad():
                teacher(images)
            student(images)
            total = total + transfer()
        got = gradients(total, student)
        right = torch.zeros_like(got)
        for seed in (1, 2):
            images, _ = batch(seed=seed)
            with torch.no_grad():
                teacher(images)
            student(images)
            right += gradients(transfer(), student)
    torch.testing.assert_close(got, right)


def test_inference_mode_teacher_and_in_place_changes_behind_its_taps() -> None:
    student, _ = networks()
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True)).double()
    images, _ = batch()
    with at_fused.AttentionTransfer(student, teacher, {"layer1": "0"}) as transfer:
        with torch.inference_mode():
            teacher(images)
        with at_fused.FeatureTaps(student, ["layer1"]) as taps:
            student(images)
            right = 1000 * at_fused.attention_loss(taps.features, [teacher[0](images)])
        torch.testing.assert_close(transfer(), right)


def test_an_in_place_change_of_the_students_feature_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True)).double()
    images, _ = batch()
    teacher = copy.deepcopy(model)
    with at_fused.AttentionTransfer(model, teacher, ["0"]) as transfer:
        teacher(images)
        model(images)
        with pytest.raises(RuntimeError, match=r"'0' was modified in place.*out-of-place"):
            transfer()


def test_a_hook_registered_later_is_seen() -> None:
    student, teacher = networks()
    with at_fused.AttentionTransfer(student, teacher, ["layer1"]) as transfer:
        student.layer1.register_forward_hook(lambda module, args, output: output.clamp(max=0.1))
        images, _ = batch()
        with torch.no_grad():
            teacher(images)
            feature = student.layer1(student.stem(images))
            student(images)
            right = at_fused.attention_loss(feature, teacher.layer1(teacher.stem(images)))
            teacher(images), student(images)
            torch.testing.assert_close(transfer(), 1000 * right)


# --- copies -----------------------------------------------------------------------------------------


class Owner(nn.Module):
    """A student with its teacher and their transfer, as a training module keeps them."""

    def __init__(self, student: Net, teacher: Net) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.transfer = at_fused.AttentionTransfer(student, teacher, NAMES, beta=5.0)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher(images)
        self.student(images)
        return self.transfer()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
@pytest.mark.parametrize("grad", [False, True])
def test_a_copied_owner_has_a_transfer_of_its_own(grad: bool, duplicate: Callable) -> None:
    owner = Owner(*networks())
    images, _ = batch()
    with torch.set_grad_enabled(grad):
        owner.teacher(images)
        owner.student(images)  # a pass that is not used
        other = duplicate(owner)
        nn.init.ones_(other.student.layer1.conv.weight)
        right = Owner(*(copy.deepcopy(net) for net in (other.student, other.teacher)))(images)
        torch.testing.assert_close(other(images), right)
        assert not torch.allclose(owner(images), right)


def test_hooks_go_away() -> None:
    student, teacher = networks()
    with pytest.raises(ValueError, match=r"layer4.*layer3"):
        at_fused.AttentionTransfer(student, teacher, NAMES, ["layer1", "layer2", "layer4"])
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        assert "layer1" in repr(transfer)
    for net in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(RuntimeError, match="this transfer is closed"):
        transfer()
    assert "closed" in repr(transfer)


# --- what modules return ----------------------------------------------------------------------------


@dataclass
class Output:
    hidden: Tensor
    others: dict[str, list[Tensor]]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 1), self.Body(), nn.Linear(4, 5)

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor, scale: Tensor) -> Output:
            y = self.conv(x) * scale
            return Output(y.relu(), {"pyramid": [y, 2 * y + x]})

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(self.stem(x), scale=x.mean((1, 2, 3), keepdim=True))
        return self.head((out.hidden + out.others["pyramid"][1]).mean((2, 3)))


@pytest.mark.parametrize(
    "name",
    ["body['hidden']", "body['others']['pyramid'][1]", "body:input", "body:input['scale']", "stem[:, :, 1:]"],
)
def test_selected_features(name: str) -> None:
    torch.manual_seed(0)
    student, teacher = Structured().double(), Structured().double()
    if name == "body:input['scale']":
        student.body.conv.weight.requires_grad_(False)
    images, targets = batch()
    images.requires_grad_()
    x = student.stem(images)
    scale = images.mean((1, 2, 3), keepdim=True)
    out = student.body(x, scale)
    found = {
        "body['hidden']": out.hidden,
        "body['others']['pyramid'][1]": out.others["pyramid"][1],
        "body:input": x,
        "body:input['scale']": scale,
        "stem[:, :, 1:]": x[:, :, 1:],
    }
    logits = student.head((out.hidden + out.others["pyramid"][1]).mean((2, 3)))
    with at_fused.FeatureTaps(teacher, [name]) as taps, torch.no_grad():
        teacher(images)
        (theirs,) = taps.features
    told = pytest.warns(UserWarning, match="single position") if "scale" in name else nullcontext()
    with told, at_fused.AttentionTransfer(student, teacher, [name], p=2) as transfer:
        with torch.no_grad():
            teacher(images)
        got = student(images)
        term = transfer()
        torch.testing.assert_close(got, logits)
        (ours,) = torch.autograd.grad(F.cross_entropy(got, targets) + term, images)
    right = 1000 * at_fused.attention_loss(found[name], theirs, backend="reference")
    torch.testing.assert_close(term, right)
    (exact,) = torch.autograd.grad(F.cross_entropy(logits, targets) + right, images)
    torch.testing.assert_close(ours, exact)


def test_what_cannot_be_selected_is_listed() -> None:
    model, images = Structured().double(), batch()[0]
    for name, message in (
        ("body", r"'body' returned Output with fields \['hidden', 'others'\].*\"body\['hidden'\]\""),
        ("body['others']", r"returned dict with keys \['pyramid'\]"),
        ("body['deep']", r"there is no \['deep'\] in Output"),
        ("body['others']['pyramid'][5]", r"there is no \[5\] in list of 2"),
    ):
        with at_fused.FeatureTaps(model, [name]), pytest.raises(TypeError, match=message):
            model(images)
    with pytest.raises(ValueError, match="can't be read"):
        at_fused.FeatureTaps(model, ["body[open('x')]"])
    with pytest.raises(ValueError, match="no submodule named 'boddy'; close names: body"):
        at_fused.FeatureTaps(model, ["boddy:input[0]"])


def test_tokens_against_maps_have_a_channel_dim_per_side() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Sequential(nn.Flatten(2)), nn.Sequential(nn.Identity())
    with at_fused.AttentionTransfer(student, teacher, ["0"], channel_dim=1, t_channel_dim=-1) as transfer:
        feature, tokens = torch.rand(2, 8, 3, 4), torch.rand(2, 12, 16)
        teacher(tokens), student(feature)
        right = at_fused.attention_loss(feature.flatten(2), tokens.transpose(1, 2))
        torch.testing.assert_close(transfer(), 1000 * right)


# --- maps in place of a teacher ---------------------------------------------------------------------


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("normalize", [None, "l2"])
def test_given_maps_are_compared_instead_of_a_teachers(normalize: str | None, with_teacher: bool) -> None:
    student, teacher = networks()
    images, targets = batch()
    with at_fused.FeatureTaps(teacher, NAMES) as taps, torch.no_grad():
        teacher(images)
        maps = [at_fused.attention_map(feature, normalize=normalize) for feature in taps.features]
    with at_fused.AttentionTransfer(student, teacher if with_teacher else None, NAMES) as transfer:
        logits = student(images)
        term = transfer(maps)
        got = term.detach(), gradients(F.cross_entropy(logits, targets) + term, student)
        assert_same(got, expected())
        with pytest.raises(RuntimeError, match=r"student: .*has not reached"):
            transfer(maps)
        student(images)
        missing = (
            "teacher: this model"
            if with_teacher
            else r"has no teacher: give its maps, transfer\(teacher_maps\)"
        )
        with pytest.raises(RuntimeError, match=missing):
            transfer()


@pytest.mark.parametrize("normalize", [None, "l1", "l2"])
def test_the_teachers_maps_are_given_back(normalize: str | None) -> None:
    """Those of `attention_map`, also where the model overwrites the feature afterwards; they serve a call."""

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mul_(-2).relu_()

    torch.manual_seed(0)
    student = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3))).double()
    teacher = Overwriting().double().requires_grad_(False)
    images, _ = batch()
    with at_fused.AttentionTransfer(student, teacher, ["conv"], normalize=normalize) as transfer:
        with pytest.raises(RuntimeError, match=r"teacher: .*has not reached"):
            transfer.teacher_maps()
        with torch.no_grad():
            teacher(images)
            (got,) = transfer.teacher_maps()
            with transfer.paused():
                right = at_fused.attention_map(teacher.conv(images), normalize=normalize)
        torch.testing.assert_close(got, right, rtol=1e-13, atol=1e-13)
        with pytest.raises(RuntimeError, match=r"teacher: .*has not reached"):  # they are used up
            transfer.teacher_maps()
        student(images)
        given = transfer([got])
        student(images), teacher(images)
        torch.testing.assert_close(given, transfer(), rtol=1e-12, atol=0)
    alone = at_fused.AttentionTransfer(student, None, ["conv"])
    with alone, pytest.raises(RuntimeError, match="has no teacher"):
        alone.teacher_maps()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_kept_in_half_precision(dtype: torch.dtype) -> None:
    """Each value is rounded: a normalised map changes by at most one rounding, and so does the distance."""
    student, teacher = networks(torch.float32)
    images, _ = batch(torch.float32)
    with at_fused.FeatureTaps(teacher, NAMES) as taps, torch.no_grad():
        teacher(images)
        maps = [at_fused.attention_map(feature, normalize="l2") for feature in taps.features]
        with at_fused.AttentionTransfer(student, None, NAMES, reduction="none") as transfer:
            student(images)
            exact = transfer(maps)
            student(images)
            rounded = transfer([attention.to(dtype) for attention in maps])
    # |√loss' − √loss| ≤ √mean (change of a unit vector)² ≤ rounding / √positions
    positions = torch.tensor([attention[0].numel() for attention in maps])
    bound = torch.finfo(dtype).eps * (1000 / positions).sqrt()
    assert ((rounded.sqrt() - exact.sqrt()).abs() <= bound).all()
    assert (rounded != exact).any()


def test_wrong_maps() -> None:
    student, _ = networks()
    images, _ = batch()
    right = [torch.rand(6, side, side) for side in (16, 8, 4)]
    with at_fused.AttentionTransfer(student, None, NAMES) as transfer, torch.no_grad():
        for error, message, maps in (
            (TypeError, "sequence of maps, one per pair", right[0]),
            (ValueError, "got 1 for 3 pairs", right[:1]),
            (
                TypeError,
                r"'layer2' must be a floating-point tensor.*int64 \(6, 8, 8\)",
                [right[0], right[1].long(), right[2]],
            ),
            (
                RuntimeError,
                r"'layer1' \(6, 16, 16\) and 'layer1' \(5, 16, 16\), differ in batch size",
                [r[:5] for r in right],
            ),
        ):
            student(images)
            with pytest.raises(error, match=message):
                transfer(maps)


# --- arguments --------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    student, teacher = networks()
    make = at_fused.AttentionTransfer
    for error, message, call in (
        (TypeError, "single string 'layer1'", lambda: make(student, teacher, "layer1")),  # type: ignore[arg-type]
        (ValueError, "same number: got 3 .* and 1", lambda: make(student, teacher, NAMES, ["layer1"])),
        (ValueError, "names are empty", lambda: make(student, teacher, [])),
        (TypeError, "t_names can't be given", lambda: make(student, teacher, {"layer1": "layer2"}, NAMES)),
        (
            ValueError,
            "weights must have one number per pair",
            lambda: make(student, teacher, NAMES, weights=[1]),
        ),
        (TypeError, "beta must be a real number", lambda: make(student, teacher, NAMES, beta="1")),  # type: ignore[arg-type]
        (ValueError, "got 2 for 3 pairs", lambda: make(student, teacher, NAMES, channel_dim=[1, 1])),
        (ValueError, "distance must be one of", lambda: make(student, teacher, NAMES, distance="l2")),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_one_position_is_a_warning_once() -> None:
    student, teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1)), nn.Sequential(nn.AdaptiveAvgPool2d(1))
    x = torch.rand(2, 3, 4, 4)
    with at_fused.AttentionTransfer(student, teacher, ["0"]) as transfer:
        teacher(x), student(x)
        with pytest.warns(UserWarning, match="maps of '0' have a single position"):
            assert transfer() == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            teacher(x), student(x)
            transfer()
