"""Adapters for methods written for the protocol of version 0.1.0, with a warning; to be removed in the next version."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from starseg.config import PUBLISHED, Choices
from starseg.data.samples import SALIENCY
from starseg.methods.protocol import ADAPTERS, Method
from starseg.methods.recipes import Recipe, StepSchedule, recipe_options
from starseg.methods.sigmoid import SigmoidMethod
from starseg.methods.softmax import SoftmaxMethod

T = TypeVar("T", bound="type[Method]")


@dataclass(frozen=True)
class Schedule:
    """Return value of the former ``Method.defaults``: a recipe without the memory."""

    base: StepSchedule
    later: StepSchedule
    warmup: float
    pos_weight: float


class _OldDefaults:
    """The former ``defaults``, for classes that call it through ``super()``."""

    def defaults(self, dataset: str, task: str | None = None) -> Schedule:
        family = SoftmaxMethod if isinstance(self, SoftmaxMethod) else SigmoidMethod
        recipe = family.recipes["ade" if dataset == "ade" else "voc"]
        return Schedule(recipe.base, recipe.later, recipe.warmup, recipe.options.get("pos_weight", 1.0))


def adapt(cls: T) -> T:
    """Return the class or, if it relies on the protocol of version 0.1.0, an adapted subclass.

    Each adaptation issues a DeprecationWarning that says what to change.
    """
    bases: list[type] = [cls]
    body: dict[str, Any] = {}
    if cls.__abstractmethods__:
        _warn(cls, "derives from Method and relies on the defaults of sigmoid methods; derive from SigmoidMethod")
        bases.append(SigmoidMethod)
    if hasattr(cls, "defaults"):
        _warn(cls, "overrides defaults(); declare recipes instead")
        bases.append(_OldDefaults)
    if "published" in inspect.signature(cls.rule).parameters:
        _warn(cls, "has a prediction rule that takes `published`; take `choices`")
        body["rule"] = _old_rule(cls.rule)
    if hasattr(cls, "saliency"):
        _warn(cls, "overrides saliency(); override extra_maps()")
        body["extra_maps"] = _old_maps
    if len(bases) == 1 and not body:
        return cls
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    adapted = metaclass(cls.__name__, tuple(bases), body)
    if _OldDefaults in bases:
        adapted.recipes = _recipes(adapted)
    return adapted


def _warn(cls: type[Method], text: str) -> None:
    warnings.warn(f"method class {cls.__name__} {text} (docs/new-method.md)", DeprecationWarning, stacklevel=4)


def _old_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    def adapted(self: Method, choices: Choices) -> Callable[[Tensor], Tensor]:
        return rule(self, choices == PUBLISHED)

    return adapted


def _old_maps(self: Any) -> dict[str, Path]:
    """Return the folder of the former ``saliency(dataset)``, which got "ade" on ADE20K; it always gets "voc" here."""
    folder = self.saliency("voc")
    return {SALIENCY: folder} if folder else {}


def _recipes(cls: Any) -> dict[str, Recipe]:
    """Return what ``defaults`` gives for the two data sets that version 0.1.0 knew, as recipes."""
    method, recipes = cls(cls.Options()), {}
    for dataset in ("voc", "ade"):
        schedule = method.defaults(dataset)
        options = {"pos_weight": schedule.pos_weight} if "pos_weight" in recipe_options(cls.Options) else {}
        recipes[dataset] = Recipe(schedule.base, schedule.later, schedule.warmup, options)
    return recipes


ADAPTERS.append(adapt)
