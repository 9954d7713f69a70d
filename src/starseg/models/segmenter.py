"""Segmentation network: encoder, decoder, and one classifier head per step (docs/protocol.md).

Shape letters: N images, H W pixels, h w feature cells, D feature channels, C logit channels: those of the leading heads
(none in STAR), then the classes without background.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import timm.layers
import torch
from torch import Tensor, nn

from starseg.models.architectures import Architecture
from starseg.models.classifiers import AUXILIARY, SIGMOID, HeadLayout, make_head
from starseg.models.encoders import Encoder, Preprocess
from starseg.ops.bilinear import resize
from starseg.ops.fused_layers import fuse_batch_norm
from starseg.utils.deprecation import old_names

__getattr__ = old_names(__name__)

# Of timm's own norms, those that are no subclass of torch's; which of them there are depends on timm's version.
_TIMM_NORMS = tuple(
    getattr(timm.layers, name)
    for name in ("RmsNorm", "RmsNormFp32", "RmsNorm2d", "RmsNorm2dFp32", "SimpleNorm", "SimpleNorm2d")
    if hasattr(timm.layers, name)
)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *_TIMM_NORMS)
_DROPOUTS = (nn.modules.dropout._DropoutNd, timm.layers.DropPath, timm.layers.DropBlock2d, timm.layers.PatchDropout)
_FORMER = {"backbone": "encoder", "aspp": "decoder", "output_stride": "stride"}
# Of the images that go through a network at a time: their maps stay in a CPU's cache (docs/performance.md).
_PIXELS = 512 * 512


class Output(NamedTuple):
    """Outputs of the network.

    Attributes:
        features: [N, D, h, w], the map the heads and the prototypes live on.
        logits: [N, C, h, w], not upsampled: the leading channels, then class c + 1 at channel c of the rest.
        extra_logits: [M, C] of the extra features, or None.
        maps: the encoder's, from shallow to deep, or None.
    """

    features: Tensor
    logits: Tensor
    extra_logits: Tensor | None = None
    maps: list[Tensor] | None = None


class Roles(NamedTuple):
    """Parts of a network by role, for a method's parameter groups.

    Attributes:
        encoder, decoder: before the classifier.
        lead: heads of the leading channels.
        old, new: class heads of the steps before, and of the last one.
    """

    encoder: nn.Module
    decoder: nn.Module
    lead: nn.Module
    old: nn.Module
    new: nn.Module


class Segmenter(nn.Module):
    """Encoder, decoder, leading heads and one head per step; :func:`starseg.models.make_network` makes one.

    Args:
        architecture: what encoder and decoder were built from.
        encoder: gives maps.
        decoder: gives features on a grid; see :mod:`starseg.models.decoders`.
        head_sizes: new classes of each step so far.
        layout: the kind of heads, and which lead.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        architecture: Architecture,
        encoder: Encoder,
        decoder: nn.Module,
        head_sizes: list[int],
        layout: HeadLayout = SIGMOID,
    ) -> None:
        super().__init__()
        self.architecture, self.layout, self.stride = architecture, layout, architecture.stride
        self.encoder, self.decoder = encoder, decoder
        self.lead = nn.ModuleDict({name: make_head(self.width, 1, layout.conv) for name in layout.lead})
        self.heads = nn.ModuleList()
        self.head_sizes: list[int] = []
        for size in head_sizes:
            self.add_head(size)
        self.register_buffer("mean", torch.tensor(self.preprocess.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.preprocess.std).view(3, 1, 1), persistent=False)
        self._frozen: Sequence[nn.Module] = ()
        self.fuse_batch_norm()

    @property
    def width(self) -> int:
        """Feature channels."""
        return int(self.decoder.width)  # type: ignore[arg-type]

    @property
    def classes(self) -> int:
        """Number of classes, without the background."""
        return sum(self.head_sizes)

    @property
    def multiple(self) -> int:
        """Divisor of image sides that gives whole cells without resizing before the encoder."""
        return math.lcm(self.stride, self.encoder.multiple)

    @property
    def preprocess(self) -> Preprocess:
        """Normalisation that :meth:`normalize` applies."""
        return self.encoder.preprocess

    @property
    def roles(self) -> Roles:
        """Parts of the network by role."""
        return Roles(self.encoder, self.decoder, self.lead, self.heads[:-1], self.heads[-1])

    def __getattr__(self, name: str) -> Any:
        """Look up a part by its name in version 0.1.0, with a warning."""
        if name in _FORMER:
            warnings.warn(f"Segmenter.{name} is now Segmenter.{_FORMER[name]}", DeprecationWarning, stacklevel=2)
            return getattr(self, _FORMER[name])
        return super().__getattr__(name)

    def fuse_batch_norm(self) -> None:
        """Use the layers of :mod:`starseg.ops.fused_layers`; call it again after batch norms were replaced."""
        image = self.encoder.example()
        fuse_batch_norm(self.encoder, image)
        cells = [max(1, image.shape[-1] // stride) for stride in self.encoder.strides]
        maps = [image.new_zeros(1, c, n, n) for c, n in zip(self.encoder.channels, cells, strict=True)]
        fuse_batch_norm(self.decoder, maps, self._grid(maps, image))
        self.to(memory_format=torch.channels_last)

    def add_head(self, classes: int) -> None:
        """Append a randomly initialised head for ``classes`` new classes."""
        like = next(self.encoder.parameters())
        self.heads.append(make_head(self.width, classes, self.layout.conv).to(like.device))
        self.head_sizes.append(classes)

    def cut_heads(self, keep: int) -> list[nn.Module]:
        """Remove and return all heads except the first ``keep``."""
        taken = list(self.heads[keep:])
        self.heads, self.head_sizes = self.heads[:keep], self.head_sizes[:keep]
        return taken

    def freeze_norm(self, keep: Iterable[nn.Module] = ()) -> None:
        """Freeze norm layers (statistics and affine) and switch dropout off, for good: ``train()`` keeps it so.

        Args:
            keep: heads whose norms go on learning.
        """
        kept = {module for head in keep for module in head.modules()}
        still = [m for m in self.modules() if m not in kept and isinstance(m, (*_NORMS, *_DROPOUTS))]
        for module in still:
            module.requires_grad_(False)
        self._frozen = still
        self.train(self.training)

    def freeze_all_but(self, heads: Iterable[nn.Module]) -> None:
        """Freeze everything, norms and dropout as in :meth:`freeze_norm`, but ``heads``."""
        heads = list(heads)
        self.requires_grad_(False)
        self.freeze_norm(heads)
        for head in heads:
            head.requires_grad_(True)

    def train(self, mode: bool = True) -> Segmenter:
        """Set the training mode as torch does, but keep frozen layers in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Convert uint8 images [N, 3, H, W] on any device to the encoder's input, channels last."""
        images = images.to(self.mean.device, non_blocking=True).float().div_(255)
        return images.sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)

    def classify(self, features: Tensor) -> Tensor:
        """Compute logits [N, C, h, w] of a feature map [N, D, h, w]."""
        lead = [head(features.detach() if name == AUXILIARY else features) for name, head in self.lead.items()]
        return torch.cat([*lead, *(head(features) for head in self.heads)], 1)

    def predict(self, images: Tensor) -> Tensor:
        """Compute logits [N, C, h, w] of uint8 images [N, 3, H, W], without gradients; call it in eval mode."""
        on_cpu = self.mean.device.type == "cpu"
        at_once = max(1, _PIXELS // images[0, 0].numel()) if on_cpu else len(images)
        return torch.cat([self(self.normalize(part)).logits for part in images.split(at_once)])

    def forward(self, images: Tensor, extra_features: Tensor | None = None, maps: bool = False) -> Output:
        """Run the network.

        Args:
            images: [N, 3, H, W] normalised floats.
            extra_features: [M, D] replayed features to classify as well.
            maps: also return the encoder's maps.
        """
        images = self._fit(images)
        found = self.encoder(images)
        features = self.decoder(found, self._grid(found, images))
        extra = None
        if extra_features is not None and len(extra_features):
            extra = self.classify(extra_features.T[None, :, :, None])[0, :, :, 0].T
        return Output(features, self.classify(features), extra, found if maps else None)

    def _fit(self, images: Tensor) -> Tensor:
        """Resize images to the nearest size that the encoder takes."""
        if self.encoder.convolutional:
            return images
        size = [max(1, round(int(side) / self.multiple)) * self.multiple for side in images.shape[-2:]]
        return images if size == list(images.shape[-2:]) else resize(images, size)

    def _grid(self, maps: Sequence[Tensor], images: Tensor) -> Sequence[int]:
        """Return height and width of the feature map: those of a map of the same stride if there is one."""
        if self.stride in self.encoder.strides:
            return maps[self.encoder.strides.index(self.stride)].shape[-2:]
        return [side // self.stride for side in images.shape[-2:]]
