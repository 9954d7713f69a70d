"""Preparation of a run: method, resolved configuration, devices and data, checked together.

All checks take place before anything is written or trained, so that mistakes are reported early.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from lightning_fabric import Fabric
from rich.console import Console

from starseg.config import RunConfig
from starseg.data.datasets import find_dataset
from starseg.engine.launch import check_world_size, make_fabric, refuse_without_compiler
from starseg.engine.run_data import RunData, open_data
from starseg.engine.rundir import resolve
from starseg.errors import UserError
from starseg.methods import METHODS, Method, method_options
from starseg.methods.recipes import find_recipe, substitute_note
from starseg.tasks import TaskSequence
from starseg.utils.terminal import labelled


@dataclass(frozen=True)
class PreparedRun:
    """A run whose configuration, devices and data have passed all checks.

    Attributes:
        config: resolved configuration, with the values of the method's recipe filled in.
        method: the method with its options.
        data: the opened and indexed data; loader workers are started on first use.
        notes: deviations of this run from the published method.
        fabric: devices and processes, not launched yet.
    """

    config: RunConfig
    method: Method
    data: RunData
    notes: list[str]
    fabric: Fabric

    @property
    def task(self) -> TaskSequence:
        """The steps in which the method learns the task."""
        return self.data.task

    def step_dir(self, step: int) -> Path:
        """Return the directory of a step, which need not exist."""
        return self.config.run_dir / f"step_{step}"


def check_method(config: RunConfig) -> None:
    """Check the parts of a configuration that depend on the registered methods.

    Raises:
        UserError: the method, the data set or a section is unknown, an option is invalid, or the method does not
            support a setting.
    """
    if config.method not in METHODS:
        raise UserError(
            f"{config.source}:\nmethod: unknown method {config.method!r}; known: {', '.join(sorted(METHODS))}; "
            "one of your own is named by STARSEG_METHODS=its_file.py, or by its package (docs/new-method.md)"
        )
    try:
        find_dataset(config.data.dataset)
    except UserError as error:
        raise UserError(f"{config.source}:\n{error}") from error
    _check_sections(config)
    method = METHODS[config.method]
    if config.memory.size and method.memory is None:
        keeping = ", ".join(sorted(name for name, other in METHODS.items() if other.memory is not None))
        raise UserError(
            f"{config.source}:\nmemory.size: method {config.method} keeps no images; set it to 0 or take one of: "
            f"{keeping}"
        )
    if config.task.setting == "domain" and not method.domains:
        able = ", ".join(sorted(name for name, other in METHODS.items() if other.domains))
        raise UserError(
            f"{config.source}:\ntask.setting: method {config.method} learns new classes, not new domains of the same "
            f"classes; take one of: {able}"
        )
    world = config.train.devices * config.train.num_nodes
    if world > 1 and method.one_process:
        raise UserError(
            f"{config.source}:\ntrain.devices: method {config.method} runs on one process only, got {world}"
        )


def _check_sections(config: RunConfig) -> None:
    """Reject sections that belong to no method, and invalid options."""
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
    """Create the configured method, or the one called ``name``, with its options from the configuration.

    Raises:
        UserError: :func:`check_method` rejects the configuration.
    """
    check_method(config)
    name = name or config.method
    return METHODS[name](method_options(name, config))


def resolve_config(config: RunConfig) -> tuple[RunConfig, Method]:
    """Fill in the values of the method's recipe and the task's own name; return the configuration and the method.

    Raises:
        UserError: :func:`check_method` rejects the configuration, or a value is neither given nor in a recipe.
    """
    check_method(config)
    aliases = find_dataset(config.data.dataset).aliases
    if config.task.steps is None and (name := aliases.get(config.task.name or "")):
        config = config.model_copy(update={"task": config.task.model_copy(update={"name": name})})
    try:
        resolved = resolve(config)
    except UserError as error:
        raise UserError(f"{config.source}:\n{error}") from error
    return resolved, make_method(resolved)


def prepare(config: RunConfig, console: Console, steps: range | None = None) -> PreparedRun:
    """Check a configuration, its devices and its data, without writing, launching or training anything.

    Args:
        config: configuration as returned by :func:`starseg.config.load_config`.
        console: where the number of images, the method's notes and progress are printed.
        steps: the steps to run; all by default.

    Raises:
        UserError: the configuration, devices or data must be corrected first.
    """
    resolved, method = resolve_config(config)
    check_world_size(resolved.train)
    fabric = make_fabric(resolved.train)
    if resolved.train.compile:
        refuse_without_compiler(fabric.device)
    data = open_data(resolved, method, console, fabric, steps)
    notes = [
        *method.notes(find_recipe(resolved, type(method))),
        *substitute_note(config, type(method), method_options(config.method, config)),
    ]
    if (share := resolved.data.validation) is not None:
        notes = [*notes, f"evaluated on held-out training images (data.validation {share:g}), not on the test images"]
    for note in notes:
        console.print(labelled("note:", "yellow", note), soft_wrap=True)
    return PreparedRun(resolved, method, data, notes, fabric)
