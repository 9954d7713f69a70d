"""The parts of a network of another library, split in front of its classifier.

Shape letters: N images, H W pixels, C map channels, D feature channels, h w feature cells, K outputs.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starseg.errors import UserError
from starseg.models.encoders import Encoder, Preprocess

# Side in pixels of the image on which channels and strides are measured.
_SIDE = 64
_PATCH = 9


class Split(NamedTuple):
    """A network, split in front of its classifier.

    Attributes:
        body: computes a list of maps [N, C, *, *] of normalised images [N, 3, H, W].
        head: computes the classifier's input [N, D, h, w] from the list of maps.
        classifier: 1x1 convolution whose outputs, resized to the image, are the network's logits.
        multiple: divisor that the height and width of images must have; 1 for none.
        fixed: whether height and width must be ``multiple`` itself.
    """

    body: nn.Module
    head: nn.Module
    classifier: nn.Conv2d
    multiple: int = 1
    fixed: bool = False


class ForeignDecoder(nn.Module):
    """Decoder around the head of a network of another library, which fixes the grid itself.

    Args:
        head: module that turns a list of maps into the feature map.
        width: number of feature channels D.

    Attributes:
        scale: factor on the feature map, which brings its root mean square near 1 so that the learning rates fit. It is
            a power of 2, so that multiplying by it rounds nothing.
    """

    scale: Tensor

    def __init__(self, head: nn.Module, width: int) -> None:
        super().__init__()
        self.head, self.width = head, width
        self.register_buffer("scale", torch.ones(()))

    def forward(self, maps: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
        """Compute the feature map [N, D, h, w]."""
        return self.head(list(maps)) * self.scale


class Patches(nn.Module):
    """The 3x3 neighbourhood of every cell as 9 D channels, in the order of a 3x3 convolution's flattened weights.

    A 3x3 convolution with zero padding equals a 1x1 convolution of these channels.

    Args:
        channels: number of channels D.
    """

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        kernel = torch.eye(_PATCH).view(_PATCH, 1, 3, 3).repeat(channels, 1, 1, 1)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the neighbourhoods [N, 9 D, h, w] of features [N, D, h, w]."""
        return F.conv2d(features, self.kernel, padding=1, groups=self.channels)


def pointwise(classifier: nn.Conv2d) -> tuple[nn.Module, nn.Conv2d]:
    """Return a classifier as a 1x1 convolution, and the module that computes its input.

    Raises:
        UserError: the classifier is neither a 1x1 nor a zero-padded 3x3 convolution.
    """
    if classifier.kernel_size == (1, 1) and classifier.stride == (1, 1) and classifier.groups == 1:
        return nn.Identity(), classifier
    plain = (classifier.stride, classifier.dilation, classifier.padding, classifier.groups, classifier.padding_mode)
    if classifier.kernel_size != (3, 3) or plain != ((1, 1), (1, 1), (1, 1), 1, "zeros"):
        raise UserError(
            f"its classifier is a convolution of {classifier.kernel_size[0]}x{classifier.kernel_size[1]}; expected "
            "1x1, or 3x3 with zero padding; name another layer with --classifier"
        )
    joined = nn.Conv2d(_PATCH * classifier.in_channels, classifier.out_channels, 1, bias=classifier.bias is not None)
    with torch.no_grad():
        joined.weight.copy_(classifier.weight.flatten(1)[:, :, None, None])
        if classifier.bias is not None and joined.bias is not None:
            joined.bias.copy_(classifier.bias)
    return Patches(classifier.in_channels), joined


class Scores(nn.Module):
    """The scores of a 3x3 classifier as K channels, followed by the D channels that it reads at the centre.

    Args:
        classifier: the classifier; its bias is left out.
    """

    def __init__(self, classifier: nn.Conv2d) -> None:
        super().__init__()
        self.classifier = classifier
        self.classifier.bias = None

    def forward(self, features: Tensor) -> Tensor:
        """Compute the scores and features [N, K + D, h, w] of features [N, D, h, w]."""
        return torch.cat([self.classifier(features), features], 1)


def scored(classifier: nn.Conv2d) -> tuple[nn.Module, nn.Conv2d]:
    """Return a 3x3 classifier as a module that computes its scores, and a 1x1 convolution that picks them.

    The features are far fewer than those of patches; a new class is a 1x1 convolution of old scores and centres.
    """
    outputs, bias = classifier.out_channels, classifier.bias
    picking = nn.Conv2d(outputs + classifier.in_channels, outputs, 1)
    with torch.no_grad():
        picking.weight.zero_()[:, :outputs, 0, 0].fill_diagonal_(1)
        nn.init.zeros_(picking.bias) if bias is None else picking.bias.copy_(bias)  # type: ignore[arg-type, union-attr]
    return Scores(classifier), picking


class _Tap(nn.Module):
    """Stand-in for a classifier, which keeps its input and passes on a single channel."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        self.kept.append(features)
        return features[:, :1]

    def keep(self, layer: nn.Module, arguments: Any, output: Tensor) -> None:
        """Keep the output of another layer (forward hook).

        Raises:
            UserError: it is no map.
        """
        if not isinstance(output, Tensor) or output.ndim != 4:
            what = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise UserError(
                f"--features: {type(layer).__name__} returns {what}; expected a layer that returns a map [N, C, h, w]"
            )
        self.kept.append(output)


class _Tapped(nn.Module):
    """A whole network, run for the maps that a tap keeps."""

    def __init__(self, network: nn.Module, tap: _Tap) -> None:
        super().__init__()
        self.network, self.tap = network, tap

    def forward(self, images: Tensor) -> list[Tensor]:
        self.tap.kept.clear()
        self.network(images)
        maps = list(self.tap.kept)
        self.tap.kept.clear()
        return maps


class Flipped(nn.Module):
    """A body whose network takes BGR images, here given RGB images."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps of normalised RGB images [N, 3, H, W]."""
        return self.body(images.flip(1))


class _Last(nn.Module):
    """Returns the last map after another module."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.after = after

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.after(maps[-1])


def find_classifier(network: nn.Module, name: str) -> nn.Conv2d:
    """Return the convolution called ``name``.

    Raises:
        UserError: there is no such layer, or it is no convolution.
    """
    layers = dict(network.named_modules())
    convolutions = [key for key, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    found = layers.get(name)
    if not isinstance(found, nn.Conv2d):
        what = "has no such layer" if found is None else f"is a {type(found).__name__}"
        raise UserError(
            f"--classifier {name}: {type(network).__name__} {what}; expected the name of its last convolution, such "
            f"as {', '.join(convolutions[-3:]) or 'none, as it has no convolution'}"
        )
    return found


def merge_at(network: nn.Module, name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the convolution called ``name`` that compute what a 1x1 classifier of its input computes.

    The inverse of :func:`pointwise`.

    Args:
        network: a network in its library's form.
        name: of its classifier.
        weight: [K, D] of the 1x1 classifier.
        bias: [K].

    Raises:
        UserError: the convolution has no bias, and one is needed.
    """
    classifier = find_classifier(network, name)
    tensors = {f"{name}.weight": weight.reshape(len(weight), *classifier.weight.shape[1:])}
    if classifier.bias is not None:
        tensors[f"{name}.bias"] = bias
    elif bias.any():
        raise UserError(f"{type(network).__name__}: its classifier {name} has no bias, which the new classes need")
    return tensors


def split_at(
    network: nn.Module, name: str, multiple: int = 1, after: nn.Module | None = None, features: str | None = None
) -> Split:
    """Split any network in front of the convolution called ``name``; everything before it becomes the encoder.

    Args:
        network: the network, which is changed.
        name: of its last convolution.
        multiple: divisor that the sides of images must have.
        after: what the network does to its outputs after the convolution, if it is linear and the same for each.
        features: name of a layer whose output becomes a further map of the encoder.

    Raises:
        UserError: there is no such layer, or it is no classifier.
    """
    before, classifier = pointwise(find_classifier(network, name))
    parent, _, child = name.rpartition(".")
    tap = _Tap()
    if features is not None:
        find_layer(network, features).register_forward_hook(tap.keep)
    setattr(network.get_submodule(parent), child, tap)
    head = before if after is None else nn.Sequential(before, after)
    return Split(_Tapped(network, tap), _Last(head), classifier, multiple)


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """Return the layer called ``name``.

    Raises:
        UserError: there is no such layer.
    """
    layers = dict(network.named_modules())
    if not name or name not in layers:
        close = difflib.get_close_matches(name, layers, 3) or list(layers)[-3:]
        raise UserError(
            f"--features {name}: {type(network).__name__} has no such layer; expected the name of a layer, such as "
            f"{', '.join(close)}"
        )
    return layers[name]


def last_map(after: nn.Module) -> nn.Module:
    """Return a head that applies ``after`` to the last map alone."""
    return _Last(after)


def make_parts(split: Split, preprocess: Preprocess) -> tuple[Encoder, ForeignDecoder]:
    """Return encoder and decoder of a split network, with channels and strides measured on a black image."""
    side = math.ceil(_SIDE / split.multiple) * split.multiple
    training = split.body.training
    with torch.no_grad():
        maps = split.body.eval()(next(split.body.parameters()).new_zeros(1, 3, side, side))
    split.body.train(training)
    channels, strides = [m.shape[1] for m in maps], [max(1, side // m.shape[-1]) for m in maps]
    encoder = Encoder(split.body, channels, strides, preprocess, split.multiple, fixed=split.fixed)
    return encoder, ForeignDecoder(split.head, split.classifier.in_channels)


def feature_stride(encoder: Encoder, decoder: nn.Module) -> int:
    """Measure the pixels per cell of the feature map."""
    image = encoder.example()
    with torch.no_grad():
        return max(1, image.shape[-1] // decoder.eval()(encoder.eval()(image), ()).shape[-1])


def logits_of(result: Any) -> Tensor:
    """Return the logits [N, K, *, *] in what a network returns: a tensor, the first of a tuple, "out" or "logits".

    Raises:
        UserError: there are none.
    """
    found = result
    if isinstance(result, Mapping):
        found = result.get("out", result.get("logits"))
    elif isinstance(result, tuple | list) and result:
        found = result[0]
    if not isinstance(found, Tensor) or found.ndim != 4:
        what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(result).__name__}"
        raise UserError(
            f"the network returns {what}; expected the logits [N, outputs, height, width] of a semantic segmentation "
            'network, alone, first in a tuple, or as "out" or "logits"'
        )
    return found


def require(package: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        UserError: it is not installed; the message names the extra that contains it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"this network needs the package {error.name}, which is missing; pip install 'starseg[{extra}]'"
        ) from error
