"""What each backend must serve, in a suite that asks everything of each: only this table skips a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from at_fused import backends


class Served(NamedTuple):
    """What a backend must serve; it may refuse everything else, and serve it, too."""

    dtypes: set[torch.dtype]
    mappings: set[str]
    layouts: set[str]  # of a sample: see `layouts`
    positions: int  # of a map, at the most


SERVED = {
    "cuda": Served(
        dtypes={torch.float32, torch.bfloat16, torch.float16},
        mappings={"sum"},
        layouts={"channels-first", "channels-last"},
        positions=128 * 128,
    )
}


def layouts(feature: Tensor) -> set[str]:
    """The layouts in memory, without gaps, of each sample of a feature (B, C, *spatial)."""
    sample = feature[0] if len(feature) else feature.new_empty(feature.shape[1:])
    orders = {"channels-first": sample, "channels-last": sample.movedim(0, -1)}
    return {name for name, ordered in orders.items() if ordered.is_contiguous()}


def must_serve(backend: str, features: Sequence[Tensor], mapping: str) -> bool:
    """Whether the table says so. No backend can see into the features of a wrapper or of functorch."""
    served = SERVED.get(backend)
    return served is None or (
        mapping in served.mappings
        and all(map(backends.is_plain, features))
        and all(x.dtype in served.dtypes and layouts(x) & served.layouts for x in features)
        and all(x.shape[2:].numel() <= served.positions for x in features)
    )


def may_refuse(error: backends.BackendError) -> bool:
    """Whether the table lets a backend refuse what `select` was asked when it raised this error."""
    traceback = error.__traceback__
    while traceback:
        frame = traceback.tb_frame
        if frame.f_code is backends.select.__code__:
            asked = frame.f_locals
            return not must_serve(asked["backend"], asked["feats"], asked["mapping"])
        traceback = traceback.tb_next
    return False


def install() -> None:
    """Let `cases.check_loss` go on with another backend where a test gets to what a backend may refuse."""
    import cases

    def check_loss(*args: Any, backend: str, **options: Any) -> list[Tensor]:
        try:
            return check(*args, backend=backend, **options)
        except backends.BackendError as error:
            if not may_refuse(error):
                raise
            return check(*args, backend="auto", **options)

    check, cases.check_loss = cases.check_loss, check_loss


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Skip a test where a backend refuses what it may refuse."""
    try:
        return (yield)
    except backends.BackendError as error:
        if may_refuse(error):
            pytest.skip(str(error))
        raise
