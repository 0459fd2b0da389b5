"""Attention transfer between two models as one object, which takes each map where its feature is made."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _ops, backends, reference
from ._checks import (
    ChannelDim,
    check_batches,
    check_masks,
    check_options,
    check_real,
    check_weights,
    described,
    dims_of_both,
    map_mismatch,
    warn_if_tokens_in_a_line,
)
from ._hooks import ModelTaps, is_complete
from ._pairs import pair_names, settle_what_is_shared
from ._tapped_map import TakeMap, TappedMap
from ._tapping import Tapping
from ._tracing import constant


class AttentionTransfer(Tapping):
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
        reduction: "sum" over pairs, "none", or "batch": each sample's loss in each pair.
        resize: "bilinear" or "nearest" to interpolate the teacher's maps to the student's sizes, or "error".
            Against a map (H, W), N tokens are the rows of a grid of H : W.
        channel_dim: dimension of the channels in the student's features, one for all or one per pair.
        t_channel_dim: the same for the teacher's; None: as the student's.
        eps: lower bound of the norms (1e-12 by default).
        backend: "auto", or one of `available_backends()`.

    Attributes:
        losses: {student's name: its weighted term, beta included, detached} of the last call.

    A call, `transfer()`, uses up one forward pass of each model and returns a scalar, (n_pairs,) with
    reduction="none", or (n_pairs, B) with "batch", in fp32 (fp64 if a feature is fp64).
    `transfer(teacher_maps)` compares with given maps (B, *spatial) instead, one per pair, of any float dtype,
    normalised or not, as `attention_map` and `transfer.teacher_maps()` return them: so a teacher can run
    once, and its maps be kept. With `transfer(masks=masks)` only positions whose mask is true count, as in
    `attention_loss`: per pair a bool (B, *spatial) of the student's map, or None. Hooks live from
    construction until the `with` block ends, or until `close()`; a copy of a model is not tapped.

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
        self._dims = s_dims, t_dims = dims_of_both(channel_dim, t_channel_dim, count)
        options = float(p), mapping, backend
        self._has_teacher = teacher is not None
        self._student = ModelTaps(student, s_names, TakeMap(s_names, s_dims, *options))
        self._teacher = ModelTaps(None, t_names, TakeMap(t_names, t_dims, *options))
        try:
            self._teacher = ModelTaps(teacher, t_names, TakeMap(t_names, t_dims, *options))
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

    def __call__(
        self,
        teacher_maps: Sequence[Tensor] | None = None,
        *,
        masks: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The loss of the latest forward pass of each model; both are used up.

        Args:
            teacher_maps: what to compare the student with instead of the teacher's pass.
            masks: which positions count, bool (B, *spatial) of the student's maps; None: all of them.
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
        names = self._student.names, self._teacher.names
        for pair in zip(*names, students, teachers, zip(*self._dims, strict=True), strict=True):
            self._check(*pair)

        def name(index: int) -> str:
            return f"{self._student.names[index]!r} {described(students[index])}"

        if masks is not None:
            shapes = [student.shape for student in students]
            masks = check_masks(masks, name, shapes, students[0].device)
        if self.reduction == "batch":
            check_batches(name, [student.shape[0] for student in students])
        losses = self._compare(students, teachers, masks)
        self.clear()
        terms = losses.detach()
        if self.reduction == "batch":
            terms = terms.sum(1) / max(terms.shape[1], 1)
        self.losses = dict(zip(self._student.names, terms.unbind(), strict=True))
        return losses.sum() if self.reduction == "sum" else losses

    def teacher_maps(self) -> list[Tensor]:
        """The teacher's maps of its latest forward pass, which this uses up: to keep, and to give to a call.

        One per pair, (B, *spatial) in fp32 (fp64 for fp64 features), divided by its norm if there is one:
        nothing in them leaves the range of fp16 then.

        Raises:
            RuntimeError: as from a call.
        """
        if not self._has_teacher:
            raise RuntimeError("this transfer has no teacher, and no maps of one")
        maps = self._taken("teacher", self._teacher)
        self._teacher.clear()
        normalize, eps = self.distance["normalize"], self.distance["eps"]
        return [reference.normalize_map(one, normalize, eps) for one in maps]

    def _taken(self, who: str, taps: ModelTaps) -> list[Tensor]:
        """The maps of a model's latest pass, known to be whole and, of the student, to carry gradients."""
        if taps.closed:
            raise RuntimeError("this transfer is closed: call it before the end of the with block")
        if problem := taps.missing():
            raise RuntimeError(f"{who}: {problem}")
        maps = []
        for name in taps.names:
            taken: TappedMap = taps.pass_.records[name].value
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

    def _check(
        self, s_name: str, t_name: str, student: Tensor, teacher: Tensor, dims: tuple[int, int]
    ) -> None:
        """Raise what keeps two maps (B, *spatial) from being compared."""

        def pair() -> str:
            names = f"{s_name!r} {described(student)} and {t_name!r} {described(teacher)}"
            return f"the maps of student and teacher, {names},"

        if student.shape[:1] != teacher.shape[:1]:
            raise RuntimeError(
                f"{pair()} differ in batch size: run both models on the same images before each call"
            )
        if problem := map_mismatch(student, teacher, self.distance["resize"]):
            raise ValueError(f"{pair()} {problem}")
        warn_if_tokens_in_a_line(student.shape[1:], teacher.shape[1:], dims, f"{s_name!r} and {t_name!r}")
        if self.distance["normalize"] and student.shape[1:].numel() == 1:
            self._warn(
                f"the maps of {s_name!r} have a single position: normalised they are 1 whatever the feature, "
                "so this pair's loss and gradient are 0; tap an earlier module"
            )

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            _warn(text)

    def _compare(
        self, students: list[Tensor], teachers: list[Tensor], masks: Sequence[Tensor | None] | None
    ) -> Tensor:
        """The weighted distance of each pair, beta included: (n_pairs,), or (n_pairs, B)."""
        comparable = all(
            s.shape == t.shape and s.dtype == t.dtype for s, t in zip(students, teachers, strict=True)
        )
        normalize, distance = self.distance["normalize"], self.distance["distance"]
        hot = comparable and _ops.is_fused(normalize, distance, self.reduction, masks)
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
        reduction = "batch" if self.reduction == "batch" else "none"
        return self.beta * reference.loss_from_maps(
            students, teachers, self.weights, reduction=reduction, masks=masks, **self.distance
        )

    @property
    def _models(self) -> tuple[ModelTaps, ...]:
        return self._student, self._teacher

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


@constant
def _warn(text: str) -> None:
    """Warns also where torch.compile traces a call, which can't trace a warning."""
    warnings.warn(text, stacklevel=5)
