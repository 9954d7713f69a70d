"""Gradient accumulation that changes no loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from starseg.models import Output


class MicroBatches:
    """Network that processes a batch in micro-batches; call it once, then :meth:`backward`.

    The losses see the outputs of the whole batch, so they and their gradients are the batch's, whatever they are
    normalised over. The parts go through the network twice: without gradients for the outputs, then one by one with
    the gradients that the losses have for these. Only a batch norm that is trained takes its statistics from a part;
    dropout draws the same both times.

    Args:
        fabric: its strategy and precision do the backward passes.
        network: a :class:`starseg.models.Segmenter` as set up by ``fabric``.
        run: calls it.
        parts: of a batch.
    """

    def __init__(self, fabric: Fabric, network: nn.Module, run: Callable[..., Output], parts: int) -> None:
        self.fabric, self.network, self.run, self.parts = fabric, network, run, parts
        self.calls: list[tuple[Any, ...]] = []
        self.leaves: list[Tensor] = []

    def __call__(self, images: Tensor, extra_features: Tensor | None = None, maps: bool = False) -> Output:
        """Return the concatenated outputs of all micro-batches, as leaves of a graph."""
        parts = images.tensor_split(self.parts)
        self.calls = [(part, None if i else extra_features, maps) for i, part in enumerate(parts)]
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        with torch.no_grad(), self._same_draws():
            found = [self.run(*call) for call in self.calls]
            for buffer, before in buffers:
                buffer.copy_(before)
        joined = [torch.cat(same) for same in zip(*map(_maps, found), strict=True)]
        extra = found[0].extra_logits
        self.leaves = [value.requires_grad_() for value in (*joined, *([] if extra is None else [extra]))]
        return Output(joined[0], joined[1], extra, joined[2:] or None)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the parameters' gradients of a loss of the outputs."""
        # Its gradient is what fp16's loss scaler multiplies all by, as it will those of the parts once more.
        unit = torch.zeros_like(loss, requires_grad=True)
        self.fabric.backward(loss + unit)
        assert unit.grad is not None
        slopes = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.div_(unit.grad) for leaf in self.leaves]
        first = 0
        for i, call in enumerate(self.calls):
            after = first + len(call[0])
            with self.fabric.no_backward_sync(self.network, enabled=i < len(self.calls) - 1):  # type: ignore[arg-type]
                output = self.run(*call)
                values = _maps(output)
                wanted = [slope[first:after] for slope in slopes[: len(values)]]
                if output.extra_logits is not None:
                    values, wanted = [*values, output.extra_logits], [*wanted, slopes[-1]]
                products = [(value * slope).sum() for value, slope in zip(values, wanted, strict=True)]
                self.fabric.backward(torch.stack(products).sum())
            first = after
        self.leaves = []

    def _same_draws(self) -> AbstractContextManager[None]:
        """Leave the random state as it was, so that the second time draws what the first did."""
        device = self.fabric.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _maps(output: Output) -> list[Tensor]:
    return [output.features, output.logits, *(output.maps or [])]
