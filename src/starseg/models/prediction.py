"""Prediction rules, which compute training ids from logits.

Shape letters: N images, C logit channels, H W pixels, h w feature cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starseg.ops.bilinear import chunk_size, largest, resize

# With three or fewer channels, a CPU uses another interpolation kernel, whose results differ in the last bit.
_FEWEST = 4
# Number of logit maps upsampled at a time, small enough for a CPU's cache.
_AT_A_TIME = 8


@dataclass(frozen=True)
class LargestLogit:
    """Sigmoid prediction rule: the class of the largest logit if it exceeds 0, else background.

    Attributes:
        argmax_of_sigmoids: compare float32 sigmoids instead of logits; saturated sigmoids tie, and the first wins.
        lead: number of leading channels, which are ignored.
    """

    argmax_of_sigmoids: bool = False
    lead: int = 0

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the int64 training ids [N, ...] of logits [N, C, ...]; channel lead + c has training id c + 1."""
        return self._ids(*self._score(logits[:, self.lead :]).max(1))

    def upsampled(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Apply the rule to logits [N, C, h, w] resized to ``size``: training ids [N, *size].

        Only the logits of classes that can be predicted are resized, a few maps at a time: a class without a positive
        logit in an image has none after bilinear interpolation either.
        """
        images = logits[:, self.lead :].contiguous().split(1)
        return torch.cat([self._upsampled_image(image, size) for image in images])

    def _upsampled_image(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        peaks = logits.amax((0, 2, 3))
        most = min(len(peaks), max(_FEWEST, int((peaks > 0).sum())))
        chosen = peaks.topk(most).indices.sort().values
        parts = logits[:, chosen].tensor_split(
            max(1, most // max(_AT_A_TIME, chunk_size(size[0] * size[1], logits.device))), 1
        )
        best, winner = largest(self._score(resize(part, size)) for part in parts)
        return self._ids(best, chosen[winner])

    def _score(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid() if self.argmax_of_sigmoids else logits

    def _ids(self, best: Tensor, winner: Tensor) -> Tensor:
        return torch.where(best > (0.5 if self.argmax_of_sigmoids else 0), winner + 1, 0)


@dataclass(frozen=True)
class LargestClass:
    """Prediction rule without a background: the class of the largest logit.

    Attributes:
        lead: number of leading channels, which are ignored.
    """

    lead: int = 0

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the int64 training ids [N, ...] of logits [N, C, ...]; channel lead + c has training id c + 1."""
        return logits[:, self.lead :].argmax(1) + 1


def predict_upsampled(rule: Callable[[Tensor], Tensor], logits: Tensor, size: Sequence[int]) -> Tensor:
    """Apply a prediction rule to logits [N, C, h, w] resized to ``size``, by its ``upsampled`` method if it has one.

    Logits are made contiguous first, so that the result does not depend on their memory format: interpolation in
    channels_last rounds differently.

    Returns:
        [N, *size] training ids.
    """
    upsampled = getattr(rule, "upsampled", None)
    return upsampled(logits, size) if upsampled else rule(resize(logits.contiguous(), size))
