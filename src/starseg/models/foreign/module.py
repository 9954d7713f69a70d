"""Networks of the user's own, which a registered function builds.

``STARSEG_MODELS=nets.py`` names a Python file, or several separated by ``:``, that registers functions when it is
imported; entry points of the group ``starseg.models`` name modules of installed packages. A step directory stores the
name of the function and its options, so that other processes can build the network again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from starseg.errors import UserError
from starseg.models.architectures import Architecture
from starseg.models.builders import FILES, load_plugins
from starseg.models.foreign.split import Split, merge_at, split_at

MODELS: dict[str, Callable[..., nn.Module]] = {}
"""Functions that build a network, by name; the first argument is the number of outputs."""

HOW = "@starseg.register_model('my_net') def my_net(outputs): return MyNet(outputs)"
_Build = TypeVar("_Build", bound=Callable[..., nn.Module])


def register_model(name: str) -> Callable[[_Build], _Build]:
    """Register a function or class that builds a network (decorator), for `starseg adopt model:NAME`.

    Its first argument is the number of outputs; further ones are keyword arguments with plain JSON values.

    Raises:
        UserError: the name is registered already.
    """

    def register(build: _Build) -> _Build:
        if name in MODELS and source_file(MODELS[name]) != source_file(build):
            raise UserError(
                f"register_model: {name!r} is registered already, by {source_file(MODELS[name])}; take another name"
            )
        MODELS[name] = build
        return build

    return register


def source_file(build: Callable[..., nn.Module]) -> str | None:
    """Return the path of the file that defines a function or class; None if it was typed in."""
    try:
        return inspect.getsourcefile(build)
    except TypeError:
        return None


def find_model(name: str, file: str | None = None) -> Callable[..., nn.Module]:
    """Return the function that builds the network called ``name``.

    Args:
        name: name under which it was registered.
        file: name of the file that registered it when it was adopted, for the message.

    Raises:
        UserError: it is not registered.
    """
    load_plugins()
    if name not in MODELS:
        known = f"registered are {', '.join(sorted(MODELS))}" if MODELS else "none is registered"
        raise UserError(
            f"model:{name}: no such model ({known}); name the Python file that registers it in {FILES}, as in "
            f"{FILES}={file or 'nets.py'}: {HOW}"
        )
    return MODELS[name]


def create(architecture: Architecture, outputs: int) -> nn.Module:
    """Create a network with random weights.

    Raises:
        UserError: its function is not registered, fails, or returns no network.
    """
    name, config = architecture.encoder, architecture.options.get("config", {})
    build = find_model(name, architecture.options.get("file"))
    try:
        network = build(outputs, **config)
    except Exception as error:  # another person's code may raise anything
        raise UserError(
            f"model:{name}: {source_file(build)} cannot build it with {outputs} outputs: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"model:{name}: {source_file(build)} returned a {type(network).__name__}; expected a torch.nn.Module"
        )
    return network


def last_convolution(network: nn.Module, outputs: int | None = None) -> str:
    """Return the name of the last convolution, or of the last with ``outputs`` channels if there is one.

    Raises:
        UserError: there is no convolution.
    """
    found = {key: layer.out_channels for key, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    if not found:
        raise UserError(
            f"{type(network).__name__}: has no convolution; looked for the last one, the 1x1 or 3x3 convolution that "
            "computes the classes"
        )
    fitting = [key for key, channels in found.items() if channels == outputs]
    return (fitting or list(found))[-1]


def multiple(network: nn.Module, architecture: Architecture) -> int:
    """Return the divisor that the sides of images must have."""
    return int(architecture.options.get("multiple", 1))


def split(network: nn.Module, architecture: Architecture) -> Split:
    """Split a network in front of the classifier that the architecture's options name.

    Raises:
        UserError: there is no such layer.
    """
    options: Mapping[str, Any] = architecture.options
    sides = multiple(network, architecture)
    return split_at(network, options["classifier"], sides, features=options.get("features"))


def misfit(network: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that differs in name or shape between a network and a state dict."""
    own = {key: value.shape for key, value in network.state_dict().items()}
    other = {key: value.shape for key, value in state.items()}
    return next((key for key in own | other if own.get(key) != other.get(key)), None)


def merge(
    network: nn.Module, architecture: Architecture, state: Mapping[str, Tensor], weight: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of the classifier that computes weight [K, D] and bias [K]."""
    return merge_at(network, architecture.options["classifier"], weight, bias)
