"""Networks of torchvision: DeepLabV3, FCN and LR-ASPP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models, segmentation
from torchvision.models.segmentation.lraspp import LRASPP, LRASPPHead

from starseg.errors import UserError
from starseg.models.architectures import Architecture
from starseg.models.foreign.split import Split, last_map, merge_at, split_at
from starseg.ops.bilinear import resize

CLASSIFIER = "classifier.4"
LOW, HIGH = "classifier.low_classifier", "classifier.high_classifier"


def names() -> list[str]:
    """Return the names of torchvision's segmentation networks."""
    return list_models(segmentation)


class _Maps(nn.Module):
    """The maps of a backbone that returns them by name."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.backbone(images).values())


class _Lraspp(nn.Module):
    """LR-ASPP before its two classifiers, whose sum is one classifier of the concatenated channels."""

    def __init__(self, head: LRASPPHead) -> None:
        super().__init__()
        self.cbr, self.scale = head.cbr, head.scale

    def forward(self, maps: list[Tensor]) -> Tensor:
        low, high = maps
        return torch.cat([low, resize(self.cbr(high) * self.scale(high), low.shape[-2:])], 1)


def check_name(name: str) -> None:
    """Check the name of a network.

    Raises:
        UserError: torchvision has no segmentation network of this name.
    """
    if name not in names():
        kind = "is a classification or detection network" if name in list_models() else "is unknown to torchvision"
        raise UserError(f"torchvision:{name}: {kind}; expected a segmentation network: {', '.join(names())}")


def named_weights(name: str, weights: str | None) -> Any:
    """Return torchvision's own weights called ``weights`` of a network, or None if ``weights`` is no such name."""
    members = get_model_weights(name).__members__
    return members.get(weights) if weights else None


def download(weights: Any) -> dict[str, Tensor]:
    """Return the state dict of torchvision's own weights, from its cache or the network.

    Raises:
        UserError: they cannot be downloaded.
    """
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--weights {weights.name}: cannot be downloaded from {weights.url} ({error}); download it elsewhere and "
            "give the file"
        ) from error


def create(architecture: Architecture, outputs: int) -> nn.Module:
    """Create a network with random weights; the auxiliary classifier, which prediction never uses, is left out.

    Raises:
        UserError: torchvision has no segmentation network of this name.
    """
    check_name(architecture.encoder)
    options: dict[str, Any] = {} if architecture.encoder.startswith("lraspp") else {"aux_loss": False}
    return get_model(architecture.encoder, weights=None, weights_backbone=None, num_classes=outputs, **options)


def multiple(network: nn.Module, architecture: Architecture) -> int:
    """Return the divisor that the sides of images must have."""
    return 1


def split(network: nn.Module, architecture: Architecture) -> Split:
    """Split a network in front of its classifier, or of the layer that the architecture's options name.

    Raises:
        UserError: there is no such layer.
    """
    classifier = architecture.options.get("classifier")
    if classifier not in (None, CLASSIFIER):
        return split_at(network, classifier)
    body, head = _Maps(network.get_submodule("backbone")), network.get_submodule("classifier")
    if not isinstance(network, LRASPP):
        assert isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Conv2d)
        return Split(body, last_map(nn.Sequential(*list(head)[:-1])), head[-1])
    assert isinstance(head, LRASPPHead)
    low, high = head.low_classifier, head.high_classifier
    joined = nn.Conv2d(low.in_channels + high.in_channels, low.out_channels, 1)
    with torch.no_grad():
        joined.weight.copy_(torch.cat([low.weight, high.weight], 1))
        joined.bias.copy_(low.bias + high.bias)  # type: ignore[union-attr]
    return Split(body, _Lraspp(head), joined)


def merge(
    network: nn.Module, architecture: Architecture, state: Mapping[str, Tensor], weight: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of the classifier, or of the two of LR-ASPP, that compute weight [K, D] and bias [K]."""
    if not isinstance(network, LRASPP) or architecture.options.get("classifier"):
        return merge_at(network, architecture.options.get("classifier") or CLASSIFIER, weight, bias)
    low = network.get_submodule(LOW).in_channels
    parts = {LOW: weight[:, :low], HIGH: weight[:, low:]}
    tensors = {f"{name}.weight": part[:, :, None, None] for name, part in parts.items()}
    return tensors | {f"{LOW}.bias": torch.zeros_like(bias), f"{HIGH}.bias": bias}
