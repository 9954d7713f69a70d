"""Decoders: from an encoder's maps to the feature map that classifiers and prototypes use."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

FEATURES = 256


class Aspp(ASPP):
    """torchvision's ASPP with dropout 0.1, followed by one more 3x3 conv-BN-ReLU."""

    def __init__(self, in_channels: int, output_stride: int) -> None:
        rates = [r * 16 // output_stride for r in (6, 12, 18)]
        super().__init__(in_channels, rates, FEATURES)
        self.in_channels = in_channels
        self.project[-1].p = 0.1
        self.last_conv = nn.Sequential(
            nn.Conv2d(FEATURES, FEATURES, 3, padding=1, bias=False), nn.BatchNorm2d(FEATURES), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last_conv(super().forward(x))
