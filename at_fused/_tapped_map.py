"""A map taken where its feature is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops, backends, reference
from ._checks import channels_second, described, feature_error, warn_if_channels_last
from ._selectors import Selector, leads_to_a_part


class TappedMap(NamedTuple):
    """A raw map (B, *spatial); where it has a gradient, also the feature, and its version then."""

    attention: Tensor
    feature: Tensor | None
    version: int


class TakeMap:
    """Takes the map of a feature where it is made."""

    def __init__(
        self, names: Sequence[str], dims: Sequence[int], p: float, mapping: str, backend: str
    ) -> None:
        self.dims = dict(zip(names, dims, strict=True))
        self.p, self.mapping, self.backend = p, mapping, backend

    def __call__(self, feature: Tensor, selector: Selector, value: Any) -> tuple[TappedMap, Tensor | None]:
        dim, p, mapping = self.dims[selector.name], self.p, self.mapping
        if error := feature_error(feature, dim):
            kind, text = error
            raise kind(f"tap {selector.name!r}: the feature {described(feature)} {text}")
        if torch.compiler.is_compiling():  # the compiler joins the plain formula to the feature's kernel
            return TappedMap(
                reference.attention_map(channels_second(feature, dim), p, mapping), None, 0
            ), None
        warn_if_channels_last(feature, dim, f"tap {selector.name!r}")
        second = channels_second(feature, dim)
        backend = backends.select(self.backend, [second], p, mapping)
        if not (torch.is_grad_enabled() and feature.requires_grad):
            return TappedMap(_ops.raw_maps([second], p, mapping, backend)[0], None, 0), None
        if backend == "reference" or leads_to_a_part(value, selector.path):
            return TappedMap(_ops.raw_maps([second], p, mapping, backend)[0], feature, feature._version), None
        passed_on, attention = _ops.feature_and_map(feature, p, mapping, backend, dim)
        return TappedMap(attention, passed_on, passed_on._version), passed_on
