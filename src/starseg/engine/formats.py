"""Trained networks on disk: step directories, and file formats that other packages register.

A package registers a file format through an entry point of the group ``starseg.formats``. Its name is the suffix
(``.pth``); its value is a :data:`Loader`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from starseg.config import RunConfig, change_config, load_config
from starseg.engine.checkpoint import StepInfo, load_model
from starseg.errors import UserError
from starseg.models import Segmenter

ENTRY_POINTS = "starseg.formats"

Loader = Callable[[Path], tuple[Segmenter, StepInfo, RunConfig]]
"""Reads a file: the network in eval mode on the CPU, what it is, and the run that evaluates it."""


def find_loader(suffix: str) -> Loader | None:
    """The registered loader of a file format; None if there is none.

    Args:
        suffix: of the file, such as ``.pth``.

    Raises:
        UserError: the package that registers it cannot be imported.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == suffix:
            try:
                return entry.load()
            except Exception as error:  # whatever a foreign module does when it is imported
                raise UserError(
                    f"file format {suffix!r} of the installed package {entry.dist.name if entry.dist else '?'} cannot "
                    f"be loaded ({entry.value}): {type(error).__name__}: {error}"
                ) from error
    return None


def open_network(path: Path) -> tuple[Segmenter, StepInfo]:
    """The network of a step directory or of a file in a registered format, in eval mode on the CPU.

    Raises:
        UserError: no such step or file, an unknown format, or damaged files.
    """
    if loader := _loader_of(path):
        return loader(path)[:2]
    return load_model(path)


def open_run(path: Path, overrides: Sequence[str]) -> tuple[Segmenter, StepInfo, RunConfig]:
    """Like :func:`open_network`, with the configuration of the run that the network belongs to.

    Args:
        path: a run's step directory, or a file in a registered format.
        overrides: of the configuration, "key=value".

    Raises:
        UserError: as :func:`open_network`, or a step directory without its run.
    """
    if loader := _loader_of(path):
        model, info, config = loader(path)
        return model, info, change_config(config, overrides)
    model, info = load_model(path)
    config_path = path.resolve().parent / "config.yaml"
    if not config_path.is_file():
        raise UserError(
            f"{path}: cannot be evaluated, {config_path} is missing, which names the data set; give the step directory "
            "in its run"
        )
    return model, info, load_config(config_path, overrides)


def _loader_of(path: Path) -> Loader | None:
    """The loader of a file; None for a step directory."""
    loader = find_loader(path.suffix) if path.suffix else None
    if loader is None and path.suffix and path.is_file():
        known = ", ".join(sorted(entry.name for entry in entry_points(group=ENTRY_POINTS))) or "none"
        raise UserError(
            f"{path}: no step directory, and no installed package reads {path.suffix} files (registered formats: "
            f"{known}); give a step directory. If starseg was updated in place, reinstall it to register its formats"
        )
    return loader
