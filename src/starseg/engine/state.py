"""The training state of an unfinished step: saved after each epoch over images, every few minutes and on Ctrl-C.

``resume.ckpt`` begins with a line that contains the format version and the SHA-256 of the rest; the rest is a torch
file of tensors, numbers and text, read with ``weights_only=True``. The previously saved state is kept as
``resume.previous.ckpt``. Both files are removed when the step is published. A damaged file is renamed to
``resume.ckpt.damaged`` and never overwritten.
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
    """The data is not an intact training state."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that an unfinished step needs to resume exactly where it was saved.

    Attributes:
        iteration: number of completed iterations.
        model, optimizer, schedule, precision: state dictionaries; ``precision`` contains the loss scale of fp16.
        generator: state of the method's random generator.
        processes: result of :func:`process_states`.
        time: seconds spent on each part of the step (:class:`starseg.utils.clock.Clock`).
        seconds: total time spent on the step so far.
        images: digest of the step's training images; None in states saved by early versions.
        stage: index of the stage of the step.
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
    stage: int = 0


@dataclass(frozen=True)
class FoundState:
    """Result of :func:`read_state`.

    Attributes:
        state: the latest intact state; None if there is none.
        damaged: damaged files that were skipped, each with the reason.
    """

    state: TrainingState | None
    damaged: dict[Path, str]


def encode(state: TrainingState) -> bytes:
    """Encode a training state as the content of a resume file."""
    buffer = io.BytesIO()
    torch.save({f.name: getattr(state, f.name) for f in fields(state)}, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    return f"starseg-resume-{FORMAT} {digest}\n".encode() + buffer.getvalue()


def decode(data: bytes) -> TrainingState:
    """Decode the content of a resume file.

    Raises:
        DamagedState: the data is truncated, altered or not a training state.
        UserError: a newer version of starseg wrote the data.
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
    """Save a training state, keeping the previously saved one.

    Raises:
        UserError: the disk is full, or the folder is not writable.
    """
    data = encode(state)
    if (folder / CURRENT).is_file():
        (folder / CURRENT).replace(folder / PREVIOUS)
    write_atomic(folder / CURRENT, data)


def read_state(folder: Path) -> FoundState:
    """Read the latest intact training state of a step directory, without changing any file.

    Raises:
        UserError: a newer version of starseg wrote the state.
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
    """Rename a file or folder to an unused name, ``*.damaged`` or ``*.damaged.<number>``, and return the new path."""
    numbers = itertools.count(2)
    target = path.with_name(f"{path.name}.damaged")
    while target.exists():
        target = path.with_name(f"{path.name}.damaged.{next(numbers)}")
    return path.rename(target)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the training state files of a step directory, including damaged ones that were renamed."""
    for name in (CURRENT, PREVIOUS):
        yield from folder.glob(f"{name}*")


def clear(folder: Path) -> None:
    """Remove the training state files of a published step."""
    for path in _files(folder):
        path.unlink(missing_ok=True)


def begun(folder: Path) -> bool:
    """Return whether a step directory contains the training state of an unfinished step, intact or damaged."""
    return any(_files(folder))


def process_states(model: nn.Module, fabric: Fabric) -> list[dict[str, Any]]:
    """Gather random states and batch-norm statistics of all processes, by rank; every process must call it."""
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
    """Restore this process's part of :func:`process_states`; a rank that it does not contain keeps its random state."""
    if fabric.global_rank < len(states):
        own = states[fabric.global_rank]
        torch.set_rng_state(own["torch"])
        if own["cuda"] is not None and fabric.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], fabric.device)
        buffers: dict[str, Tensor] = dict(model.named_buffers())
        for name, value in upgrade_keys(own["buffers"]).items():
            buffers[name].copy_(value)
