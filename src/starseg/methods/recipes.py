"""Recipes: the hyper-parameters of a method on a data set, and how they complete a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from starseg.config import PhaseConfig, RunConfig, Strict
from starseg.data.datasets import find_dataset
from starseg.errors import UserError
from starseg.tasks import TaskSequence

if TYPE_CHECKING:
    from starseg.methods.protocol import Method


@dataclass(frozen=True)
class StepSchedule:
    """Epochs and base learning rate of a step."""

    epochs: int
    lr: float


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a method on a data set.

    Attributes:
        base, later: schedules of step 0 and of every later step.
        warmup: share of the iterations with a linear warm-up from a thousandth of the learning rate.
        options: values of the method's options that depend on the data set (:func:`from_recipe`).
        memory_size: number of old images kept as exemplars.
        tasks: schedules of the later steps of published tasks that deviate from ``later``, by the task's name.
        expected: options that the published method sets on this data set and that have no default; a run without them
            deviates from the published method (:meth:`Method.notes <starseg.methods.Method.notes>`).
    """

    base: StepSchedule
    later: StepSchedule
    warmup: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    memory_size: int = 0
    tasks: Mapping[str, StepSchedule] = field(default_factory=dict)
    expected: tuple[str, ...] = ()

    def later_of(self, task: str | None) -> StepSchedule:
        """Return the schedule of the later steps of a task."""
        return self.tasks.get(task or "", self.later)


Recipes = Mapping[str, Recipe]
"""Recipes by the key of the data set."""

_REGISTERED: dict[tuple[str, str], Recipe] = {}


def from_recipe(**constraints: Any) -> Any:
    """Declare a field of a method's options whose default value, None, stands for the recipe's value.

    Args:
        constraints: constraints of the field, as for :func:`pydantic.Field`.
    """
    return Field(None, json_schema_extra={"from_recipe": True}, **constraints)


def recipe_options(options: type[Strict]) -> list[str]:
    """Return the names of the options that a recipe sets."""
    marked = options.model_fields.items()
    return [
        name for name, f in marked if isinstance(f.json_schema_extra, dict) and f.json_schema_extra.get("from_recipe")
    ]


def register_recipe(method: str, dataset: str, recipe: Recipe) -> None:
    """Register a recipe for a method that is defined elsewhere, for example in a package that adds a data set.

    Args:
        method: registered name of the method.
        dataset: key of the data set.
        recipe: the hyper-parameters.

    Raises:
        ValueError: a recipe is already registered for the pair.
    """
    if (method, dataset) in _REGISTERED:
        raise ValueError(f"a recipe for method {method!r} on data set {dataset!r} is already registered")
    _REGISTERED[method, dataset] = recipe


def recipes_of(method: type[Method]) -> dict[str, Recipe]:
    """Return all recipes of a method by the key of the data set: its own and those registered for it."""
    return {**method.recipes, **{key: recipe for (name, key), recipe in _REGISTERED.items() if name == method.name}}


def find_recipe(config: RunConfig, method: type[Method]) -> Recipe | None:
    """Return the recipe that ``recipe`` names, else the method's recipe for the data set.

    If the method has none, it is that for the data set that the spec names (:attr:`DatasetSpec.recipe`); None if there
    is no such recipe either.

    Raises:
        UserError: ``recipe`` names a data set for which the method has no recipe.
    """
    recipes = recipes_of(method)
    if config.recipe is not None and config.recipe not in recipes:
        known = ", ".join(sorted(recipes)) or "none"
        raise UserError(f"recipe: method {method.name} has no recipe for data set {config.recipe!r}; it has: {known}")
    dataset = config.recipe or config.data.dataset
    if (other := recipes.get(substitute(config, method) or "")) is not None:
        # Its schedules of single tasks are those of the other data set's tasks.
        return replace(other, tasks={})
    return recipes.get(dataset)


def substitute(config: RunConfig, method: type[Method]) -> str | None:
    """Return the key of the data set whose recipe applies because the method has none for the configured one.

    None if the method has one, ``recipe`` names one, or the spec names no other data set.
    """
    if config.recipe is not None or config.data.dataset in recipes_of(method):
        return None
    return find_dataset(config.data.dataset).recipe


def substitute_note(config: RunConfig, method: type[Method], options: Strict) -> list[str]:
    """Return a note about hyper-parameters of another data set; empty if the configuration gives every value itself."""
    other = substitute(config, method)
    if other is None or not list(_missing(config, method, method.complete_options(options, None))):
        return []
    return [f"hyper-parameters of data set {other!r}, as none are published for {config.data.dataset!r}"]


def apply_recipe(config: RunConfig, method: type[Method], options: Strict) -> RunConfig:
    """Return the configuration with every missing value taken from the recipe.

    Args:
        config: the configuration as it was given.
        method: the configured method.
        options: the method's options, validated.

    Raises:
        UserError: the method has no recipe for the data set and values are missing, or the recipe does not fit the
            method.
    """
    recipe = find_recipe(config, method)
    completed = method.complete_options(options, recipe)
    if recipe is None:
        if missing := list(_missing(config, method, completed)):
            raise UserError(_no_recipe(config, method, missing))
        memory_size = config.memory.size or 0
        train = config.train
    else:
        _check_options(config, method, recipe, completed)
        memory_size = recipe.memory_size if config.memory.size is None else config.memory.size
        train = config.train.model_copy(
            update={
                "base": _filled(config.train.base, recipe.base),
                "later": _filled(config.train.later, recipe.later_of(config.task.name)),
                "warmup": recipe.warmup if config.train.warmup is None else config.train.warmup,
            }
        )
    memory = config.memory.model_copy(update={"size": memory_size if method.memory else 0})
    return config.model_copy(update={"train": train, "memory": memory, method.section: completed})


def _filled(given: PhaseConfig, schedule: StepSchedule) -> PhaseConfig:
    return given.model_copy(update={"epochs": given.epochs or schedule.epochs, "lr": given.lr or schedule.lr})


def _missing(config: RunConfig, method: type[Method], options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys without a value that a recipe would set."""
    train = config.train
    for name, phase in (("base", train.base), ("later", train.later)):
        if name == "base" or has_later_steps(config, method, options):
            yield from (f"train.{name}.{key}" for key in ("epochs", "lr") if getattr(phase, key) is None)
    if train.warmup is None:
        yield "train.warmup"
    if method.memory and config.memory.size is None:
        yield "memory.size"
    yield from (f"{method.section}.{key}" for key in recipe_options(method.Options) if options[key] is None)


def _check_options(config: RunConfig, method: type[Method], recipe: Recipe, options: Mapping[str, Any]) -> None:
    """Refuse a recipe that names an option which the method does not take from it, or lacks one that is not given.

    Args:
        config: the configuration as it was given.
        method: the configured method.
        recipe: its recipe.
        options: the method's options, completed from the recipe.

    Raises:
        UserError: see above.
    """
    allowed = recipe_options(method.Options)
    title = f"the recipe of method {method.name} for data set {config.recipe or config.data.dataset!r}"
    if unknown := sorted(recipe.options.keys() - set(allowed)):
        known = ", ".join(allowed) or "none"
        raise UserError(f"{title}: {method.name} takes no option {', '.join(unknown)} from a recipe; it takes: {known}")
    if missing := [name for name in allowed if options[name] is None]:
        keys = ", ".join(f"{method.section}.{name}" for name in missing)
        raise UserError(f"{title} has no {', '.join(missing)}: add it to the recipe's options, or give {keys}")


def has_later_steps(config: RunConfig, method: type[Method], options: Mapping[str, Any]) -> bool:
    """Return whether the method learns the task in more than one step.

    A task that is given only by its name counts as several steps, unless it is ``joint``.

    Args:
        config: a configuration of the method.
        method: the configured method.
        options: the method's options, completed from the recipe.
    """
    if config.task.name == "joint":
        return False
    steps = tuple((i,) for i in range(1, 1 + len(config.task.steps or (1, 2))))
    task = TaskSequence("", steps, tuple(f"class{i}" for i in range(1 + len(steps))))
    return len(method(method.Options.model_validate(options)).sequence(task)) > 1


def _no_recipe(config: RunConfig, method: type[Method], missing: list[str]) -> str:
    text = f"no recipe for method {method.name} on data set {config.data.dataset!r}: give {', '.join(missing)}"
    others = " or ".join(f"recipe={key}" for key in sorted(recipes_of(method), reverse=True))
    return f"{text}, or take another data set's with {others}" if others else text
