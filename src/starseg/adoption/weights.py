"""Weight files of other libraries."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from starseg.errors import UserError

# Keys under which training scripts save the weights beside other things, and a prefix that data-parallel training adds.
_NESTED = ("state_dict", "model_state_dict", "model", "state_dict_ema")
_PREFIX = "module."


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file or a file of ``torch.save``, of which only tensors are unpickled.

    Raises:
        UserError: the file is missing, holds code or no weights, or is quantised.
    """
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file; give a .pth, .pt, .bin or .safetensors file of weights")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--weights {path}: holds Python objects besides tensors, which are not unpickled because that may run any "
            "code; save the weights alone: torch.save(model.state_dict(), path)"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise UserError(f"--weights {path}: damaged, or no file of weights ({type(error).__name__})") from error
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"--weights {path}: holds no state dict (name -> tensor); save model.state_dict()")
    if any(v.is_quantized or v.dtype in (torch.int8, torch.uint8) for v in state.values()):
        raise UserError(f"--weights {path}: quantised weights cannot be adopted; give the float network it was made of")
    return {
        key.removeprefix(_PREFIX): value.float() if value.is_floating_point() else value for key, value in state.items()
    }


def count_outputs(state: Mapping[str, Tensor], layers: tuple[str, ...], path: Path) -> int:
    """Return the number of outputs of the classifier in a state dict.

    Args:
        state: the weights.
        layers: possible names of the classifier.
        path: of the file, for messages.

    Raises:
        UserError: the classifier is not among the weights.
    """
    for layer in layers:
        if (weight := state.get(f"{layer}.weight")) is not None:
            return len(weight)
    matrices = [key.removesuffix(".weight") for key, value in state.items() if value.ndim == 4]
    raise UserError(
        f"--weights {path}: holds no {' or '.join(layers)}, the classifier of this network; its last convolutions are "
        f"{', '.join(matrices[-3:]) or 'none'}: take another SOURCE, or name the classifier with --classifier"
    )


def load_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict; weights of auxiliary classifiers, which the network does not have, are left out.

    Raises:
        UserError: weights are missing, unknown or of another shape.
    """
    own = network.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.startswith("aux_classifier.")}
    wrong = [key for key in own if key not in state or own[key].shape != state[key].shape]
    if wrong or (wrong := sorted(state.keys() - own.keys())):
        raise UserError(
            f"{source}: the weights do not fit {type(network).__name__}: {len(wrong)} tensors are missing, unknown "
            f"or of another shape, the first is {wrong[0]}; take the SOURCE that they were trained with"
        )
    network.load_state_dict(state)
