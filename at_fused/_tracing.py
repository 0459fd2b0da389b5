"""What torch.compile may take for granted, and what it must look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable)


def constant(function: _Function) -> _Function:
    """Dynamo takes what `function` returns as it is, instead of looking into it.

    As torch.compiler.assume_constant_result, which imports all of Dynamo to do this.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def guard_on_hooks() -> None:
    """Has torch.compile look at the hooks of the modules it is called with.

    By default (`torch._dynamo.config.skip_nnmodule_hook_guards`) it runs what it compiled for a model without
    hooks for one that has some, too, and nothing is recorded. What was compiled so is dropped.
    """
    if torch.compiler.is_compiling():
        return
    import torch._dynamo as dynamo

    if dynamo.config.skip_nnmodule_hook_guards:
        dynamo.config.skip_nnmodule_hook_guards = False
        if dynamo.utils.counters["stats"]["unique_graphs"]:
            torch.compiler.reset()
