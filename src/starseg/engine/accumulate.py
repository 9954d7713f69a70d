"""Gradient accumulation over micro-batches that leaves the losses unchanged."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from starseg.models import Output


class MicroBatches:
    """Wrapper that runs a network on a batch in parts; call it once, then call :meth:`backward`.

    The losses are computed from the outputs of the whole batch, so that they and their gradients equal those without
    accumulation, however they are normalised. Each part passes through the network twice: first without gradients, to
    compute the outputs, then once more to backpropagate the gradients of the losses with respect to these outputs. Only
    a batch norm in training mode differs, as it uses the statistics of one part; dropout uses the same random numbers
    both times.

    Args:
        fabric: the Fabric whose strategy and precision perform the backward passes.
        network: a :class:`starseg.models.Segmenter` as set up by ``fabric``.
        run: function that calls the network.
        parts: number of parts of a batch.
    """

    def __init__(self, fabric: Fabric, network: nn.Module, run: Callable[..., Output], parts: int) -> None:
        self.fabric, self.network, self.run, self.parts = fabric, network, run, parts
        self.calls: list[tuple[Any, ...]] = []
        self.leaves: list[Tensor] = []

    def __call__(self, images: Tensor, extra_features: Tensor | None = None, maps: bool = False) -> Output:
        """Compute the outputs of all parts without gradients; return them, concatenated, as leaves of a new graph."""
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
        """Add the gradients of a loss on the outputs to those of the network's parameters."""
        # The gradient of ``unit`` is the fp16 loss scale. Gradients are divided by it because the backward passes of
        # the parts apply the scale again.
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
        """Restore the random state afterwards, so that the second pass draws the same random numbers as the first."""
        device = self.fabric.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _maps(output: Output) -> list[Tensor]:
    return [output.features, output.logits, *(output.maps or [])]
