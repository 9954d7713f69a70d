"""The protocol of a method: its losses for a batch, and its work before and after a step. The engine does the rest."""

# ruff: noqa: B027 (a method without a use for a hook leaves it empty)

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from starseg.config import PUBLISHED, SOUND, Choices, RunConfig, Strict, explain
from starseg.data.samples import Batch
from starseg.errors import UserError
from starseg.losses.pseudo_labels import fill_in
from starseg.losses.reduction import identity
from starseg.methods.recipes import Recipe, Recipes, StepSchedule, recipe_options
from starseg.models import Output, Segmenter
from starseg.models.classifiers import SIGMOID, HeadLayout
from starseg.replay.memory import MemoryRule
from starseg.tasks import TaskSequence

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo

__all__ = ["METHODS", "Group", "Method", "Network", "Recipe", "StepContext", "StepSchedule", "register_method"]

METHODS: dict[str, type[Method]] = {}
ADAPTERS: list[Callable[[Any], Any]] = []
"""Applied to every class that is registered; :mod:`starseg.methods.legacy` adds one."""
Network = Callable[..., Output]
T = TypeVar("T", bound="type[Method]")


def register_method(name: str) -> Callable[[T], T]:
    """Class decorator: make a method known under ``name``, in configurations and on the command line.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: T) -> T:
        if name in METHODS:
            raise ValueError(f"method {name!r} is registered already, by {METHODS[name].__module__}")
        for adapt in ADAPTERS:
            cls = adapt(cls)
        cls.name = name
        for attribute in ("section", "base_step"):
            if attribute not in cls.__dict__:
                setattr(cls, attribute, name)
        METHODS[name] = cls
        return cls

    return register


def method_options(name: str, config: RunConfig) -> Strict:
    """The validated options of method ``name``.

    Raises:
        UserError: unknown or wrong options, named with their section.
    """
    try:
        return METHODS[name].Options.model_validate(config.method_section(METHODS[name].section))
    except ValidationError as error:
        raise UserError(explain(error, METHODS[name].Options, f"{METHODS[name].section}.")) from error


class Group(NamedTuple):
    """Parameters that the optimizer treats alike; those that need no gradient are left out.

    Attributes:
        name: for the log.
        module: whose parameters.
        lr: factor on the base learning rate.
        decay: whether weight decay applies.
    """

    name: str
    module: nn.Module
    lr: float = 1.0
    decay: bool = True


@dataclass(frozen=True)
class StepContext:
    """All that a method may know of the step it is in.

    Attributes:
        task, step: which classes are new.
        model: the network being trained; its last head is the new one.
        old_model: the frozen previous network, None at step 0.
        iterations: of one epoch.
        scan: one pass over this process's share of the step's augmented training crops, last incomplete batch included;
            images normalised, all on the device. Each name gives other crops.
        generator: for draws during training, on the device; the same draws in every process.
        choices: which choices of the published code apply.
        all_reduce_sum: sums a tensor over processes, differentiably, so that every process holds the loss of the global
            batch.
        rank, world: number of this process, and of how many.
    """

    task: TaskSequence
    step: int
    model: Segmenter
    old_model: Segmenter | None
    iterations: int
    scan: Callable[[str], Iterator[Batch]]
    generator: torch.Generator
    choices: Choices = SOUND
    all_reduce_sum: Callable[[Tensor], Tensor] = identity
    rank: int = 0
    world: int = 1

    @property
    def new_classes(self) -> int:
        """Number of classes that this step learns."""
        return len(self.task.new(self.step))

    @property
    def old_classes(self) -> int:
        """Number of classes learnt in the steps before, without the background."""
        return len(self.task.old(self.step))

    @property
    def first_new(self) -> int:
        """Training id of the first new class."""
        return 1 + self.old_classes

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.mean.device

    @property
    def published(self) -> bool:
        """Deprecated: whether all :attr:`choices` are the published code's."""
        warnings.warn("StepContext.published is now the named StepContext.choices", DeprecationWarning, stacklevel=2)
        return self.choices == PUBLISHED

    @property
    def add_up(self) -> Callable[[Tensor], Tensor]:
        """Deprecated name of :attr:`all_reduce_sum`."""
        warnings.warn("StepContext.add_up is now all_reduce_sum", DeprecationWarning, stacklevel=2)
        return self.all_reduce_sum


class Method(ABC):
    """A method of incremental learning, as the engine uses it.

    A method is constructed with its completed options. For each step the engine calls :meth:`load_state_dict`,
    :meth:`init_heads`, :meth:`freeze`, :meth:`begin_step`, :meth:`param_groups`, then :meth:`losses` once an iteration,
    and finally :meth:`end_step` and :meth:`state_dict`. :class:`~starseg.methods.SigmoidMethod` and
    :class:`~starseg.methods.SoftmaxMethod` implement the abstract methods for the two families of classifiers.
    """

    name: ClassVar[str]
    section: ClassVar[str]
    """Section of the configuration with the method's options; by default its name."""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    """Where it was published."""
    stores: ClassVar[str] = "the previous model"
    """What it stores from one step to the next."""
    base_step: ClassVar[str]
    """Method whose step 0 is the same, so that a comparison trains it once; by default its own name."""
    layout: ClassVar[HeadLayout] = SIGMOID
    """The kind of classifier heads."""
    memory: ClassVar[MemoryRule | None] = None
    """How old images are selected and used as exemplars; None: the method uses none."""
    one_process: ClassVar[bool] = False
    """Whether its losses need the whole batch in one process, so that a run on several is refused."""
    recipes: ClassVar[Recipes] = {}
    """Hyper-parameters by data set; data set packages add theirs with :func:`~starseg.methods.register_recipe`."""
    Options: ClassVar[type[Strict]] = Strict
    """Model of the options; those of :func:`~starseg.methods.from_recipe` have the recipe's value by default."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.ctx: StepContext

    @classmethod
    def complete_options(cls, options: Strict, recipe: Recipe | None) -> dict[str, Any]:
        """All options by name, those that are not given taken from the recipe where there is one."""
        values = options.model_dump()
        given = recipe.options if recipe else {}
        return values | {key: given[key] for key in recipe_options(cls.Options) if values[key] is None and key in given}

    def sequence(self, task: TaskSequence) -> TaskSequence:
        """The steps in which this method learns the task."""
        return task

    def notes(self, recipe: Recipe | None) -> list[str]:
        """How this run deviates from the published method; printed, and marked in every table of the results.

        Args:
            recipe: of the run; None where the configuration gives every value itself.
        """
        return []

    def extra_maps(self) -> dict[str, Path]:
        """Folders of grey maps by the name under which they come in :attr:`Batch.extras`.

        A folder holds one PNG per training image, named like it; the maps are cropped like the labels.
        """
        return {}

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Why this method cannot learn new classes on top of a finished step; None if it can.

        Args:
            info: description of the step.
            state: what its method stored with it.
        """
        if (info.lead, info.conv_heads) != (list(self.layout.lead), self.layout.conv):
            return f"a step of {info.method} has other classifier heads than {self.name} trains"
        return None

    def replay_counts(self) -> Tensor | None:
        """[1 + K] stored feature cells of the background and each old class, to replay; None: nothing is replayed."""
        return None

    def scale_replay(self, share: float) -> dict[str, Any]:
        """Options that replay this share of what the method replays with its own options."""
        return {}

    def init_heads(self, ctx: StepContext) -> None:
        """Initialise the new head otherwise than at random; called without gradients, with the old weights loaded."""

    @abstractmethod
    def freeze(self, ctx: StepContext) -> None:
        """Freeze what the step does not train."""

    @abstractmethod
    def param_groups(self, ctx: StepContext) -> list[Group]:
        """Parameters with their learning-rate factors; every trained parameter is in one group."""

    def begin_step(self, ctx: StepContext) -> None:
        """Called before a step trains, with the new head added and without gradients; may scan the data.

        It must depend on the context alone: a run that was interrupted in the middle of a step calls it again.
        """
        self.ctx = ctx

    @abstractmethod
    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Named scalar losses of a batch, already weighted; the engine sums and logs them.

        Args:
            batch: normalised images and labels on the device.
            new: the network being trained; call it once.
            old: the frozen previous network, without gradients; None at step 0.

        Returns:
            Loss terms by name, of the global batch (see :attr:`StepContext.all_reduce_sum`).
        """

    def end_step(self, ctx: StepContext) -> None:
        """Called after a step has trained, with the model in eval mode and without gradients; may scan the data."""

    @abstractmethod
    def rule(self, choices: Choices) -> Callable[[Tensor], Tensor]:
        """The prediction rule: training ids [N, ...] from logits [N, C, ...]."""

    def confident(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels with confident predictions filled in, for the choice of exemplars; see :func:`fill_in`."""
        assert self.memory is not None, "only asked of a method with a memory"
        return fill_in(labels, logits[:, len(self.layout.lead) :], self.memory.score)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that the next step needs, stored as bank.safetensors in the step's directory."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
