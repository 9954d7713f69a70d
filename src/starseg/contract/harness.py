"""A short run of a method on random images, without files, to check what it does in each step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import SGD

from starseg.data.samples import Batch
from starseg.engine.fit import make_optimizer
from starseg.losses.reduction import identity
from starseg.methods import METHODS, Method, StepContext
from starseg.methods.recipes import recipes_of
from starseg.models import Architecture, Output, Segmenter, make_network
from starseg.tasks import IGNORE, Setting, TaskSequence

BACKBONE, SIDE, IMAGES = "test_resnet", 64, 4
ITERATIONS = 6
# Guards torch's global generator, which the threads that stand for processes share.
_SEEDING = threading.Lock()


def random_batch(seed: int, new: Sequence[int], old: Sequence[int] = ()) -> Batch:
    """Return noise images with a patch of a new class in three of their quarters, one colour per class.

    The fourth quarter is background: plain, or a patch of an old class. The last four columns are ignored.
    """
    draw = torch.Generator().manual_seed(seed)
    half = SIDE // 2
    pixels = 0.3 * torch.randn(IMAGES, 3, SIDE, SIDE, generator=draw)
    labels = torch.zeros(IMAGES, SIDE, SIDE, dtype=torch.uint8)
    for n in range(IMAGES):
        shown = [new[(3 * n + place) % len(new)] for place in range(3)]
        if n and old:
            shown.append(old[n % len(old)])
        for place, c in enumerate(shown):
            rows, columns = (slice(k * half, (k + 1) * half) for k in divmod(place, 2))
            pixels[n, :, rows, columns] += 2.0 * torch.tensor([c % 2, c // 2 % 2, c // 4 % 2])[:, None, None]
            labels[n, rows, columns] = c if place < 3 else 0
    labels[:, :, -4:] = IGNORE
    return Batch(pixels, labels, torch.arange(IMAGES))


@dataclass
class MethodHarness:
    """Run of a method through the steps of a small task, as the engine does it.

    Attributes:
        name: name of a registered method.
        steps: classes of each step.
        options: options of the method.
        lr: base learning rate.
        setting: "overlap" or "disjoint".
        architecture: architecture of the model.
        model, state: model and method state after the last finished step.
    """

    name: str
    steps: tuple[tuple[int, ...], ...] = ((1, 2, 3), (4,), (5,))
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 3e-4
    setting: Setting = "overlap"
    architecture: Architecture = field(default_factory=lambda: Architecture(BACKBONE))
    model: Segmenter | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def task(self) -> TaskSequence:
        """The steps in which the method learns the classes, under this setting."""
        size = 1 + max(c for step in self.steps for c in step)
        task = TaskSequence("rehearsal", self.steps, tuple(f"class{i}" for i in range(size)), self.setting)
        return self.method().sequence(task)

    def method(self) -> Method:
        """Return a new instance, with the options completed by the method's first recipe."""
        cls = METHODS[self.name]
        recipe = next(iter(recipes_of(cls).values()), None)
        options = cls.complete_options(cls.Options(**{**cls.contract_options, **self.options}), recipe)
        return cls(cls.Options(**options))

    def batch(self, step: int) -> Batch:
        """Return images of a step, labelled with its new classes."""
        first = 1 + len(self.task.old(step))
        return random_batch(step, range(first, first + len(self.task.new(step))), range(1, first))

    def enter(self, step: int, **context: Any) -> tuple[Method, StepContext, SGD | None]:
        """Prepare a step: add a head to the previous step's model, and load the method's state from a file.

        All its stages but the last are trained for two iterations.

        Args:
            step: index of the step.
            context: fields of the step context to replace.

        Returns:
            The method, its context and an optimizer, of the last stage; None in a step that trains nothing.
        """
        method, new, old = self.method(), len(self.task.new(step)), None
        with _SEEDING:
            torch.manual_seed(step)
            if self.model is None:
                model = make_network(method.architecture(self.architecture), [new], method.layout)
            else:
                like = (self.model.architecture, self.model.head_sizes, self.model.layout)
                model, old = (make_network(*like) for _ in range(2))
                for network in (model, old):
                    network.load_state_dict(self.model.state_dict())
                method.load_state_dict(through_a_file(self.state))
                model = method.grow(model, new)
        ctx = StepContext(
            task=self.task,
            step=step,
            model=model,
            old_model=old.requires_grad_(False).eval() if old else None,
            iterations=ITERATIONS,
            scan=lambda name: iter([self.batch(step)]),
            generator=torch.Generator().manual_seed(step),
        )
        ctx = replace(ctx, **context)
        if not method.stages(ctx):
            return method, ctx, None
        with _SEEDING, torch.no_grad():
            torch.manual_seed(step)
            method.init_heads(ctx)
        *earlier, last = method.stages(ctx)
        for stage in earlier:
            alone = replace(ctx, stage=stage, all_reduce_sum=identity, rank=0, world=1)
            self.train(method, alone, self._begin(method, alone), self.batch(step), 2)
            ctx.model.zero_grad()
        ctx = replace(ctx, stage=last)
        return method, ctx, self._begin(method, ctx)

    def _begin(self, method: Method, ctx: StepContext) -> SGD:
        method.freeze(ctx)
        ctx.model.eval()
        with torch.no_grad():
            method.begin_step(ctx)
        return make_optimizer(method, ctx, self.lr, weight_decay=1e-4)

    def train(self, method: Method, ctx: StepContext, optimizer: SGD | None, batch: Batch, times: int) -> list[float]:
        """Repeat iterations on one batch, each with the same random draws, and return their losses.

        Without an optimizer nothing is trained.
        """
        values: list[float] = []
        if optimizer is None:
            return values
        ctx.model.train()
        for _ in range(times):
            loss = total(method, ctx, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    def leave(self, method: Method, ctx: StepContext) -> None:
        """Finish a step, and keep the model and the method's state for the next one."""
        ctx.model.eval()
        with torch.no_grad():
            method.end_step(ctx)
        self.model, self.state = ctx.model, method.state_dict()

    def walk(self, until: int) -> None:
        """Train and finish the remaining steps before ``until``."""
        for step in range(len(self.model.heads) if self.model else 0, until):
            method, ctx, optimizer = self.enter(step)
            self.train(method, ctx, optimizer, self.batch(step), 2)
            self.leave(method, ctx)


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a method's state after a round trip through a file, as the next step reads it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, path)
        return load_file(path)


def total(method: Method, ctx: StepContext, batch: Batch) -> Tensor:
    """Return the sum of a batch's losses, with the same random draws in every call.

    Raises:
        AssertionError: a loss is not a finite scalar.
    """
    with _SEEDING:
        torch.manual_seed(0)
    ctx.generator.manual_seed(0)

    def old(images: Tensor, maps: bool = False) -> Output:
        assert ctx.old_model is not None
        with torch.no_grad():
            return ctx.old_model(images, maps=maps)

    losses = method.losses(batch, ctx.model, old if ctx.old_model is not None else None)
    for name, value in losses.items():
        if value.ndim or not value.isfinite():
            raise AssertionError(f"loss {name!r} of step {ctx.step} must be a finite scalar, got {value}")
    return torch.stack(list(losses.values())).sum()
