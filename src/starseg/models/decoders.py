"""Decoders: from an encoder's maps to the feature map that classifiers and prototypes use.

A decoder is a module that is called with the encoder's maps and the grid, the height and width of its feature map in
cells, and tells its ``width``, the number of feature channels.

Shape letters: N images, h w feature cells, D feature channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from starseg.models.encoders import Encoder
from starseg.ops.bilinear import resize

_WIDTH = 256
Grid = Sequence[int]


def _ratios(encoder: Encoder, stride: int) -> list[int]:
    """Return how many cells of each map make one cell of the grid along an axis, at least one."""
    return [max(1, stride // own) for own in encoder.strides]


def _to_grid(maps: Tensor, ratio: int, grid: Grid) -> Tensor:
    """Average maps [N, C, *, *] over ``ratio`` x ``ratio`` cells and resize those that are not on the grid yet."""
    if ratio > 1:
        maps = F.avg_pool2d(maps, ratio, ceil_mode=True)
    # An exported graph must resize at sizes at which the traced example need not.
    return maps if maps.shape[-2:] == tuple(grid) and not torch.onnx.is_in_onnx_export() else resize(maps, grid)


def _conv_norm_relu(channels: int, width: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Aspp(ASPP):
    """ASPP of torchvision with dropout 0.1 on the deepest map, followed by one more 3x3 conv-BN-ReLU."""

    def __init__(self, encoder: Encoder, output_stride: int) -> None:
        rates = [r * 16 // output_stride for r in (6, 12, 18)]
        super().__init__(encoder.channels[-1], rates, _WIDTH)
        self.width, self.ratio = _WIDTH, _ratios(encoder, output_stride)[-1]
        self.on_grid = encoder.strides[-1] == output_stride
        self.project[-1].p = 0.1
        self.last_conv = _conv_norm_relu(_WIDTH, _WIDTH, 3)

    def forward(self, maps: Sequence[Tensor], grid: Grid) -> Tensor:
        """Return features [N, D, h, w]."""
        deepest = maps[-1] if self.on_grid else _to_grid(maps[-1], self.ratio, grid)
        return self.last_conv(super().forward(deepest))


class Fpn(nn.Module):
    """Light feature pyramid: 1x1 conv-BN-ReLU of every map, their sum on the grid, 3x3 conv-BN-ReLU."""

    def __init__(self, encoder: Encoder, output_stride: int) -> None:
        super().__init__()
        self.width, self.ratios = _WIDTH, _ratios(encoder, output_stride)
        self.lateral = nn.ModuleList(_conv_norm_relu(channels, _WIDTH, 1) for channels in encoder.channels)
        self.last_conv = _conv_norm_relu(_WIDTH, _WIDTH, 3)

    def forward(self, maps: Sequence[Tensor], grid: Grid) -> Tensor:
        """Return features [N, D, h, w]."""
        parts = zip(self.lateral, maps, self.ratios, strict=True)
        return self.last_conv(torch.stack([lateral(_to_grid(m, ratio, grid)) for lateral, m, ratio in parts]).sum(0))


class Linear(nn.Module):
    """Linear projection (1x1) of all maps, concatenated on the grid, with batch norm."""

    def __init__(self, encoder: Encoder, output_stride: int) -> None:
        super().__init__()
        self.width, self.ratios = _WIDTH, _ratios(encoder, output_stride)
        self.project = nn.Conv2d(sum(encoder.channels), _WIDTH, 1, bias=False)
        self.norm = nn.BatchNorm2d(_WIDTH)

    def forward(self, maps: Sequence[Tensor], grid: Grid) -> Tensor:
        """Return features [N, D, h, w]."""
        found = [_to_grid(m, ratio, grid) for m, ratio in zip(maps, self.ratios, strict=True)]
        return self.norm(self.project(torch.cat(found, 1)))


DECODERS: dict[str, Callable[[Encoder, int], nn.Module]] = {"aspp": Aspp, "fpn": Fpn, "linear": Linear}
