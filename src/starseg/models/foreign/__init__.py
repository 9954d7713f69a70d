"""Builders of networks from other libraries (torchvision, segmentation_models.pytorch, transformers) and of users.

A network of another library is split in front of its last 1x1 convolution, the classifier: what comes before it becomes
encoder and decoder of a :class:`~starseg.models.segmenter.Segmenter`, and the classifier becomes its heads. The other
library is imported when such a network is built. ``architecture.options`` holds the number of ``outputs`` of the
original network, ``mean`` and ``std``, whether it takes ``bgr`` images, the name of another ``classifier`` if one was
given, and a ``config`` where the library needs one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from starseg.models.architectures import Architecture
from starseg.models.builders import Parts, register_builder
from starseg.models.encoders import Preprocess
from starseg.models.foreign import huggingface, module, smp, torchvision
from starseg.models.foreign.split import Flipped, Split, make_parts

LIBRARIES: dict[str, Any] = {"torchvision": torchvision, "smp": smp, "transformers": huggingface, "module": module}
"""The modules by name of their builder, each with ``create``, ``split``, ``multiple`` and ``merge``."""
NEVER = -1e4
"""Logit of the background of a network that has none, which is therefore never predicted."""


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


def original_state(architecture: Architecture, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict, under its own names, of the network that a step's weights were split from.

    The heads are not part of it: the classifier's tensors are those of a random network. So are those of auxiliary
    heads, which the split leaves out.

    Args:
        architecture: of the step.
        state: state dict of the step's :class:`~starseg.models.segmenter.Segmenter`.
    """
    network = LIBRARIES[architecture.builder].create(architecture, architecture.options["outputs"])
    own = network.state_dict(keep_vars=True)  # the parts share these tensors, into which the weights are loaded
    encoder, decoder = make_parts(split_network(network, architecture), preprocess_of(architecture))
    for prefix, part in {"encoder.": encoder, "decoder.": decoder}.items():
        part.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return {key: value.detach() for key, value in own.items()}


def grow(
    architecture: Architecture, state: Mapping[str, Tensor], weight: Tensor, bias: Tensor
) -> tuple[nn.Module, Architecture]:
    """Return a step's network in its library's form, with a classifier of more outputs; and its architecture.

    Args:
        architecture: of the step.
        state: state dict of the step's :class:`~starseg.models.segmenter.Segmenter`.
        weight: [K, D] of the linear classifier over the step's features.
        bias: [K].

    Raises:
        UserError: the library's form has no such classifier.
    """
    library, options = LIBRARIES[architecture.builder], dict(architecture.options)
    if "use_auxiliary_head" in options.get("config", {}):
        options["config"] = options["config"] | {"use_auxiliary_head": False}
    grown = replace(architecture, options=options | {"outputs": len(weight)})
    network = library.create(grown, len(weight)).eval()
    old = original_state(architecture, state)
    scaled = weight * state["decoder.scale"]
    tensors = old | library.merge(network, architecture, old, scaled, bias)
    network.load_state_dict({key: tensors[key] for key in network.state_dict()})
    return network, grown
