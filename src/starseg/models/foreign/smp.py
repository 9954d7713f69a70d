"""Networks of segmentation_models.pytorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from starseg.errors import UserError
from starseg.models.architectures import Architecture
from starseg.models.foreign.split import Split, merge_at, pointwise, require, scored, split_at

CLASSIFIER, DPT_CLASSIFIER = "segmentation_head.0", "segmentation_head.head.4"
# Largest number of patch channels at full resolution, of which a map of 512 x 512 pixels takes 512 MB. A wider 3x3
# classifier is applied before the upsampling, and its scores become features.
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


def multiple(network: nn.Module, architecture: Architecture) -> int:
    """Return the divisor that the sides of images must have."""
    model: Any = network
    if (side := _fixed_side(network)) is not None:
        return side
    if not model.requires_divisible_input_shape:
        return 1
    # PAN halves the deepest map three times more.
    return int(model.encoder.output_stride) * (8 if type(network).__name__ == "PAN" else 1)


def _fixed_side(network: nn.Module) -> int | None:
    """Return the side of the square images that a vision transformer was made for; None if it takes others too."""
    body: Any = getattr(network.encoder, "model", None)
    patches = getattr(body, "patch_embed", None)
    if type(network).__name__ != "DPT" or patches is None or getattr(body, "dynamic_img_size", False):
        return None
    return int(patches.img_size[0])


def split(network: nn.Module, architecture: Architecture) -> Split:
    """Split a network in front of its classifier, or of the layer that the architecture's options name.

    Raises:
        UserError: there is no such layer.
    """
    model: Any = network
    sides, name = multiple(network, architecture), architecture.options.get("classifier")
    if architecture.decoder == "DPT" and name in (None, DPT_CLASSIFIER):
        factor = model.segmentation_head.upsampling_factor
        upsampling = nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=True)
        found = split_at(network, DPT_CLASSIFIER, sides, upsampling)
        return found._replace(fixed=_fixed_side(network) is not None)
    if name not in (None, CLASSIFIER):
        return split_at(network, name, sides)
    layer, upsampling, _ = model.segmentation_head
    before, joined = pointwise(layer)
    if joined.in_channels > _WIDEST and not isinstance(upsampling, nn.Identity):
        before, joined = scored(layer)
    return Split(_Encoder(model.encoder), _Head(model.decoder, before, upsampling), joined, sides)


def merge(
    network: nn.Module, architecture: Architecture, state: Mapping[str, Tensor], weight: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of the classifier that computes weight [K, D] and bias [K]; ``state`` is the original's."""
    model: Any = network
    usual = DPT_CLASSIFIER if architecture.decoder == "DPT" else CLASSIFIER
    name = architecture.options.get("classifier") or usual
    layer = model.get_submodule(name)
    outputs = int(architecture.options["outputs"])
    if name == CLASSIFIER and weight.shape[1] == outputs + layer.in_channels:
        # A combination of the old 3x3 kernels, and of the channels at the centre.
        old = state[f"{name}.weight"].flatten(1)
        kernels = (weight[:, :outputs] @ old).reshape(len(weight), *layer.weight.shape[1:])
        kernels[:, :, 1, 1] += weight[:, outputs:]
        return {f"{name}.weight": kernels, f"{name}.bias": bias}
    return merge_at(network, name, weight, bias)
