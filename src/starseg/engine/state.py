"""The training state of an unfinished step: saved at the end of each epoch, every few minutes and on SIGTERM or Ctrl-C.

``resume.ckpt`` is a line with the format's version and the SHA-256 of the rest, then a torch file of tensors, numbers
and text, read with ``weights_only=True``. The state before it is kept as ``resume.previous.ckpt``. Both are removed
when the step is published. A damaged file is renamed to ``resume.ckpt.damaged`` and never overwritten.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from starseg.errors import UserError
from starseg.models import upgrade_keys
from starseg.utils.files import write_atomic

CURRENT, PREVIOUS = "resume.ckpt", "resume.previous.ckpt"
FORMAT = 1
_HEADER = re.compile(rb"starseg-resume-(\d+) ([0-9a-f]{64})")


class DamagedState(UserError):
    """The bytes are no intact training state."""


@dataclass(frozen=True)
class TrainingState:
    """All that an unfinished step needs to continue exactly where it was saved.

    Attributes:
        iteration: iterations done.
        model, optimizer, schedule, precision: state dictionaries; ``precision`` holds the loss scale of fp16.
        generator: state of the method's random generator.
        processes: what :func:`process_states` gathered.
        time: seconds by part of the step (:class:`starseg.utils.clock.Clock`).
        seconds: spent on the step so far.
        images: digest of the step's training images; None in states of early versions, which have none.
    """

    iteration: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    precision: dict[str, Any]
    generator: Tensor
    processes: list[dict[str, Any]]
    time: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    images: str | None = None


@dataclass(frozen=True)
class FoundState:
    """What :func:`read_state` found.

    Attributes:
        state: the last intact state; None if there is none.
        damaged: the files that were passed over to get there, with what is wrong with each.
    """

    state: TrainingState | None
    damaged: dict[Path, str]


def encode(state: TrainingState) -> bytes:
    """A state as the bytes of a resume file."""
    buffer = io.BytesIO()
    torch.save({f.name: getattr(state, f.name) for f in fields(state)}, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    return f"starseg-resume-{FORMAT} {digest}\n".encode() + buffer.getvalue()


def decode(data: bytes) -> TrainingState:
    """The state in the bytes of a resume file.

    Raises:
        DamagedState: they are truncated, altered or something else.
        UserError: a newer version of starseg wrote them.
    """
    head, _, body = data.partition(b"\n")
    header = _HEADER.fullmatch(head)
    if header is None:
        raise DamagedState("not a training state of starseg")
    if int(header[1]) > FORMAT:
        raise UserError(
            f"a training state in format {int(header[1])}; this starseg reads format {FORMAT}; resume with the version "
            "that wrote it, or update starseg"
        )
    if header[2] != hashlib.sha256(body).hexdigest().encode():
        raise DamagedState("damaged, its SHA-256 differs from the recorded one")
    try:
        return TrainingState(**torch.load(io.BytesIO(body), map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError) as error:
        raise DamagedState(f"not a training state of starseg ({type(error).__name__})") from error


def write_state(folder: Path, state: TrainingState) -> None:
    """Write a state, keeping the one before.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    data = encode(state)
    if (folder / CURRENT).is_file():
        (folder / CURRENT).replace(folder / PREVIOUS)
    write_atomic(folder / CURRENT, data)


def read_state(folder: Path) -> FoundState:
    """The last intact state of a step directory; nothing is changed.

    Raises:
        UserError: a newer version of starseg wrote it.
    """
    damaged: dict[Path, str] = {}
    for path in (folder / CURRENT, folder / PREVIOUS):
        if path.is_file():
            try:
                return FoundState(decode(path.read_bytes()), damaged)
            except DamagedState as error:
                damaged[path] = str(error)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
    return FoundState(None, damaged)


def set_aside(path: Path) -> Path:
    """Rename what is damaged to a free name ending in ``.damaged``; the new path."""
    numbers = itertools.count(2)
    target = path.with_name(f"{path.name}.damaged")
    while target.exists():
        target = path.with_name(f"{path.name}.damaged.{next(numbers)}")
    return path.rename(target)


def _files(folder: Path) -> Iterator[Path]:
    """The training states of a step directory, those set aside included."""
    for name in (CURRENT, PREVIOUS):
        yield from folder.glob(f"{name}*")


def clear(folder: Path) -> None:
    """Remove the training states of a published step."""
    for path in _files(folder):
        path.unlink(missing_ok=True)


def begun(folder: Path) -> bool:
    """Whether a step directory holds the state of an unfinished step, intact or damaged."""
    return any(_files(folder))


def process_states(model: nn.Module, fabric: Fabric) -> list[dict[str, Any]]:
    """Random state and batch-norm statistics of every process, by rank. All processes must call it."""
    device = fabric.device
    own = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "buffers": {k: v.cpu() for k, v in model.named_buffers() if v.is_floating_point()},
    }
    if fabric.world_size == 1:
        return [own]
    states: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(states, own)
    return states


def restore_process(states: list[dict[str, Any]], model: nn.Module, fabric: Fabric) -> None:
    """Restore what :func:`process_states` gathered; a rank that did not exist then keeps its own random state."""
    if fabric.global_rank < len(states):
        own = states[fabric.global_rank]
        torch.set_rng_state(own["torch"])
        if own["cuda"] is not None and fabric.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], fabric.device)
        buffers: dict[str, Tensor] = dict(model.named_buffers())
        for name, value in upgrade_keys(own["buffers"]).items():
            buffers[name].copy_(value)
