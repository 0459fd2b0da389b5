"""Attention transfer between two models as one object, which takes each map where its feature is made."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _ops, backends, reference
from ._checks import (
    channels_second,
    check_options,
    check_real,
    check_weights,
    described,
    feature_error,
    map_mismatch,
    warn_if_channels_last,
)
from ._hooks import ModelTaps, is_complete
from ._pairs import ChannelDim, pair_names, per_pair, settle_what_is_shared
from ._selectors import Selector, leads_to_a_part
from ._tracing import constant


class AttentionTransfer:
    """The attention-transfer loss of a student and a teacher (section 3.1, Eq. 2), from their forward passes.

    ```
    transfer = at_fused.AttentionTransfer(student, teacher, ["layer3", "layer4"], beta=1000)
    for images, labels in loader:
        with torch.no_grad():
            teacher(images)
        loss = F.cross_entropy(student(images), labels) + transfer()
    ```

    It is `beta * attention_loss(student's features, teacher's features)`, with the maps taken in the models'
    forward passes: nothing of a feature is kept for the loss, what happens to it afterwards cannot change its
    map, and the student's gradient is added to that of the next layer in one pass.

    Args:
        student: any module. For a model under DistributedDataParallel or torch.compile, give the original
            module it wraps.
        teacher: the same; under `no_grad` it gets no gradient. With None, each call is given its maps.
        names: the student's features, as for `FeatureTaps`; or {student's name: teacher's name}.
        t_names: the teacher's, in the same order; None: the same names.
        p: exponent of the maps, a real number >= 1.
        beta: factor of the whole loss. A plain attribute: assign to it to schedule it.
        weights: one factor per pair; None means 1 for each.
        mapping: "sum" (F_sum^p) or "max" (F_max^p).
        normalize: "l2", "l1", or None, over each sample's positions.
        distance: "mse" (the authors' code: beta = 1000) or "norm" (Eq. 2: beta / 2).
        norm_order: q >= 1 of distance="norm".
        reduction: "sum" over pairs, or "none".
        resize: "bilinear" or "nearest" to interpolate the teacher's maps to the student's sizes, or "error".
        channel_dim: dimension of the channels in the student's features, one for all or one per pair.
        t_channel_dim: the same for the teacher's; None: as the student's.
        eps: lower bound of the norms.
        backend: "auto", or one of `available_backends()`.

    Attributes:
        losses: {student's name: its weighted term, beta included, detached} of the last call.

    A call, `transfer()`, uses up one forward pass of each model and returns a scalar, or (n_pairs,) with
    reduction="none", in fp32 (fp64 if a feature is fp64). `transfer(teacher_maps)` compares with given maps
    (B, *spatial) instead, one per pair, of any float dtype, normalised or not, as `attention_map` returns
    them: so a teacher can run once, and its maps be kept. Hooks live from construction until the `with` block
    ends, or until `close()`; a copy of a model is not tapped.

    Raises:
        ValueError, TypeError: unknown or repeated names, options as for `attention_loss`; from a call,
            features that cannot be compared, with both names and shapes.
        RuntimeError: from a call, where a model has made no new pass, a tap was not reached or its module
            replaced, the student's feature was made without the gradient it needs (reentrant checkpointing,
            `no_grad`) or modified in place afterwards, or the two passes differ in batch size.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        names: Iterable[str] | Mapping[str, str],
        t_names: Iterable[str] | None = None,
        p: float = 2,
        *,
        beta: float = 1000.0,
        weights: Sequence[float] | None = None,
        mapping: str = "sum",
        normalize: str | None = "l2",
        distance: str = "mse",
        norm_order: float = 2,
        reduction: str = "sum",
        resize: str = "bilinear",
        channel_dim: ChannelDim = 1,
        t_channel_dim: ChannelDim | None = None,
        eps: float = reference.EPS,
        backend: str = "auto",
    ) -> None:
        check_real("beta", beta)
        check_options(
            p,
            norm_order,
            eps,
            mapping=mapping,
            normalize=normalize,
            distance=distance,
            reduction=reduction,
            resize=resize,
            backend=backend,
        )
        s_names, t_names = pair_names(names, t_names)
        count = len(s_names)
        self.p, self.beta = p, beta
        self.weights = (1.0,) * count if weights is None else tuple(check_weights(weights, count))
        self.reduction, self.backend = reduction, backend
        self.distance: dict[str, Any] = {
            "eps": float(eps),
            "normalize": normalize,
            "distance": distance,
            "norm_order": norm_order,
            "resize": resize,
        }
        self.losses: dict[str, Tensor] = {}
        s_dims = per_pair("channel_dim", channel_dim, count)
        t_dims = s_dims if t_channel_dim is None else per_pair("t_channel_dim", t_channel_dim, count)
        options = float(p), mapping, backend
        self._has_teacher = teacher is not None
        self._student = ModelTaps(student, s_names, _TakeMap(s_names, s_dims, *options))
        self._teacher = ModelTaps(None, t_names, _TakeMap(t_names, t_dims, *options))
        try:
            self._teacher = ModelTaps(teacher, t_names, _TakeMap(t_names, t_dims, *options))
            if not (self._student.closed or self._teacher.closed):
                settle_what_is_shared(self._student, self._teacher)
        except BaseException:
            self.close()
            raise
        self._options = {
            "names": s_names,
            "t_names": t_names,
            "p": p,
            "weights": self.weights,
            "mapping": mapping,
            "reduction": reduction,
            "channel_dim": s_dims,
            "t_channel_dim": t_dims,
            "backend": backend,
            **self.distance,
        }
        self._warned: set[str] = set()

    def __call__(self, teacher_maps: Sequence[Tensor] | None = None) -> Tensor:
        """The loss of the latest forward pass of each model; both are used up.

        Args:
            teacher_maps: what to compare the student with instead of the teacher's pass.
        """
        if not torch.compiler.is_compiling():
            check_real("beta", self.beta)
        students = self._taken("student", self._student)
        if teacher_maps is not None:
            teachers = self._given(teacher_maps, students)
        elif self._has_teacher:
            teachers = self._taken("teacher", self._teacher)
        else:
            raise RuntimeError("this transfer has no teacher: give its maps, transfer(teacher_maps)")
        for pair in zip(self._student.names, self._teacher.names, students, teachers, strict=True):
            self._check(*pair)
        losses = self._compare(students, teachers)
        self._student.clear()
        self._teacher.clear()
        self.losses = dict(zip(self._student.names, losses.detach().unbind(), strict=True))
        return losses.sum() if self.reduction == "sum" else losses

    def _taken(self, who: str, taps: ModelTaps) -> list[Tensor]:
        """The maps of a model's latest pass, known to be whole and, of the student, to carry gradients."""
        if taps.closed:
            raise RuntimeError("this transfer is closed: call it before the end of the with block")
        if problem := taps.missing():
            raise RuntimeError(f"{who}: {problem}")
        maps = []
        for name in taps.names:
            taken: _Map = taps.pass_.records[name].value
            trained = who == "student" and torch.is_grad_enabled()
            lost = trained and not taken.attention.requires_grad
            if lost and (problem := taps.lost_gradient(name, student=True)):
                raise RuntimeError(f"{who}: {problem}")
            if taken.feature is not None and taken.feature._version != taken.version:
                raise RuntimeError(
                    f"{who}: the feature of {name!r} was modified in place after its map was taken (by a "
                    "ReLU, say), and its gradient needs its values: tap the module that modified it, or make "
                    "that out-of-place"
                )
            if not torch.compiler.is_compiling() and (problem := taps.hooked_later(name)):
                self._warn(f"{who}: {problem}")
            maps.append(taken.attention)
        return maps

    def _given(self, maps: Sequence[Tensor], students: Sequence[Tensor]) -> list[Tensor]:
        """Given maps in the dtypes of the student's."""
        if isinstance(maps, Tensor) or not isinstance(maps, Sequence):
            raise TypeError(f"teacher_maps must be a sequence of maps, one per pair, got {described(maps)}")
        if len(maps) != len(students):
            raise ValueError(
                f"teacher_maps must have one map per pair: got {len(maps)} for {len(students)} pairs"
            )
        for name, given in zip(self._teacher.names, maps, strict=True):
            if not isinstance(given, Tensor) or not given.is_floating_point() or given.ndim < 2:
                raise TypeError(
                    f"teacher_maps: the map for {name!r} must be a floating-point tensor (B, *spatial), got "
                    f"{described(given, dtype=True)}"
                )
        return [given.to(student.dtype) for given, student in zip(maps, students, strict=True)]

    def _check(self, s_name: str, t_name: str, student: Tensor, teacher: Tensor) -> None:
        """Raise what keeps two maps (B, *spatial) from being compared."""
        pair = f"{s_name!r} {described(student)} and {t_name!r} {described(teacher)}"
        if student.shape[:1] != teacher.shape[:1]:
            raise RuntimeError(
                f"the maps of student and teacher, {pair}, differ in batch size: run both models on the same "
                "images before each call"
            )
        if problem := map_mismatch(student, teacher, self.distance["resize"]):
            raise ValueError(f"the maps of student and teacher, {pair}, {problem}")
        if self.distance["normalize"] and student.shape[1:].numel() == 1:
            self._warn(
                f"the maps of {s_name!r} have a single position: normalised they are 1 whatever the feature, "
                "so this pair's loss and gradient are 0; tap an earlier module"
            )

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            _warn(text)

    def _compare(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        """The weighted distance of each pair, beta included: (n_pairs,)."""
        comparable = all(
            s.shape == t.shape and s.dtype == t.dtype for s, t in zip(students, teachers, strict=True)
        )
        hot = self.distance["normalize"] == "l2" and self.distance["distance"] == "mse" and comparable
        if hot and not torch.compiler.is_compiling():
            # A map is its own F_sum^1 over one channel: the fused loss takes maps as it takes features.
            s_maps, t_maps = [s.unsqueeze(1) for s in students], [t.unsqueeze(1) for t in teachers]
            backend = backends.select(self.backend, [*s_maps, *t_maps], 1.0, "sum")
            if backend != "reference":
                weights = [self.beta * weight for weight in self.weights]
                losses: Tensor = _ops.fused_loss(
                    s_maps, t_maps, weights, 1.0, "sum", self.distance["eps"], False, backend
                )
                return losses
        # Not into the weights: a beta within them would recompile each time that it changes.
        return self.beta * reference.loss_from_maps(
            students, teachers, self.weights, reduce=False, **self.distance
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context passes of both models are not recorded, and cost no maps: for an
        evaluation between two steps, say.

        What was recorded before is kept. The backward pass of a checkpointed pass belongs within it, too.
        """
        with self._student.paused(), self._teacher.paused():
            yield

    def close(self) -> None:
        """Removes the hooks from both models and forgets what they recorded."""
        self._student.close()
        self._teacher.close()

    def __enter__(self) -> AttentionTransfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        names = zip(self._student.names, self._teacher.names, strict=True)
        pairs = ", ".join(s if s == t else f"{s} <- {t}" for s, t in names)
        state = ", closed" if self._student.closed else ""
        return f"AttentionTransfer({pairs}; p={self.p!r}, beta={self.beta!r}{state})"

    def __reduce__(self) -> Any:
        """A copy, or a pickle, taps the copies of the models that come with it."""
        models: list[nn.Module | None] = [] if self._student.closed else [self._student.model()]
        if models and self._has_teacher:
            models.append(self._teacher.model())
        return _copied, (models, {**self._options, "beta": self.beta})


def _copied(models: list[nn.Module | None], options: dict[str, Any]) -> AttentionTransfer:
    student, teacher = [*models, None, None][:2]
    if not all(is_complete(model) for model in models):
        student = None  # closed
    return AttentionTransfer(student, teacher if student else None, **options)  # type: ignore[arg-type]


class _Map(NamedTuple):
    """A raw map (B, *spatial); where it has a gradient, also the feature, and its version then."""

    attention: Tensor
    feature: Tensor | None
    version: int


class _TakeMap:
    """Takes the map of a feature where it is made."""

    def __init__(
        self, names: Sequence[str], dims: Sequence[int], p: float, mapping: str, backend: str
    ) -> None:
        self.dims = dict(zip(names, dims, strict=True))
        self.p, self.mapping, self.backend = p, mapping, backend

    def __call__(self, feature: Tensor, selector: Selector, value: Any) -> tuple[_Map, Tensor | None]:
        dim, p, mapping = self.dims[selector.name], self.p, self.mapping
        if error := feature_error(feature, dim):
            kind, text = error
            raise kind(f"tap {selector.name!r}: the feature {described(feature)} {text}")
        if torch.compiler.is_compiling():  # the compiler joins the plain formula to the feature's kernel
            return _Map(reference.attention_map(channels_second(feature, dim), p, mapping), None, 0), None
        warn_if_channels_last(feature, dim, f"tap {selector.name!r}")
        second = channels_second(feature, dim)
        backend = backends.select(self.backend, [second], p, mapping)
        if not (torch.is_grad_enabled() and feature.requires_grad):
            return _Map(_ops.raw_maps([second], p, mapping, backend)[0], None, 0), None
        if backend == "reference" or leads_to_a_part(value, selector.path):
            return _Map(_ops.raw_maps([second], p, mapping, backend)[0], feature, feature._version), None
        passed_on, attention = _ops.feature_and_map(feature, p, mapping, backend, dim)
        return _Map(attention, passed_on, passed_on._version), passed_on


@constant
def _warn(text: str) -> None:
    """Warns also where torch.compile traces a call, which can't trace a warning."""
    warnings.warn(text, stacklevel=5)
