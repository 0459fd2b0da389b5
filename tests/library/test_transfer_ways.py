"""AttentionTransfer where models share modules, fail, are traced, compiled in parts or transformed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_transfer import NAMES, Block, Net, assert_same, batch, expected, gradients, networks, one_step
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import at_fused


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


# --- (eager, compiled student, compiled step) x what must be refused --------------------------------


def runner(
    how: str, student: Net, teacher: Net, transfer: at_fused.AttentionTransfer
) -> Callable[[], Tensor]:
    """A call makes a step's passes and returns its loss."""
    images, targets = batch()
    run = torch.compile(student, backend="aot_eager") if how == "compiled student" else student

    def step(images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            teacher(images)
        return F.cross_entropy(run(images), targets) + transfer()

    if how == "compiled step":
        step = torch.compile(step, backend="aot_eager")
    return lambda: step(images, targets)


def break_it(fault: str, student: Net) -> None:
    if fault == "skipped block":
        student.skip = "layer2"
    elif fault == "swapped module":
        student.layer1.norm = nn.BatchNorm2d(4).double()
    elif fault == "reentrant checkpoint":
        student.reentrant = True
    elif fault == "no_grad inside":
        student.layer2.forward = torch.no_grad()(student.layer2.forward)  # type: ignore[method-assign]
    elif fault == "half-failed pass":
        student.fail = True


@pytest.mark.parametrize("how", ["eager", "compiled student", "compiled step"])
@pytest.mark.parametrize(
    "fault, message",
    [
        ("skipped block", r"has not reached the tapped modules \['layer2'\]"),
        ("swapped module", r"\['layer1.norm'\]"),
        ("reentrant checkpoint", r"'layer1.norm' was made without gradient.*use_reentrant=False"),
        ("no_grad inside", r"'layer2' has no gradient, and parameters before it are trained"),
        ("half-failed pass", r"has not reached the tapped modules \['layer2'"),
    ],
)
def test_a_fault_after_good_steps_is_named(fault: str, message: str, how: str) -> None:
    student, teacher = networks()
    with at_fused.AttentionTransfer(student, teacher, ["layer1.norm", "layer2"]) as transfer:
        step = runner(how, student, teacher, transfer)
        assert torch.isfinite(step())
        break_it(fault, student)
        if fault == "half-failed pass":
            with pytest.raises(KeyError, match="half-way"):
                step()
            step = transfer
        with pytest.raises(RuntimeError, match=message):
            step()


@pytest.mark.parametrize("how", ["eager", "compiled student", "compiled step"])
def test_the_pass_of_a_copy_is_none_of_the_original(how: str) -> None:
    student, teacher = networks()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        step = runner(how, copy.deepcopy(student), teacher, transfer)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"student: .*was one of a copy, which has no taps"):
                step()


# --- passes that failed, models that share modules --------------------------------------------------


def test_after_a_failed_pass_parts_of_the_model_begin_passes_of_their_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()
    images, _ = batch()
    with at_fused.FeatureTaps(model, ["0", "2"]) as taps:
        with pytest.raises(RuntimeError, match="size"):
            model(images[:, :, :3, :3])
        model[2](model[0](images))
        assert len(taps.features) == 2
        model[0](2 * images)
        with pytest.raises(RuntimeError, match=r"\['2'\]"):
            _ = taps.features


class Reuses(nn.Module):
    """A student that runs its teacher's stem and first block, on other values, before a block of its own."""

    def __init__(self, teacher: Net) -> None:
        super().__init__()
        self.stem, self.theirs, self.own = teacher.stem, teacher.layer1, Block(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.theirs(self.stem(x / 2)))


@pytest.mark.parametrize("compiled", [False, True])
def test_modules_that_both_models_run(compiled: bool) -> None:
    _, teacher = networks()
    student = Reuses(teacher).eval()
    images, _ = batch()
    with torch.no_grad():
        first = teacher.layer1(teacher.stem(images))
        theirs = [first, teacher.layer2(F.avg_pool2d(first, 2))]
    with at_fused.AttentionTransfer(student, teacher, ["own", "theirs"], ["layer1", "layer2"]) as transfer:
        run = torch.compile(student, backend="aot_eager") if compiled else student
        for order in (0, 1):
            if order:
                with torch.no_grad():
                    teacher(images)
            own = run(images)
            if not order:
                with torch.no_grad():
                    teacher(images)
            shared = teacher.layer1(student.stem(images / 2))
            right = 1000 * at_fused.attention_loss([own, shared], theirs)
            torch.testing.assert_close(transfer(), right)


def test_one_model_as_student_and_teacher() -> None:
    """A layer may learn from a deeper one of the same pass; compared with itself, it would learn nothing."""
    student, _ = networks()
    images, _ = batch()
    with at_fused.AttentionTransfer(student, student, {"layer2": "layer3"}) as transfer:
        with at_fused.FeatureTaps(student, ["layer2", "layer3"]) as taps:
            student(images)
            (ours, theirs), term = taps.features, transfer()
        torch.testing.assert_close(term, 1000 * at_fused.attention_loss(ours, theirs))
    with pytest.raises(ValueError, match=r"are the same model, .*'layer3' would be compared with itself"):
        at_fused.AttentionTransfer(student, student, {"layer2": "layer1", "layer3": "layer3"})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


@pytest.mark.parametrize("inner", ["teacher in student", "student in teacher"])
def test_one_model_within_the_other(inner: str) -> None:
    student, teacher = networks()

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = student, teacher

        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                self.teacher(images)
            return self.student(images)

    owner, outer = Owner(), inner.split()[-1]
    models = {"student": student, "teacher": teacher, outer: owner}
    names = {side: [f"{side}.{n}" if side == outer else n for n in NAMES] for side in models}
    transfer = at_fused.AttentionTransfer(
        models["student"], models["teacher"], names["student"], names["teacher"]
    )
    images, targets = batch()
    logits = owner(images)
    term = transfer()
    assert_same((term.detach(), gradients(F.cross_entropy(logits, targets) + term, student)), expected())


def test_two_transfers_of_one_student() -> None:
    student, teacher = networks()
    images, targets = batch()
    with (
        at_fused.AttentionTransfer(student, teacher, NAMES, beta=400) as one,
        at_fused.AttentionTransfer(student, teacher, NAMES, beta=600) as two,
    ):
        with torch.no_grad():
            teacher(images)
        logits = student(images)
        term = one() + two()
        assert_same((term.detach(), gradients(F.cross_entropy(logits, targets) + term, student)), expected())


def test_a_block_that_runs_twice_keeps_its_last_map_and_all_of_its_gradient() -> None:
    torch.manual_seed(0)
    block = Block(4, 4)
    student = nn.Sequential(nn.Conv2d(3, 4, 1), block, block).double().eval()
    teacher = copy.deepcopy(student)
    nn.init.normal_(teacher[1].conv.weight)
    images, _ = batch()
    with torch.no_grad():
        theirs = teacher(images)
    with at_fused.AttentionTransfer(student, teacher, ["1"]) as transfer:
        with torch.no_grad():
            teacher(images)
        out = student(images)
        term = transfer()
        got = term.detach(), gradients(out.sum() + term, student)
    out = student(images)
    term = 1000 * at_fused.attention_loss(out, theirs)
    assert_same(got, (term.detach(), gradients(out.sum() + term, student)))


class ActivationFirst(nn.Module):
    """An activation that is registered before the layers it follows, in a reentrant checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv = nn.ReLU(), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.act(self.conv(x)), x, use_reentrant=True)


def test_an_activation_registered_first_depends_on_what_runs_before_it() -> None:
    student, teacher = ActivationFirst(), ActivationFirst()
    images = torch.rand(2, 3, 5, 5, requires_grad=True)
    with at_fused.AttentionTransfer(student, teacher, ["act"]) as transfer:
        teacher(images), student(images)
        with pytest.raises(RuntimeError, match=r"student: the feature of 'act'.*use_reentrant=False"):
            transfer()
        student.requires_grad_(False), teacher(images), student(images)
        assert not transfer().requires_grad


# --- hooks that come later ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["eager", "compiled student", "compiled step"])
@pytest.mark.parametrize("tap", ["layer2", "layer2:input"])
def test_a_hook_registered_after_the_tap_is_called_before_it(tap: str, how: str) -> None:
    student, teacher = networks()
    images, _ = batch()
    with torch.no_grad():
        student.eval()
        inputs = F.avg_pool2d(student.layer1(student.stem(images)), 2)
        feature = inputs if ":" in tap else student.layer2(inputs)
        theirs = F.avg_pool2d(teacher.layer1(teacher.stem(images)), 2)
    right = 1000 * at_fused.attention_loss(feature.clamp(max=0.1), theirs)
    with at_fused.AttentionTransfer(student, teacher, {tap: "layer2:input"}) as transfer:
        if ":" in tap:
            student.layer2.register_forward_pre_hook(lambda module, args: (args[0].clamp(max=0.1),))
        else:
            student.layer2.register_forward_hook(lambda module, args, output: output.clamp(max=0.1))
        runner(how, student, teacher, transfer)()
        torch.testing.assert_close(transfer.losses[tap], right)


def test_a_hook_registered_between_pass_and_call_is_told() -> None:
    student, teacher = networks()
    images, _ = batch()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        teacher(images), student(images)
        student.layer1.register_forward_hook(lambda module, args, output: None)
        with pytest.warns(UserWarning, match="student: a forward hook was registered on 'layer1' after"):
            transfer()


# --- compiled in parts, traced ----------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_blocks_compiled_one_by_one(fullgraph: bool, before: bool) -> None:
    student, teacher = networks()

    def compile_blocks() -> None:
        for name in NAMES:
            student.get_submodule(name).compile(backend="aot_eager", fullgraph=fullgraph)

    if before:
        compile_blocks()
        student(batch()[0])
        student.load_state_dict(networks()[0].state_dict())
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        if not before:
            compile_blocks()
        for _ in range(2):
            student.load_state_dict(networks()[0].state_dict())
            assert_same(one_step(student, teacher, transfer), expected())


def test_a_compiled_step_of_any_batch_size_compiles_once() -> None:
    student, teacher = networks()
    student.eval()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:

        def step(images: Tensor) -> Tensor:
            with torch.no_grad():
                teacher(images)
            student(images)
            return transfer()

        compiled = torch.compile(step, backend=count, fullgraph=True, dynamic=True)
        for size in (3, 4, 7):
            transfer.beta = 1000.0 + size
            torch.testing.assert_close(compiled(batch(size=size)[0]), step(batch(size=size)[0]))
    assert len(graphs) <= 2, "the second time because beta changes"


def test_one_position_is_told_in_a_compiled_step_too() -> None:
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)) for _ in range(2))
    with at_fused.AttentionTransfer(student, teacher, ["1"]) as transfer:

        def step(images: Tensor) -> Tensor:
            teacher(images), student(images)
            return transfer()

        with pytest.warns(UserWarning, match="maps of '1' have a single position"):
            assert torch.compile(step, backend="aot_eager", fullgraph=True)(torch.rand(2, 3, 4, 4)) == 0


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_traced_model_is_a_copy_and_not_tapped() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 4, 1), Block(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x))

    model = Small().eval()
    images = torch.rand(2, 3, 8, 8)
    right = model(images)
    with at_fused.AttentionTransfer(model, copy.deepcopy(model), ["stem", "block"]):
        assert torch.equal(torch.fx.symbolic_trace(model)(images), right)
        assert torch.equal(torch.jit.trace(model, images)(images), right)
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), right)


# --- transformed ------------------------------------------------------------------------------------


def loss_on_features(student: Net, teacher: Net, images: Tensor, targets: Tensor) -> Tensor:
    with at_fused.FeatureTaps(student, NAMES) as s, at_fused.FeatureTaps(teacher, NAMES) as t:
        with torch.no_grad():
            teacher(images)
        logits = student(images)
        at = at_fused.attention_loss(s.features, t.features, backend="reference")
    return F.cross_entropy(logits, targets) + 1000 * at


def functional(student: Net, teacher: Net, transfer: at_fused.AttentionTransfer) -> Callable[..., Tensor]:
    def loss(state: Any, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            teacher(images)
        return F.cross_entropy(functional_call(student, state, (images,)), targets) + transfer()

    return loss


def test_functional_gradients() -> None:
    student, teacher = networks()
    student.eval()
    images, targets = batch()
    right = gradients(loss_on_features(student, teacher, images, targets), student)
    state = {name: p.detach() for name, p in student.named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in state.items()}
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        loss = functional(student, teacher, transfer)
        whole = grad(loss)(state, images, targets)
        each = vmap(grad(lambda s, x, y: loss(s, x[None], y[None])), (None, 0, 0))(state, images, targets)
        _, slope = jvp(lambda state: loss(state, images, targets), (state,), (ones,))
    for found in (whole, {name: g.mean(0) for name, g in each.items()}):
        assert_same((torch.cat([g.flatten() for g in found.values()]),), (right,))
    torch.testing.assert_close(slope, right.sum())


def test_an_ensemble_under_vmap() -> None:
    student, teacher = networks()
    others = [student.eval(), Net(4).double().eval()]
    images, targets = batch()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        loss = functional(student, teacher, transfer)
        losses = vmap(lambda *state: loss(state, images, targets))(*stack_module_state(others))
    right = [loss_on_features(net, teacher, images, targets) for net in others]
    torch.testing.assert_close(losses, torch.stack(right))


def test_forward_mode() -> None:
    student, teacher = networks()
    student.eval()
    images, targets = batch()
    images.requires_grad_()
    (slopes,) = torch.autograd.grad(loss_on_features(student, teacher, images, targets), images)
    with (
        at_fused.AttentionTransfer(student, teacher, NAMES) as transfer,
        torch.autograd.forward_ad.dual_level(),
    ):
        with torch.no_grad():
            teacher(images.detach())
        logits = student(torch.autograd.forward_ad.make_dual(images.detach(), torch.ones_like(images)))
        loss = F.cross_entropy(logits, targets) + transfer()
        tangent = torch.autograd.forward_ad.unpack_dual(loss).tangent
    torch.testing.assert_close(tangent, slopes.sum())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_gradients(dtype: torch.dtype) -> None:
    """is_grads_batched=True, whose tensors are batched by other means than those of torch.func."""
    student, teacher = networks(dtype)
    student.eval()
    images, _ = batch(dtype)
    parameters = [*student.parameters()]
    weights = torch.tensor([1.0, -2.0], dtype=dtype), torch.randn(2, len(images), 5, dtype=dtype)
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        with torch.no_grad():
            teacher(images)
        logits = student(images)
        outputs = [transfer(), logits]
    with at_fused.FeatureTaps(student, NAMES) as s, at_fused.FeatureTaps(teacher, NAMES) as t:
        with torch.no_grad():
            teacher(images)
        logits = student(images)
        on_features = [1000 * at_fused.attention_loss(s.features, t.features), logits]
    one_by_one = [
        torch.autograd.grad(outputs, parameters, [w[i] for w in weights], retain_graph=True) for i in (0, 1)
    ]
    right = torch.cat([torch.stack(grads).flatten() for grads in zip(*one_by_one, strict=True)])
    for found in (outputs, on_features):
        got = torch.autograd.grad(found, parameters, weights, is_grads_batched=True, retain_graph=True)
        assert_same((torch.cat([g.flatten() for g in got]),), (right,), roundings=2**8)


def test_distributed_tensors() -> None:
    """DTensors, on a mesh of one: no kernel sees into them, and the reference serves."""
    images, _ = batch(torch.float32)

    def model(width: int) -> nn.Module:
        torch.manual_seed(width)
        blocks = nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 5, 1)
        return nn.Sequential(*blocks, nn.Flatten(2))

    right = []
    for distributed in (False, True):
        student, teacher, inputs = model(4), model(6), images
        if distributed:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            mesh = init_device_mesh("cpu", (1,))
            distribute_module(student, mesh), distribute_module(teacher, mesh)
            inputs = distribute_tensor(images, mesh, [Shard(0)])
        try:
            with at_fused.AttentionTransfer(student, teacher, ["1", "2"]) as transfer:
                with torch.no_grad():
                    teacher(inputs)
                loss = student(inputs).square().mean() + transfer()
                loss.backward()
            found = [loss.detach(), *(p.grad for p in student.parameters())]
            right.append([x.full_tensor() if distributed else x for x in found])
        finally:
            if distributed:
                dist.destroy_process_group()
    for one, other in zip(*right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * one.abs().max().item())


def test_gradient_scaling_of_a_whole_step() -> None:
    """GradScaler: an overflow skips the step, what follows is the unscaled gradient."""
    student, teacher = networks(torch.float32)
    student.eval()
    images, targets = batch(torch.float32)
    right = gradients(loss_on_features(student, teacher, images, targets), student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100)
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        for _ in range(60):
            optimizer.zero_grad()
            with torch.no_grad():
                teacher(images)
            loss = F.cross_entropy(student(images), targets) + transfer()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            got = torch.cat([p.grad.flatten() for p in student.parameters()])
            scaler.step(optimizer)
            scaler.update()
            if torch.isfinite(got).all():
                break
    assert scaler.get_scale() < 2.0**127, "the first scale was too large"
    assert_same((got,), (right,), roundings=2**8)


# --- arguments and warnings -------------------------------------------------------------------------


@pytest.mark.parametrize("beta", ["1", None, torch.tensor(1.0)])
def test_a_wrong_beta_that_is_assigned_is_named(beta: Any) -> None:
    student, teacher = networks()
    with at_fused.AttentionTransfer(student, teacher, NAMES) as transfer:
        transfer.beta = beta
        with pytest.raises(TypeError, match="beta must be a real number"):
            transfer()


@pytest.mark.parametrize(
    "shape, last",
    [
        ((2, 14, 14, 96), True),  # Swin
        ((2, 197, 192), True),  # ViT with a class token
        ((2, 49, 384), True),
        ((2, 64, 56, 56), False),
        ((2, 7, 7, 7), False),
        ((2, 64, 64, 100), False),  # spectrograms
        ((2, 144, 28, 28), False),
        ((2, 64, 128), False),  # 1-D convolutions
        ((2, 256, 512), False),
    ],
)
def test_a_layout_that_looks_channels_last_is_told(shape: tuple[int, ...], last: bool) -> None:
    student, teacher = nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity())
    feature = torch.rand(shape)
    for channel_dim in (1, -1):
        at_fused._checks._warned_shapes.clear()
        with (
            at_fused.AttentionTransfer(student, teacher, ["0"], channel_dim=channel_dim) as transfer,
            warnings.catch_warnings(record=True) as told,
        ):
            warnings.simplefilter("always")
            teacher(feature), student(feature)
            transfer()
        assert bool(told) == (last and channel_dim == 1), [str(w.message) for w in told]
