"""A backend that serves the hot path only, as "cuda" does, in a suite that asks everything of each."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from at_fused import backends


def install() -> None:
    """Let `cases.check_loss` go on with another backend where a test gets to features it does not serve."""
    import cases

    def check_loss(*args: Any, backend: str, **options: Any) -> list[Tensor]:
        try:
            return check(*args, backend=backend, **options)
        except backends.BackendError:
            return check(*args, backend="auto", **options)

    check, cases.check_loss = cases.check_loss, check_loss


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Skip a test whose features it does not serve."""
    try:
        return (yield)
    except backends.BackendError as error:
        pytest.skip(str(error))
