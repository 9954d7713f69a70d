"""Reading and writing of published checkpoint and prototype files, with their tensor names and shapes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starseg.compat.settings import PublishedConfig, parse_published, tree_beside
from starseg.config import RunConfig
from starseg.data.datasets import DATASETS, list_dataset
from starseg.engine.checkpoint import StepInfo
from starseg.errors import UserError
from starseg.models import Architecture, Segmenter, make_network, upgrade_keys
from starseg.models.architectures import published_keys
from starseg.replay.bank import PrototypeBank
from starseg.replay.directions import DirectionBank
from starseg.utils.files import write_atomic

_HEADS = {"cls.": "heads."}


def _renamed(state: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    def name(key: str) -> str:
        return next((new + key.removeprefix(old) for old, new in prefixes.items() if key.startswith(old)), key)

    return {name(key): value for key, value in state.items()}


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: not {what}, or it holds more than plain tensors and numbers, which is never loaded "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected {what}, a dictionary; it holds a {type(content).__name__}")
    return content


def checkpoint_name(epoch: int) -> str:
    """Return the file name of a published checkpoint."""
    return f"checkpoint-epoch{epoch}.pth"


def prototypes_name(epoch: int) -> str:
    """Return the file name of published prototypes."""
    return f"prototypes-epoch{epoch}.pth"


def info_name(epoch: int, derived: bool = False) -> str:
    """Return the file name of what the journal version stores: the bank, or the prototypes derived from a network."""
    return f"{'new_' if derived else ''}saved_info-epoch{epoch}.pth"


def open_checkpoint(path: Path) -> tuple[Segmenter, StepInfo, RunConfig]:
    """Load a published checkpoint with the config.json next to it; registered as the file format ``.pth``.

    Raises:
        UserError: one of the two is missing or wrong.
    """
    tree, source = tree_beside(path)
    config = parse_published(tree, str(source))
    return *load_checkpoint(path, config), config.to_run(gpu=torch.cuda.is_available())


def _class_names(run: RunConfig) -> tuple[str, ...]:
    """Return names by dataset id, even without the data set; ADE20K's classes then have numbers for names."""
    try:
        return list_dataset(run.data).names
    except UserError:
        return DATASETS[run.data.dataset].names


def load_checkpoint(path: Path, config: PublishedConfig) -> tuple[Segmenter, StepInfo]:
    """Load a published checkpoint in eval mode on the CPU; its heads determine step and classes.

    Raises:
        UserError: not a checkpoint, or one of another network or task.
    """
    content = _read(path, "a published checkpoint")
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: expected a published checkpoint with a state_dict; it has {', '.join(content)}")
    state = _renamed(state, {"module.": ""}) if all(k.startswith("module.") for k in state) else state
    heads = sum(k.startswith("cls.") and k.endswith(".weight") for k in state)
    sizes = [len(state[f"cls.{t}.weight"]) for t in range(heads) if f"cls.{t}.weight" in state]
    run = config.to_run()
    dataset = run.data.dataset
    task = DATASETS[dataset].task(_class_names(run), config.task.name, setting=config.task.setting)
    step = len(sizes) - 1
    expected = [len(task.new(t)) for t in range(len(task))][: step + 1]
    if not sizes or sizes != expected:
        raise UserError(
            f"{path}: its heads hold {sizes} classes, task {task.name} of its configuration has {expected} up to there"
        )
    model = make_network(Architecture.of(run.model), sizes)
    try:
        model.load_state_dict(upgrade_keys(_renamed(state, _HEADS)))
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit {run.model.backbone}: {str(error).splitlines()[1].strip()}") from error
    info = StepInfo(
        architecture=model.architecture,
        head_sizes=sizes,
        names=list(task.class_names(step)),
        dataset_ids=list(task.dataset_ids(step)),
        method=config.method,
        dataset=dataset,
        task=task.name,
        setting=task.setting,
        step=step,
        seed=config.seed,
        compat=config.compat,
        base=task.base,
        crop=run.data.crop,
        test_fill=DATASETS[dataset].test_fill,
    )
    return model.eval().to(memory_format=torch.channels_last), info


def load_bank(folder: Path, epoch: int, config: PublishedConfig) -> dict[str, Tensor]:
    """Load the state of the configured method from a published file, for STAR ``prototypes-epoch<E>.pth``.

    Raises:
        UserError: another file, or tensors of other shapes.
    """
    if config.method == "star":
        return load_prototypes(folder / prototypes_name(epoch)).state_dict()
    wanted = ("counts",) if config.method == "star-lite" else ("counts", "prototypes", noise_key(config))
    return _read_info(folder / info_name(epoch), wanted, f"a published saved_info file for {config.method}")


def noise_key(config: PublishedConfig) -> str:
    """Return the name of the noise in the journal version's files, which tells its kind."""
    return f"{config.noise}_noise"


def load_derived(path: Path, config: PublishedConfig) -> DirectionBank:
    """Load the prototypes with which a step of STAR-Lite begins, from ``new_saved_info-epoch<E>.pth``.

    Raises:
        UserError: another file, another kind of noise, or tensors of other shapes.
    """
    noise = noise_key(config)
    found = _read_info(path, ("counts", "prototypes", noise), "a file of compute_prototype.py")
    return DirectionBank(found["counts"], found["prototypes"], found[noise])


def _read_info(path: Path, wanted: Sequence[str], what: str) -> dict[str, Tensor]:
    """Read tensors of a file of the journal version, with one row per class except for the counts."""
    content = _read(path, what)
    names = {"numbers" if name == "counts" else name: name for name in wanted}
    if missing := [k for k in names if not isinstance(content.get(k), Tensor)]:
        raise UserError(f"{path}: {what} holds {', '.join(names)}; here {missing[0]} is missing")
    if shapes := {
        k: tuple(content[k].shape) for k in names if len(content[k]) != len(content["numbers"]) - (k != "numbers")
    }:
        raise UserError(f"{path}: {len(content['numbers'])} numbers do not belong with {shapes}")
    return {ours: content[theirs].float() for theirs, ours in names.items()}


def load_prototypes(path: Path) -> PrototypeBank:
    """Load a published prototypes file.

    Raises:
        UserError: another file, or tensors of other shapes.
    """
    content = _read(path, "a published prototypes file")
    wanted = ("numbers", "prototypes", "norm_mean_and_std", "noise")
    if missing := [k for k in wanted if not isinstance(content.get(k), Tensor)]:
        raise UserError(f"{path}: a published prototypes file holds {', '.join(wanted)}; here {missing[0]} is missing")
    counts, prototypes, norms, noise = (content[k].float() for k in wanted)
    classes = len(prototypes)
    if counts.shape != (1 + classes,) or norms.shape != (2, classes) or noise.shape != prototypes.shape:
        shapes = {k: tuple(content[k].shape) for k in wanted}
        raise UserError(f"{path}: these shapes do not belong together: {shapes}")
    return PrototypeBank(counts, prototypes, noise, norm_mean=norms[0], norm_std=norms[1])


def _save(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())


def save_published(
    folder: Path, epoch: int, model: dict[str, Tensor], state: dict[str, Tensor], base_model: str = "DeepLabV3"
) -> None:
    """Write ``checkpoint-epoch<E>.pth``, and the method's state in the published form.

    STAR's state becomes ``prototypes-epoch<E>.pth``, that of STAR-Basic and STAR-Lite ``saved_info-epoch<E>.pth``. The
    optimizer, schedule and scaler of the published files are left empty: nothing resumes from a finished step.
    """
    weights = published_keys(_renamed(model, {new: old for old, new in _HEADS.items()}))
    content: dict[str, Any] = {"arch": base_model, "epoch": epoch, "state_dict": weights, "monitor_best": 0}
    _save(folder / checkpoint_name(epoch), content | {"optimizer": {}, "lr_scheduler": {}, "scaler": {}})
    if not PrototypeBank.fits(state):
        save_info(folder / info_name(epoch), state)
        return
    bank = PrototypeBank.from_state_dict(state)
    norms = torch.stack([bank.norm_mean, bank.norm_std])
    prototypes = {"numbers": bank.counts, "prototypes": bank.prototypes, "norm_mean_and_std": norms}
    _save(folder / prototypes_name(epoch), prototypes | {"noise": bank.noise})


def save_info(path: Path, state: dict[str, Tensor]) -> None:
    """Write counts, and prototypes and noise where there are any, with the names of the journal version."""
    _save(path, {"numbers" if name == "counts" else name: value.cpu() for name, value in state.items()})
