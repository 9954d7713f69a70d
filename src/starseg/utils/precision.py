"""Precision of forward passes: the data types that a device is fast at."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "32", "bf16"]
"""Precision of forward passes without gradients; what `auto` means depends on their purpose."""


def is_bf16_fast(device: torch.device) -> bool:
    """Return whether the device computes matrix products in bf16 natively.

    Decided by capability flags and not by a measurement, so that the same command gives the same result in every
    process on a machine.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
