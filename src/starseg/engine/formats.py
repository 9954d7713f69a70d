"""Loading of trained networks from step directories and from file formats registered by packages.

A package registers a file format through an entry point of the group ``starseg.formats``. The name of the entry point
is the suffix (``.pth``), its value a :data:`Loader`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from starseg.config import RunConfig, change_config
from starseg.engine.checkpoint import StepInfo, load_model
from starseg.engine.rundir import load_run_config
from starseg.errors import UserError
from starseg.models import Segmenter

ENTRY_POINTS = "starseg.formats"

Loader = Callable[[Path], tuple[Segmenter, StepInfo, RunConfig]]
"""Function that reads a file: the network in eval mode on the CPU, its description, and a run configuration for it."""


def find_loader(suffix: str) -> Loader | None:
    """Return the registered loader of a file format, or None if there is none.

    Args:
        suffix: suffix of the file, such as ``.pth``.

    Raises:
        UserError: the package that registers the loader cannot be imported.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == suffix:
            try:
                return entry.load()
            except Exception as error:  # importing another package's code may raise anything
                raise UserError(
                    f"file format {suffix!r} of the installed package {entry.dist.name if entry.dist else '?'} cannot "
                    f"be loaded ({entry.value}): {type(error).__name__}: {error}"
                ) from error
    return None


def open_network(path: Path) -> tuple[Segmenter, StepInfo]:
    """Load the network of a step directory or of a file in a registered format, in eval mode on the CPU.

    Raises:
        UserError: the step or file does not exist or is damaged, or the format is unknown.
    """
    if loader := _loader_of(path):
        return loader(path)[:2]
    return load_model(path)


def open_run(path: Path, overrides: Sequence[str]) -> tuple[Segmenter, StepInfo, RunConfig]:
    """Load a network like :func:`open_network`, together with the configuration of its run.

    Args:
        path: a run's step directory, or a file in a registered format.
        overrides: changes of the configuration, "key=value".

    Raises:
        UserError: an error of :func:`open_network`, or the step directory is outside its run.
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
    return model, info, load_run_config(config_path.parent, overrides)


def _loader_of(path: Path) -> Loader | None:
    """Return the loader of a file, or None for a step directory."""
    loader = find_loader(path.suffix) if path.suffix else None
    if loader is None and path.suffix and path.is_file():
        known = ", ".join(sorted(entry.name for entry in entry_points(group=ENTRY_POINTS))) or "none"
        raise UserError(
            f"{path}: no step directory, and no installed package reads {path.suffix} files (registered formats: "
            f"{known}); give a step directory. If starseg was updated in place, reinstall it to register its formats"
        )
    return loader
