"""The description of a network as stored in ``model.json``, and conversion of parameter names in weight files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from starseg.config import ModelConfig

# Prefixes of parameter names in files of earlier versions and in the published checkpoints, and their current names.
_FORMER = {"backbone.": "encoder.body.", "aspp.": "decoder."}


@dataclass(frozen=True)
class Extension:
    """Classes added to a trained network (:class:`starseg.models.extended.ExtendedSegmenter`).

    Attributes:
        heads: number of the first heads, which are those of the network itself.
        stride: pixels per cell of the descriptor.
        width, window: of the descriptor.
        within: for each further head, the channel of earlier logits that its classes belonged to before; -1 for any.
        tuned: number of classes that a copy of the network was tuned to, whose feature map the descriptor reads as
            well; 0 without a copy.
    """

    heads: int
    stride: int
    width: int
    window: int
    within: list[int] = field(default_factory=list)
    tuned: int = 0


@dataclass(frozen=True)
class Architecture:
    """The architecture of a network, without its weights and classifier heads.

    Attributes:
        encoder: name of the encoder; for the builder "timm", the name of a timm model.
        decoder: name of the decoder.
        stride: output stride, in pixels per feature cell.
        builder: key of :data:`starseg.models.builders.BUILDERS`.
        options: options of the builder, plain JSON values.
        extension: what was added to the network afterwards.
        dropped: for each class head, outputs of its weights that are no longer used; empty if there are none at all.
    """

    encoder: str
    decoder: str = "aspp"
    stride: int = 16
    builder: str = "timm"
    options: dict[str, Any] = field(default_factory=dict)
    extension: Extension | None = None
    dropped: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, config: ModelConfig) -> Architecture:
        """Return the architecture described by the ``model`` section of a configuration."""
        return cls(config.backbone, config.decoder, config.output_stride)


def upgrade_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of a state dict from those of earlier versions of starseg to the current ones."""

    def name(key: str) -> str:
        return next((new + key.removeprefix(old) for old, new in _FORMER.items() if key.startswith(old)), key)

    return {name(key): value for key, value in state.items()}


def published_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the current keys of a state dict to the published ones: the inverse of :func:`upgrade_keys`."""

    def name(key: str) -> str:
        return next((old + key.removeprefix(new) for old, new in _FORMER.items() if key.startswith(new)), key)

    return {name(key): value for key, value in state.items()}
