"""The training loop of one step: forward pass, named losses, backward pass, optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from starseg.config import TrainConfig
from starseg.data.samples import Batch
from starseg.engine.accumulate import MicroBatches
from starseg.engine.guard import Guard
from starseg.engine.shared import common_encoder, computed_once
from starseg.engine.state import TrainingState, process_states, restore_process
from starseg.errors import UserError
from starseg.methods import Method, StepContext
from starseg.models import Output, Segmenter, upgrade_keys
from starseg.utils.clock import Clock
from starseg.utils.progress import Bar

_LOG_EVERY = 10


def lr_factor(iteration: int, total: int, warmup: float) -> float:
    """Return the learning rate factor of a poly schedule (power 0.9) with linear warm-up from 0.001.

    Args:
        iteration: number of the iteration, from 0.
        total: number of iterations in the step.
        warmup: fraction of the iterations with warm-up.
    """
    poly = max(0.0, 1 - iteration / total) ** 0.9
    if iteration >= warmup * total:
        return poly
    alpha = iteration / (warmup * total)
    return poly * (0.001 * (1 - alpha) + alpha)


def make_optimizer(method: Method, ctx: StepContext, lr: float, weight_decay: float, encoder_lr: float = 1.0) -> SGD:
    """Create SGD with Nesterov momentum 0.9, with the method's parameter groups.

    Args:
        method: the method.
        ctx: context of the step.
        lr: base learning rate.
        weight_decay: weight decay of the groups that have one.
        encoder_lr: factor on the learning rate of the encoder's parameters; unless it is 1, they form groups of their
            own.
    """
    encoder = set(ctx.model.encoder.parameters()) if encoder_lr != 1 else set()
    groups = []
    for group in method.param_groups(ctx):
        decay = weight_decay if group.decay else 0.0
        trained = [p for p in group.module.parameters() if p.requires_grad]
        slower, others = [p for p in trained if p in encoder], [p for p in trained if p not in encoder]
        name = f"{group.name}: encoder" if others else group.name
        for parameters, title, factor in ((slower, name, encoder_lr), (others, group.name, 1.0)):
            if parameters:
                rate = lr * group.lr * factor
                groups.append({"params": parameters, "lr": rate, "name": title, "weight_decay": decay})
    optimizer = SGD(groups, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=True)
    # Fused SGD would leave uninitialised memory in the momentum buffer if the loss scaler skips the first iteration.
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def to_device(batch: Batch, model: Segmenter) -> Batch:
    """Move a batch, except its indices, to the model's device and normalise the images."""

    def move(values: Tensor) -> Tensor:
        return values.to(model.mean.device, non_blocking=True)

    extras = {name: move(values) for name, values in batch.extras.items()}
    return replace(batch, images=model.normalize(batch.images), labels=move(batch.labels), extras=extras)


@torch.no_grad()
def _frozen(fabric: Fabric, model: Segmenter, images: Tensor, maps: bool = False) -> Output:
    with fabric.autocast():
        return model(images, maps=maps)


class StepTraining:
    """The training loop of one step, and its state.

    Args:
        fabric: device, precision and processes.
        method: method whose losses are minimised.
        ctx: context of the step.
        epochs: number of epochs.
        lr: base learning rate.
        config: batch size, warm-up, weight decay, the encoder's learning rate, compilation and micro-batches.
        clock: clock that measures the parts of the step.
        stage: index of the stage of the step.
        before: iterations of the step's earlier stages, which the logs count as well.
    """

    def __init__(
        self,
        fabric: Fabric,
        method: Method,
        ctx: StepContext,
        epochs: int,
        lr: float,
        config: TrainConfig,
        clock: Clock,
        stage: int = 0,
        before: int = 0,
    ) -> None:
        self.stage, self.before = stage, before
        assert config.warmup is not None, "resolved by the runner"
        self.fabric, self.method, self.ctx, self.epochs, self.clock = fabric, method, ctx, epochs, clock
        self.total, self.iteration, self.batch_size = epochs * ctx.iterations, 0, config.batch_size
        self.optimizer = make_optimizer(method, ctx, lr, config.weight_decay, config.encoder_lr)
        self.schedule = LambdaLR(self.optimizer, partial(lr_factor, total=self.total, warmup=config.warmup))
        network: Any
        old: Any
        network, old = (torch.compile(m) if m and config.compile else m for m in (ctx.model, ctx.old_model))
        network, self.wrapped = fabric.setup(network, self.optimizer)
        self.new = self.clock.timed("new forward", network)
        parts = config.accumulate
        self.micro = MicroBatches(fabric, network, self.new, parts) if parts > 1 else None
        self.old = self.clock.timed("old forward", partial(_frozen, fabric, old)) if ctx.old_model else None
        self.common = () if config.compile else common_encoder(ctx.model, ctx.old_model)
        self.processes: list[dict[str, Any]] = []
        # Losses whose values have not been checked yet, as reading them would wait for the GPU.
        self.pending_losses: list[tuple[Batch, dict[str, Tensor]]] = []

    def capture(self, seconds: float, images: str) -> TrainingState:
        """Return the training state after :attr:`iteration` iterations; every process must call it.

        Args:
            seconds: time spent on the step so far.
            images: digest of the step's training images.
        """
        return TrainingState(
            iteration=self.iteration,
            model=self.ctx.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            precision=self.fabric.strategy.precision.state_dict(),
            generator=self.ctx.generator.get_state(),
            processes=process_states(self.ctx.model, self.fabric),
            time=dict(self.clock.read()),
            seconds=seconds,
            images=images,
            stage=self.stage,
        )

    def restore(self, state: TrainingState) -> list[str]:
        """Resume from a training state.

        Returns:
            Names of the parts that were reset because the state was saved on another kind of device.
        """
        precision, generator, reset = self.fabric.strategy.precision, self.ctx.generator, []
        self.iteration = state.iteration
        self.ctx.model.load_state_dict(upgrade_keys(state.model))
        self.optimizer.load_state_dict(state.optimizer)
        self.schedule.load_state_dict(state.schedule)
        if state.precision or not precision.state_dict():
            precision.load_state_dict(state.precision)
        else:
            reset.append("loss scale")
        if state.generator.shape == generator.get_state().shape:
            generator.set_state(state.generator)
        else:
            reset.append("random generator")
        self.processes = state.processes
        self.clock.seconds |= state.time
        return reset

    def run(
        self, loader: Iterable[Batch], bar: Bar, logger: TensorBoardLogger, guard: Guard, save: Callable[[], None]
    ) -> None:
        """Train ``ctx.model`` in place, starting at :attr:`iteration`.

        Args:
            loader: the remaining uint8 batches.
            bar: progress bar, advanced once per batch.
            logger: logger of loss terms and learning rates.
            guard: decides when to save.
            save: function that saves the result of :meth:`capture`.

        Raises:
            UserError: a loss is NaN or infinite.
            Stopped: a signal was received; the training state has been saved.
        """
        self.ctx.model.train()
        restore_process(self.processes, self.ctx.model, self.fabric)
        for raw in self.clock.each("data", iter(loader)):
            losses = self.iterate(raw)
            epoch, last = (self.iteration - 1) // self.ctx.iterations + 1, self.iteration % self.ctx.iterations == 0
            self.pending_losses.append((raw, losses))
            bar.advance()
            # Reading values from a GPU, and communication between processes, stall the GPU.
            checks = last or self.fabric.device.type == "cpu" or len(self.pending_losses) >= _LOG_EVERY
            # An epoch over features held in memory may take less time than a save.
            ends = last and (self.ctx.cached is None or self.iteration == self.total)
            due = (checks or self.fabric.world_size == 1) and guard.due(ends)
            if checks or due:
                self._check_finite(epoch)
            if last or self.iteration % _LOG_EVERY == 1:
                terms = {"loss": sum(v.item() for v in losses.values()), **{k: v.item() for k, v in losses.items()}}
                rates = {f"lr/{g['name']}": g["lr"] for g in self.optimizer.param_groups}
                values = {f"loss/{k}": v for k, v in terms.items()} | rates | self.clock.scalars()
                logger.log_metrics(values, step=self.before + self.iteration - 1)
                if last or bar.live:
                    bar.show(f"epoch {epoch}/{self.epochs}", terms, self.batch_size)
            if due:
                save()
                guard.saved_now()

    def iterate(self, raw: Batch) -> dict[str, Tensor]:
        """Run one iteration on a uint8 batch and return the loss terms."""
        clock, micro = self.clock, self.micro
        with clock.time("data"):
            batch = to_device(raw, self.ctx.model)
        self.wrapped.zero_grad()
        with clock.time("loss"), computed_once(self.common):
            losses = self.method.losses(batch, micro or self.new, self.old)
            total = torch.stack(list(losses.values())).sum()
        with clock.time("backward"):
            if micro:
                micro.backward(total)
            else:
                self.fabric.backward(total)
        with clock.time("optimizer"):
            self.wrapped.step()
        self.schedule.step()
        self.iteration += 1
        return {name: value.detach() for name, value in losses.items()}

    def _check_finite(self, epoch: int) -> None:
        """Raise an error, without saving, if a pending loss is not finite."""
        first, precision = self.iteration - len(self.pending_losses), self.fabric.strategy.precision.precision
        for offset, (raw, losses) in enumerate(self.pending_losses):
            terms = {name: value.item() for name, value in losses.items()}
            if not all(map(math.isfinite, terms.values())):
                raise UserError(
                    f"step {self.ctx.step}, epoch {epoch}, iteration {first + offset}: a loss is no finite number: "
                    f"{terms}; images {raw.indices.tolist()}. The state before is kept. Lower the learning rate"
                    + (", or use train.precision=32" if not precision.startswith("32") else "")
                )
        self.pending_losses.clear()
