"""Every test starts from the same random state and one thread, whatever the test before it did."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import partial
import pytest
import torch
from wheels import quick_compiler, tree  # noqa: F401 (fixtures)

import at_fused

pytest.register_assert_rewrite("cases", "runs")  # else what is asserted there fails without its values

with suppress(ImportError):  # a run of the library alone
    from models import torchvision_compat  # noqa: F401  (before torchvision: xdist unpickles its users' warnings)

# A compiler in this process, rather than in others that first import torch and that a fork can't use.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # xdist's workers inherit it; an older one may not fit
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="at-fused-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # on a GPU, too, fp32 is compared as fp32
torch.backends.cudnn.deterministic = True  # and what is computed twice has the same bits

if "cuda" in at_fused.available_backends():
    partial.install()
    pytest_runtest_call = partial.pytest_runtest_call

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    # Half of the time, for checks that a program outside debug mode does not heed.
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)

    call = InterpretedFunction.__call__
    ready: set[str] = set()

    def call_quickly(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        """Triton readies the language at each call of a function, which takes milliseconds: once will do."""
        if self.fn.__module__ in ready:
            return self.rewrite()(*args, **kwargs)
        ready.add(self.fn.__module__)
        return call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call_quickly


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
