"""FeatureTaps: which features it collects, and what it leaves behind (nothing)."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import at_fused


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.group1 = nn.Sequential(Block(4), Block(4))
        self.group2 = nn.Sequential(Block(4), nn.MaxPool2d(2))
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group2(self.group1(self.stem(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 10, 10)


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def by_hand(model: Net, x: Tensor) -> dict[str, Tensor]:
    stem = model.stem(x)
    first = model.group1[0](stem)
    group1 = model.group1[1](first)
    return {"stem": stem, "group1.0": first, "group1": group1, "group2.0.conv": model.group2[0].conv(group1)}


@pytest.mark.parametrize(
    "names", [["stem", "group1"], ["group1", "stem"], ["group2.0.conv", "group1.0", "stem"]]
)
def test_features_come_in_the_order_of_names(names: list[str], model: Net, x: Tensor) -> None:
    expected = by_hand(model, x)
    with at_fused.FeatureTaps(model, names) as taps:
        logits = model(x)
        features = taps.features
    assert isinstance(features, list)
    assert all(torch.equal(f, expected[name]) for f, name in zip(features, names, strict=True))
    assert torch.equal(logits, model(x)), "tapping changes nothing"


def test_features_carry_the_graph(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model, ["group1"]) as taps:
        model(x)
        (feature,) = taps.features
        at_fused.attention_loss(feature, torch.rand_like(feature)).backward()
    assert torch.count_nonzero(model.stem.weight.grad) > 0
    assert model.head.weight.grad is None, "the tap is before the head"


def test_no_grad_features_have_no_graph(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model, ["group1"]) as taps, torch.no_grad():
        model(x)
        assert not taps.features[0].requires_grad


def test_features_are_those_of_the_last_call(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model, ["stem", "group1"]) as taps:
        for batch in (x, 2 * x, x[:1]):
            model(batch)
            assert len(taps.features) == 2
            assert torch.equal(taps.features[0], model.stem(batch))


def test_a_module_called_twice_in_one_pass_keeps_its_last_output(model: Net, x: Tensor) -> None:
    shared = nn.Sequential(model.stem, model.group1[0], model.group1[0])
    with at_fused.FeatureTaps(shared, ["1"]) as taps:
        out = shared(x)
        assert len(taps.features) == 1
        assert torch.equal(taps.features[0], out)


def test_a_shared_module_has_every_one_of_its_names(model: Net, x: Tensor) -> None:
    shared = nn.Sequential(model.stem, model.group1[0], model.group1[0])
    with at_fused.FeatureTaps(shared, ["2", "0"]) as taps:
        out = shared(x)
        assert torch.equal(taps.features[0], out)


@pytest.mark.parametrize("grad", [False, True])
def test_an_output_changed_in_place_is_told_once(grad: bool, x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU())
    with at_fused.FeatureTaps(model, ["2", "0"]) as taps, torch.set_grad_enabled(grad):
        model(x)
        with pytest.warns(UserWarning, match="the output of '0' was modified in place") as told:
            first, second = taps.features
        assert len(told) == 1
        assert first.min() < 0 <= second.min()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
            assert taps.features[1].min() >= 0


def test_inference_tensors_are_recorded(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model, ["stem"]) as taps, torch.inference_mode():
        model(x)
        assert torch.equal(taps.features[0], model.stem(x))


def test_features_are_read_in_a_compiled_function(model: Net, x: Tensor) -> None:
    torch.compiler.reset()
    with at_fused.FeatureTaps(model, ["stem", "group2.0.act"]) as taps:
        total = torch.compile(
            lambda: sum(feature.sum() for feature in taps.features), backend="aot_eager", fullgraph=True
        )
        for batch in (x, 2 * x):
            model(batch)
            torch.testing.assert_close(total(), sum(feature.sum() for feature in taps.features))


def test_two_taps_at_once(model: Net, x: Tensor) -> None:
    """Student and teacher may even be one model."""
    with at_fused.FeatureTaps(model, ["stem"]) as one, at_fused.FeatureTaps(model, ["group1", "stem"]) as two:
        model(x)
        assert torch.equal(one.features[0], two.features[1])
    assert hooks(model) == 0


def test_unknown_name_lists_close_ones(model: Net) -> None:
    with pytest.raises(ValueError, match=r"group3.*group[12]"):
        at_fused.FeatureTaps(model, ["stem", "group3"])
    with pytest.raises(ValueError, match=r"group1\.0\.cnov.*group1\.0\.conv"):
        at_fused.FeatureTaps(model, ["group1.0.cnov"])
    with pytest.raises(ValueError, match=r"'zzz'; its modules: stem, .*, …$"):
        at_fused.FeatureTaps(model, ["zzz"])
    with pytest.raises(ValueError, match=r"'zzz'; its modules: none$"):
        at_fused.FeatureTaps(nn.Identity(), ["zzz"])
    assert hooks(model) == 0, "a refused tap leaves no hook"


def test_wrong_names(model: Net) -> None:
    with pytest.raises(TypeError, match="stem"):
        at_fused.FeatureTaps(model, "stem")
    with pytest.raises(ValueError, match="stem"):
        at_fused.FeatureTaps(model, ["stem", "stem"])
    with pytest.raises(TypeError, match="names must be strings, got 0"):
        at_fused.FeatureTaps(model, [0])  # type: ignore[list-item]
    assert hooks(model) == 0


def test_reading_before_a_forward_pass(model: Net) -> None:
    with at_fused.FeatureTaps(model, ["stem"]) as taps, pytest.raises(RuntimeError, match="stem"):
        _ = taps.features


def test_reading_after_the_end(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model, ["stem"]) as taps:
        model(x)
    with pytest.raises(RuntimeError, match="these taps are closed"):
        _ = taps.features


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_not_tapped(duplicate: Callable[[Net], Net], model: Net, x: Tensor) -> None:
    """Such as the average of its weights that a mean teacher is."""
    with at_fused.FeatureTaps(model, ["stem"]) as taps:
        other = duplicate(model)
        nn.init.zeros_(other.stem.weight)
        with at_fused.FeatureTaps(other, ["stem"]) as others:
            model(x)
            other(x)
            assert torch.equal(taps.features[0], model.stem(x))
            assert torch.equal(others.features[0], other.stem(x))
    other(x)


def test_a_replica_of_the_model_is_not_recorded(model: Net, x: Tensor) -> None:
    """As nn.DataParallel makes them: they share the hooks, and hold a part of the batch."""
    with at_fused.FeatureTaps(model, ["stem"]) as taps:
        replica = model.stem._replicate_for_data_parallel()
        replica._parameters = model.stem._parameters
        model(x)
        replica(x[:1])
        assert torch.equal(taps.features[0], model.stem(x))


def test_a_module_that_was_not_reached(x: Tensor, model: Net) -> None:
    with at_fused.FeatureTaps(model, ["stem", "head"]) as taps:
        model.stem(x)
        with pytest.raises(RuntimeError, match="head"):
            _ = taps.features


def test_an_output_that_is_no_tensor() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    with at_fused.FeatureTaps(model, ["0"]), pytest.raises(TypeError, match=r"'0'.*tuple"):
        model(torch.randn(2, 1, 3))


def test_hooks_go_away(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model, ["stem", "group1"]):
        assert len(model.stem._forward_hooks) == len(model.group1._forward_hooks) == 1
        model(x)
    assert hooks(model) == 0


def interrupted(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model, ["stem", "group1"]):
        model(x)
        raise KeyError("the step failed")


def test_hooks_go_away_after_an_exception(model: Net, x: Tensor) -> None:
    with pytest.raises(KeyError, match="the step failed"):
        interrupted(model, x)
    assert hooks(model) == 0


def test_nothing_is_kept_alive(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model, ["group1"]) as taps:
        model(x)
        old = weakref.ref(taps.features[0])
        model(x)
        gc.collect()
        assert old() is None, "the last step's features are freed"
        last = weakref.ref(taps.features[0])
    gc.collect()
    assert last() is None, "features do not outlive the block"


def test_taps_keep_no_model_alive(x: Tensor) -> None:
    model = Net()
    taps = at_fused.FeatureTaps(model, ["stem"])
    with taps:
        model(x)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_taps_that_were_never_closed_keep_no_model_alive() -> None:
    gc.disable()  # not even for a while
    try:
        model = Net()
        taps = at_fused.FeatureTaps(model, ["stem"])
        watched = weakref.ref(model.stem)
        del model
        assert watched() is None
        taps.close()
    finally:
        gc.enable()


def test_train_and_eval_mode_are_left_alone(model: Net, x: Tensor) -> None:
    model.eval()
    with at_fused.FeatureTaps(model, ["stem"]):
        model(x)
        assert not model.training


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_model(fullgraph: bool, model: Net, x: Tensor) -> None:
    """Tap the original module before compiling it: the hooks are traced with it."""
    torch.compiler.reset()
    expected = by_hand(model, x)["group1"]
    with at_fused.FeatureTaps(model, ["group1"]) as taps:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        for _ in range(2):
            compiled(x)
            torch.testing.assert_close(taps.features[0], expected)
        loss = at_fused.attention_loss(taps.features, [torch.rand_like(expected)])
        loss.backward()
    assert torch.count_nonzero(model.stem.weight.grad) > 0


@pytest.mark.parametrize("eager_pass_before", [False, True])
@pytest.mark.parametrize("before", ["this model", "another of its class", "nothing"])
def test_compiled_before_or_after_it_was_tapped(
    before: str, eager_pass_before: bool, model: Net, x: Tensor
) -> None:
    """What was compiled without taps is not run for a model that has some."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    if before == "this model":
        compiled(x)
    elif before == "another of its class":
        torch.compile(Net(), backend="aot_eager")(x)
    with at_fused.FeatureTaps(model, ["group1"]) as taps:
        if eager_pass_before:
            model(2 * x)
        for batch in (x, 3 * x):
            compiled(batch)
            torch.testing.assert_close(taps.features[0], by_hand(model, batch)["group1"])
    torch.testing.assert_close(compiled(x), model(x))


def test_a_second_instance_compiled_beside_the_first(x: Tensor) -> None:
    torch.compiler.reset()
    first, second = Net(), Net()
    with at_fused.FeatureTaps(first, ["stem"]) as one, at_fused.FeatureTaps(second, ["stem"]) as two:
        runs = [torch.compile(net, backend="aot_eager", fullgraph=True) for net in (first, second)]
        for batch in (x, 2 * x):
            for run in runs:
                run(batch)
            torch.testing.assert_close(one.features[0], first.stem(batch))
            torch.testing.assert_close(two.features[0], second.stem(batch))


# --- a gradient that is lost, features of an earlier pass ---------------------------------------------


@pytest.mark.parametrize("tapped", ["group1", "group1.0", "group1.0.act", "group2.0.conv"])
@pytest.mark.parametrize("part", ["model", "groups", "inner function"])
def test_a_reentrant_checkpoint_never_loses_a_gradient_silently(
    part: str, tapped: str, model: Net, x: Tensor
) -> None:
    """The gradient of the same model without checkpoints, or an error that says what to do."""
    with at_fused.FeatureTaps(model, [tapped]) as taps:
        model(x)
        taps.features[0].square().sum().backward()
        right = model.stem.weight.grad.clone()
        model.zero_grad()

    run: Callable[[Tensor], Tensor] = model
    if part == "model":
        run = lambda x: checkpoint(model, x, use_reentrant=True)  # noqa: E731
    else:
        for group in (model.group1, model.group2):
            inner = group.forward if part == "groups" else (lambda x, blocks=group: blocks[1](blocks[0](x)))
            group.forward = functools.partial(checkpoint, inner, use_reentrant=True)
    with at_fused.FeatureTaps(model, [tapped]) as taps:
        run(x.requires_grad_())
        if part != "model" and tapped == "group1":  # the output of the checkpoint: autograd sees it
            taps.features[0].square().sum().backward()
            torch.testing.assert_close(model.stem.weight.grad, right)
        else:
            with pytest.raises(RuntimeError, match=f"'{tapped}'.*use_reentrant=False"):
                _ = taps.features


def test_a_checkpointed_module_that_is_tapped_itself(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model.group1, [""]) as taps:
        out = checkpoint(model.group1, model.stem(x), use_reentrant=True)
        assert taps.features[0] is out
        assert taps.features[0].requires_grad


def test_segments_of_checkpoint_sequential(x: Tensor) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Conv2d(3, 4, 3), Block(4), Block(4), nn.ReLU())
    with at_fused.FeatureTaps(blocks, ["0", "2"]) as taps:
        checkpoint_sequential(blocks, 2, x.requires_grad_(), use_reentrant=False).sum().backward()
        assert all(feature.requires_grad for feature in taps.features)
        checkpoint_sequential(blocks, 2, x, use_reentrant=True)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            _ = taps.features


def test_no_grad_within_a_pass_that_trains(model: Net, x: Tensor) -> None:
    model.group1.forward = torch.no_grad()(model.group1.forward)  # type: ignore[method-assign]
    with at_fused.FeatureTaps(model, ["group1.0.act"]) as taps:
        model(x)
        with pytest.raises(RuntimeError, match=r"'group1.0.act' has no gradient.*leave no_grad"):
            _ = taps.features
        model.requires_grad_(False)  # a teacher
        model(x)
        assert not taps.features[0].requires_grad


def test_a_frozen_teacher_within_a_module_that_trains_is_right(x: Tensor) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = Net(), Net().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.teacher(x)
            return self.student(x)

    both = Both()
    with at_fused.FeatureTaps(both, ["student.group1", "teacher.group1.0.act"]) as taps:
        both(x)
        assert [feature.requires_grad for feature in taps.features] == [True, False]


@pytest.mark.parametrize("names", [["group1.1"], ["stem", "group1.1", "group2"]])
@pytest.mark.parametrize("whole", [True, False])
def test_a_module_that_a_pass_skips_leaves_nothing_of_the_pass_before(
    whole: bool, names: list[str], model: Net, x: Tensor
) -> None:
    run = model if whole else model.forward  # whose hooks on the model itself are not called
    with at_fused.FeatureTaps(model, names) as taps:
        run(x)
        assert len(taps.features) == len(names)
        kept, model.group1 = model.group1, nn.Sequential(model.group1[0])
        model.group1.add_module("1", kept[1])
        model.group1.forward = kept[0].__call__  # type: ignore[method-assign]
        if len(names) > 1 or whole:
            run(2 * x)
            with pytest.raises(RuntimeError, match=r"has not reached the tapped modules \['group1.1'\]"):
                _ = taps.features


def test_a_pass_that_fails_half_way_leaves_no_two_batches(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model, ["stem", "group2"]) as taps:
        model(x)
        with pytest.raises(RuntimeError, match="size"):
            model(x[..., :3, :3].repeat(1, 1, 1, 1)[..., :2, :2])
        with pytest.raises(RuntimeError, match="has not reached"):
            _ = taps.features
        model(x)
        assert torch.equal(taps.features[0], model.stem(x))


def test_a_module_that_is_replaced_is_named(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    for change in (
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda model: model.__setitem__(1, nn.Identity()),
    ):
        changed = copy.deepcopy(model)
        with at_fused.FeatureTaps(changed, ["1"]) as taps:
            changed(x)
            change(changed)
            with pytest.raises(RuntimeError, match=r"\['1'\] are no longer part of this model"):
                _ = taps.features


class Owner(nn.Module):
    """A model that returns its features, as one module to wrap, average or send elsewhere."""

    def __init__(self, model: Net) -> None:
        super().__init__()
        self.model = model
        self.taps = at_fused.FeatureTaps(model, ["stem", "group1"])

    def forward(self, x: Tensor) -> list[Tensor]:
        self.model(x)
        return self.taps.features


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda owner: torch.optim.swa_utils.AveragedModel(owner).module,
        lambda owner: pickle.loads(pickle.dumps(owner)),
    ],
)
def test_a_copied_owner_has_the_features_of_its_own_passes(
    duplicate: Callable[[Owner], Owner], grad: bool, model: Net, x: Tensor
) -> None:
    owner = Owner(model)
    with torch.set_grad_enabled(grad):
        first = owner(x)
        other = duplicate(owner)
        nn.init.zeros_(other.model.stem.weight)
        with pytest.raises(RuntimeError, match="has not reached"):
            _ = other.taps.features
        assert torch.equal(other(x)[0], other.model.stem(x))
        assert all(a is b for a, b in zip(owner.taps.features, first, strict=True))


def test_taps_owned_by_their_own_model(x: Tensor) -> None:
    model = Net()
    model.taps = at_fused.FeatureTaps(model, ["stem"])
    model(x)
    other = copy.deepcopy(model)
    other(x)
    with pytest.raises(RuntimeError, match="closed"):
        _ = other.taps.features
    assert torch.equal(model.taps.features[0], model.stem(x))


# --- what else may come between a feature and its reader ---------------------------------------------


def test_in_place_changes_are_noticed_in_inference_mode(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    with at_fused.FeatureTaps(model, ["0"]) as taps, torch.inference_mode():
        model(x)
        with pytest.warns(UserWarning, match="'0' was modified in place"):
            _ = taps.features


def test_a_hook_registered_after_the_tap_is_called_before_it(model: Net, x: Tensor) -> None:
    with at_fused.FeatureTaps(model, ["stem"]) as taps:
        model.stem.register_forward_hook(lambda module, args, output: output.clamp(-0.1, 0.1))
        model(x)
        assert taps.features[0].abs().max() <= 0.1
        model.stem.register_forward_hook(lambda module, args, output: None)
        with pytest.warns(UserWarning, match="hook was registered on 'stem' after its tap"):
            _ = taps.features


def test_a_tapped_model_is_not_scripted(model: Net) -> None:
    with at_fused.FeatureTaps(model, ["stem"]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(AttributeError, match=r"close its taps before torch\.jit\.script"):
            torch.jit.script(model)


def test_a_model_pickled_with_taps_loads_without_at_fused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with at_fused.FeatureTaps(model, ["0"]):
        torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys; sys.modules['at_fused'] = None; import torch; "
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "print(model(torch.ones(1, 3, 4, 4)).shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("4", "")


def test_passes_while_paused_are_not_recorded(model: Net) -> None:
    x, other = torch.randn(2, 2, 3, 8, 8)
    with at_fused.FeatureTaps(model, ["group1", "group2:input"]) as taps:
        with taps.paused():
            model(x)
        with pytest.raises(RuntimeError, match="has not reached the tapped modules"):
            taps.features  # noqa: B018
        model(x)
        before = taps.features
        with taps.paused():
            model(other)
        assert all(a is b for a, b in zip(taps.features, before, strict=True))
        model(other)
        assert not torch.equal(taps.features[0], before[0])
