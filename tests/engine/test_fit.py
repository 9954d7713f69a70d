"""The training loop of one step: restoring its state on another device, and its reports."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision

from starseg.config import TrainConfig
from starseg.contract import MethodHarness
from starseg.data.samples import Batch
from starseg.engine.fit import StepTraining
from starseg.utils.clock import Clock

_CPU = torch.device("cpu")


def _training(*plugins: MixedPrecision, batch_size: int = 4) -> tuple[StepTraining, Batch]:
    """The first step of a method harness, and a batch for it."""
    rehearsal = MethodHarness("finetune")
    method, ctx, _ = rehearsal.enter(0)
    fabric = Fabric(accelerator="cpu", plugins=list(plugins))
    config = TrainConfig(warmup=0, batch_size=batch_size)
    batch = rehearsal.batch(0)
    images = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8)
    return StepTraining(fabric, method, ctx, 1, 1e-3, config, Clock(_CPU)), replace(batch, images=images)


def _half() -> MixedPrecision:
    """16-mixed, which Fabric takes for bf16 on a CPU unless it is given so."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))


def test_an_iteration_that_overflows_leaves_no_trace() -> None:
    """The loss scale skips it; memory as it comes, were it the momentum, would stay."""
    training, raw = _training(MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**120)))
    training.iterate(raw)
    momenta = [state["momentum_buffer"] for state in training.optimizer.state.values()]
    assert training.fabric.strategy.precision.scaler.get_scale() == 2.0**119
    assert momenta and not any(momentum.any() for momentum in momenta)


def test_loss_scale_and_generator_are_restored() -> None:
    before, again = _training(_half())[0], _training(_half())[0]
    before.ctx.generator.manual_seed(5)
    before.fabric.strategy.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    assert again.restore(before.capture(1.0, "")) == []
    assert again.fabric.strategy.precision.scaler.get_scale() == 2
    assert torch.equal(again.ctx.generator.get_state(), before.ctx.generator.get_state())


def test_another_device_resets_what_it_cannot_restore() -> None:
    """A GPU's generator has a state of 16 bytes, and bf16 and float32 have no loss scale."""
    before, again = _training()[0], _training(_half())[0]
    draws = again.ctx.generator.get_state()
    before.iteration = 3
    state = replace(before.capture(1.0, ""), generator=torch.zeros(16, dtype=torch.uint8))
    assert again.restore(state) == ["loss scale", "random generator"]
    assert again.iteration == 3 and again.fabric.strategy.precision.scaler.get_scale() == 8
    assert torch.equal(again.ctx.generator.get_state(), draws)
    assert _training()[0].restore(_training(_half())[0].capture(1.0, "")) == [], "what is not needed is no loss"


@pytest.mark.parametrize("share", [2, 4])
def test_the_reported_speed_counts_all_processes(share: int) -> None:
    """A process sees its share of every batch."""
    training, batch = _training()
    raw = replace(batch, images=batch.images[:share], labels=batch.labels[:share], indices=batch.indices[:share])
    shown: list[int] = []
    bar = SimpleNamespace(live=True, advance=lambda: None, show=lambda where, terms, images: shown.append(images))
    training.run([raw], bar, SimpleNamespace(log_metrics=lambda *_, **__: None), SimpleNamespace(due=bool), print)
    assert shown == [4]
