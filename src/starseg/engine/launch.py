"""Devices and precision, through lightning-fabric."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric

from starseg.config import TrainConfig
from starseg.errors import UserError


def _auto_precision(cuda: bool) -> str:
    if cuda:
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "32"


def make_fabric(config: TrainConfig) -> Fabric:
    """One process on the configured device.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("train.accelerator: gpu is asked for, but torch sees none; use cpu or auto")
    cuda = config.accelerator != "cpu" and torch.cuda.is_available()
    precision = _auto_precision(cuda) if config.precision == "auto" else config.precision
    return Fabric(accelerator="cuda" if cuda else "cpu", devices=1, precision=precision)  # type: ignore[arg-type]
