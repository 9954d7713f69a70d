"""Where a broken step goes on: its training state at each epoch's end, every few minutes, and on SIGTERM or Ctrl-C.

``resume.ckpt`` is a line with the SHA-256 of the rest, then a torch file of tensors, numbers and text, read with
``weights_only=True``. The state before it is kept as ``resume.previous.ckpt``. Both go when the step is published.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from starseg.utils.files import write_atomic

CURRENT, PREVIOUS = "resume.ckpt", "resume.previous.ckpt"
_MAGIC = b"starseg-resume-1 "


def encode(state: dict[str, Any]) -> bytes:
    """A state as the bytes of a resume file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return _MAGIC + hashlib.sha256(buffer.getbuffer()).hexdigest().encode() + b"\n" + buffer.getvalue()


def decode(data: bytes) -> dict[str, Any] | None:
    """The state in the bytes of a resume file; None if they are damaged."""
    head, _, body = data.partition(b"\n")
    if head != _MAGIC + hashlib.sha256(body).hexdigest().encode():
        return None
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        return None


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state, keeping the one before."""
    data = encode(state)
    if (folder / CURRENT).is_file():
        (folder / CURRENT).replace(folder / PREVIOUS)
    write_atomic(folder / CURRENT, data)


def read_state(folder: Path, console: Console) -> dict[str, Any] | None:
    """The last good state of a step, None if it has none; a damaged file is named and passed over."""
    for name in (CURRENT, PREVIOUS):
        path = folder / name
        if path.is_file():
            state = decode(path.read_bytes())
            if state is not None:
                return state
            console.print(f"{path}: damaged, going on from the state before", highlight=False, soft_wrap=True)
    return None


def clear(folder: Path) -> None:
    for name in (CURRENT, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def begun(folder: Path) -> bool:
    """Whether a step directory holds the state of a broken step."""
    return (folder / CURRENT).is_file() or (folder / PREVIOUS).is_file()


def _of_this_process(model: nn.Module, device: torch.device) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    buffers = {k: v.cpu() for k, v in model.named_buffers() if v.is_floating_point()}
    return {"torch": torch.get_rng_state(), "cuda": cuda, "buffers": buffers}


def every_process(model: nn.Module, fabric: Fabric) -> list[dict[str, Any]]:
    """Random state and batch-norm statistics of every process, by rank. All of them must call it."""
    mine = _of_this_process(model, fabric.device)
    if fabric.world_size == 1:
        return [mine]
    states: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(states, mine)
    return states


def restore_process(states: list[dict[str, Any]], model: nn.Module, fabric: Fabric) -> None:
    """Take up what :func:`every_process` gave; a rank that was not there then keeps its own random state."""
    if fabric.global_rank < len(states):
        mine = states[fabric.global_rank]
        torch.set_rng_state(mine["torch"])
        if mine["cuda"] is not None and fabric.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], fabric.device)
        own: dict[str, Tensor] = dict(model.named_buffers())
        for name, value in mine["buffers"].items():
            own[name].copy_(value)
