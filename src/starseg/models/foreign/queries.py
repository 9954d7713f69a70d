"""Networks of transformers that classify queries: their semantic map as a feature map of one channel per class.

Such a network has no classifier over pixels. It scores K classes for each of Q queries and draws a mask for each; the
score of a class at a pixel is the sum over the queries of class probability times mask probability. This semantic map
becomes the feature map, and the classifier is the identity.

Shape letters: N images, Q queries, K classes, h w cells of the semantic map.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from starseg.models.foreign.split import Split, last_map


class _Kind(NamedTuple):
    """How a class of networks makes its semantic map.

    Attributes:
        multiple: divisor of the sides of images; None for square images of the size in the configuration.
        side: side in cells to which the library resizes masks before it makes the map: 0 for that of the images, None
            for no resizing.
    """

    multiple: int | None
    side: int | None


KINDS = {
    "MaskFormerForInstanceSegmentation": _Kind(32, None),
    # The library makes the map at 384 x 384 for images of any size; it is its own grid for images of this size alone.
    "Mask2FormerForUniversalSegmentation": _Kind(384, 384),
    "EomtForUniversalSegmentation": _Kind(None, 0),
}


class _SemanticMap(nn.Module):
    """A whole network, run for its semantic map."""

    def __init__(self, network: nn.Module, side: int | None) -> None:
        super().__init__()
        self.network, self.side = network, side

    def forward(self, images: Tensor) -> list[Tensor]:
        return [semantic_map(self.network(images), self.side)]


def semantic_map(result: Any, side: int | None) -> Tensor:
    """Compute the semantic map [N, K, h, w] as the library's ``post_process_semantic_segmentation`` does."""
    masks = result.masks_queries_logits
    if side is not None:
        masks = nn.functional.interpolate(masks, size=(side, side), mode="bilinear", align_corners=False)
    classes = result.class_queries_logits.softmax(-1)[..., :-1]
    return torch.einsum("nqk,nqhw->nkhw", classes, masks.sigmoid())


def multiple(network: nn.Module) -> int:
    """Return the divisor that the sides of images must have."""
    return KINDS[type(network).__name__].multiple or int(cast(Any, network.config).image_size)


def is_fixed(network: nn.Module) -> bool:
    """Whether images must be squares with the side :func:`multiple`."""
    return KINDS[type(network).__name__].side is not None


def side(network: nn.Module) -> int | None:
    """Return the side in cells of the semantic map; None for that of the masks."""
    found = KINDS[type(network).__name__].side
    return multiple(network) if found == 0 else found


def split(network: nn.Module) -> Split:
    """Split a network behind its semantic map, with the identity as the classifier."""
    outputs = int(cast(Any, network.config).num_labels)
    classifier = nn.Conv2d(outputs, outputs, 1)
    with torch.no_grad():
        classifier.weight.copy_(torch.eye(outputs)[:, :, None, None])
        nn.init.zeros_(cast(nn.Parameter, classifier.bias))
    body = _SemanticMap(network, side(network))
    return Split(body, last_map(nn.Identity()), classifier, multiple(network), fixed=is_fixed(network))
