"""Semantic segmentation networks of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from starseg.errors import UserError
from starseg.models.architectures import Architecture
from starseg.models.foreign import queries
from starseg.models.foreign.split import Split, find_classifier, logits_of, merge_at, pointwise, require, split_at


class _Body(nn.Module):
    """Runs the backbone of a network, of which ``read`` returns the maps."""

    def __init__(self, backbone: nn.Module, read: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.backbone, self.read = backbone, read

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.read(self.backbone, images))


class _Head(nn.Module):
    """A decode head without its classifier.

    Args:
        head: the decode head.
        last: whether it takes the last map alone.
        before: what the classifier reads of the head's features.
    """

    def __init__(self, head: nn.Module, last: bool, before: nn.Module) -> None:
        super().__init__()
        self.head, self.last, self.before = head, last, before

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.before(self.head(maps[-1] if self.last else maps))


class _Family(NamedTuple):
    """How a network of transformers is split.

    Attributes:
        backbone, head: names of the backbone and of the decode head.
        classifier: name of the convolution in the head's last layer.
        read: returns the backbone's maps of images.
        multiple: divisor of the sides of images, given the configuration.
        last: whether the head takes the last map alone.
    """

    backbone: str
    head: str
    classifier: str
    read: Callable[[nn.Module, Tensor], Any]
    multiple: Callable[[Any], int]
    last: bool = False


def _hidden_states(backbone: nn.Module, images: Tensor) -> Any:
    return backbone(images, output_hidden_states=True).hidden_states


def _last_hidden_state(backbone: nn.Module, images: Tensor) -> Any:
    return [_hidden_states(backbone, images)[-1]]


def _feature_maps(backbone: nn.Module, images: Tensor) -> Any:
    return backbone(images).feature_maps


FAMILIES = {
    "SegformerForSemanticSegmentation": _Family(
        "segformer", "decode_head", "classifier", _hidden_states, lambda c: math.prod(c.strides)
    ),
    "UperNetForSemanticSegmentation": _Family("backbone", "decode_head", "classifier", _feature_maps, lambda c: 32),
    "MobileNetV2ForSemanticSegmentation": _Family(
        *("mobilenet_v2", "segmentation_head", "classifier.convolution"), _last_hidden_state, lambda c: 1, True
    ),
    **{
        f"{name}ForSemanticSegmentation": _Family(
            *(name.lower(), "segmentation_head", "classifier.convolution"), _last_hidden_state, lambda c: 32
        )
        for name in ("MobileViT", "MobileViTV2")
    },
}
# Networks that are run as a whole, up to their classifier, on square images of the size in their configuration.
WHOLE = {
    "BeitForSemanticSegmentation": "decode_head.classifier",
    "Data2VecVisionForSemanticSegmentation": "decode_head.classifier",
    "DPTForSemanticSegmentation": "head.head.4",
}
# What follows the classifier: an upsampling with aligned corners.
_UPSAMPLING = {"DPTForSemanticSegmentation": "head.head.5"}
# Divisor of the sides of images for a network of another class, whose classifier the user names.
_MULTIPLE = 32


def known() -> list[str]:
    """Return the names of the classes that can be split."""
    return [*FAMILIES, *WHOLE, *queries.KINDS]


def library() -> Any:
    """Import transformers.

    Raises:
        UserError: it is not installed.
    """
    return require("transformers", "transformers")


def check_class(name: str, classifier: str | None = None) -> None:
    """Check that networks of a class can be split.

    Raises:
        UserError: they cannot.
    """
    if name in known() or (classifier and name.endswith("ForSemanticSegmentation")):
        return
    if name.startswith("OneFormer"):
        raise UserError(
            f"{name}: wants a task in words beside the image; take a network that wants the image alone, one of "
            f"{', '.join(known())}"
        )
    hint = "; name its last 1x1 convolution with --classifier" if name.endswith("ForSemanticSegmentation") else ""
    raise UserError(f"{name}: expected a semantic segmentation network, one of {', '.join(known())}{hint}")


def create(architecture: Architecture, outputs: int) -> nn.Module:
    """Create a network with random weights from the configuration in the architecture's options.

    Raises:
        UserError: transformers does not know its class or refuses the configuration.
    """
    kind = getattr(library(), architecture.decoder, None)
    if kind is None:
        raise UserError(f"{architecture.decoder}: this version of transformers has no such class; update it")
    config = kind.config_class.from_dict(architecture.options["config"])
    config.num_labels = outputs
    return kind(config)


def multiple(network: nn.Module, architecture: Architecture) -> int:
    """Return the divisor that the sides of images must have."""
    name, config = type(network).__name__, cast(Any, network.config)
    if name in queries.KINDS:
        return queries.multiple(network)
    if name in FAMILIES:
        return FAMILIES[name].multiple(config)
    return int(config.image_size) if name in WHOLE else _MULTIPLE


def logits(network: nn.Module, result: Any) -> Tensor:
    """Return the logits in what a network returns; of one that classifies queries, its semantic map."""
    if type(network).__name__ in queries.KINDS:
        return queries.semantic_map(result, queries.side(network))
    return logits_of(result)


def split(network: nn.Module, architecture: Architecture) -> Split:
    """Split a network in front of its classifier, or of the layer that the architecture's options name.

    Raises:
        UserError: there is no such layer.
    """
    name, classifier = type(network).__name__, architecture.options.get("classifier")
    if name in queries.KINDS:
        return queries.split(network)
    sides, family = multiple(network, architecture), FAMILIES.get(name)
    if family is None or classifier not in (None, f"{family.head}.{family.classifier}"):
        after = network.get_submodule(_UPSAMPLING[name]) if name in _UPSAMPLING else None
        found = split_at(network, classifier or WHOLE[name], sides, after)
        return found._replace(fixed=name in WHOLE)
    head = network.get_submodule(family.head)
    before, joined = pointwise(find_classifier(head, family.classifier))
    setattr(head, family.classifier.split(".")[0], nn.Identity())
    body = _Body(network.get_submodule(family.backbone), family.read)
    return Split(body, _Head(head, family.last, before), joined, sides)


def merge(
    network: nn.Module, architecture: Architecture, state: Mapping[str, Tensor], weight: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of the classifier that computes weight [K, D] and bias [K].

    Raises:
        UserError: the network classifies queries.
    """
    name = type(network).__name__
    if name in queries.KINDS:
        raise UserError(f"{name}: classifies queries, so it has no layer into which a new class of pixels would fit")
    family = FAMILIES.get(name)
    usual = f"{family.head}.{family.classifier}" if family else WHOLE.get(name, "")
    return merge_at(network, architecture.options.get("classifier") or usual, weight, bias)
