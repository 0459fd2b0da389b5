"""The CPU kernels of the instruction sets below this processor's own, which are never chosen here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import at_fused

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    "cpu" not in at_fused.available_backends(), reason="the CPU library was not built"
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_anywhere_in_memory(layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Whole aligned rows are written past the caches, others through them: with the same bits."""
    feat = torch.randn(3, 64, 8, 8, dtype=torch.float64).to(dtype, memory_format=layout)
    slopes = torch.randn(3, 8, 8, dtype=torch.promote_types(dtype, torch.float32))
    grads = []
    for first in (0, 1):
        grad = torch.full((feat.numel() + 2,), -7, dtype=dtype)
        grads.append(grad[first:].as_strided(feat.shape, feat.stride()))
        torch.ops.at_fused_cpu.attention_maps_backward([feat], [slopes], None, [], [grads[-1]], 2.0, False)
        outside = torch.cat([grad[:first], grad[first + feat.numel() :]])
        assert (outside == -7).all()
    assert torch.equal(*grads)
    exact = 2 * slopes.double()[:, None] * feat.double()
    torch.testing.assert_close(grads[0].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fresh_memory_gets_the_same_bits(layout: torch.memory_format) -> None:
    """A gradient of 32 MiB, which the allocator takes from the system each time, and one written before."""
    feat = torch.randn(32, 64, 64, 64).to(memory_format=layout)
    slopes = torch.randn(32, 64, 64)
    fresh, written = torch.empty_like(feat), torch.zeros_like(feat)
    for grad in (fresh, written):
        torch.ops.at_fused_cpu.attention_maps_backward([feat], [slopes], None, [], [grad], 2.0, False)
    assert torch.equal(fresh, written)
    torch.testing.assert_close(fresh, 2 * slopes[:, None] * feat, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value, chosen", [("baseline", "baseline"), ("AVX512", None)])
def test_a_requested_instruction_set(value: str, chosen: str | None) -> None:
    """One that there is not lowers nothing."""
    ask = "import torch, at_fused; print(torch.ops.at_fused_cpu.instruction_set())"
    environment = os.environ | {"AT_FUSED_ISA": value}
    told = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    assert told.stdout.strip() == (chosen or torch.ops.at_fused_cpu.instruction_set())


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_numbers_on_lesser_processors(isa: str) -> None:
    environment = os.environ | {"AT_FUSED_ISA": isa}
    ask = "import torch, at_fused; print(torch.ops.at_fused_cpu.instruction_set())"
    chosen = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    assert chosen.returncode == 0, chosen.stderr
    if isa == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no avx2")
    assert chosen.stdout.strip() == isa
    files = [str(TESTS / name) for name in ("test_attention_map.py", "test_attention_loss.py")]
    composed = (
        "test_attention_loss and test_options and (norm- or l1 or None)"  # in PyTorch, of the kernels' maps
    )
    selected = ["-k", f"not reference and not ({composed})"]
    command = [sys.executable, "-m", "pytest", "-q", *selected, "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
