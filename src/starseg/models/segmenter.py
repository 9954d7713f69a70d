"""DeepLabV3 with one classifier head per step (docs/protocol.md).

Shape letters: N images, H W pixels, h w feature cells, D feature channels (256), C logit channels: those of the leading
heads (none in STAR), then the classes without background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from starseg.bilinear import chunk_size, largest, resize
from starseg.models.backbones import make_backbone
from starseg.models.heads import AUXILIARY, SIGMOID, HeadLayout, make_head
from starseg.models.lean import lighten

FEATURES = 256
_NORMS = (nn.modules.batchnorm._BatchNorm,)
# Three channels are interpolated by another kernel on a CPU, whose last bit differs.
_FEWEST = 4
# Maps of an image that are upsampled at a time: few enough for a CPU's cache.
_AT_A_TIME = 8
# Of the images that go through a network at a time: their maps stay in a CPU's cache (docs/performance.md).
_PIXELS = 512 * 512
_DROPOUTS = (nn.modules.dropout._DropoutNd, DropPath)


class Output(NamedTuple):
    """What the network computes.

    Attributes:
        features: [N, D, h, w], the map the heads and the prototypes live on.
        logits: [N, C, h, w], not upsampled: the leading channels, then class c + 1 at channel c of the rest.
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
        self.in_channels = in_channels
        self.project[-1].p = 0.1
        self.last_conv = nn.Sequential(
            nn.Conv2d(FEATURES, FEATURES, 3, padding=1, bias=False), nn.BatchNorm2d(FEATURES), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last_conv(super().forward(x))


class Segmenter(nn.Module):
    """Backbone, ASPP, leading heads and one head per step.

    Args:
        backbone: timm model name.
        head_sizes: new classes of each step so far.
        output_stride: 8 or 16.
        pretrained: ImageNet weights of the backbone: yes, no, or a file.
        layout: the kind of heads, and which lead.

    Raises:
        UserError: see :func:`starseg.models.backbones.make_backbone`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str,
        head_sizes: list[int],
        output_stride: int = 16,
        pretrained: bool | Path = False,
        layout: HeadLayout = SIGMOID,
    ) -> None:
        super().__init__()
        parts = make_backbone(backbone, output_stride, pretrained)
        self.backbone_name, self.output_stride = backbone, output_stride
        self.backbone = parts.module
        for module in self.backbone.modules():
            if isinstance(module, _NORMS):
                module.momentum = 0.01
        self.aspp = Aspp(parts.channels, output_stride)
        self.layout = layout
        self.lead = nn.ModuleDict({name: make_head(FEATURES, 1, layout.conv) for name in layout.lead})
        self.heads = nn.ModuleList()
        self.head_sizes: list[int] = []
        for size in head_sizes:
            self.add_head(size)
        self.register_buffer("mean", torch.tensor(parts.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(parts.std).view(3, 1, 1), persistent=False)
        self._frozen: Sequence[nn.Module] = ()
        self.lighten()

    def lighten(self) -> None:
        """Take the convolutions and batch norms of :mod:`starseg.models.lean`; anew where batch norms were replaced."""
        lighten(self.backbone, 3)
        lighten(self.aspp, self.aspp.in_channels)
        self.to(memory_format=torch.channels_last)

    def add_head(self, classes: int) -> None:
        """Append a randomly initialised head for ``classes`` new classes."""
        like = next(self.aspp.parameters())
        self.heads.append(make_head(FEATURES, classes, self.layout.conv).to(like.device))
        self.head_sizes.append(classes)

    def cut_heads(self, keep: int) -> list[nn.Module]:
        """Take off and return all heads but the first ``keep``."""
        taken = list(self.heads[keep:])
        self.heads, self.head_sizes = self.heads[:keep], self.head_sizes[:keep]
        return taken

    def freeze_norm(self, keep: Iterable[nn.Module] = ()) -> None:
        """Freeze batch norm (statistics and affine) and switch dropout off, for good: ``train()`` keeps it so.

        Args:
            keep: heads whose batch norm goes on learning.
        """
        kept = {module for head in keep for module in head.modules()}
        still = [m for m in self.modules() if m not in kept and isinstance(m, (*_NORMS, *_DROPOUTS))]
        for module in still:
            module.requires_grad_(False)
        self._frozen = still
        self.train(self.training)

    def freeze_all_but(self, heads: Iterable[nn.Module]) -> None:
        """Freeze everything, batch norm and dropout as in :meth:`freeze_norm`, but ``heads``."""
        heads = list(heads)
        self.requires_grad_(False)
        self.freeze_norm(heads)
        for head in heads:
            head.requires_grad_(True)

    def train(self, mode: bool = True) -> Segmenter:
        """As torch's, but what was frozen stays in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] on any device to the backbone's input, channels last."""
        images = images.to(self.mean.device, non_blocking=True).float().div_(255)
        return images.sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [N, C, h, w] of a feature map [N, D, h, w]."""
        lead = [head(features.detach() if name == AUXILIARY else features) for name, head in self.lead.items()]
        return torch.cat([*lead, *(head(features) for head in self.heads)], 1)

    def predict(self, images: Tensor) -> Tensor:
        """Logits [N, C, h, w] of uint8 images [N, 3, H, W]; in eval mode, without gradients."""
        on_cpu = self.mean.device.type == "cpu"
        at_once = max(1, _PIXELS // images[0, 0].numel()) if on_cpu else len(images)
        return torch.cat([self(self.normalize(part)).logits for part in images.split(at_once)])

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


@dataclass(frozen=True)
class LargestLogit:
    """The sigmoid prediction rule: the largest logit's class where it exceeds 0, else background.

    Attributes:
        published: argmax of the float32 sigmoids, where saturated ones tie and the first wins.
        lead: leading channels that have no say.
    """

    published: bool = False
    lead: int = 0

    def __call__(self, logits: Tensor) -> Tensor:
        """[N, ...] int64 training ids of [N, C, ...], channel lead + c being training id c + 1."""
        return self._ids(*self._score(logits[:, self.lead :]).max(1))

    def upsampled(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """The rule on logits [N, C, h, w] resized to ``size``, resizing only what can win, a few maps at a time.

        A class with no positive logit in an image has none after bilinear interpolation either.
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
        return logits.float().sigmoid() if self.published else logits

    def _ids(self, best: Tensor, winner: Tensor) -> Tensor:
        return torch.where(best > (0.5 if self.published else 0), winner + 1, 0)


def predict_upsampled(rule: Callable[[Tensor], Tensor], logits: Tensor, size: Sequence[int]) -> Tensor:
    """A prediction rule on logits [N, C, h, w] resized to ``size``, by the rule's own ``upsampled`` if it has one.

    The logits' memory format does not matter: channels_last ones would be interpolated with other rounding.

    Returns:
        [N, *size] training ids.
    """
    upsampled = getattr(rule, "upsampled", None)
    return upsampled(logits, size) if upsampled else rule(resize(logits.contiguous(), size))
