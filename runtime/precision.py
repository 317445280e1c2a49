"""The dtype of the passes of a training: bfloat16 where the hardware multiplies it natively."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def working_dtype(precision: Precision, device: torch.device, lent: torch.dtype | None = None) -> torch.dtype:
    """The dtype of weights and activations in the passes; what an optimizer holds is float32 in any case.

    `lent` is what the runtime asks for and rules over `auto`.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if lent is not None:
        return lent
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones: AMX or AVX-512 BF16, GPUs since Ampere."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))
