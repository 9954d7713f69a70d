"""Protocol of a method: its losses for a batch, and its work before and after a step. The engine does the rest."""

# ruff: noqa: B027 (hooks are optional, so their empty defaults are not abstract)

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
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
from starseg.models import Architecture, Output, Segmenter
from starseg.models.classifiers import SIGMOID, HeadLayout
from starseg.models.prediction import LargestClass
from starseg.replay.memory import MemoryRule
from starseg.tasks import TaskSequence

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo

__all__ = [
    "METHODS",
    "Group",
    "Method",
    "Network",
    "Recipe",
    "Stage",
    "StepContext",
    "StepSchedule",
    "register_method",
]

METHODS: dict[str, type[Method]] = {}
ADAPTERS: list[Callable[[Any], Any]] = []
"""Functions applied to every class when it is registered; :mod:`starseg.methods.legacy` adds one."""
Network = Callable[..., Output]
T = TypeVar("T", bound="type[Method]")


def register_method(name: str) -> Callable[[T], T]:
    """Return a class decorator that registers a method under ``name``, for configurations and the command line.

    Raises:
        ValueError: the name is already registered.
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
    """Return the validated options of method ``name`` from a configuration.

    Raises:
        UserError: an option is unknown or invalid; the message names it with its section.
    """
    try:
        return METHODS[name].Options.model_validate(config.method_section(METHODS[name].section))
    except ValidationError as error:
        raise UserError(explain(error, METHODS[name].Options, f"{METHODS[name].section}.")) from error


class Group(NamedTuple):
    """Parameters with common optimizer settings; those that need no gradient are left out.

    Attributes:
        name: name of the group in the log.
        module: module whose parameters form the group.
        lr: factor on the base learning rate.
        decay: whether weight decay applies.
    """

    name: str
    module: nn.Module
    lr: float = 1.0
    decay: bool = True


@dataclass(frozen=True)
class Stage:
    """A part of a step with its own trained parameters, optimizer and schedule.

    Attributes:
        name: name of the stage, shown in messages if a step has several.
        schedule: epochs and learning rate; None for those of ``train.base`` in step 0 and ``train.later`` afterwards.
        crops: number of augmented crops of each image that the stage trains on, if the feature map does not change in
            it. Their features are then computed once and held in memory: batches have no images, but the features as
            ``extras[FEATURES]`` and labels on their grid. 0 for a stage that computes features in each iteration.
        cells: number of cells that are held of each crop, a random choice; None for all.
    """

    name: str
    schedule: StepSchedule | None = None
    crops: int = 0
    cells: int | None = None


@dataclass(frozen=True)
class StepContext:
    """Everything that a method may know about the current step.

    Attributes:
        task, step: the task and the index of the step, which determine the new classes.
        model: the model being trained; its last head is that of the new classes.
        old_model: the frozen previous model, None at step 0.
        iterations: iterations per epoch.
        scan: starts one pass over this process's share of the step's augmented training crops, including the last
            incomplete batch. Images are normalised, and all tensors are on the device. Each name gives different crops.
        generator: for random draws during training, on the device; it draws the same numbers in every process.
        choices: which choices of the published code apply.
        all_reduce_sum: sums a tensor over processes, differentiably, so that every process holds the loss of the global
            batch.
        rank, world: index of this process, and number of processes.
        pretrained: whether the encoder of step 0 starts from pretrained weights.
        frozen: whether encoder and decoder are those of another run's step; the engine freezes them in every step.
        stage: the current stage of the step.
        cached: starts one pass over the features that the engine holds in memory (:attr:`Stage.crops`), with batches as
            in training but without the order of an epoch; None if it holds none.
        crop: side of the training crops in pixels.
        autocast: context manager of forward passes in the precision of training.
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
    pretrained: bool = False
    frozen: bool = False
    stage: Stage = Stage("network")
    cached: Callable[[], Iterator[Batch]] | None = None
    crop: int = 512
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def new_classes(self) -> int:
        """Number of classes that the step's labels show: those it learns, or with domains all."""
        return len(self.task.new(self.step))

    @property
    def old_classes(self) -> int:
        """Number of classes learnt in earlier steps and not labelled in this one, without the background."""
        return len(self.task.old(self.step))

    @property
    def first_new(self) -> int:
        """Training id of the first new class."""
        return 1 + self.old_classes

    @property
    def growth(self) -> float:
        """Number of all classes, with the background, per new class; or of all domains seen per new domain."""
        if self.task.domains:
            return len(self.task.domains_of(self.step, seen=True)) / len(self.task.domains_of(self.step))
        return (self.first_new + self.new_classes) / self.new_classes

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.mean.device

    @property
    def published(self) -> bool:
        """Deprecated: whether all :attr:`choices` are those of the published code."""
        warnings.warn("StepContext.published is now the named StepContext.choices", DeprecationWarning, stacklevel=2)
        return self.choices == PUBLISHED

    @property
    def add_up(self) -> Callable[[Tensor], Tensor]:
        """Deprecated name of :attr:`all_reduce_sum`."""
        warnings.warn("StepContext.add_up is now all_reduce_sum", DeprecationWarning, stacklevel=2)
        return self.all_reduce_sum


class Method(ABC):
    """Class-incremental learning method, as the engine uses it.

    The engine constructs a method with its completed options. In each step it calls :meth:`load_state_dict`,
    :meth:`init_heads`, :meth:`freeze`, :meth:`begin_step` and :meth:`param_groups`, then :meth:`losses` once per
    iteration, and finally :meth:`end_step` and :meth:`state_dict`. :class:`~starseg.methods.SigmoidMethod` and
    :class:`~starseg.methods.SoftmaxMethod` implement the abstract methods for the two families of classifiers.
    """

    name: ClassVar[str]
    section: ClassVar[str]
    """Section of the configuration with the method's options; by default the method's name."""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    """Where the method was published."""
    stores: ClassVar[str] = "the previous model"
    """What the method stores from one step to the next."""
    base_step: ClassVar[str]
    """Method with the same step 0, so that a comparison trains it only once; by default the method itself."""
    later_options: ClassVar[frozenset[str]] = frozenset()
    """Options without effect on step 0, so that a sweep over them trains step 0 only once."""
    later_schedule: ClassVar[bool] = True
    """Whether later steps train with ``train.later``, so that a sweep over it concerns the method."""
    layout: HeadLayout = SIGMOID
    """Kind of the classifier heads; may depend on the options."""
    memory: ClassVar[MemoryRule | None] = None
    """How old images are selected and used as exemplars; None for a method without exemplar memory."""
    domains: ClassVar[bool] = False
    """Whether the method learns new domains of the same classes too (`task.setting: domain`)."""
    wide: ClassVar[bool] = True
    """Whether the losses accept int32 labels, of data sets with more than 254 classes."""
    freezes: ClassVar[bool] = False
    """Whether encoder and decoder are frozen after step 0; a comparison then adds joint training on the same frozen
    network, the method's upper bound."""
    one_process: ClassVar[bool] = False
    """Whether the losses need the whole batch in one process; a run on several processes is then refused."""
    recipes: ClassVar[Recipes] = {}
    """Hyper-parameters by data set; other packages add recipes with :func:`~starseg.methods.register_recipe`."""
    Options: ClassVar[type[Strict]] = Strict
    """Model of the options; fields made by :func:`~starseg.methods.from_recipe` default to the recipe's value."""
    contract_options: ClassVar[Mapping[str, Any]] = {}
    """Options with which the contract suite runs the method, if its defaults are too large for a small network."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.ctx: StepContext

    @classmethod
    def complete_options(cls, options: Strict, recipe: Recipe | None) -> dict[str, Any]:
        """Return all options by name, with missing values taken from the recipe if there is one."""
        values = options.model_dump()
        given = recipe.options if recipe else {}
        return values | {key: given[key] for key in recipe_options(cls.Options) if values[key] is None and key in given}

    def sequence(self, task: TaskSequence) -> TaskSequence:
        """Return the task with the steps in which this method learns it."""
        return task

    def notes(self, recipe: Recipe | None) -> list[str]:
        """Return the deviations of this run from the published method.

        They are printed, and marked in every table of the results.

        Args:
            recipe: recipe of the run; None if the configuration gives every value itself.
        """
        return []

    def architecture(self, architecture: Architecture) -> Architecture:
        """Return the architecture of the network that this method trains, given the configured one."""
        return architecture

    def stages(self, ctx: StepContext) -> tuple[Stage, ...]:
        """Return the stages in which a step trains, one after another; by default a single one.

        A step without a stage trains nothing: :meth:`end_step` does all its work, and of the other hooks only
        :meth:`load_state_dict` is called.
        """
        return (Stage("network"),)

    def own_stage(self, step: int, pretrained: bool) -> Stage | None:
        """Return the only stage of a step if the method's options ``epochs`` and ``lr`` are its schedule.

        Args:
            step: the step.
            pretrained: whether the encoder of step 0 starts from pretrained weights.

        Returns:
            None if the step trains by ``train.base`` or ``train.later``.
        """
        return None

    def extra_maps(self) -> dict[str, Path]:
        """Return folders of greyscale maps, by the name of the maps in :attr:`Batch.extras`.

        A folder holds one PNG per training image, named like the image; the maps are cropped like the labels.
        """
        return {}

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Return why this method cannot learn new classes on top of a finished step; None if it can.

        Args:
            info: description of the finished step.
            state: tensors that the method of that step stored.
        """
        if info.layout != self.layout:
            return f"a step of {info.method} has other classifier heads than {self.name} trains"
        return None

    def replay_counts(self) -> Tensor | None:
        """Return the numbers of stored feature cells to replay, [1 + K]: of the background and of each old class.

        None if nothing is replayed.
        """
        return None

    def scale_replay(self, share: float) -> dict[str, Any]:
        """Return options that replay this share of what the method replays with its current options."""
        return {}

    def grow(self, model: Segmenter, classes: int) -> Segmenter:
        """Return the network of a step after step 0: that of the previous step with a head for its new classes."""
        model.add_head(classes)
        return model

    def init_heads(self, ctx: StepContext) -> None:
        """Initialise the new head; called without gradients, with the old weights loaded.

        By default the head keeps its random initialisation.
        """

    @abstractmethod
    def freeze(self, ctx: StepContext) -> None:
        """Freeze the parameters that the step does not train."""

    @abstractmethod
    def param_groups(self, ctx: StepContext) -> list[Group]:
        """Return parameters with their learning-rate factors; every trained parameter is in exactly one group."""

    def begin_step(self, ctx: StepContext) -> None:
        """Prepare a stage of the step before it trains; called without gradients, with the new head added.

        May scan the data. The result must depend on the context alone, because resuming an interrupted step calls this
        method again; in a stage after the first, the model may already be partly trained in that stage.
        """
        self.ctx = ctx

    @abstractmethod
    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Return the named scalar losses of a batch, already weighted; the engine sums and logs them.

        Args:
            batch: normalised images and labels on the device.
            new: the model being trained; call it once.
            old: the frozen previous model, without gradients; None at step 0.

        Returns:
            Loss terms by name, of the global batch (see :attr:`StepContext.all_reduce_sum`).
        """

    def end_step(self, ctx: StepContext) -> None:
        """Finish the step after it has trained; called with the model in eval mode and without gradients.

        May scan the data.
        """

    @abstractmethod
    def rule(self, choices: Choices) -> Callable[[Tensor], Tensor]:
        """Return the prediction rule, a function from logits [N, C, ...] to training ids [N, ...]."""

    def confident(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the labels with confident predictions filled in, to select exemplars; see :func:`fill_in`."""
        assert self.memory is not None, "only asked of a method with a memory"
        return fill_in(labels, logits[:, len(self.layout.lead) :], self.memory.score)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that the next step needs, stored as bank.safetensors in the step directory."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""


def prediction_rule(method: Method, choices: Choices, background: bool) -> Callable[[Tensor], Tensor]:
    """Return the prediction rule for a method's networks, a function from logits [N, C, ...] to training ids [N, ...].

    Without a background, it is the class of the largest logit for every method: leading channels and the threshold of
    sigmoids only stand for what is not learnt yet.
    """
    return method.rule(choices) if background else LargestClass(len(method.layout.lead))
