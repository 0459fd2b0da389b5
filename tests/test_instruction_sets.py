"""The CPU kernels of the instruction sets below this processor's own, which are never chosen here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import at_fused

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in at_fused.available_backends(), reason="the CPU library was not built")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_numbers_on_lesser_processors(isa: str) -> None:
    environment = os.environ | {"AT_FUSED_ISA": isa}
    ask = "import torch, at_fused; print(torch.ops.at_fused_cpu.instruction_set())"
    chosen = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    if chosen.stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}")
    files = [str(TESTS / name) for name in ("test_attention_map.py", "test_attention_loss.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not reference", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
