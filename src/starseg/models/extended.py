"""A trained network with added classes, whose own logits stay as they are (docs/adopt.md).

Shape letters: N images, C logit channels (C0 of them the network's own), D descriptor channels, H W cells of the
logits, h w cells of the descriptor.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starseg.models.architectures import Architecture, Extension
from starseg.models.classifiers import HeadLayout
from starseg.models.decoders import Descriptor, to_grid
from starseg.models.encoders import Encoder
from starseg.models.segmenter import Output, Segmenter
from starseg.ops.bilinear import resize

ANY = -1
"""Value of :attr:`Extension.within` for classes that may have belonged to any class."""
# Units of the hidden layer of an added head, smallest stride of a descriptor, and number of maps that it reads: the two
# deepest of the encoder and the network's own feature map.
_HIDDEN, _FINEST, _MAPS = 256, 4, 3
_LEAST_SHARE = 1e-6


@dataclass
class _Maps:
    channels: list[int]
    strides: list[int]


class Calibration(nn.Module):
    """A factor and an offset for each of C0 logits, at first 1 and 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, logits: Tensor) -> Tensor:
        """Compute the calibrated logits [N, C0, *, *]."""
        return logits * self.scale + self.bias


class AddedHead(nn.Sequential):
    """Log-odds of added classes, from a hidden layer, and what restrains them where old classes are not known.

    Args:
        width: number of descriptor channels D.
        classes: number of added classes K.

    Attributes:
        margin: [] subtracted from the log-odds.
        averaging: [] weight with which a cell takes part in the decision of the whole image, 0..1.
        penalty_weight: [K, 2 D, 1, 1] weights of the squared channels and of the channels.
        penalty_bias: [K].
    """

    margin: Tensor
    averaging: Tensor
    penalty_weight: Tensor
    penalty_bias: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(nn.Conv2d(width, _HIDDEN, 1), nn.ReLU(), nn.Conv2d(_HIDDEN, classes, 1))
        self.register_buffer("margin", torch.zeros(()))
        self.register_buffer("averaging", torch.zeros(()))
        self.register_buffer("penalty_weight", torch.zeros(classes, 2 * width, 1, 1))
        self.register_buffer("penalty_bias", torch.zeros(classes))

    def forward(self, described: Tensor, before: Tensor | None = None, best: Tensor | None = None) -> Tensor:
        """Compute the log-odds [N, K, h, w].

        Args:
            described: [N, D, h, w] descriptor channels.
            before: [N, 1, h, w] logit of what the added classes belonged to before; None for cells that are no image.
            best: [N, 1, h, w] largest of the earlier logits; likewise.
        """
        trained = super().forward(described)
        channels = torch.cat([described.square(), described], 1)
        odds = trained - self.margin - F.conv2d(channels, self.penalty_weight, self.penalty_bias).relu()
        if before is None or best is None:
            return odds
        lead, share = before + odds - best, trained.sigmoid()
        mean = (lead * share).sum((2, 3), keepdim=True) / share.sum((2, 3), keepdim=True).clamp_min(_LEAST_SHARE)
        return odds + self.averaging * (mean - lead)

    def restrain(self, margin: float, averaging: float) -> None:
        """Set the margin and the weight of the image's decision."""
        self.margin.fill_(margin)
        self.averaging.fill_(averaging)

    def penalise(self, row: int, mean: Tensor, variance: Tensor, strength: float) -> None:
        """Set the penalty of a class: ``strength`` times the excess over 1 of the mean squared z-score of the channels.

        Args:
            row: row of the class in this head.
            mean: [D] of the cells that the class was learnt from.
            variance: [D] likewise.
            strength: at least 0.
        """
        scale = strength / (len(mean) * variance)
        self.penalty_weight[row] = torch.cat([scale, -2 * scale * mean])[:, None, None]
        self.penalty_bias[row] = scale @ mean.square() - strength


class ExtendedSegmenter(Segmenter):
    """A network with heads that were added later and read a descriptor instead of the network's own feature map.

    The logit of an added class is the logit of what it belonged to before (:attr:`Extension.within`) plus the output
    of its head, which is thus a log-odds. The other logits do not depend on it, so that every pixel that is not
    predicted as an added class is predicted as before.

    The features in :class:`Output` are [N, D + C0, h, w]: the descriptor's, and the network's own logits. The logits
    have the resolution of the network's own.

    Attributes:
        descriptor: the descriptor of the network's maps.
        calibration: of the network's own logits, which changes only in a step that is allowed to.
        tuned: a copy of the network, whose head has the log-odds of the first added classes and whose feature map the
            descriptor reads as well; None without one.
        tuning: whether a forward pass is for training this copy: it then returns the copy's features, and its log-odds
            in place of the heads'.
    """

    def __init__(
        self,
        architecture: Architecture,
        encoder: Encoder,
        decoder: nn.Module,
        head_sizes: list[int],
        layout: HeadLayout,
    ) -> None:
        super().__init__(architecture, encoder, decoder, head_sizes, layout)
        like, stride, extension = next(encoder.parameters()), self.stride, self.extension
        *channels, deepest = encoder.channels
        *strides, coarsest = encoder.strides
        read = 1 + bool(extension.tuned)
        maps = _Maps([*channels, *[super().width] * read, deepest], [*strides, *[stride] * read, coarsest])
        self.descriptor = Descriptor(maps, extension.stride, extension.width, extension.window, _MAPS - 1 + read)
        self.descriptor.to(like.device)
        self.calibration = Calibration(self._own_channels).to(like.device)
        self.tuned = _copy(architecture, encoder, decoder, extension.tuned) if extension.tuned else None
        self.tuning = False
        self._ratio = max(1, extension.stride // stride)

    @property
    def extension(self) -> Extension:
        """What was added to the network."""
        assert self.architecture.extension is not None
        return self.architecture.extension

    @property
    def width(self) -> int:
        """Number of feature channels, D + C0."""
        return self.extension.width + self._own_channels

    @property
    def feature_stride(self) -> int:
        """Pixels per cell of the descriptor."""
        return self.extension.stride

    @property
    def _own_channels(self) -> int:
        return len(self.lead) + sum(self.head_sizes[: self.extension.heads])

    def add_head(self, classes: int) -> None:
        """Append a randomly initialised head for ``classes`` new classes."""
        if len(self.heads) < self.extension.heads:
            super().add_head(classes)
            return
        like, width = next(self.encoder.parameters()), self.extension.width
        self.heads.append(AddedHead(width, classes).to(like.device))
        self.head_sizes.append(classes)

    def classify(self, features: Tensor) -> Tensor:
        """Compute the logits [N, C, h, w] of features [N, D + C0, h, w]."""
        width = self.extension.width
        return self._extend(features[:, width:], features[:, :width])

    def forward(
        self,
        images: Tensor,
        extra_features: Tensor | None = None,
        maps: bool = False,
        features: Tensor | None = None,
    ) -> Output:
        """Run the network; see :meth:`Segmenter.forward`."""
        if features is not None:
            return super().forward(images, extra_features, maps, features)
        if self.tuning:
            return self._tune(images)
        found, grid = self.describe(images)
        own = self._own(found[-2])
        described = self.descriptor(found, grid)
        extra = self._classify_extra(extra_features)
        coarse = to_grid(own, self._ratio, grid)
        logits = self._extend(own, described, coarse)
        return Output(torch.cat([described, coarse], 1), logits, extra, found if maps else None)

    def describe(self, images: Tensor) -> tuple[list[Tensor], Sequence[int]]:
        """Return the maps that the descriptor reads, the last but one of them the feature map, and its grid."""
        images = self._fit(images)
        maps, features = self._run(images)
        stride, strides = self.extension.stride, self.encoder.strides
        grid = maps[strides.index(stride)].shape[-2:] if stride in strides else [s // stride for s in images.shape[-2:]]
        tuned = [self.tuned(images).features] if self.tuned is not None else []
        return [*maps[:-1], *tuned, features, maps[-1]], grid

    def _own(self, features: Tensor) -> Tensor:
        """Return the network's own logits [N, C0, H, W] of its feature map."""
        hidden = self.hidden(features)
        return torch.cat([head(hidden) for head in (*self.lead.values(), *self.heads[: self.extension.heads])], 1)

    def _tune(self, images: Tensor) -> Output:
        """Return the features of the tuned copy, and the network's own logits followed by those that it gives."""
        assert self.tuned is not None, "only a network with a copy can tune it"
        images = self._fit(images)
        with torch.no_grad():
            own = self._own(self._run(images)[1])
        output = self.tuned(images)
        return Output(output.features, torch.cat([own, _before(own, self.extension.within[0]) + output.logits], 1))

    def _extend(self, own: Tensor, described: Tensor, coarse: Tensor | None = None) -> Tensor:
        """Append the logits of added classes to the network's own.

        Args:
            own: [N, C0, H, W].
            described: [N, D, h, w].
            coarse: [N, C0, h, w] the network's own logits as well; None if the cells are no images.

        Returns:
            [N, C, H, W].
        """
        logits = self.calibration(own)
        around = None if coarse is None else self.calibration(coarse)
        for head, within in zip(self.heads[self.extension.heads :], self.extension.within, strict=True):
            if around is None:
                odds = head(described)
            else:
                before = _before(around, within)
                odds = head(described, before, around.amax(1, keepdim=True))
                around = torch.cat([around, before + odds], 1)
            if odds.shape[-2:] != own.shape[-2:] or torch.onnx.is_in_onnx_export():
                odds = resize(odds, own.shape[-2:])
            logits = torch.cat([logits, _before(logits, within) + odds], 1)
        return logits


def _before(logits: Tensor, within: int) -> Tensor:
    """Return the logit [N, 1, *, *] of what added classes belonged to before."""
    return logits.logsumexp(1, keepdim=True) if within == ANY else logits[:, within : within + 1]


def _copy(architecture: Architecture, encoder: Encoder, decoder: nn.Module, classes: int) -> Segmenter:
    """Return a copy of a network with a single head, for the log-odds of ``classes``."""
    plain = replace(architecture, extension=None, dropped=[])
    return Segmenter(plain, copy.deepcopy(encoder), copy.deepcopy(decoder), [classes])


def extend(
    model: Segmenter, classes: int, within: int, width: int, window: int, tuned: bool = False
) -> ExtendedSegmenter:
    """Return a network with a head for added classes, whose descriptor is still to be fitted if it is the first.

    Args:
        model: the trained network.
        classes: number of added classes.
        within: channel of the logits that they belonged to before; :data:`ANY` for any.
        width: feature channels of the descriptor, if the network has none yet.
        window: likewise, side in cells over which it averages.
        tuned: likewise, whether it also reads a copy of the network, which is still to be tuned.
    """
    before = model.architecture.extension or Extension(
        len(model.heads), max(_FINEST, model.stride), width, window, within=[], tuned=classes if tuned else 0
    )
    architecture = replace(model.architecture, extension=replace(before, within=[*before.within, within]))
    layout = replace(model.layout, extended=True)
    sizes = [*model.head_sizes, classes]
    encoder: Any = model.encoder
    extended = ExtendedSegmenter(architecture, encoder, model.decoder, sizes, layout)
    added = extended.load_state_dict(model.state_dict(), strict=False)
    assert not added.unexpected_keys, "an extension has all that the network has"
    extended.train(model.training)
    return extended
