"""Training and test transforms on uint8 tensors.

Shapes: image [3, H, W] uint8, mask [1, H, W] uint8 (or one channel per mask). Masks are resampled with "nearest-exact",
which selects the same pixels as PIL's NEAREST in the published pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from starseg.utils.deprecation import old_names

__getattr__ = old_names(__name__)

_NEAREST = InterpolationMode.NEAREST_EXACT


@dataclass(frozen=True)
class TrainCrop:
    """A crop of a training image, in pixels of the whole image, and whether it is flipped."""

    top: int
    left: int
    height: int
    width: int
    flipped: bool

    def scale(self, side: int) -> int:
        """Return by how much a JPEG decoder may reduce the image, 1, 2, 4 or 8, for a resized crop of ``side`` pixels.

        The reduced crop is not smaller than the resized one, so that no axis is enlarged that would have been reduced.
        """
        return next((scale for scale in (8, 4, 2) if scale * side <= min(self.height, self.width)), 1)

    def aligned(self, scale: int, size: Sequence[int]) -> TrainCrop:
        """Return the nearest crop whose edges are edges of pixels of the image reduced by ``scale``.

        Args:
            scale: number of pixels along an axis of which the decoder makes one.
            size: (height, width) of the whole image.
        """
        height, width = self.height // scale, self.width // scale
        top = min(round(self.top / scale), size[0] // scale - height)
        left = min(round(self.left / scale), size[1] // scale - width)
        return TrainCrop(top * scale, left * scale, height * scale, width * scale, self.flipped)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Top, left, height and width."""
        return self.top, self.left, self.height, self.width

    def apply(self, image: Tensor, side: int) -> Tensor:
        """Cut the crop out of an image and resize and flip it."""
        return self.resize(F.crop(image, *self.box), side)

    def apply_to_mask(self, mask: Tensor, side: int) -> Tensor:
        """Cut the crop out of a mask and resize and flip it."""
        mask = _resized_mask(F.crop(mask, *self.box), side)
        return F.horizontal_flip(mask) if self.flipped else mask

    def resize(self, image: Tensor, side: int) -> Tensor:
        """Resize and flip a crop that has been cut out."""
        # ATen resizes contiguous channels_last uint8 images pixel by pixel, in less than half the time.
        image = image[None].contiguous(memory_format=torch.channels_last)
        image = F.resize(image, [side, side], antialias=True)[0]
        return F.horizontal_flip(image) if self.flipped else image


def draw_crop(size: Sequence[int]) -> TrainCrop:
    """Draw a random resized crop (area 0.5..2.0, ratio 3/4..4/3) and a random horizontal flip.

    Random numbers are drawn from torch's global generator.

    Args:
        size: (height, width) of the whole image in pixels.
    """
    pixels = torch.empty(1, 1, 1).expand(3, *size)  # takes no memory
    top, left, height, width = RandomResizedCrop.get_params(pixels, scale=[0.5, 2.0], ratio=[3 / 4, 4 / 3])
    return TrainCrop(top, left, height, width, bool(torch.rand(()) < 0.5))


def train_transform(image: Tensor, mask: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """Apply a random crop and flip as :func:`draw_crop` draws them."""
    drawn = draw_crop(image.shape[-2:])
    return drawn.apply(image, crop), drawn.apply_to_mask(mask, crop)


def _resized_mask(mask: Tensor, crop: int) -> Tensor:
    """Resize a mask like F.resize with "nearest-exact", in half the time: select columns, then rows, by index."""
    rows, columns = (_nearest(side, crop) for side in mask.shape[1:])
    return torch.from_numpy(mask.numpy().take(columns, 2).take(rows, 1))


def _nearest(side: int, crop: int) -> np.ndarray:
    places = torch.arange(side, dtype=torch.float64)
    return interpolate(places[None, None], crop, mode="nearest-exact")[0, 0].long().numpy()


def eval_transform(image: Tensor, mask: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """Resize the short side to ``crop`` pixels, then take a square centre crop of that size."""
    image = F.resize(image, [crop], antialias=True)
    mask = F.resize(mask, [crop], interpolation=_NEAREST)
    return F.center_crop(image, [crop, crop]), F.center_crop(mask, [crop, crop])
