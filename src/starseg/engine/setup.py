"""From a configuration to a run that can start: method, resolved configuration, devices and data, checked together.

Everything here happens before anything is written, so that a mistake costs no work.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from lightning_fabric import Fabric
from rich.console import Console

from starseg.config import RunConfig
from starseg.engine.launch import check_world_size, make_fabric, refuse_without_compiler
from starseg.engine.run_data import RunData, open_data
from starseg.engine.rundir import resolve
from starseg.errors import UserError
from starseg.methods import METHODS, Method, method_options
from starseg.methods.recipes import find_recipe
from starseg.tasks import TaskSequence


@dataclass(frozen=True)
class PreparedRun:
    """A run whose configuration, devices and data have passed every check.

    Attributes:
        config: resolved: what the method decides for this data set is filled in.
        method: with its options.
        data: opened and indexed; its loader workers start when they are needed.
        notes: how this run deviates from the published method.
        fabric: devices and processes, not launched yet; None for a run that is only looked at.
    """

    config: RunConfig
    method: Method
    data: RunData
    notes: list[str]
    fabric: Fabric | None

    @property
    def task(self) -> TaskSequence:
        """The steps in which the method learns the task."""
        return self.data.task

    def step_dir(self, step: int) -> Path:
        """Directory of a step, whether it exists or not."""
        return self.config.run_dir / f"step_{step}"


def check_method(config: RunConfig) -> None:
    """Check what the schema of a configuration leaves to the registered methods.

    Raises:
        UserError: an unknown method or section, wrong options, or a setting that the method does not support.
    """
    if config.method not in METHODS:
        raise UserError(
            f"{config.source}:\nmethod: unknown method {config.method!r}; known: {', '.join(sorted(METHODS))}; "
            "one of your own is named by STARSEG_METHODS=its_file.py, or by its package (docs/new-method.md)"
        )
    _check_sections(config)
    method = METHODS[config.method]
    if config.memory.size and method.memory is None:
        keeping = ", ".join(sorted(name for name, other in METHODS.items() if other.memory is not None))
        raise UserError(
            f"{config.source}:\nmemory.size: method {config.method} keeps no images; set it to 0 or take one of: "
            f"{keeping}"
        )
    world = config.train.devices * config.train.num_nodes
    if world > 1 and method.one_process:
        raise UserError(
            f"{config.source}:\ntrain.devices: method {config.method} runs on one process only, got {world}"
        )


def _check_sections(config: RunConfig) -> None:
    """Refuse sections of no method, and options that a method does not know."""
    given, sections = config.model_extra or {}, {method.section for method in METHODS.values()}
    if unknown := sorted(set(given) - sections):
        known = [*RunConfig.model_fields, *sorted(sections)]
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"{config.source}:\n{unknown[0]}: unknown key; {hint}")
    for name, method in METHODS.items():
        if method.section in given:
            section = given[method.section] or {}
            if not isinstance(section, dict):
                raise UserError(f"{config.source}:\n{method.section}: expected a section (key: value), got {section!r}")
            method_options(name, config)


def make_method(config: RunConfig, name: str | None = None) -> Method:
    """The configured method, or another one of that ``name``, with its options from a checked configuration.

    Raises:
        UserError: :func:`check_method` refuses the configuration.
    """
    check_method(config)
    name = name or config.method
    return METHODS[name](method_options(name, config))


def resolve_config(config: RunConfig) -> tuple[RunConfig, Method]:
    """The configuration with what its method decides for this data set filled in, and the method.

    Raises:
        UserError: :func:`check_method` refuses the configuration.
    """
    check_method(config)
    resolved = resolve(config)
    return resolved, make_method(resolved)


def prepare(config: RunConfig, console: Console, steps: range | None = None, *, training: bool = False) -> PreparedRun:
    """Check a configuration, its devices and its data; nothing is written, launched or trained.

    Args:
        config: as given by :func:`starseg.config.load_config`.
        console: where the number of images, the method's notes and progress are printed.
        steps: which steps are wanted; all by default.
        training: also choose devices and loader workers, which a run that is only looked at does not need.

    Raises:
        UserError: anything in the input that must be corrected first.
    """
    resolved, method = resolve_config(config)
    fabric = None
    if training:
        check_world_size(resolved.train)
        fabric = make_fabric(resolved.train)
        if resolved.train.compile:
            refuse_without_compiler(fabric.device)
    data = open_data(resolved, method, console, fabric, steps)
    notes = method.notes(find_recipe(resolved, type(method)))
    if training:
        for note in notes:
            console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
    return PreparedRun(resolved, method, data, notes, fabric)
