"""The loop of one step: forward, named losses, backward, optimizer, schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from starseg.data.step import Batch
from starseg.engine.progress import Bar
from starseg.errors import UserError
from starseg.methods import Method, StepContext
from starseg.models import Output, Segmenter

_LOG_EVERY = 10


def lr_factor(iteration: int, total: int, warmup: float) -> float:
    """Poly schedule with power 0.9, with a linear warm-up from 0.001 over the first ``warmup`` share of iterations."""
    poly = max(0.0, 1 - iteration / total) ** 0.9
    if iteration >= warmup * total:
        return poly
    alpha = iteration / (warmup * total)
    return poly * (0.001 * (1 - alpha) + alpha)


def make_optimizer(method: Method, ctx: StepContext, lr: float, weight_decay: float) -> SGD:
    """SGD with momentum 0.9 and Nesterov, one group per entry of the method's parameter groups."""
    groups = []
    for group in method.param_groups(ctx):
        if parameters := [p for p in group.module.parameters() if p.requires_grad]:
            decay = weight_decay if group.decay else 0.0
            groups.append({"params": parameters, "lr": lr * group.lr, "name": group.name, "weight_decay": decay})
    return SGD(groups, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def to_device(batch: Batch, model: Segmenter) -> Batch:
    """All but the indices moved, images normalised."""
    moved = {
        name: value.to(model.mean.device, non_blocking=True)
        for name in ("labels", "saliency", "exemplar")
        if (value := getattr(batch, name)) is not None
    }
    return replace(batch, images=model.normalize(batch.images), **moved)


@torch.no_grad()
def _frozen(fabric: Fabric, model: Segmenter, images: Tensor, stages: bool = False) -> Output:
    with fabric.autocast():
        return model(images, stages=stages)


def fit_step(
    fabric: Fabric,
    method: Method,
    ctx: StepContext,
    optimizer: SGD,
    loader: Iterable[Batch],
    epochs: int,
    warmup: float,
    bar: Bar,
    logger: TensorBoardLogger,
) -> None:
    """Train ``ctx.model`` in place.

    Args:
        fabric: device and precision.
        method: whose losses are minimised.
        ctx: the step; its iterations times ``epochs`` is how many batches ``loader`` gives.
        optimizer: over the model's parameters.
        loader: uint8 batches.
        epochs: for the log.
        warmup: see :func:`lr_factor`.
        bar: advanced a batch at a time.
        logger: takes loss terms and learning rates.

    Raises:
        UserError: the loss is NaN or infinite.
    """
    total = epochs * ctx.iterations
    schedule = LambdaLR(optimizer, partial(lr_factor, total=total, warmup=warmup))
    new, optimizer_ = fabric.setup(ctx.model, optimizer)
    old = partial(_frozen, fabric, ctx.old_model) if ctx.old_model else None
    ctx.model.train()
    for iteration, raw in enumerate(loader):
        batch = to_device(raw, ctx.model)
        losses = method.losses(batch, new, old)
        loss = torch.stack(list(losses.values())).sum()
        optimizer_.zero_grad()
        fabric.backward(loss)
        optimizer_.step()
        schedule.step()
        bar.advance()
        epoch, last = iteration // ctx.iterations + 1, (iteration + 1) % ctx.iterations == 0
        if last or iteration % _LOG_EVERY == 0:
            terms = {"loss": loss.item(), **{name: value.item() for name, value in losses.items()}}
            if not math.isfinite(terms["loss"]):
                raise UserError(
                    f"step {ctx.step}, epoch {epoch}, iteration {iteration}: the loss is {terms['loss']} ({terms}); "
                    f"images {raw.indices.tolist()}. Lower the learning rate or use train.precision=32"
                )
            rates = {f"lr/{g['name']}": g["lr"] for g in optimizer.param_groups}
            logger.log_metrics({f"loss/{k}": v for k, v in terms.items()} | rates, step=iteration)
            if last or bar.live:
                bar.show(f"epoch {epoch}/{epochs}", terms, len(raw))
