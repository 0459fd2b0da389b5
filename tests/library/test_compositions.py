"""attention_loss inside the rest of PyTorch: autograd, compile, export, mixed precision, threads, memory."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
import textwrap
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import cases
import kernels
import pytest
import torch
from cases import each_backend, feature
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import at_fused

LOSSES = [
    {},
    {"p": 1},
    {"p": 3},
    {"p": 4, "mapping": "max"},
    {"p": 1.5, "normalize": "l1"},
    {"weights": [0.5, -2.0], "reduction": "none"},
    {"eps": 5.0},  # above some of the norms
]
if not cases.INTERPRETED:  # composed in PyTorch of a backend's maps, as that of l1 is
    LOSSES += [{"normalize": None}, {"distance": "norm"}, {"distance": "norm", "norm_order": 3, "p": 4}]
each_fused = pytest.mark.parametrize("backend", cases.FUSED)
each_loss = pytest.mark.parametrize("options", LOSSES, ids=str)


def features(device: str, **options) -> tuple[list[Tensor], list[Tensor]]:
    """Two small pairs, the second teacher on another grid unless ``same_grid``."""
    t_size = (3, 3) if options.pop("same_grid", False) else (2, 5)
    shapes = (2, 3, 2, 3), (2, 2, 3, 3), (2, 2, 2, 3), (2, 3, *t_size)
    feats = [feature(*shape, seed=i, device=device, **options) for i, shape in enumerate(shapes)]
    return feats[:2], feats[2:]


# --- autograd -------------------------------------------------------------------------------------


@each_backend
@each_loss
def test_gradcheck_and_gradgradcheck(options: dict, backend: str) -> None:
    for same_grid in (True, False):
        s_feats, t_feats = features(cases.device_of(backend), dtype=torch.float64, same_grid=same_grid)

        def loss(*feats: Tensor) -> Tensor:
            return at_fused.attention_loss(feats[:2], feats[2:], backend=backend, **options)

        assert torch.autograd.gradcheck(loss, (*s_feats, *t_feats), fast_mode=cases.INTERPRETED)
        assert torch.autograd.gradgradcheck(loss, (*s_feats, *t_feats), fast_mode=True)


@each_backend
@pytest.mark.parametrize(
    "options", [{}, {"p": 1}, {"p": 3, "mapping": "max"}, {"normalize": "l2", "p": 4}], ids=str
)
def test_gradcheck_of_the_map(options: dict, backend: str) -> None:
    for layout in (Tensor.contiguous, cases.channels_last):
        x = feature(2, 3, 3, 4, dtype=torch.float64, layout=layout, device=cases.device_of(backend))
        attention = functools.partial(at_fused.attention_map, backend=backend, **options)
        assert torch.autograd.gradcheck(attention, (x,), fast_mode=cases.INTERPRETED)
        assert torch.autograd.gradgradcheck(attention, (x,), fast_mode=cases.INTERPRETED)


@each_backend
def test_gradgradcheck_with_one_side(backend: str) -> None:
    for side in (0, 1):
        feats = [x[0] for x in features(cases.device_of(backend), dtype=torch.float64)]
        feats[1 - side].requires_grad_(False)
        loss = functools.partial(at_fused.attention_loss, backend=backend)
        assert torch.autograd.gradcheck(loss, tuple(feats), fast_mode=cases.INTERPRETED)
        assert torch.autograd.gradgradcheck(loss, tuple(feats), fast_mode=cases.INTERPRETED)


@each_fused
@each_loss
def test_gradient_penalty_equals_the_reference(options: dict, backend: str) -> None:
    """|d loss / d feature|^2 trained through: what a backward that is not differentiable silently drops."""
    penalties = []
    for name in (backend, "reference"):
        s_feats, t_feats = features(cases.device_of(backend), dtype=torch.float64, same_grid=True)
        inputs = [*s_feats, *t_feats]
        loss = at_fused.attention_loss(s_feats, t_feats, backend=name, **options).sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        assert all(g.requires_grad for g in grads)
        penalty = sum(g.square().sum() for g in grads)
        penalties.append(torch.autograd.grad(penalty, inputs))
    assert any(torch.count_nonzero(g) for g in penalties[0])
    torch.testing.assert_close(*penalties)


@each_backend
def test_third_derivative(backend: str) -> None:
    x, t = feature(1, 2, 2, 2, dtype=torch.float64), feature(1, 2, 2, 2, seed=1, dtype=torch.float64)
    x, t = (v.detach().to(cases.device_of(backend)).requires_grad_() for v in (x, t))

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(at_fused.attention_loss(x, t, backend=backend), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, (x,), fast_mode=cases.INTERPRETED)


@each_backend
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("layout", [Tensor.contiguous, cases.channels_last], ids=cases.name_of)
def test_a_gradient_is_the_callers(layout, teacher: bool, backend: str) -> None:
    """Whatever it is changed into, a second backward through the same graph gives the first's bits."""
    s, t = (x[0] for x in features(cases.device_of(backend), layout=layout))
    wanted = [s, t] if teacher else [s]
    for _ in range(2):  # the second loss may expect an upstream gradient of 1, like the first's
        loss = at_fused.attention_loss(s, t.requires_grad_(teacher), backend=backend)
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        kept = [grad.clone() for grad in first]
        for grad in first:
            grad.mul_(-3)
        for _ in range(2):
            loss.backward(inputs=wanted, retain_graph=True)
            for x, grad in zip(wanted, kept, strict=True):
                assert torch.equal(x.grad, grad)
                x.grad.zero_()
                x.grad = None


@each_backend
def test_inputs_modified_before_backward_are_refused(backend: str) -> None:
    leaf, t = (x[0] for x in features(cases.device_of(backend)))
    s = leaf * 1
    loss = at_fused.attention_loss(s, t.detach(), backend=backend)
    with torch.no_grad():
        s.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@each_backend
def test_features_are_freed_by_backward(backend: str) -> None:
    """Also the teacher's, and though the loss lives on."""
    s, t = (x[0].detach().to(torch.bfloat16) for x in features(cases.device_of(backend)))
    leaf = s.requires_grad_()
    s, t = leaf * 1, t * 1
    dead = [weakref.ref(s), weakref.ref(t)]
    loss = at_fused.attention_loss(s, t, backend=backend)
    loss.backward()
    del s, t
    assert [ref() for ref in dead] == [None, None]
    assert loss.isfinite()


@each_backend
def test_second_derivatives_at_maps_of_zeros_are_finite(backend: str) -> None:
    s, t = pair_with_a_dead_sample(cases.device_of(backend))
    for options in ({}, {"p": 1}, {"p": 3}, {"mapping": "max"}, {"normalize": "l1"}, {"distance": "norm"}):
        loss = at_fused.attention_loss(s, t, backend=backend, **options)
        (first,) = torch.autograd.grad(loss, s, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), s)
        assert second.isfinite().all(), options
        assert (second[0] == 0).all(), options
        assert (second[1] != 0).any(), options


def pair_with_a_dead_sample(device: torch.device) -> tuple[Tensor, Tensor]:
    s, t = (feature(2, 3, 4, 4, seed=seed, dtype=torch.float32, device=device).detach() for seed in (0, 1))
    s[0] = 0
    return s.requires_grad_(), t


@each_backend
def test_features_of_a_network_get_both_gradients(backend: str) -> None:
    """The gradient of the attention loss is added to the one that comes from the next layer."""
    device = cases.device_of(backend)
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 6, 3).to(device), nn.Conv2d(6, 4, 3).to(device)
    x, t = feature(2, 3, 8, 8, device=device).detach(), feature(2, 5, 6, 6, seed=1, device=device).detach()
    grads = []
    for term in ("task", "at", "both"):
        tap = first(x)
        loss = 0.0
        loss = loss + second(tap).square().mean() if term != "at" else loss
        loss = loss + at_fused.attention_loss(tap, t, backend=backend) if term != "task" else loss
        grads.append(torch.autograd.grad(loss, first.weight)[0])
    assert torch.count_nonzero(grads[1]) > 0
    torch.testing.assert_close(grads[0] + grads[1], grads[2])


# --- torch.library, torch.compile, torch.export ---------------------------------------------------


@each_fused
@pytest.mark.parametrize("mapping", ["sum", "max"])
def test_opcheck(mapping: str, backend: str) -> None:
    """Schemas, fakes and autograd of the operators, on lists that mix dtypes and layouts."""
    if backend == "cuda" and mapping == "max":
        pytest.skip("it serves sums over the channels")
    ops, device = torch.ops.at_fused, cases.device_of(backend)
    wide, sliced, transposed = torch.float64, cases.sliced, cases.transposed
    if backend == "cuda":  # which serves neither
        wide, sliced, transposed = torch.float32, Tensor.contiguous, cases.channels_last
    s_feats = [
        feature(2, 3, 2, 3, seed=1, dtype=wide, layout=cases.channels_last, device=device),
        feature(2, 2, 3, 3, seed=2, layout=sliced, device=device),
    ]
    t_feats = [
        feature(2, 4, 2, 3, seed=3, dtype=wide, layout=transposed, device=device),
        feature(2, 3, 3, 3, seed=4, dtype=torch.bfloat16, device=device).detach(),
    ]
    torch.library.opcheck(ops.attention_maps.default, (s_feats, 2.0, mapping, backend))
    maps = [torch.randn_like(m) for m in ops.attention_maps(s_feats, 2.0, mapping, backend)]
    for scale in (None, torch.tensor([1.0, 2.0], device=device)):
        args = (s_feats, maps, scale, 2.0, mapping, backend)
        torch.library.opcheck(ops.attention_maps_backward.default, args)
    for reduce, slopes, grads in [(True, False, False), (False, True, False), (True, True, True)]:
        args = ([1.0, 0.5], 2.0, mapping, 1e-12)
        torch.library.opcheck(ops.attention_loss.default, (s_feats, t_feats, *args, reduce, backend))
        students, teachers = ([feat.detach() for feat in feats] for feats in (s_feats, t_feats))
        wanted = {"student_slopes": slopes, "teacher_slopes": slopes, "grads": grads}
        found = kernels.outputs(students, teachers, reduce=reduce, **wanted)
        torch.library.opcheck(ops.fill_loss.default, (students, teachers, *args, backend, *found))


@each_fused
def test_second_derivative_of_one_feature_beside_a_constant_one(backend: str) -> None:
    device = cases.device_of(backend)
    a, constant = feature(2, 3, 2, 3, device=device), feature(2, 2, 3, 3, seed=1, device=device).detach()
    upstream = [feature(2, *x.shape[2:], seed=2, device=device).detach() for x in (a, constant)]
    first = torch.ops.at_fused.attention_maps_backward([a, constant], upstream, None, 3.0, "sum", backend)
    (second,) = torch.autograd.grad(first[0].sum() + first[1].sum(), a)
    torch.testing.assert_close(second, 6 * a.detach().abs() * upstream[0].unsqueeze(1))  # of 3 A |A|


def value_and_grads(loss_fn, s_feats: list[Tensor], t_feats: list[Tensor]) -> list[Tensor]:
    s_feats, t_feats = ([x.detach().requires_grad_() for x in feats] for feats in (s_feats, t_feats))
    loss = loss_fn(s_feats, t_feats)
    loss.sum().backward()
    return [loss.detach(), *(x.grad for x in (*s_feats, *t_feats))]


@each_backend
@pytest.mark.parametrize("options", [LOSSES[0], *LOSSES[3:6]], ids=str)
def test_compile_fullgraph_traces(options: dict, backend: str) -> None:
    """Traced whole by dynamo and AOTAutograd, without generating code: quick, so for every kind of loss."""
    torch.compiler.reset()
    loss = functools.partial(at_fused.attention_loss, backend=backend, **options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for same_grid in (True, False):
        feats = features(cases.device_of(backend), same_grid=same_grid)
        expected = value_and_grads(loss, *feats)  # first: what the backend does not serve it says untraced
        torch.testing.assert_close(value_and_grads(compiled, *feats), expected)


@pytest.mark.slow
@each_backend
def test_compile_fullgraph_with_inductor(backend: str) -> None:
    torch.compiler.reset()
    module = at_fused.AttentionLoss(backend=backend)

    def step(s_feats: list[Tensor], t_feats: list[Tensor]) -> Tensor:
        return module([x.relu() * 2 for x in s_feats], t_feats) + s_feats[0].square().mean()

    compiled = torch.compile(step, fullgraph=True)
    feats = features(cases.device_of(backend), same_grid=True, layout=cases.channels_last)
    torch.testing.assert_close(value_and_grads(compiled, *feats), value_and_grads(step, *feats))


@each_backend
def test_compile_with_dynamic_shapes(backend: str) -> None:
    torch.compiler.reset()
    loss = functools.partial(at_fused.attention_loss, backend=backend)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    device = cases.device_of(backend)
    for batch, size in ((2, 6), (3, 5), (4, 7)):
        feats = (
            [feature(batch, 3, size, size, seed=1, device=device)],
            [feature(batch, 5, size, size, seed=2, device=device)],
        )
        torch.testing.assert_close(value_and_grads(compiled, *feats), value_and_grads(loss, *feats))


@each_backend
def test_compile_with_a_beta_schedule(backend: str) -> None:
    """beta decays from epoch to epoch: the right value each time, and not one compilation per value."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = at_fused.AttentionLoss(3, weights=[1.0, -0.5], backend=backend)
    compiled = torch.compile(lambda s, t: module(s, t), fullgraph=True, backend=counter)
    feats = features(cases.device_of(backend), same_grid=True)
    for epoch in range(12):
        module.beta = 1000.0 * 0.7**epoch
        torch.testing.assert_close(compiled(*feats), module(*feats))
    assert counter.frame_count <= 3


class Distilled(nn.Module):
    """A student with its attention loss inside, as one exportable module."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.loss = at_fused.AttentionLoss(beta=10.0, backend=backend)

    def forward(self, x: Tensor, teacher: Tensor) -> Tensor:
        return self.loss([self.conv(x)], [teacher])


@each_backend
def test_export(backend: str) -> None:
    device = cases.device_of(backend)
    module = Distilled(backend).to(device)
    args = (feature(2, 3, 6, 6, device=device).detach(), feature(2, 5, 4, 4, seed=1, device=device).detach())
    exported = torch.export.export(module, args)
    torch.testing.assert_close(exported.module()(*args), module(*args))
    with torch.no_grad():  # as where it is deployed
        torch.testing.assert_close(exported.module()(*args), module(*args))
    torch.testing.assert_close(exported.run_decompositions().module()(*args), module(*args))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(*args), module(*args))


@each_backend
def test_fake_tensors(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 8, 6, 6, dtype=torch.bfloat16, device=cases.device_of(backend), requires_grad=True)
        x = x.to(memory_format=torch.channels_last)
        loss = at_fused.attention_loss(x, x.detach(), backend=backend)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


# --- mixed precision ------------------------------------------------------------------------------


@each_backend
@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name_of)
def test_autocast_changes_nothing(dtype: torch.dtype, options: dict, backend: str) -> None:
    device = cases.device_of(backend)
    feats = features(device, dtype=dtype)
    loss = functools.partial(at_fused.attention_loss, backend=backend, **options)
    plain = value_and_grads(loss, *feats)
    with torch.autocast(device, dtype=torch.bfloat16):
        under = value_and_grads(loss, *feats)
    assert under[0].dtype == torch.float32
    for a, b in zip(plain, under, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@each_backend
@pytest.mark.parametrize("layout", [Tensor.contiguous, cases.channels_last], ids=cases.name_of)
def test_fp16_with_a_scaled_loss(layout, backend: str) -> None:
    """GradScaler's first scale times the authors' beta: gradients that fit fp16 are right, others inf."""
    device = cases.device_of(backend)
    s_feats = [feature(4, 8, 6, 6, seed=i, dtype=torch.float16, layout=layout, device=device) for i in (1, 2)]
    t_feats = [feature(4, 8, 6, 6, seed=i, dtype=torch.float16, layout=layout, device=device) for i in (3, 4)]
    with torch.no_grad():
        s_feats[1].mul_(2**-12)  # Q scales by 2^-24, its gradient by 2^12: beyond 65504
    loss = at_fused.AttentionLoss(beta=1000.0, backend=backend)(s_feats, t_feats)
    assert loss.isfinite()
    cases.check_loss(s_feats[:1], t_feats[:1], backend=backend, upstream=1000.0 * 2.0)
    grads = torch.autograd.grad(loss * 65536.0, s_feats)
    assert not any(g.isnan().any() for g in grads)
    assert grads[1].isinf().any()


@each_backend
def test_grad_scaler(backend: str) -> None:
    """The scale comes off again: an fp16 student takes the step that its fp32 twin takes."""
    device = cases.device_of(backend)
    torch.manual_seed(0)
    t = feature(4, 8, 6, 6, seed=1, device=device).detach().half()
    steps = []
    for scale in (None, 1024.0):
        weight = torch.full((1, 8, 1, 1), 0.5, device=device, requires_grad=True)
        x = feature(4, 8, 6, 6, seed=2, device=device).detach()
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler(device, init_scale=scale or 1.0, enabled=scale is not None)
        s = x * weight if scale is None else (x * weight).half()
        loss = at_fused.AttentionLoss(beta=10.0, backend=backend)(s, t)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(weight.detach() - 0.5)
    torch.testing.assert_close(steps[0], steps[1], rtol=2e-2, atol=1e-4)


# --- checkpointing, copies, threads ---------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, backend: str) -> None:
    device = cases.device_of(backend)
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3).to(device)
    x, t = feature(2, 3, 8, 8, device=device), feature(2, 5, 6, 6, seed=1, device=device).detach()

    def loss(x: Tensor) -> Tensor:
        return at_fused.attention_loss(conv(x).relu(), t, backend=backend)

    plain = torch.autograd.grad(loss(x), [x, conv.weight])
    x.grad = conv.weight.grad = None
    checkpoint(loss, x, use_reentrant=use_reentrant).backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(conv.weight.grad, plain[1])


@each_backend
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_module_can_be_copied(duplicate, backend: str) -> None:
    s_feats, t_feats = features(cases.device_of(backend))
    module = at_fused.AttentionLoss(3, beta=7.0, mapping="max", weights=[1.0, 0.5], backend=backend)
    module(s_feats, t_feats)
    twin = duplicate(module)
    assert torch.equal(twin(s_feats, t_feats), module(s_feats, t_feats))
    assert repr(twin) == repr(module)


def big_pairs(backend: str, **options) -> tuple[list[Tensor], list[Tensor]]:
    """Big enough to be split over threads, with sizes that no split divides."""
    device = cases.device_of(backend)
    groups = [(5, 37, 33, 31), (7, 129, 9, 9), (3, 515, 7, 7)]
    if cases.INTERPRETED:
        groups = [(2, 37, 9, 11), (3, 131, 3, 3), (1, 70, 7, 7)]
    s_feats = [feature(*shape, seed=i, device=device, **options) for i, shape in enumerate(groups)]
    t_feats = [
        feature(b, c + 1, h, w, seed=9 + i, device=device, **options) for i, (b, c, h, w) in enumerate(groups)
    ]
    return s_feats, t_feats


@each_backend
@pytest.mark.parametrize(
    "layout", [Tensor.contiguous, cases.channels_last, cases.transposed], ids=cases.name_of
)
@pytest.mark.parametrize("options", [{}, {"mapping": "max"}, {"distance": "norm"}], ids=str)
def test_bitwise_deterministic(layout, options: dict, backend: str) -> None:
    """The same bits run after run, and, for the fused kernels, for any number of threads."""
    feats = big_pairs(backend, layout=layout)
    loss = functools.partial(at_fused.attention_loss, backend=backend, **options)
    runs = []
    for threads in (2, 2, 1) if backend != "reference" else (2, 2):
        torch.set_num_threads(threads)
        runs.append(value_and_grads(loss, *feats))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@each_backend
def test_a_sample_does_not_depend_on_its_batch(backend: str) -> None:
    """Maps of one sample are the same bits whatever stands beside it."""
    for layout in (Tensor.contiguous, cases.channels_last):
        x = feature(5, 37, 9, 7, layout=layout, device=cases.device_of(backend)).detach()
        whole = at_fused.attention_map(x, backend=backend)
        for i in range(5):
            alone = at_fused.attention_map(layout(x[i : i + 1]), backend=backend)
            if backend == "reference":
                torch.testing.assert_close(alone[0], whole[i])
            else:
                assert torch.equal(alone[0], whole[i])


@each_backend
def test_concurrent_calls(backend: str) -> None:
    """Python threads calling at once (DataParallel, services) share no scratch."""
    jobs = [big_pairs(backend, scale=scale) for scale in (1.0, 2.0, 0.5, 3.0)]
    loss = functools.partial(at_fused.attention_loss, backend=backend)

    def work(job) -> list[Tensor]:
        return value_and_grads(loss, *job)

    serial = [work(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(work, jobs), serial, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@each_backend
def test_no_warnings(backend: str) -> None:
    feats = features(cases.device_of(backend))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if cases.INTERPRETED:  # as Triton 3.6's interpreter does
            warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
        value_and_grads(functools.partial(at_fused.attention_loss, backend=backend), *feats)


@each_backend
def test_inference_mode_and_no_grad(backend: str) -> None:
    s_feats, t_feats = features(cases.device_of(backend))
    expected = at_fused.attention_loss(s_feats, t_feats, backend=backend).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = at_fused.attention_loss(s_feats, t_feats, backend=backend)
        assert torch.equal(got, expected)
        assert not got.requires_grad


@each_backend
@pytest.mark.parametrize("options", [{}, {"distance": "norm"}], ids=str)
def test_teacher_in_inference_mode(options: dict, backend: str) -> None:
    """Its tensors can't be saved for backward; the gradients are the same, of any order."""
    s_feats, t_feats = features(cases.device_of(backend))
    with torch.inference_mode():
        inferred = [x * 1 for x in t_feats]
    found = []
    for teacher in ([x.detach() for x in t_feats], inferred):
        loss = at_fused.attention_loss(s_feats, teacher, backend=backend, **options)
        grads = torch.autograd.grad(loss, s_feats, create_graph=True)
        penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
        found.append([loss, *grads, *torch.autograd.grad(penalty, s_feats)])
    for expected, got in zip(*found, strict=True):
        assert torch.count_nonzero(expected)
        torch.testing.assert_close(got, expected)


@each_fused
def test_forward_mode_is_refused(backend: str) -> None:
    """Tangents are never dropped."""
    (feat, *_), (teacher, *_) = features(cases.device_of(backend))
    feat, teacher = feat.detach(), teacher.detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(feat, torch.ones_like(feat))
        for call in (
            lambda: at_fused.attention_loss(dual, teacher, backend=backend),
            lambda: at_fused.attention_map(dual, backend=backend),
        ):
            with pytest.raises(NotImplementedError, match="forward mode"):
                call()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jvp(lambda x: at_fused.attention_loss(x, teacher, backend=backend), (feat,), (feat,))


@each_fused
@pytest.mark.parametrize(
    "mode, students, teachers, options, slopes",
    [
        (torch.enable_grad, (False, False), (False, False), {}, (False, False)),
        (torch.no_grad, (True, True), (True, True), {}, (False, False)),
        (torch.inference_mode, (True, True), (True, True), {}, (False, False)),
        (torch.enable_grad, (True, True), (False, False), {}, (True, False)),
        (torch.enable_grad, (True, False), (False, False), {}, (True, False)),
        (torch.enable_grad, (False, False), (False, True), {}, (False, True)),
        (torch.enable_grad, (True, True), (True, False), {}, (True, True)),
        (torch.enable_grad, (True, True), (False, False), {"reduction": "none"}, (True, False)),
    ],
    ids=cases.name_of,
)
def test_nothing_is_computed_unasked(
    mode, students, teachers, options: dict, slopes, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slopes only of a side that is trained; early gradients only where backward is sure to want them all."""
    module = at_fused.backends.modules[backend]
    asked: list[tuple[bool, ...]] = []

    def attention_loss(students, teachers, weights, outputs, *, forward=module.attention_loss, **options):
        asked.append((bool(outputs.student_slopes), bool(outputs.teacher_slopes), bool(outputs.grads)))
        forward(students, teachers, weights, outputs, **options)

    monkeypatch.setattr(module, "attention_loss", attention_loss)
    s_feats, t_feats = features(cases.device_of(backend), same_grid=True)
    # a backward whose upstream gradient is 1: the next one is expected to be like it
    at_fused.attention_loss(s_feats, [t.detach() for t in t_feats], backend=backend).backward()
    for feat, trained in zip([*s_feats, *t_feats], [*students, *teachers], strict=True):
        feat.requires_grad_(trained)
    with mode():
        at_fused.attention_loss(s_feats, t_feats, backend=backend, **options)
    *sides, early = asked[-1]
    assert tuple(sides) == slopes
    sure = all(students) and not any(teachers) and not options
    assert not early or sure
    if backend == "cpu" and mode is torch.enable_grad:
        assert early == sure


# --- memory ---------------------------------------------------------------------------------------


def allocated(call) -> tuple[object, int]:
    """What ``call`` returns, and every byte it asked of PyTorch's CPU allocator, freed or not."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    return result, sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)


@each_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name_of)
@pytest.mark.parametrize("layout", [*cases.DENSE, cases.sliced], ids=cases.name_of)
def test_only_the_gradient_is_as_big_as_an_activation(layout, dtype: torch.dtype, backend: str) -> None:
    if cases.device_of(backend) == "cuda" or backend == "triton":
        pytest.skip("counts the CPU allocator; the interpreter of Triton allocates what it likes")
    shape = (4, 64, 32, 32)
    activation = 4 * 64 * 32 * 32 * dtype.itemsize
    maps = 4 * 32 * 32 * 4  # fp32
    s, t = (
        feature(*shape, seed=1, dtype=dtype, layout=layout),
        feature(*shape, seed=2, dtype=dtype, layout=layout),
    )
    slack = 8 * maps
    assert slack < activation / 3, "the bound must tell an activation from maps"
    for mapping in ("sum", "max"):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for s_grad, t_grad in [(True, False), (False, True), (True, True), (False, False)]:
                    feats = s.detach().requires_grad_(s_grad), t.detach().requires_grad_(t_grad)
                    wanted = [x for x in feats if x.requires_grad]
                    call = functools.partial(
                        at_fused.attention_loss, *feats, mapping=mapping, backend=backend
                    )
                    loss, forward = allocated(call)
                    backward = 0
                    if wanted:
                        _, backward = allocated(functools.partial(torch.autograd.grad, loss, wanted))
                    # a gradient may be ready with the loss, or wait for backward, but is there once
                    assert forward + backward <= len(wanted) * activation + slack


@each_fused
def test_a_scaled_loss_costs_no_second_gradient(backend: str) -> None:
    """An early gradient, for an upstream of 1, is no use under GradScaler: at most one step has it."""
    if cases.device_of(backend) == "cuda" or backend == "triton":
        pytest.skip("counts the CPU allocator; the interpreter of Triton allocates what it likes")
    s, t = feature(4, 64, 32, 32, seed=1), feature(4, 64, 32, 32, seed=2).detach()
    activation = s.numel() * s.element_size()

    def step() -> None:
        torch.autograd.grad(at_fused.attention_loss(s, t, backend=backend) * 1024.0, s)

    step()
    assert allocated(step)[1] < 1.25 * activation


@each_backend
def test_gradients_do_not_depend_on_what_was_expected(backend: str) -> None:
    """Whether the step before was scaled may change when a gradient is computed, never its bits."""
    for layout in (Tensor.contiguous, cases.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            s_feats, t_feats = big_pairs(backend, layout=layout, dtype=dtype)
            t_feats = [x.detach() for x in t_feats]

            def gradients(scale: float, s_feats=s_feats, t_feats=t_feats) -> tuple[Tensor, ...]:
                loss = at_fused.attention_loss(s_feats, t_feats, backend=backend)
                return torch.autograd.grad(loss, s_feats, torch.tensor(scale, device=loss.device))

            runs = [gradients(scale) for scale in (1.0, 1.0, 1024.0, 1.0, 1024.0, 1024.0)]
            for first, others in ((0, (1, 3)), (2, (4, 5))):
                for other in others:
                    assert all(torch.equal(a, b) for a, b in zip(runs[first], runs[other], strict=True))


@pytest.mark.slow
@each_fused
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_resident_memory_of_a_process(layout: str, backend: str) -> None:
    """Peak resident memory, which sees scratch that PyTorch's allocator does not."""
    if cases.device_of(backend) == "cuda" or backend == "triton":
        pytest.skip("counts the CPU's memory")
    memory_format = "contiguous_format" if layout == "contiguous" else layout
    script = f"""
    import resource, torch, at_fused
    torch.set_num_threads(2)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
    make = lambda *shape: torch.ones(shape).to(memory_format=torch.{memory_format})
    loss_of = lambda s, t: at_fused.attention_loss(s, t, backend={backend!r})
    loss_of(make(2, 8, 8, 8).requires_grad_(), make(2, 8, 8, 8)).backward()
    s, t = make(32, 64, 128, 128).requires_grad_(), make(32, 64, 128, 128)  # 128 MiB each
    start = peak()
    loss_of(s.detach(), t)
    forward = peak() - start
    loss_of(s, t).backward()
    print(forward, peak() - start)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    forward, total = map(float, ran.stdout.split())
    assert forward < 32, "MiB above the two features"
    assert total < 128 + 32, "MiB above the two features: the gradient is 128"
