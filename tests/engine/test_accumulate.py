"""Gradient accumulation: micro-batches give the losses and gradients of the whole batch."""

from typing import Any

import pytest
import torch
from lightning_fabric.plugins import Precision

from starseg.config import TrainConfig, parse_config
from starseg.contract import MethodHarness
from starseg.engine.accumulate import MicroBatches
from starseg.engine.launch import make_fabric
from starseg.errors import UserError


class _Scaled(Precision):
    """float32 with a loss scale, as fp16 has."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def backward(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor * self.scale, *args, **kwargs)


@pytest.mark.parametrize(
    ("name", "scale"), [("star", 1), ("dkd", 1), ("dkd", 1024), ("mib", 1), ("plop", 1), ("ssul", 1)]
)
def test_micro_batches_give_the_losses_and_gradients_of_the_batch(name: str, scale: float) -> None:
    """Batch norm in eval mode: where it is trained, its statistics are those of a part. fp16 scales the gradients."""
    rehearsal = MethodHarness(name)
    rehearsal.walk(1)
    method, ctx, optimizer = rehearsal.enter(1)
    with torch.no_grad():  # away from the old model: PLOP's distance to it has no gradient at 0
        for parameter in ctx.model.parameters():
            parameter += 0.02 * parameter.std(correction=0) * torch.randn_like(parameter)
    batch, old = rehearsal.batch(1), torch.no_grad()(ctx.old_model)
    draws = ctx.generator.get_state()
    whole = method.losses(batch, ctx.model, old)
    torch.stack(list(whole.values())).sum().backward()
    want = {n: p.grad for n, p in ctx.model.named_parameters() if p.grad is not None}
    ctx.model.zero_grad()

    ctx.generator.set_state(draws)
    fabric = make_fabric(TrainConfig(accelerator="cpu", precision="32"))
    fabric.strategy.precision = _Scaled(scale)
    network, _ = fabric.setup(ctx.model, optimizer)
    micro = MicroBatches(fabric, network, network, 2)
    losses = method.losses(batch, micro, old)
    micro.backward(torch.stack(list(losses.values())).sum())
    assert losses.keys() == whole.keys()
    for term, value in losses.items():
        torch.testing.assert_close(value, whole[term], rtol=1e-5, atol=1e-6)
    got = {n: p.grad / scale for n, p in ctx.model.named_parameters() if p.grad is not None}
    assert got.keys() >= want.keys()
    largest = max(grad.abs().max() for grad in want.values())
    for n, grad in got.items():
        assert (grad - want.get(n, 0)).abs().max() <= 1e-5 * largest, n


def test_trained_batch_norm_and_dropout() -> None:
    """The pass for the outputs leaves no trace: statistics move once a part, dropout draws the same again."""
    rehearsal = MethodHarness("star")
    _, ctx, optimizer = rehearsal.enter(0)
    fabric = make_fabric(TrainConfig(accelerator="cpu", precision="32"))
    network, _ = fabric.setup(ctx.model.train(), optimizer)
    maps: list[torch.Tensor] = []
    micro = MicroBatches(fabric, network, lambda *call: (maps.append((out := network(*call)).features), out)[1], 2)
    norm = ctx.model.decoder.last_conv[1]
    micro.backward(micro(rehearsal.batch(0).images).logits.sum())
    assert norm.num_batches_tracked == 2
    assert len(maps) == 4 and torch.equal(maps[0], maps[2].detach()) and torch.equal(maps[1], maps[3].detach())


def test_micro_batches_too_small_for_batch_norm_are_refused() -> None:
    tree = {"task": {"name": "15-1"}, "train": {"batch_size": 6, "accumulate": 4}}
    with pytest.raises(UserError, match=r"train.batch_size: .* 4 parts \(train.accumulate\), got 6"):
        parse_config(tree)
