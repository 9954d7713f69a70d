"""Classifier heads: channels, construction, initialisation (docs/reference/baselines.md, "What is common").

The logits of a network are its leading channels (background, unknown, auxiliary: none is a class), then the class
heads in order of learning. A class head counts classes only, so 1 + the sum of their sizes is the number of ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BACKGROUND, UNKNOWN, AUXILIARY = "background", "unknown", "auxiliary"


@dataclass(frozen=True)
class HeadLayout:
    """Layout of the classifier heads of a method's network.

    Attributes:
        lead: names of the leading channels, each a head of its own. An auxiliary head learns from detached features.
        conv: every head is 3x3 conv-BN-ReLU and a 1x1 convolution, instead of a 1x1 convolution.
    """

    lead: tuple[str, ...] = ()
    conv: bool = False


SIGMOID = HeadLayout()
SOFTMAX = HeadLayout((BACKGROUND,))


def make_head(channels: int, classes: int, conv: bool) -> nn.Module:
    """Make a randomly initialised head: [N, channels, h, w] -> [N, classes, h, w]."""
    last = nn.Conv2d(channels, classes, 1)
    if not conv:
        return last
    first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU(), last)


def last_layer(head: nn.Module) -> nn.Conv2d:
    """Return the 1x1 convolution of a head."""
    layer = head[-1] if isinstance(head, nn.Sequential) else head
    assert isinstance(layer, nn.Conv2d)
    return layer


def _parameters(head: nn.Module) -> tuple[Tensor, Tensor]:
    layer = last_layer(head)
    assert layer.bias is not None
    return layer.weight, layer.bias


@torch.no_grad()
def copy_head(source: nn.Module, target: nn.Module) -> None:
    """Start every class of ``target`` as the one channel of ``source`` (DKD: auxiliary head, SSUL: unknown head)."""
    own = target.state_dict()
    target.load_state_dict({name: value.expand_as(own[name]) for name, value in source.state_dict().items()})


@torch.no_grad()
def share_background(background: nn.Module, target: nn.Module) -> None:
    """Start n new classes with equal shares of the background's probability (MiB, section 3.3).

    New weights are the background's; the new biases and the background's own become b_0 - log(n + 1), so that the
    n + 1 channels together have the probability that the background had.
    """
    (weight, bias), (new_weight, new_bias) = _parameters(background), _parameters(target)
    bias -= math.log(len(new_bias) + 1)
    new_weight.copy_(weight.expand_as(new_weight))
    new_bias.copy_(bias.expand_as(new_bias))
