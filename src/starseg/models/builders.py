"""Registry of network builders, by the name that an architecture gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from starseg.errors import UserError
from starseg.models.architectures import Architecture
from starseg.models.classifiers import SIGMOID, HeadLayout
from starseg.models.decoders import DECODERS
from starseg.models.encoders import Encoder, make_encoder
from starseg.models.segmenter import Segmenter


class Parts(NamedTuple):
    """Result of a builder: an encoder (such as :class:`starseg.models.encoders.Encoder`) and a decoder."""

    encoder: Encoder
    decoder: nn.Module


Builder = Callable[[Architecture, bool | Path], Parts]
BUILDERS: dict[str, Builder] = {}


def register_builder(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make a builder of networks known under ``name``, as ``architecture.builder`` in ``model.json``.

    A builder takes an architecture and the encoder's pretrained weights (yes, no, or a file).

    Raises:
        ValueError: the name is taken.
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
    return Parts(encoder, DECODERS[architecture.decoder](encoder, architecture.stride))


def make_network(
    architecture: Architecture,
    head_sizes: list[int],
    layout: HeadLayout = SIGMOID,
    pretrained: bool | Path = False,
) -> Segmenter:
    """Build a network with random weights, except the encoder's if pretrained ones are requested.

    Args:
        architecture: what to build.
        head_sizes: new classes of each step so far.
        layout: the kind of heads, and which lead.
        pretrained: ImageNet weights of the encoder: yes, no, or a file.

    Raises:
        UserError: an unknown builder, or see :func:`starseg.models.encoders.make_encoder`.
    """
    if architecture.builder not in BUILDERS:
        raise UserError(
            f"architecture: no builder {architecture.builder!r} is registered here; known: {', '.join(BUILDERS)}"
        )
    encoder, decoder = BUILDERS[architecture.builder](architecture, pretrained)
    return Segmenter(architecture, encoder, decoder, head_sizes, layout)


def check_crop(network: Segmenter, crop: int) -> None:
    """Refuse training crops that do not fit a network.

    Raises:
        UserError: their side is no multiple of what the encoder and the grid need.
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
