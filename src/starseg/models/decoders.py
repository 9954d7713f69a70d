"""Decoders, which turn an encoder's maps into the feature map that classifier heads and prototypes use.

A decoder is a module called with the encoder's maps and the grid: the height and width, in cells, of the feature map to
return. Its attribute ``width`` is the number of feature channels.

Shape letters: N images, C map channels, h w feature cells, D feature channels.
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
# Smallest standard deviation by which a channel is divided, relative to the mean of all channels.
_LEAST = 0.1
Grid = Sequence[int]


def _ratios(encoder: Encoder, stride: int) -> list[int]:
    """Return, for each map, how many of its cells correspond to one grid cell along an axis (at least 1)."""
    return [max(1, stride // own) for own in encoder.strides]


def _to_grid(maps: Tensor, ratio: int, grid: Grid) -> Tensor:
    """Average maps [N, C, *, *] over ``ratio`` x ``ratio`` cells and resize them to the grid if necessary."""
    if ratio > 1:
        maps = F.avg_pool2d(maps, ratio, ceil_mode=True)
    # An exported graph may need to resize at other input sizes even if the traced example does not.
    return maps if maps.shape[-2:] == tuple(grid) and not torch.onnx.is_in_onnx_export() else resize(maps, grid)


def _conv_norm_relu(channels: int, width: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Aspp(ASPP):
    """torchvision's ASPP with dropout 0.1, applied to the deepest map and followed by a 3x3 conv-BN-ReLU."""

    def __init__(self, encoder: Encoder, output_stride: int) -> None:
        rates = [r * 16 // output_stride for r in (6, 12, 18)]
        super().__init__(encoder.channels[-1], rates, _WIDTH)
        self.width, self.ratio = _WIDTH, _ratios(encoder, output_stride)[-1]
        self.on_grid = encoder.strides[-1] == output_stride
        self.project[-1].p = 0.1
        self.last_conv = _conv_norm_relu(_WIDTH, _WIDTH, 3)

    def forward(self, maps: Sequence[Tensor], grid: Grid) -> Tensor:
        """Compute the feature map [N, D, h, w]."""
        deepest = maps[-1] if self.on_grid else _to_grid(maps[-1], self.ratio, grid)
        return self.last_conv(super().forward(deepest))


class Fpn(nn.Module):
    """Light feature pyramid: 1x1 conv-BN-ReLU of every map on the grid, sum over maps, 3x3 conv-BN-ReLU."""

    def __init__(self, encoder: Encoder, output_stride: int) -> None:
        super().__init__()
        self.width, self.ratios = _WIDTH, _ratios(encoder, output_stride)
        self.lateral = nn.ModuleList(_conv_norm_relu(channels, _WIDTH, 1) for channels in encoder.channels)
        self.last_conv = _conv_norm_relu(_WIDTH, _WIDTH, 3)

    def forward(self, maps: Sequence[Tensor], grid: Grid) -> Tensor:
        """Compute the feature map [N, D, h, w]."""
        parts = zip(self.lateral, maps, self.ratios, strict=True)
        return self.last_conv(torch.stack([lateral(_to_grid(m, ratio, grid)) for lateral, m, ratio in parts]).sum(0))


class Linear(nn.Module):
    """1x1 projection of all maps, concatenated on the grid, followed by batch norm."""

    def __init__(self, encoder: Encoder, output_stride: int) -> None:
        super().__init__()
        self.width, self.ratios = _WIDTH, _ratios(encoder, output_stride)
        self.project = nn.Conv2d(sum(encoder.channels), _WIDTH, 1, bias=False)
        self.norm = nn.BatchNorm2d(_WIDTH)

    def forward(self, maps: Sequence[Tensor], grid: Grid) -> Tensor:
        """Compute the feature map [N, D, h, w]."""
        found = [_to_grid(m, ratio, grid) for m, ratio in zip(maps, self.ratios, strict=True)]
        return self.norm(self.project(torch.cat(found, 1)))


class Descriptor(nn.Module):
    """Description of each cell by the encoder's deepest maps and their surroundings (docs/constellation.md).

    The raw description is the deepest maps, and averages of the deepest one over a window around the cell and over the
    image. A 1x1 convolution projects it, followed by batch norm. Both may be trained; :meth:`fit` sets them to
    standardisation and principal component analysis.

    Args:
        encoder: the encoder.
        output_stride: pixels per feature cell.
        width: number of feature channels D.
        window: side of the window in cells, odd; 0 for no such average.
        maps: how many of the encoder's maps are used, from the deepest; all if it has no more.
        image_mean: whether the average over the image is used.
        limit: largest root mean square of a cell's features, which are about 1 on the images that the descriptor was
            fitted to.
    """

    def __init__(
        self,
        encoder: Encoder,
        output_stride: int,
        width: int = _WIDTH,
        window: int = 5,
        maps: int = 2,
        image_mean: bool = True,
        limit: float = 2.0,
    ) -> None:
        super().__init__()
        self.width, self.window, self.image_mean, self.limit = width, window, image_mean, limit
        self.ratios = _ratios(encoder, output_stride)[-maps:]
        averages = (window > 0) + image_mean
        self.raw_width = sum(encoder.channels[-maps:]) + averages * encoder.channels[-1]
        self.project = nn.Conv2d(self.raw_width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def raw(self, maps: Sequence[Tensor], grid: Grid) -> Tensor:
        """Compute the raw description [N, raw_width, h, w]."""
        found = [_to_grid(m, r, grid) for m, r in zip(maps[-len(self.ratios) :], self.ratios, strict=True)]
        deepest = found[-1]
        if self.window:
            found.append(F.avg_pool2d(deepest, self.window, 1, self.window // 2, count_include_pad=False))
        if self.image_mean:
            found.append(deepest.mean((2, 3), keepdim=True).expand_as(deepest))
        return torch.cat(found, 1)

    def forward(self, maps: Sequence[Tensor], grid: Grid) -> Tensor:
        """Compute the feature map [N, D, h, w]; cells far from all that was seen in step 0 are drawn nearer."""
        features = self.norm(self.project(self.raw(maps, grid)))
        size = features.square().mean(1, keepdim=True).sqrt()
        return features / (size / self.limit).clamp_min(1)

    @torch.no_grad()
    def fit(self, mean: Tensor, covariance: Tensor, floor: float) -> None:
        """Standardise and project by the principal components of raw descriptions.

        Each channel is divided by its standard deviation, at least a tenth of the channels' mean, and each component by
        the square root of its variance, at least ``floor`` times the total variance.

        Args:
            mean: [raw_width] float64 mean of the raw descriptions.
            covariance: [raw_width, raw_width] float64 covariance.
            floor: see above.
        """
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        inverse = 1 / deviation.clamp_min(_LEAST * float(deviation.mean()) + 1e-12)
        values, vectors = torch.linalg.eigh(covariance * inverse[:, None] * inverse)
        least = max(floor * float(values.sum()), 1e-12)
        values, vectors = values[-self.width :].flip(0), vectors[:, -self.width :].flip(1)
        # The sign of an eigenvector is arbitrary: its largest entry is made positive.
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        weight = torch.zeros(self.width, self.raw_width, dtype=torch.float64, device=mean.device)
        weight[: len(values)] = (vectors * inverse[:, None] * values.clamp_min(least).rsqrt()).T
        self.project.weight.copy_(weight[:, :, None, None])
        self.norm.reset_parameters()
        self.norm.running_mean.copy_(weight @ mean)  # type: ignore[union-attr]


DECODERS: dict[str, Callable[..., nn.Module]] = {
    "aspp": Aspp,
    "fpn": Fpn,
    "linear": Linear,
    "descriptor": Descriptor,
}
