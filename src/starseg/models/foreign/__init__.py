"""Builders of networks from other libraries (torchvision, segmentation_models.pytorch, transformers) and of users.

A network of another library is split in front of its last 1x1 convolution, the classifier: what comes before it becomes
encoder and decoder of a :class:`~starseg.models.segmenter.Segmenter`, and the classifier becomes its heads. The other
library is imported when such a network is built. ``architecture.options`` holds the number of ``outputs`` of the
original network, ``mean`` and ``std``, whether it takes ``bgr`` images, the name of another ``classifier`` if one was
given, and a ``config`` where the library needs one.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from starseg.models.architectures import Architecture
from starseg.models.builders import Parts, register_builder
from starseg.models.encoders import Preprocess
from starseg.models.foreign import huggingface, module, smp, torchvision
from starseg.models.foreign.split import Flipped, Split, make_parts

LIBRARIES: dict[str, Any] = {"torchvision": torchvision, "smp": smp, "transformers": huggingface, "module": module}
"""The modules by name of their builder, each with ``create``, ``split`` and ``multiple``."""


def preprocess_of(architecture: Architecture) -> Preprocess:
    """Return the normalisation in the options of an architecture."""
    return Preprocess(tuple(architecture.options["mean"]), tuple(architecture.options["std"]))


def split_network(network: nn.Module, architecture: Architecture) -> Split:
    """Split a network, which is changed; its body takes RGB images.

    Raises:
        UserError: a layer is not found, or is no classifier.
    """
    split: Split = LIBRARIES[architecture.builder].split(network, architecture)
    return split._replace(body=Flipped(split.body)) if architecture.options.get("bgr") else split


def _build(library: ModuleType, architecture: Architecture, pretrained: object) -> Parts:
    """Build encoder and decoder of a network with random weights."""
    network = library.create(architecture, architecture.options["outputs"])
    return Parts(*make_parts(split_network(network, architecture), preprocess_of(architecture)))


for _name, _library in LIBRARIES.items():
    register_builder(_name)(partial(_build, _library))
