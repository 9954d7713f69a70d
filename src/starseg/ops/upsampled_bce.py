"""Binary cross-entropy of upsampled logits that are never stored (the base loss).

Shape letters: N images, K classes, H W pixels, h w feature cells; n, k those of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from starseg.ops.bilinear import axis_weights, chunk_size
from starseg.ops.labels import ignored_id

# Beyond it log(1 + exp(x)) is x, in float64 too.
_LINEAR = 40.0


class UpsampledBce(torch.autograd.Function):
    """Sum over pixels of each class's BCE with logits; call ``apply`` with the arguments below.

    Args:
        logits: [N, K, h, w] floats; a pixel's is their bilinear interpolation.
        labels: [N, H, W] ids.
        first_id: the id of channel 0; pixels of other ids are negatives.
        pos_weight: weight of positive pixels.
        ignored_as_negatives: ignored pixels are negatives; else they add nothing.

    Returns:
        [K] sums. Their gradient with respect to the logits is computed along with them, chunk by chunk: the stored
        tensor has the logits' size, and temporary memory does not grow with the number of classes.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first_id: int, pos_weight: float, ignored_as_negatives: bool
    ) -> Tensor:
        """Compute the sums [K] and, chunk by chunk, their gradient."""
        (_, height, width), device = labels.shape, logits.device
        (images, classes), ignored = logits.shape[:2], ignored_id(labels)
        ids = torch.arange(first_id, first_id + classes, device=device, dtype=logits.dtype)[:, None, None]
        sums = logits.new_zeros(classes)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        maps = chunk_size(height * width, device)
        side = min(images, maps)
        with torch.autocast(device.type, enabled=False):
            down, across = axis_weights(height, logits, 2), axis_weights(width, logits, 3)
            for n in _slices(images, side):
                seen = labels[n, None].to(logits.dtype)
                hidden = None if ignored_as_negatives else torch.where(seen == ignored, -torch.inf, 0.0)
                for k in _slices(classes, maps // side):
                    positive = torch.eq(seen, ids[k], out=torch.empty_like(seen[:0]))
                    signed_logits = down @ (logits[n, k] @ across.T)
                    signed_logits.addcmul_(positive, signed_logits, value=-2)
                    if hidden is not None:
                        signed_logits += hidden
                    sums[k] += _losses(signed_logits, positive, pos_weight)
                    if gradient is not None:
                        gradient[n, k] = down.T @ _grad_logits_(signed_logits, positive, pos_weight) @ across
        ctx.save_for_backward(gradient)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradient by the incoming one, [K]."""
        (gradient,) = ctx.saved_tensors
        return gradient * weights[:, None, None], None, None, None, None


def _slices(length: int, most: int) -> Iterator[slice]:
    for start in range(0, length, most):
        yield slice(start, start + most)


def _losses(signed_logits: Tensor, positive: Tensor, pos_weight: float) -> Tensor:
    """Return the summed losses [k] of logits [n, k, H, W] whose sign is flipped where ``positive``."""
    loss = F.softplus(signed_logits, threshold=_LINEAR)
    return loss.addcmul_(positive, loss, value=pos_weight - 1).sum((0, 2, 3))


def _grad_logits_(signed_logits: Tensor, positive: Tensor, pos_weight: float) -> Tensor:
    """Overwrite ``signed_logits`` with the gradients [n, k, H, W] with respect to the logits."""
    slope = signed_logits.sigmoid_()
    return slope.addcmul_(positive, slope, value=-1 - pos_weight)
