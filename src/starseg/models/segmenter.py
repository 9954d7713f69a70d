"""DeepLabV3 with one classifier head per step (REFERENCE, "The model").

Shape letters: N images, H W pixels, h w feature cells, D feature channels (256), C classes without background.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from starseg.models.backbones import make_backbone

FEATURES = 256
_NORMS = (nn.modules.batchnorm._BatchNorm,)
_DROPOUTS = (nn.modules.dropout._DropoutNd, DropPath)


class Output(NamedTuple):
    """What the network computes.

    Attributes:
        features: [N, D, h, w], the map the heads and the prototypes live on.
        logits: [N, C, h, w], channel c is training id c + 1, not upsampled.
        extra_logits: [M, C] of the extra features, or None.
        body: [N, B, h, w] backbone output, or None.
        stages: backbone maps from shallow to deep, or None.
    """

    features: Tensor
    logits: Tensor
    extra_logits: Tensor | None = None
    body: Tensor | None = None
    stages: list[Tensor] | None = None


class Aspp(ASPP):
    """torchvision's ASPP with dropout 0.1, followed by one more 3x3 conv-BN-ReLU."""

    def __init__(self, in_channels: int, output_stride: int) -> None:
        rates = [r * 16 // output_stride for r in (6, 12, 18)]
        super().__init__(in_channels, rates, FEATURES)
        self.project[-1].p = 0.1
        self.last_conv = nn.Sequential(
            nn.Conv2d(FEATURES, FEATURES, 3, padding=1, bias=False), nn.BatchNorm2d(FEATURES), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last_conv(super().forward(x))


class Segmenter(nn.Module):
    """Backbone, ASPP and one 1x1 head per step.

    Args:
        backbone: timm model name.
        head_sizes: new classes of each step so far.
        output_stride: 8 or 16.
        pretrained: ImageNet weights of the backbone: yes, no, or a file.

    Raises:
        UserError: see :func:`starseg.models.backbones.make_backbone`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: str, head_sizes: list[int], output_stride: int = 16, pretrained: bool | Path = False
    ) -> None:
        super().__init__()
        parts = make_backbone(backbone, output_stride, pretrained)
        self.backbone_name, self.output_stride = backbone, output_stride
        self.backbone = parts.module
        for module in self.backbone.modules():
            if isinstance(module, _NORMS):
                module.momentum = 0.01
        self.aspp = Aspp(parts.channels, output_stride)
        self.heads = nn.ModuleList()
        self.head_sizes: list[int] = []
        for size in head_sizes:
            self.add_head(size)
        self.register_buffer("mean", torch.tensor(parts.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(parts.std).view(3, 1, 1), persistent=False)
        self.norm_frozen = False

    def add_head(self, classes: int) -> None:
        """Append a randomly initialised head for ``classes`` new classes."""
        like = next(self.aspp.parameters())
        self.heads.append(nn.Conv2d(FEATURES, classes, 1).to(like.device))
        self.head_sizes.append(classes)

    def freeze_norm(self) -> None:
        """Freeze batch norm (statistics and affine) and switch dropout off, for good: ``train()`` keeps it so."""
        self.norm_frozen = True
        for module in self.modules():
            if isinstance(module, _NORMS):
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        if self.norm_frozen:
            for module in self.modules():
                if isinstance(module, (*_NORMS, *_DROPOUTS)):
                    module.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] on any device to the backbone's input, channels last."""
        images = images.to(self.mean.device, non_blocking=True).float().div_(255)
        return images.sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [N, C, h, w] of a feature map [N, D, h, w]."""
        return torch.cat([head(features) for head in self.heads], 1)

    def forward(self, images: Tensor, extra_features: Tensor | None = None, stages: bool = False) -> Output:
        """Run the network.

        Args:
            images: [N, 3, H, W] normalised floats.
            extra_features: [M, D] replayed features to classify as well.
            stages: also return the backbone's maps.
        """
        maps = self.backbone(images)
        features = self.aspp(maps[-1])
        extra = None
        if extra_features is not None and len(extra_features):
            extra = self.classify(extra_features.T[None, :, :, None])[0, :, :, 0].T
        logits = self.classify(features)
        return Output(features, logits, extra, maps[-1] if stages else None, maps if stages else None)


def predict(logits: Tensor, published: bool = False) -> Tensor:
    """The sigmoid prediction rule: the largest logit's class where it exceeds 0, else background.

    Args:
        logits: [N, C, ...], channel c is training id c + 1.
        published: argmax of the float32 sigmoids, where saturated ones tie and the first wins.

    Returns:
        [N, ...] int64 training ids.
    """
    if published:
        best, winner = logits.float().sigmoid().max(1)
        return torch.where(best > 0.5, winner + 1, 0)
    best, winner = logits.max(1)
    return torch.where(best > 0, winner + 1, 0)
