"""What torch.compile may take for granted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable)


def constant(function: _Function) -> _Function:
    """Dynamo takes what `function` returns as it is, instead of looking into it.

    As torch.compiler.assume_constant_result, which imports all of Dynamo to do this.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
