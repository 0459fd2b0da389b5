"""What the machine computes fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# What torch.cpu.get_capabilities() calls a processor's instructions for such numbers: x86's, then ARM's.
INSTRUCTIONS = {
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def computes(amp: str, cuda: bool) -> bool:
    """Whether the GPU or the processor has instructions for `amp`: without, it is far slower than fp32."""
    if cuda:
        return amp == "fp16" or (
            torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        )
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: none
    return any(capabilities.get(name, False) for name in INSTRUCTIONS[amp])
