"""The segmentation network: encoder, decoder and one classifier head per step (docs/protocol.md).

Shape letters: N images, H W pixels, h w feature cells, D feature channels, M extra features, C logit channels (those of
the leading heads, none in STAR, then one per class without the background).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starseg.models.architectures import Architecture
from starseg.models.classifiers import AUXILIARY, SIGMOID, HeadLayout, last_layer, linear_classifier, make_head
from starseg.models.encoders import Encoder, Preprocess
from starseg.ops.bilinear import resize
from starseg.ops.fused_layers import fuse_batch_norm
from starseg.utils.deprecation import old_names

__getattr__ = old_names(__name__)

# timm's norm layers that do not subclass torch's; which of them exist depends on the version of timm.
_TIMM_NORMS = tuple(
    getattr(timm.layers, name)
    for name in ("RmsNorm", "RmsNormFp32", "RmsNorm2d", "RmsNorm2dFp32", "SimpleNorm", "SimpleNorm2d")
    if hasattr(timm.layers, name)
)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *_TIMM_NORMS)
_DROPOUTS = (nn.modules.dropout._DropoutNd, timm.layers.DropPath, timm.layers.DropBlock2d, timm.layers.PatchDropout)
_FORMER = {"backbone": "encoder", "aspp": "decoder", "output_stride": "stride"}
# Pixels of one forward pass on a CPU in float32 and in bf16, so that the maps stay in its cache (docs/performance.md).
_PIXELS, _PIXELS_BF16 = 512 * 512, 768 * 768


class Output(NamedTuple):
    """Outputs of a forward pass.

    Attributes:
        features: feature map [N, D, h, w], the input of the classifier heads and of the prototypes.
        logits: [N, C, h, w], not upsampled: the leading channels, followed by one channel per class in order of
            training ids.
        extra_logits: [M, C], logits of the extra features; None if there are none.
        maps: the encoder's maps, from shallow to deep; None unless requested.
    """

    features: Tensor
    logits: Tensor
    extra_logits: Tensor | None = None
    maps: list[Tensor] | None = None


class Roles(NamedTuple):
    """The parts of a network, from which a method forms its parameter groups.

    Attributes:
        encoder, decoder: the parts that compute the feature map.
        lead: heads of the leading channels.
        old: class heads of all steps but the last.
        new: class head of the last step.
        hidden: the hidden layer that all heads share; without parameters if there is none.
    """

    encoder: nn.Module
    decoder: nn.Module
    lead: nn.Module
    old: nn.Module
    new: nn.Module
    hidden: nn.Module


class Segmenter(nn.Module):
    """Encoder, decoder, leading heads and one class head per step; built by :func:`starseg.models.make_network`.

    Args:
        architecture: the architecture from which encoder and decoder were built.
        encoder: module that computes maps of images.
        decoder: module that computes the feature map; see :mod:`starseg.models.decoders`.
        head_sizes: number of new classes in each step so far.
        layout: kind of heads and names of the leading channels.
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
        self.hidden = nn.Sequential()
        if layout.hidden:
            self.hidden.extend([nn.Conv2d(self.width, layout.hidden, 1), nn.ReLU()])
        self.lead = nn.ModuleDict({name: make_head(self._head_width, 1, layout.conv) for name in layout.lead})
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
        """Number of feature channels D."""
        return int(self.decoder.width)  # type: ignore[arg-type]

    @property
    def _head_width(self) -> int:
        return self.layout.hidden or int(self.decoder.width)  # type: ignore[arg-type]

    @property
    def feature_stride(self) -> int:
        """Pixels per cell of the features in :class:`Output`."""
        return self.stride

    @property
    def classes(self) -> int:
        """Number of classes learnt so far, without the background."""
        return sum(self.head_sizes)

    @property
    def multiple(self) -> int:
        """Divisor that height and width of images must have to give whole feature cells and need no resizing."""
        return math.lcm(self.stride, self.encoder.multiple)

    @property
    def preprocess(self) -> Preprocess:
        """The normalisation that :meth:`normalize` applies."""
        return self.encoder.preprocess

    @property
    def roles(self) -> Roles:
        """The parts of the network by their role."""
        return Roles(self.encoder, self.decoder, self.lead, self.heads[:-1], self.heads[-1], self.hidden)

    def __getattr__(self, name: str) -> Any:
        """Look up a part by its name in version 0.1.0, with a warning."""
        if name in _FORMER:
            warnings.warn(f"Segmenter.{name} is now Segmenter.{_FORMER[name]}", DeprecationWarning, stacklevel=2)
            return getattr(self, _FORMER[name])
        return super().__getattr__(name)

    def fuse_batch_norm(self) -> None:
        """Switch to the layers of :mod:`starseg.ops.fused_layers`; call again after replacing batch norms."""
        image = self.encoder.example()
        fuse_batch_norm(self.encoder, image)
        cells = [max(1, image.shape[-1] // stride) for stride in self.encoder.strides]
        maps = [image.new_zeros(1, c, n, n) for c, n in zip(self.encoder.channels, cells, strict=True)]
        fuse_batch_norm(self.decoder, maps, self._grid(maps, image))
        self.to(memory_format=torch.channels_last)

    def add_head(self, classes: int) -> None:
        """Append a randomly initialised head for ``classes`` new classes."""
        like, dropped = next(self.encoder.parameters()), dict(enumerate(self.architecture.dropped))
        head = make_head(self._head_width, classes, self.layout.conv, dropped.get(len(self.heads), ()))
        self.heads.append(head.to(like.device))
        self.head_sizes.append(classes)

    def cut_heads(self, keep: int) -> list[nn.Module]:
        """Remove and return all class heads but the first ``keep``."""
        taken = list(self.heads[keep:])
        self.heads, self.head_sizes = self.heads[:keep], self.head_sizes[:keep]
        return taken

    def freeze_norm(self, keep: Iterable[nn.Module] = ()) -> None:
        """Freeze norm layers (statistics and affine parameters) and disable dropout permanently, even in train mode.

        Args:
            keep: heads whose norm layers stay trainable.
        """
        kept = {module for head in keep for module in head.modules()}
        still = [m for m in self.modules() if m not in kept and isinstance(m, (*_NORMS, *_DROPOUTS))]
        for module in still:
            module.requires_grad_(False)
        self._frozen = still
        self.train(self.training)

    def freeze_all_but(self, heads: Iterable[nn.Module]) -> None:
        """Freeze the whole network except ``heads``; norms and dropout as in :meth:`freeze_norm`."""
        heads = list(heads)
        self.requires_grad_(False)
        self.freeze_norm(heads)
        for head in heads:
            head.requires_grad_(True)

    def freeze_network(self) -> None:
        """Freeze encoder and decoder in addition: parameters, statistics of norm layers and dropout."""
        self._freeze_parts([self.encoder, self.decoder])

    def freeze_encoder(self) -> None:
        """Freeze the encoder in addition; its forward pass then builds no autograd graph."""
        self._freeze_parts([self.encoder])

    def _freeze_parts(self, parts: Sequence[nn.Module]) -> None:
        for part in parts:
            part.requires_grad_(False)
        self._frozen = [*self._frozen, *parts]
        self.train(self.training)

    def train(self, mode: bool = True) -> Segmenter:
        """Set train or eval mode as in PyTorch, but keep frozen modules in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    @property
    def encoder_frozen(self) -> bool:
        """Whether training leaves the encoder's maps of an image as they are."""
        frozen = set(self._frozen)
        if self.encoder in frozen:
            return True
        still = all(m in frozen for m in self.encoder.modules() if isinstance(m, (*_NORMS, *_DROPOUTS)))
        return still and not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def normalize(self, images: Tensor) -> Tensor:
        """Convert uint8 images [N, 3, H, W] on any device to the encoder's input: normalised floats, channels_last."""
        images = images.to(self.mean.device, non_blocking=True).float().div_(255)
        return images.sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)

    def classify(self, features: Tensor) -> Tensor:
        """Compute the logits [N, C, h, w] of a feature map [N, D, h, w]."""
        features = self.hidden(features)
        lead = [head(features.detach() if name == AUXILIARY else features) for name, head in self.lead.items()]
        return torch.cat([*lead, *(head(features) for head in self.heads)], 1)

    def predict(self, images: Tensor, bf16: bool = False) -> Tensor:
        """Compute the logits of images; call it in eval mode and without gradients.

        Args:
            images: [N, 3, H, W] uint8.
            bf16: compute convolutions and matrix products in bf16 instead of float32.

        Returns:
            [N, C, h, w] float32.
        """
        with torch.autocast(self.mean.device.type, torch.bfloat16, enabled=bf16):
            return torch.cat([self(self.normalize(part)).logits.float() for part in self.parts(images)])

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        """Split images into parts that are fastest to process: on a CPU, so small that the maps stay in its cache."""
        if self.mean.device.type != "cpu":
            return [images]
        pixels = _PIXELS_BF16 if torch.is_autocast_enabled("cpu") else _PIXELS
        return images.split(max(1, pixels // images[0, 0].numel()))

    def forward(
        self,
        images: Tensor,
        extra_features: Tensor | None = None,
        maps: bool = False,
        features: Tensor | None = None,
    ) -> Output:
        """Run the network.

        Args:
            images: [N, 3, H, W] normalised floats.
            extra_features: [M, D] replayed features, also classified.
            maps: whether to return the encoder's maps as well.
            features: [N, D, h, w] feature map of the images if it is known already; the images are then not used.
        """
        extra = self._classify_extra(extra_features)
        if features is not None:
            cells = features.movedim(1, -1)
            logits = self.classify_cells(cells.flatten(0, 2)).unflatten(0, cells.shape[:3])
            return Output(features, logits.movedim(-1, 1), extra)
        found, features = self._run(self._fit(images))
        return Output(features, self.classify(features), extra, found if maps else None)

    def _run(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the encoder's maps and the feature map of images of a size that fits."""
        maps = self.encoder(images)
        return maps, self.decoder(maps, self._grid(maps, images))

    def classify_cells(self, features: Tensor) -> Tensor:
        """Compute the logits [M, C] of the features [M, D] of single cells."""
        if not self.layout.hidden or self.layout.conv or self.layout.extended:
            return self.classify(features.T[None, :, :, None])[0, :, :, 0].T
        # With a hidden layer, two matrix products take three quarters of the time of several 1x1 convolutions.
        layer = last_layer(self.hidden[0])
        hidden = F.relu(F.linear(features, layer.weight.flatten(1), layer.bias))
        return F.linear(hidden, *linear_classifier([*self.lead.values(), *self.heads]))

    def _classify_extra(self, features: Tensor | None) -> Tensor | None:
        """Compute the logits [M, C] of replayed features [M, D]; None if there are none."""
        if features is None or not len(features):
            return None
        return self.classify_cells(features)

    def _fit(self, images: Tensor) -> Tensor:
        """Resize images to the nearest size that the encoder accepts."""
        if self.encoder.convolutional:
            return images
        most = 1 if self.encoder.fixed else math.inf
        size = [int(max(1, min(most, round(int(side) / self.multiple)))) * self.multiple for side in images.shape[-2:]]
        return images if size == list(images.shape[-2:]) else resize(images, size)

    def _grid(self, maps: Sequence[Tensor], images: Tensor) -> Sequence[int]:
        """Return height and width of the feature map in cells: those of the map of the same stride, if there is one."""
        if self.stride in self.encoder.strides:
            return maps[self.encoder.strides.index(self.stride)].shape[-2:]
        return [side // self.stride for side in images.shape[-2:]]
