"""Training and test transforms on uint8 tensors.

Shapes: image [3, H, W] uint8, mask [1, H, W] uint8. Masks are resampled with "nearest-exact", which picks the pixels
that PIL's NEAREST picks in the published pipeline.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

_NEAREST = InterpolationMode.NEAREST_EXACT


def train_transform(image: Tensor, mask: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """Random resized crop (area 0.5..2.0, ratio 3/4..4/3) and horizontal flip, drawn from torch's global generator."""
    box = RandomResizedCrop.get_params(image, scale=[0.5, 2.0], ratio=[3 / 4, 4 / 3])
    image = F.resized_crop(image, *box, size=[crop, crop], antialias=True)
    mask = F.resized_crop(mask, *box, size=[crop, crop], interpolation=_NEAREST, antialias=False)
    if torch.rand(()) < 0.5:
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    return image, mask


def test_transform(image: Tensor, mask: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """Short side resized to ``crop``, then a centre crop of that size."""
    image = F.resize(image, [crop], antialias=True)
    mask = F.resize(mask, [crop], interpolation=_NEAREST)
    return F.center_crop(image, [crop, crop]), F.center_crop(mask, [crop, crop])
