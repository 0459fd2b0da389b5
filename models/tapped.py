"""What every model of the zoo offers besides `nn.Module`."""

from __future__ import annotations

from torch import nn


class TappedModel(nn.Module):
    """A module that names where its attention may be compared with another model's.

    `taps["groups"]` has one module per resolution, `taps["blocks"]` every block: names as in
    `named_modules()`, in forward order, ready for `at_fused.FeatureTaps`.
    """

    taps: dict[str, list[str]]


def named_taps(model: nn.Module) -> dict[str, list[str]]:
    """The `taps` of a model of the zoo, or of another that has such a dict; else none."""
    taps = getattr(model, "taps", None)
    return taps if isinstance(taps, dict) else {}
