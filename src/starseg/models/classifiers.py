"""Classifier heads: channels, construction, initialisation (docs/reference/baselines.md, "What is common").

The logits of a network are those of its leading channels (background, unknown, auxiliary; none of them is a class),
followed by those of the class heads in order of learning. Class heads never contain the background, so the number of
training ids is 1 + the sum of their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BACKGROUND, UNKNOWN, AUXILIARY = "background", "unknown", "auxiliary"


@dataclass(frozen=True)
class HeadLayout:
    """The layout of the classifier heads of a method's network.

    Attributes:
        lead: names of the leading channels, each of which has its own head. An auxiliary head is trained on detached
            features.
        conv: whether every head is 3x3 conv-BN-ReLU and a 1x1 convolution instead of a 1x1 convolution alone.
        hidden: units of a hidden layer that all heads share; 0 for none.
        extended: whether later heads read a descriptor (:class:`starseg.models.extended.ExtendedSegmenter`).
    """

    lead: tuple[str, ...] = ()
    conv: bool = False
    hidden: int = 0
    extended: bool = False


SIGMOID = HeadLayout()
SOFTMAX = HeadLayout((BACKGROUND,))


class PartialConv2d(nn.Conv2d):
    """A 1x1 convolution without some of its outputs, which leaves the others exactly as they were.

    With fewer weights, libraries may choose another algorithm, whose sums are rounded differently.

    Args:
        channels: number of input channels.
        outputs: number of outputs that are returned.
        dropped: positions among all outputs of those that are not.
    """

    kept: Tensor

    def __init__(self, channels: int, outputs: int, dropped: Sequence[int]) -> None:
        every = outputs + len(dropped)
        super().__init__(channels, every, 1)
        self.register_buffer("kept", torch.tensor([i for i in range(every) if i not in dropped]), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the outputs that are not dropped: [N, channels, h, w] -> [N, outputs, h, w]."""
        return super().forward(features).index_select(1, self.kept)


def make_head(channels: int, classes: int, conv: bool, dropped: Sequence[int] = ()) -> nn.Module:
    """Create a randomly initialised head: [N, channels, h, w] -> [N, classes, h, w].

    Args:
        channels: number of input channels.
        classes: number of classes.
        conv: whether there is a 3x3 convolution in front; see :class:`HeadLayout`.
        dropped: outputs of the last layer that are not used.
    """
    last = PartialConv2d(channels, classes, dropped) if dropped else nn.Conv2d(channels, classes, 1)
    if not conv:
        return last
    first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU(), last)


def last_layer(head: nn.Module) -> nn.Conv2d:
    """Return the final 1x1 convolution of a head."""
    layer = head[-1] if isinstance(head, nn.Sequential) else head
    assert isinstance(layer, nn.Conv2d)
    return layer


def _parameters(head: nn.Module) -> tuple[Tensor, Tensor]:
    layer = last_layer(head)
    assert layer.bias is not None
    if isinstance(layer, PartialConv2d):
        return layer.weight[layer.kept], layer.bias[layer.kept]
    return layer.weight, layer.bias


def linear_classifier(heads: Iterable[nn.Module]) -> tuple[Tensor, Tensor]:
    """Return weight [K, D] and bias [K] of the final layers of class heads, as one classifier."""
    weights, biases = zip(*map(_parameters, heads), strict=True)
    return torch.cat(weights).flatten(1), torch.cat(biases)


@torch.no_grad()
def copy_head(source: nn.Module, target: nn.Module) -> None:
    """Initialise every class of ``target`` with the one channel of ``source`` (DKD: auxiliary, SSUL: unknown head)."""
    own = target.state_dict()
    target.load_state_dict({name: value.expand_as(own[name]) for name, value in source.state_dict().items()})


@torch.no_grad()
def share_background(background: nn.Module, target: nn.Module) -> None:
    """Initialise n new classes with equal shares of the background's probability (MiB, section 3.3).

    The weights of the background are copied to the new classes; the biases of the new classes and of the background
    become b_0 - log(n + 1), so that the n + 1 channels together have the background's previous probability.
    """
    (weight, bias), (new_weight, new_bias) = _parameters(background), _parameters(target)
    bias -= math.log(len(new_bias) + 1)
    new_weight.copy_(weight.expand_as(new_weight))
    new_bias.copy_(bias.expand_as(new_bias))
