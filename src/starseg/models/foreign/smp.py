"""Networks of segmentation_models.pytorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from starseg.errors import UserError
from starseg.models.architectures import Architecture
from starseg.models.foreign.split import Split, pointwise, require, split_at

CLASSIFIER = "segmentation_head.0"
# Largest number of feature channels at full resolution, of which a map of 512 x 512 pixels takes 512 MB.
_WIDEST = 512


class _Encoder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.encoder(images))


class _Head(nn.Module):
    """Decoder, what the classifier reads, and the upsampling that the library does after the classifier.

    Upsampling and a 1x1 convolution can be exchanged. It is done here because its corners are aligned, which those of
    starseg's own resizing are not.
    """

    def __init__(self, decoder: nn.Module, before: nn.Module, upsampling: nn.Module) -> None:
        super().__init__()
        self.decoder, self.before, self.upsampling = decoder, before, upsampling

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.upsampling(self.before(self.decoder(maps)))


def library() -> Any:
    """Import segmentation_models.pytorch.

    Raises:
        UserError: it is not installed.
    """
    return require("segmentation_models_pytorch", "smp")


def create(architecture: Architecture, outputs: int) -> nn.Module:
    """Create a network with random weights.

    Args:
        architecture: ``decoder`` is the name of the class, ``encoder`` the library's encoder, and ``config`` of the
            options has further arguments of the class.
        outputs: number of outputs.

    Raises:
        UserError: the library does not know the class or the encoder, or refuses an argument.
    """
    smp = library()
    known = [kind.__name__ for kind in smp._MODEL_ARCHITECTURES]
    if architecture.decoder not in known:
        raise UserError(f"smp:{architecture.decoder}: expected one of {', '.join(known)}")
    config = architecture.options.get("config", {})
    given = {"encoder_name": architecture.encoder, "encoder_weights": None, "classes": outputs, "in_channels": 3}
    try:
        return getattr(smp, architecture.decoder)(**(config | given))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        text = str(error.args[0] if error.args else error).splitlines()[0][:300]
        raise UserError(
            f"smp:{architecture.decoder}:{architecture.encoder}: segmentation_models.pytorch cannot build it: {text}"
        ) from error


def multiple(network: nn.Module) -> int:
    """Return the divisor that the sides of images must have."""
    model: Any = network
    if not model.requires_divisible_input_shape:
        return 1
    # PAN halves the deepest map three times more.
    return int(model.encoder.output_stride) * (8 if type(network).__name__ == "PAN" else 1)


def split(network: nn.Module, classifier: str | None = None) -> Split:
    """Split a network in front of its classifier, or of the layer called ``classifier``.

    Raises:
        UserError: there is no such layer, or its input is too large at full resolution.
    """
    model: Any = network
    if classifier not in (None, CLASSIFIER):
        return split_at(network, classifier, multiple(network))
    layer, upsampling, _ = model.segmentation_head
    before, joined = pointwise(layer)
    if joined.in_channels > _WIDEST and not isinstance(upsampling, nn.Identity):
        raise UserError(
            f"{type(network).__name__}: its 3x3 classifier {CLASSIFIER} is followed by an upsampling with aligned "
            f"corners, for which {joined.in_channels} channels would have to be kept at full resolution (at most "
            f"{_WIDEST}); take another architecture, such as Unet, FPN or DeepLabV3Plus"
        )
    return Split(_Encoder(model.encoder), _Head(model.decoder, before, upsampling), joined, multiple(network))
