"""What a method is: losses for a batch, and what it does before and after a step. The engine does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from starseg.config import RunConfig, Strict, explain
from starseg.data.samples import Batch
from starseg.errors import UserError
from starseg.losses.pseudo_labels import fill_in
from starseg.losses.reduction import identity
from starseg.losses.star import bce_per_class
from starseg.models import Output, Segmenter
from starseg.models.classifiers import SIGMOID, HeadLayout
from starseg.models.prediction import LargestLogit
from starseg.replay.memory import MemoryRule
from starseg.tasks import TaskSequence

METHODS: dict[str, type[Method]] = {}
Network = Callable[..., Output]
T = TypeVar("T", bound="type[Method]")


def register_method(name: str) -> Callable[[T], T]:
    """Class decorator: make a method known under ``name``, in configs and on the command line.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: T) -> T:
        if name in METHODS:
            raise ValueError(f"method {name!r} is registered already, by {METHODS[name].__module__}")
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


@dataclass(frozen=True)
class StepSchedule:
    """Epochs and base learning rate of a step."""

    epochs: int
    lr: float


@dataclass(frozen=True)
class Schedule:
    """A method's hyper-parameters on a data set.

    Attributes:
        base, later: step 0, and every step after it.
        warmup: share of the iterations with a linear warm-up from a thousandth of the learning rate.
        pos_weight: of the class loss.
    """

    base: StepSchedule
    later: StepSchedule
    warmup: float
    pos_weight: float


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
        dataset: the data set's layout, "voc" or "ade".
        published: ``compat: published`` is on.
        model: the network being trained; its last head is the new one.
        old_model: the frozen previous network, None at step 0.
        iterations: of one epoch.
        scan: one pass over this process's share of the step's augmented training crops, last incomplete batch included;
            images normalised, all on the device. Each name gives other crops.
        generator: for draws during training, on the device; the same draws in every process.
        all_reduce_sum: sums a tensor over processes, differentiably, so that every process holds the loss of the global
            batch.
        rank, world: number of this process, and of how many.
    """

    task: TaskSequence
    step: int
    dataset: str
    published: bool
    model: Segmenter
    old_model: Segmenter | None
    iterations: int
    scan: Callable[[str], Iterator[Batch]]
    generator: torch.Generator
    all_reduce_sum: Callable[[Tensor], Tensor] = identity
    rank: int = 0
    world: int = 1

    @property
    def new_classes(self) -> int:
        """How many this step learns."""
        return len(self.task.new(self.step))

    @property
    def old_classes(self) -> int:
        """How many the steps before learnt, the background not among them."""
        return len(self.task.old(self.step))

    @property
    def first_new(self) -> int:
        """Training id of the first new class."""
        return 1 + self.old_classes

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.mean.device


class ClassLossOptions(Strict):
    """Options of every method built on the base loss."""

    pos_weight: float | None = Field(None, gt=0)
    """Weight of positive pixels; by default the method's for this data set (STAR: 4 on VOC, 30 on ADE20K)."""


class Method:
    """A method of the sigmoid family: no background channel, BCE on the new heads, batch norm frozen after step 0.

    Subclasses override what they do differently; :meth:`losses` as it stands is the base loss alone.
    """

    name: ClassVar[str]
    section: ClassVar[str]
    """Of the configuration, with its options; by default its name."""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    """Where it was published."""
    stores: ClassVar[str] = "the previous model"
    """What it keeps from one step to the next."""
    base_step: ClassVar[str]
    """Method whose step 0 is the same, so that a comparison trains it once; by default its own name."""
    layout: ClassVar[HeadLayout] = SIGMOID
    memory: ClassVar[MemoryRule | None] = None
    """How it keeps and uses old images; None: it keeps none."""
    one_process: ClassVar[bool] = False
    """Whether its losses need the whole batch in one process, so that a run on several is refused."""
    Options: ClassVar[type[Strict]] = ClassLossOptions

    def __init__(self, options: Any) -> None:
        self.options = options
        self.ctx: StepContext

    def sequence(self, task: TaskSequence) -> TaskSequence:
        """The steps in which this method learns the task."""
        return task

    def defaults(self, dataset: str, task: str | None = None) -> Schedule:
        """Published hyper-parameters for a data set and, where they differ, a published task."""
        if dataset == "ade":
            return Schedule(StepSchedule(100, 2.5e-3), StepSchedule(100, 2.5e-4), warmup=0.2, pos_weight=30.0)
        return Schedule(StepSchedule(60, 1e-3), StepSchedule(60, 1e-4), warmup=0.0, pos_weight=4.0)

    def notes(self, dataset: str) -> list[str]:
        """What sets this run apart from the published method; printed, and kept with the results for every table."""
        return []

    def saliency(self, dataset: str) -> Path | None:
        """Folder of grey maps, one PNG per training image, that come with the batches; None: not needed."""
        return None

    def init_heads(self, ctx: StepContext) -> None:
        """Initialise the new head otherwise than at random; called without gradients, with the old weights loaded."""

    def freeze(self, ctx: StepContext) -> None:
        """Decide what stays as it is: after step 0 batch norm, dropout and (unless published) the old heads."""
        if ctx.step:
            ctx.model.freeze_norm()
            if not ctx.published:
                ctx.model.heads[:-1].requires_grad_(False)

    def param_groups(self, ctx: StepContext) -> list[Group]:
        """Learning-rate factors; every trained parameter is in one group."""
        model = ctx.model
        newest = 100.0 if ctx.step else 10.0
        return [
            Group("backbone", model.backbone),
            Group("aspp", model.aspp, 10.0),
            Group("old heads", model.heads[:-1], 10.0),
            Group("new head", model.heads[-1], newest),
        ]

    def begin_step(self, ctx: StepContext) -> None:
        """Called before a step trains, with the model already grown and without gradients; may scan the data.

        It must depend on the context alone: a run that was killed in mid-step calls it again.
        """
        self.ctx = ctx

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Named scalar losses of a batch, already weighted; the engine adds them up and logs them.

        Args:
            batch: normalised images and labels on the device.
            new: the network being trained; call it once.
            old: the frozen previous network, without gradients; None at step 0.

        Returns:
            Loss terms by name, of the global batch (see :attr:`StepContext.all_reduce_sum`).
        """
        return {"bce": self.class_loss(batch, new(batch.images)).sum()}

    def class_loss(self, batch: Batch, output: Output) -> Tensor:
        """The base loss of the new classes, [K_new]."""
        ctx = self.ctx
        new = output.logits[:, len(self.layout.lead) + ctx.old_classes :]
        return bce_per_class(
            new.float(), batch.labels, ctx.first_new, self.pos_weight(ctx), ctx.published, ctx.all_reduce_sum
        )

    def pos_weight(self, ctx: StepContext) -> float:
        """Weight of positive pixels in the class loss."""
        return self.options.pos_weight or self.defaults(ctx.dataset).pos_weight

    def end_step(self, ctx: StepContext) -> None:
        """Called after a step has trained, with the model in eval mode and without gradients; may scan the data."""

    def rule(self, published: bool) -> Callable[[Tensor], Tensor]:
        """The prediction rule: training ids [N, ...] from logits [N, C, ...]."""
        return LargestLogit(published, len(self.layout.lead))

    def confident(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels with confident predictions filled in, for the choice of exemplars; see :func:`fill_in`."""
        assert self.memory is not None, "only asked of a method with a memory"
        return fill_in(labels, logits[:, len(self.layout.lead) :], self.memory.score)

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive a step, kept as bank.safetensors in its directory."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
