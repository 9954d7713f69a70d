"""The registry of network builders, and :func:`make_network`, which calls the one that an architecture names."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from starseg.errors import UserError
from starseg.models.architectures import Architecture
from starseg.models.classifiers import SIGMOID, HeadLayout
from starseg.models.decoders import DECODERS
from starseg.models.encoders import Encoder, make_encoder
from starseg.models.extended import ExtendedSegmenter
from starseg.models.segmenter import Segmenter
from starseg.utils.plugins import load_entry_points, load_files

ENTRY_POINTS, FILES = "starseg.models", "STARSEG_MODELS"


@cache
def load_plugins() -> None:
    """Import the packages and files that register builders and models; later calls do nothing.

    Raises:
        UserError: one of them cannot be imported.
    """
    load_entry_points(ENTRY_POINTS, "model")
    load_files(FILES)


class Parts(NamedTuple):
    """The result of a builder: an :class:`~starseg.models.encoders.Encoder` or an equivalent module, and a decoder."""

    encoder: Encoder
    decoder: nn.Module


Builder = Callable[[Architecture, bool | Path], Parts]
BUILDERS: dict[str, Builder] = {}


def register_builder(name: str) -> Callable[[Builder], Builder]:
    """Register a network builder (decorator) under ``name``, the value of ``architecture.builder`` in ``model.json``.

    A builder takes an architecture and ``pretrained``: whether to load ImageNet weights, or a file with the encoder's
    weights.

    Raises:
        ValueError: the name is already registered.
    """

    def register(builder: Builder) -> Builder:
        if name in BUILDERS:
            raise ValueError(f"builder {name!r} is registered already, by {BUILDERS[name].__module__}")
        BUILDERS[name] = builder
        return builder

    return register


@register_builder("timm")
def _build_timm(architecture: Architecture, pretrained: bool | Path) -> Parts:
    if architecture.decoder not in DECODERS:
        raise UserError(f"model.decoder: {architecture.decoder!r} is unknown; expected one of {', '.join(DECODERS)}")
    encoder = make_encoder(architecture.encoder, architecture.stride, pretrained)
    return Parts(encoder, DECODERS[architecture.decoder](encoder, architecture.stride, **architecture.options))


@torch.inference_mode(False)
def make_network(
    architecture: Architecture,
    head_sizes: list[int],
    layout: HeadLayout = SIGMOID,
    pretrained: bool | Path = False,
) -> Segmenter:
    """Build a network with random weights, except for the encoder's if ``pretrained`` is given.

    The network can be trained even if it is built in inference mode.

    Args:
        architecture: encoder, decoder and output stride.
        head_sizes: number of new classes in each step so far.
        layout: kind of heads and names of the leading channels.
        pretrained: whether to load ImageNet weights into the encoder, or a file with its weights.

    Raises:
        UserError: an unknown builder, or an error of :func:`starseg.models.encoders.make_encoder`.
    """
    if architecture.builder not in BUILDERS:
        load_plugins()
    if architecture.builder not in BUILDERS:
        raise UserError(
            f"architecture: no builder {architecture.builder!r} is registered here; known: {', '.join(BUILDERS)}; "
            f"name the Python file that registers it in {FILES}"
        )
    encoder, decoder = BUILDERS[architecture.builder](architecture, pretrained)
    network = ExtendedSegmenter if architecture.extension else Segmenter
    return network(architecture, encoder, decoder, head_sizes, layout)


def check_crop(network: Segmenter, crop: int) -> None:
    """Check that the size of the training crops suits a network.

    Raises:
        UserError: the side of the crops is not a multiple of :attr:`Segmenter.multiple`.
    """
    if crop % network.multiple:
        least = max(1, crop // network.multiple)
        parts = [f"{network.stride} for model.output_stride"]
        if (own := network.encoder.multiple) > 1:
            parts.insert(0, f"{own} for the strides {', '.join(map(str, network.encoder.strides))} of its encoder")
        raise UserError(
            f"data.crop: {crop} is no multiple of {network.multiple}, which this network needs ({', '.join(parts)}); "
            f"the next sizes that fit are {least * network.multiple} and {(least + 1) * network.multiple}"
        )
