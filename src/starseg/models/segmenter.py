"""DeepLabV3 with one classifier head per step (docs/protocol.md).

Shape letters: N images, H W pixels, h w feature cells, D feature channels (256), C logit channels: those of the leading
heads (none in STAR), then the classes without background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from starseg.models.classifiers import AUXILIARY, SIGMOID, HeadLayout, make_head
from starseg.models.decoders import Aspp
from starseg.models.encoders import make_backbone
from starseg.ops.fused_layers import fuse_batch_norm
from starseg.utils.deprecation import old_names

__getattr__ = old_names(__name__)

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


class Segmenter(nn.Module):
    """Backbone, ASPP, leading heads and one head per step.

    Args:
        backbone: timm model name.
        head_sizes: new classes of each step so far.
        output_stride: 8 or 16.
        pretrained: ImageNet weights of the backbone: yes, no, or a file.
        layout: the kind of heads, and which lead.

    Raises:
        UserError: see :func:`starseg.models.encoders.make_backbone`.
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
        self.fuse_batch_norm()

    def fuse_batch_norm(self) -> None:
        """Use the layers of :mod:`starseg.ops.fused_layers`; call it again after batch norms were replaced."""
        fuse_batch_norm(self.backbone, 3)
        fuse_batch_norm(self.aspp, self.aspp.in_channels)
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
