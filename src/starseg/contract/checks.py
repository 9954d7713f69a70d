"""Checks of a method in the steps of a :class:`MethodHarness`; a check that fails raises AssertionError."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from starseg.config import SOUND
from starseg.contract.harness import ITERATIONS, MethodHarness, through_a_file, total
from starseg.data.samples import Batch
from starseg.losses.reduction import identity
from starseg.tasks import IGNORE


def the_loss_falls(run: MethodHarness) -> None:
    """Check that the loss falls on one repeated batch, in every step."""
    for step in range(len(run.task)):
        method, ctx, optimizer = run.enter(step)
        values = run.train(method, ctx, optimizer, run.batch(step), ITERATIONS)
        assert not optimizer or values[-1] < values[0], f"step {step}: the loss does not fall: {values}"
        run.leave(method, ctx)


def the_state_survives_a_file(run: MethodHarness) -> None:
    """Check that a method loads what it saved, and that a step begun twice from it has the same loss."""
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
        method, ctx, optimizer = run.enter(last)
        if not optimizer:
            return
        values.append(total(method, ctx, run.batch(last)).item())
    assert values[0] == values[1], f"the same step begun twice gives {values}"


def gradients_reach_what_learns(run: MethodHarness) -> None:
    """Check that gradients reach every trained parameter and no frozen one.

    Every parameter that needs a gradient is in exactly one group; frozen parameters do not change.
    """
    for step in range(len(run.task)):
        method, ctx, optimizer = run.enter(step)
        if not optimizer:
            run.leave(method, ctx)
            continue
        # There is nothing to distil while both models are equal, so gradients are checked after one iteration.
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


def a_batch_without_old_classes(run: MethodHarness) -> None:
    """Check that losses and gradients are finite for batches with a single label.

    All pixels are background, one new class, or ignored.
    """
    step = min(1, len(run.task) - 1)
    run.walk(step)
    for fill in (0, 1 + len(run.task.old(step)), IGNORE):
        batch = run.batch(step)
        batch = replace(batch, images=torch.zeros_like(batch.images), labels=torch.full_like(batch.labels, fill))
        method, ctx, optimizer = run.enter(step)
        if not optimizer:
            _check_step_without_training(run, step, batch)
            continue
        ctx.model.train()
        total(method, ctx, batch).backward()
        bad = [n for n, p in ctx.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert not bad, f"labels all {fill}: gradients are not finite in {bad[:3]}"


def _check_step_without_training(run: MethodHarness, step: int, batch: Batch) -> None:
    """Check that a step whose images are this batch gives finite logits."""
    alone = replace(run)
    method, ctx, _ = alone.enter(step, scan=lambda name: iter([batch]))
    alone.leave(method, ctx)
    with torch.no_grad():
        logits = ctx.model(run.batch(step).images).logits
    assert logits.isfinite().all(), f"labels all {batch.labels.unique().tolist()}: logits are not finite"


def predictions_are_training_ids(run: MethodHarness) -> None:
    """Check that the prediction rule returns int64 ids of the classes seen so far."""
    run.walk(2 if len(run.task) > 1 else 1)
    assert run.model is not None
    with torch.no_grad():
        logits = run.model(run.batch(0).images).logits
    ids = run.method().rule(SOUND)(logits)
    classes = sum(run.model.head_sizes)
    assert ids.shape == logits[:, 0].shape and ids.dtype == torch.int64, f"{ids.dtype} {tuple(ids.shape)}"
    assert int(ids.min()) >= 0 and int(ids.max()) <= classes, f"ids {ids.unique().tolist()}, classes 1..{classes}"
    assert classes == len(run.task.seen(min(1, len(run.task) - 1))), "a finished step holds the classes seen so far"


def one_new_class_and_many(run: MethodHarness) -> None:
    """Check steps of one class, and a step that adds more classes than were known."""
    for steps in (((1,), (2,)), ((1, 2), tuple(range(3, 10)))):
        the_loss_falls(replace(run, steps=steps))


def a_permuted_order(run: MethodHarness) -> None:
    """Check that the order of the class ids changes nothing, since a method sees training ids only.

    Check also that the loss falls in the disjoint setting.
    """
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
    """Sum of tensors over threads that stand for processes.

    Gradients are those of :func:`starseg.engine.launch.make_all_reduce_sum`.
    """

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)
        self.values: list[Tensor] = [torch.empty(0)] * world

    def make_all_reduce_sum(self, rank: int) -> Callable[[Tensor], Tensor]:
        def all_reduce_sum(values: Tensor) -> Tensor:
            self.values[rank] = values.detach()
            self.barrier.wait()
            others = sum((v for i, v in enumerate(self.values) if i != rank), torch.zeros_like(values.detach()))
            self.barrier.wait()
            return values + others

        return all_reduce_sum


def shares_of_a_batch_give_the_loss_of_the_whole(run: MethodHarness) -> None:
    """Check that two processes with half a batch each compute the loss of the whole batch.

    Their gradients must add up to that of the whole batch. Batch norm is in eval mode here, because in training it is
    synchronised on GPUs only. Methods that need the whole batch in one process (``one_process``) are skipped.
    """
    if run.method().one_process:
        return
    for step in range(len(run.task)):
        batch = run.batch(step)
        if not run.enter(step)[2]:
            run.walk(step + 1)
            continue
        want, gradient = _share(run, step, batch, identity, 0, 1)
        meeting = _Meeting(2)

        def part(
            rank: int, step: int = step, batch: Batch = batch, meeting: _Meeting = meeting
        ) -> tuple[float, Tensor]:
            return _share(run, step, _half(batch, rank), meeting.make_all_reduce_sum(rank), rank, 2)

        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(part, range(2)))
        for got, _ in parts:
            assert abs(got - want) <= 1e-4 * abs(want), f"step {step}: {got} from a share, {want} from the whole batch"
        difference = (sum(p for _, p in parts) - gradient).norm() / gradient.norm()
        assert difference < 1e-3, f"step {step}: gradients of the shares differ by {difference:.1e} from the whole's"
        run.walk(step + 1)


def _half(batch: Batch, rank: int) -> Batch:
    return batch.map(lambda values: values[rank::2])


def _share(
    run: MethodHarness, step: int, batch: Batch, all_reduce_sum: Callable[[Tensor], Tensor], rank: int, world: int
) -> tuple[float, Tensor]:
    method, ctx, _ = run.enter(
        step, all_reduce_sum=all_reduce_sum, rank=rank, world=world, scan=lambda name: iter([batch])
    )
    ctx.model.eval()
    loss = total(method, ctx, batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in ctx.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


CHECKS: tuple[Callable[[MethodHarness], None], ...] = (
    the_loss_falls,
    the_state_survives_a_file,
    gradients_reach_what_learns,
    a_batch_without_old_classes,
    predictions_are_training_ids,
    one_new_class_and_many,
    a_permuted_order,
    shares_of_a_batch_give_the_loss_of_the_whole,
)
