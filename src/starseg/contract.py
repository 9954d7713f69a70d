"""The contract of a method, as checks that raise: what every registered method must do, ours and other packages'.

    from starseg.contract import check_method
    check_method("mine")

Each check takes a :class:`Rehearsal`, a short run of a method on random images without files. Its options reach the
method as they are; whoever needs a check of its own can walk the steps likewise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import SGD

from starseg.config import parse_config
from starseg.data.shapes import write_shapes
from starseg.data.step import Batch
from starseg.engine.checkpoint import load_model, read_json
from starseg.engine.evaluate import evaluate_model
from starseg.engine.fit import make_optimizer
from starseg.engine.runner import train
from starseg.losses import alone
from starseg.methods import METHODS, Method, StepContext
from starseg.models import Output, Segmenter
from starseg.tasks import IGNORE, Setting, TaskSequence

_BACKBONE, _SIDE, _IMAGES = "test_resnet", 64, 4
_ITERATIONS = 6
# torch's global generator is shared by the threads that stand for processes.
_SEEDING = threading.Lock()


def random_batch(seed: int, new: Sequence[int], old: Sequence[int] = ()) -> Batch:
    """Normalised noise with a patch of a new class in each of three quarters, a colour a class, the last strip ignored.

    The fourth quarter is background: plain, or a patch of an old class.
    """
    draw = torch.Generator().manual_seed(seed)
    half = _SIDE // 2
    pixels = 0.3 * torch.randn(_IMAGES, 3, _SIDE, _SIDE, generator=draw)
    labels = torch.zeros(_IMAGES, _SIDE, _SIDE, dtype=torch.uint8)
    for n in range(_IMAGES):
        shown = [new[(3 * n + place) % len(new)] for place in range(3)]
        if n and old:
            shown.append(old[n % len(old)])
        for place, c in enumerate(shown):
            rows, columns = (slice(k * half, (k + 1) * half) for k in divmod(place, 2))
            pixels[n, :, rows, columns] += 2.0 * torch.tensor([c % 2, c // 2 % 2, c // 4 % 2])[:, None, None]
            labels[n, rows, columns] = c if place < 3 else 0
    labels[:, :, -4:] = IGNORE
    return Batch(pixels, labels, torch.arange(_IMAGES))


@dataclass
class Rehearsal:
    """A method taken through the steps of a small task, as the engine does it.

    Attributes:
        name: of a registered method.
        steps: classes of each step.
        options: of the method.
        lr: base learning rate.
        setting: "overlap" or "disjoint".
        model, state: what the last finished step left.
    """

    name: str
    steps: tuple[tuple[int, ...], ...] = ((1, 2, 3), (4,), (5,))
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    setting: Setting = "overlap"
    model: Segmenter | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def task(self) -> TaskSequence:
        """The steps, under this setting."""
        size = 1 + max(c for step in self.steps for c in step)
        task = TaskSequence("rehearsal", self.steps, tuple(f"class{i}" for i in range(size)), self.setting)
        return self.method().sequence(task)

    def method(self) -> Method:
        """A new one, with the options."""
        cls = METHODS[self.name]
        return cls(cls.Options(**self.options))

    def batch(self, step: int) -> Batch:
        """Images of a step, labelled with its new classes."""
        first = 1 + len(self.task.old(step))
        return random_batch(step, range(first, first + len(self.task.new(step))), range(1, first))

    def enter(self, step: int, **context: Any) -> tuple[Method, StepContext, SGD]:
        """Grow the network of the step before and prepare a step, its method taking up the state from a file."""
        method, new, old = self.method(), len(self.task.new(step)), None
        with _SEEDING:
            torch.manual_seed(step)
            if self.model is None:
                model = Segmenter(_BACKBONE, [new], layout=method.layout)
            else:
                model, old = (Segmenter(_BACKBONE, self.model.head_sizes, layout=method.layout) for _ in range(2))
                for network in (model, old):
                    network.load_state_dict(self.model.state_dict())
                method.load_state_dict(through_a_file(self.state))
                model.add_head(new)
        ctx = StepContext(
            task=self.task,
            step=step,
            dataset="voc",
            published=False,
            model=model,
            old_model=old.requires_grad_(False).eval() if old else None,
            iterations=_ITERATIONS,
            scan=lambda name: iter([self.batch(step)]),
            generator=torch.Generator().manual_seed(step),
        )
        ctx = replace(ctx, **context)
        with _SEEDING, torch.no_grad():
            torch.manual_seed(step)
            method.init_heads(ctx)
        method.freeze(ctx)
        ctx.model.eval()
        with torch.no_grad():
            method.begin_step(ctx)
        return method, ctx, make_optimizer(method, ctx, self.lr, weight_decay=1e-4)

    def train(self, method: Method, ctx: StepContext, optimizer: SGD, batch: Batch, times: int) -> list[float]:
        """Losses of repeated iterations on one batch, each with the same draws."""
        values = []
        ctx.model.train()
        for _ in range(times):
            loss = total(method, ctx, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    def leave(self, method: Method, ctx: StepContext) -> None:
        """Finish a step and keep what the next one gets: the network and the method's state."""
        ctx.model.eval()
        with torch.no_grad():
            method.end_step(ctx)
        self.model, self.state = ctx.model, method.state_dict()

    def walk(self, until: int) -> None:
        """Train and finish the steps left before ``until``."""
        for step in range(len(self.model.heads) if self.model else 0, until):
            method, ctx, optimizer = self.enter(step)
            self.train(method, ctx, optimizer, self.batch(step), 2)
            self.leave(method, ctx)


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A method's state as the next step reads it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, path)
        return load_file(path)


def total(method: Method, ctx: StepContext, batch: Batch) -> Tensor:
    """The sum of a batch's losses, with the same draws at every call."""
    with _SEEDING:
        torch.manual_seed(0)
    ctx.generator.manual_seed(0)

    def old(images: Tensor, stages: bool = False) -> Output:
        assert ctx.old_model is not None
        with torch.no_grad():
            return ctx.old_model(images, stages=stages)

    losses = method.losses(batch, ctx.model, old if ctx.old_model is not None else None)
    for name, value in losses.items():
        if value.ndim or not value.isfinite():
            raise AssertionError(f"loss {name!r} of step {ctx.step} must be a finite scalar, got {value}")
    return torch.stack(list(losses.values())).sum()


def the_loss_falls(run: Rehearsal) -> None:
    """On one repeated batch, in every step."""
    for step in range(len(run.task)):
        method, ctx, optimizer = run.enter(step)
        values = run.train(method, ctx, optimizer, run.batch(step), _ITERATIONS)
        assert values[-1] < values[0], f"step {step}: the loss does not fall: {values}"
        run.leave(method, ctx)


def the_state_survives_a_file(run: Rehearsal) -> None:
    """What a method saves is what it loads, and a step begun from it gives the same loss twice."""
    last = len(run.task) - 1
    run.walk(last)
    method = run.method()
    method.load_state_dict(through_a_file(run.state))
    again = method.state_dict()
    assert again.keys() == run.state.keys(), f"{sorted(again)} after loading {sorted(run.state)}"
    for name, value in run.state.items():
        assert torch.equal(again[name], value), f"{name} changed on its way through a file"
    values = []
    for _ in range(2):
        method, ctx, _ = run.enter(last)
        values.append(total(method, ctx, run.batch(last)).item())
    assert values[0] == values[1], f"the same step begun twice gives {values}"


def gradients_reach_what_learns(run: Rehearsal) -> None:
    """Every parameter that needs a gradient is in one group and gets one; whatever is frozen stays as it is."""
    for step in range(len(run.task)):
        method, ctx, optimizer = run.enter(step)
        # An unchanged network has nothing to distil, so the first iteration tells nothing of distillation.
        run.train(method, ctx, optimizer, run.batch(step), 1)
        optimizer.zero_grad()
        before = {k: v.clone() for k, v in ctx.model.state_dict().items()}
        names = {p: name for name, p in ctx.model.named_parameters()}
        trained = {p for p in names if p.requires_grad}
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(grouped) == len(set(grouped)), f"step {step}: a parameter is in two groups"
        stray = [names[p] for p in trained.symmetric_difference(grouped)]
        assert not stray, f"step {step}: needs a gradient or is in a group, not both: {stray}"
        total(method, ctx, run.batch(step)).backward()
        missing = [names[p] for p in trained if p.grad is None]
        assert not missing, f"step {step}: no gradient (which breaks training on several processes): {missing}"
        reached = [names[p] for p in names if p.grad is not None and not p.requires_grad]
        assert not reached, f"step {step}: a gradient reaches what is frozen: {reached}"
        for group in optimizer.param_groups:
            strength = sum(float(p.grad.abs().sum()) for p in group["params"])
            assert strength > 0, f"step {step}: group {group['name']!r} gets a gradient of zero"
        head = next(ctx.model.heads[step].parameters())
        assert head.requires_grad and head.grad is not None, f"step {step}: the new head does not learn"
        optimizer.step()
        frozen = {names[p] for p in names if not p.requires_grad}
        moved = [k for k in frozen if not torch.equal(ctx.model.state_dict()[k], before[k])]
        assert not moved, f"step {step}: frozen, and yet changed: {moved}"
        run.leave(method, ctx)


def a_batch_without_old_classes(run: Rehearsal) -> None:
    """Plain background and one that is new classes all over: finite losses and gradients."""
    step = min(1, len(run.task) - 1)
    run.walk(step)
    for fill in (0, 1 + len(run.task.old(step)), IGNORE):
        method, ctx, _ = run.enter(step)
        batch = run.batch(step)
        batch = replace(batch, images=torch.zeros_like(batch.images), labels=torch.full_like(batch.labels, fill))
        ctx.model.train()
        total(method, ctx, batch).backward()
        bad = [n for n, p in ctx.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert not bad, f"labels all {fill}: gradients are not finite in {bad[:3]}"


def predictions_are_training_ids(run: Rehearsal) -> None:
    """The rule gives ids of the classes seen, for logits of any height and width."""
    run.walk(2 if len(run.task) > 1 else 1)
    assert run.model is not None
    with torch.no_grad():
        logits = run.model(run.batch(0).images).logits
    ids = run.method().rule(False)(logits)
    classes = sum(run.model.head_sizes)
    assert ids.shape == logits[:, 0].shape and ids.dtype == torch.int64, f"{ids.dtype} {tuple(ids.shape)}"
    assert int(ids.min()) >= 0 and int(ids.max()) <= classes, f"ids {ids.unique().tolist()}, classes 1..{classes}"
    assert classes == len(run.task.seen(min(1, len(run.task) - 1))), "a finished step holds the classes seen so far"


def one_new_class_and_many(run: Rehearsal) -> None:
    """Steps of one class, and a step that adds more classes than were known."""
    for steps in (((1,), (2,)), ((1, 2), tuple(range(3, 10)))):
        the_loss_falls(replace(run, steps=steps))


def a_permuted_order(run: Rehearsal) -> None:
    """Class ids out of order change nothing, since a method sees training ids only; both settings run."""
    straight, permuted = run, replace(run, steps=((5, 1, 3), (4,), (2,)))
    for step in range(len(run.task)):
        values = []
        for r in (straight, permuted):
            method, ctx, optimizer = r.enter(step)
            values.append(r.train(method, ctx, optimizer, r.batch(step), 2))
            r.leave(method, ctx)
        assert values[0] == values[1], f"step {step}: {values}"
    the_loss_falls(replace(run, setting="disjoint", model=None, state={}))


class _Meeting:
    """Sums tensors over threads that stand for processes; gradients as :func:`starseg.engine.launch.adder` has them."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)
        self.values: list[Tensor] = [torch.empty(0)] * world

    def adder(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add_up(values: Tensor) -> Tensor:
            self.values[rank] = values.detach()
            self.barrier.wait()
            others = sum((v for i, v in enumerate(self.values) if i != rank), torch.zeros_like(values.detach()))
            self.barrier.wait()
            return values + others

        return add_up


def shares_of_a_batch_give_the_loss_of_the_whole(run: Rehearsal) -> None:
    """Two processes with half of each batch: the loss of the whole batch in each, their gradients add up to its own.

    Batch norm is held in eval mode here: in training it is synchronised on GPUs only.
    """
    for step in range(len(run.task)):
        batch = run.batch(step)
        want, gradient = _share(run, step, batch, alone, 0, 1)
        meeting = _Meeting(2)

        def part(
            rank: int, step: int = step, batch: Batch = batch, meeting: _Meeting = meeting
        ) -> tuple[float, Tensor]:
            return _share(run, step, _half(batch, rank), meeting.adder(rank), rank, 2)

        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(part, range(2)))
        for got, _ in parts:
            assert abs(got - want) <= 1e-4 * abs(want), f"step {step}: {got} from a share, {want} from the whole batch"
        difference = (sum(p for _, p in parts) - gradient).norm() / gradient.norm()
        assert difference < 1e-3, f"step {step}: gradients of the shares differ by {difference:.1e} from the whole's"
        run.walk(step + 1)


def _half(batch: Batch, rank: int) -> Batch:
    return Batch(**{f.name: v[rank::2] for f in fields(Batch) if (v := getattr(batch, f.name)) is not None})


def _share(
    run: Rehearsal, step: int, batch: Batch, add_up: Callable[[Tensor], Tensor], rank: int, world: int
) -> tuple[float, Tensor]:
    method, ctx, _ = run.enter(step, add_up=add_up, rank=rank, world=world, scan=lambda name: iter([batch]))
    ctx.model.eval()
    loss = total(method, ctx, batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in ctx.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


CHECKS: tuple[Callable[[Rehearsal], None], ...] = (
    the_loss_falls,
    the_state_survives_a_file,
    gradients_reach_what_learns,
    a_batch_without_old_classes,
    predictions_are_training_ids,
    one_new_class_and_many,
    a_permuted_order,
    shares_of_a_batch_give_the_loss_of_the_whole,
)


def tiny_settings(name: str, data: Path, out: Path) -> dict[str, Any]:
    """A run of three steps in a permuted order that takes seconds, on the data of :func:`write_shapes`."""
    return {
        "method": name,
        "out": str(out),
        "data": {"root": str(data), "crop": _SIDE},
        "task": {"name": "tiny", "steps": [["heart", "disc", "triangle"], ["hexagon"], ["square"]]},
        "model": {"backbone": _BACKBONE, "pretrained": False},
        "train": {"batch_size": 4, "base": {"epochs": 1, "lr": 0.01}, "later": {"epochs": 1, "lr": 0.001}},
    }


def check_run(name: str, data: Path, out: Path) -> None:
    """Three steps through the runner; each step directory alone is enough to evaluate it."""
    config = parse_config(tiny_settings(name, data, out))
    quiet = Console(quiet=True)
    results = read_json(train(config, console=quiet) / "results.json")
    assert list(results["steps"][-1]["iou"]) == ["background", "heart", "disc", "triangle", "hexagon", "square"]
    for entry in results["steps"]:
        again = evaluate_model(*load_model(out / f"step_{entry['step']}"), config, quiet)
        assert again["iou"] == entry["iou"], f"step {entry['step']}: evaluated again, its directory gives other figures"


def check_method(name: str, **options: Any) -> None:
    """Run all checks on a registered method.

    Raises:
        AssertionError: says what the method does that it must not.
    """
    for check in CHECKS:
        check(Rehearsal(name, options=options))
    with TemporaryDirectory() as folder:
        data = write_shapes(Path(folder) / "data", train=48, val=12, size=_SIDE, classes=5)
        check_run(name, data, Path(folder) / "run")
