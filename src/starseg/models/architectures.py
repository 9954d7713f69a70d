"""Architecture of a network, as stored in ``model.json``, and the names of its parameters in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from starseg.config import ModelConfig

# Names of parameters in files of starseg 0.x, and in the published checkpoints.
_FORMER = {"backbone.": "encoder.body.", "aspp.": "decoder."}


@dataclass(frozen=True)
class Architecture:
    """Description of a network without its weights and classifier.

    Attributes:
        encoder: name of the encoder; for the builder "timm" that of a timm model.
        decoder: name of the decoder.
        stride: pixels per feature cell.
        builder: key of :data:`starseg.models.builders.BUILDERS`.
        options: of the builder, plain JSON values.
    """

    encoder: str
    decoder: str = "aspp"
    stride: int = 16
    builder: str = "timm"
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ModelConfig) -> Architecture:
        """Return the architecture that a configuration asks for."""
        return cls(config.backbone, config.decoder, config.output_stride)


def upgrade_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of earlier versions of starseg in a state dict to the current names."""

    def name(key: str) -> str:
        return next((new + key.removeprefix(old) for old, new in _FORMER.items() if key.startswith(old)), key)

    return {name(key): value for key, value in state.items()}


def published_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`upgrade_keys`."""

    def name(key: str) -> str:
        return next((old + key.removeprefix(new) for old, new in _FORMER.items() if key.startswith(new)), key)

    return {name(key): value for key, value in state.items()}
