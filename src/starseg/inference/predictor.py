"""Prediction of masks with a trained step.

Shape letters: N images, C classes without background, H W pixels, h w feature cells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any, cast, get_args, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import crop
from torchvision.transforms.v2.functional import resize as resize_image

from starseg.config import choices_for
from starseg.data.images import image_tensor, read_image
from starseg.data.palette import mask_palette
from starseg.engine.checkpoint import StepInfo
from starseg.engine.formats import open_network
from starseg.errors import UserError
from starseg.methods import METHODS, prediction_rule
from starseg.models import Segmenter
from starseg.ops.bilinear import resize
from starseg.utils.precision import Precision, is_bf16_fast

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
_ARRAYS = "an image array must be uint8 [H, W, 3] or [H, W]"
_LONGEST_SHAPE = 50
# Logits are upsampled to so many values at a time (256 MB of float32).
_MOST_LOGITS = 2**26


@dataclass(frozen=True)
class Options:
    """Options of a prediction.

    Attributes:
        window: windows of the training crop's size slid over the whole image, at least a third of each shared with its
            neighbour; by default the image is resized so that its short side is the training crop's.
        flip: average with the prediction of the mirrored image.
        scales: average over these sizes, 1 being the usual one.
        batch_size: images (or windows) of a forward pass.

    Raises:
        UserError: a scale outside 0.1..8, no scale, a batch size below 1.
    """

    window: bool = False
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.scales or not all(0.1 <= s <= 8 for s in self.scales):
            raise UserError(f"scales: expected numbers from 0.1 to 8, such as 0.75,1,1.25, got {list(self.scales)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size: expected 1 or more, got {self.batch_size}")


@dataclass(frozen=True)
class Prediction:
    """Mask of one image, or the reason why there is none.

    Attributes:
        index: of the image among those given.
        image: [3, H, W] uint8, upright; empty where it could not be read.
        mask: [H, W] uint8 dataset ids; empty where the image could not be read.
        error: why there is no mask.
    """

    index: int
    image: Tensor
    mask: np.ndarray
    error: UserError | None = None


def is_single(images: Any) -> bool:
    """Return whether the argument of a prediction is one image rather than several.

    Raises:
        UserError: neither, such as bytes, a dictionary, or a set, which has no order.
    """
    if isinstance(images, str | os.PathLike | Image.Image | np.ndarray | Tensor) or getattr(images, "ndim", 0) > 1:
        return True
    if isinstance(images, bytes | bytearray | Mapping | Set) or not isinstance(images, Iterable):
        raise UserError(
            f"images: expected a path, a PIL image, an array, a tensor, or a list of these, got {type(images).__name__}"
        )
    return False


def to_tensor(source: ImageSource) -> Tensor:
    """Convert an image to [3, H, W] uint8.

    Args:
        source: a path, a PIL image, a uint8 array [H, W, 3] (RGB) or [H, W] (grey), or a uint8 tensor [3, H, W] or
            [1, H, W], as torchvision reads it.

    Raises:
        UserError: an unreadable file, or an array or tensor of another type or shape.
    """
    if isinstance(source, str | os.PathLike):
        return read_image(Path(source))
    if isinstance(source, Image.Image):
        return image_tensor(source)
    if isinstance(source, Tensor):
        return _from_tensor(source)
    try:
        array = np.asarray(source)
    except ValueError as error:  # a list of rows of different lengths
        raise UserError(f"images: {type(source).__name__} is no image ({error}); {_ARRAYS}") from error
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise UserError(f"{_ARRAYS}, got {array.dtype} {list(array.shape)}")
    return image_tensor(Image.fromarray(array))


def _from_tensor(source: Tensor) -> Tensor:
    shape = list(source.shape)
    if source.dtype != torch.uint8 or len(shape) != 3 or shape[0] not in (1, 3) or not source.numel():
        raise UserError(
            f"an image tensor must be uint8 [3, H, W] (RGB) or [1, H, W] (grey), got {source.dtype} {shape}; give "
            "several images as a list of tensors"
        )
    return source.detach().cpu().expand(3, -1, -1)


def fitted_size(height: int, width: int, short: float, stride: int) -> tuple[int, int]:
    """Return the size with a short side of ``short`` pixels, both sides rounded to multiples of ``stride``.

    Raises:
        UserError: one side is more than 50 times the other.
    """
    if max(height, width) > _LONGEST_SHAPE * min(height, width):
        raise UserError(f"{width}x{height} pixels: one side is more than {_LONGEST_SHAPE} times the other; cut it up")
    factor = short / min(height, width) / stride
    return max(1, round(height * factor)) * stride, max(1, round(width * factor)) * stride


def _starts(length: int, window: int) -> list[int]:
    """Return the starts of windows that cover ``length`` cells evenly and overlap by a third or more."""
    count = ceil((length - window) / max(1, window * 2 // 3)) + 1
    return [int(x) for x in np.linspace(0, length - window, count)]


def step_rule(info: StepInfo) -> Callable[[Tensor], Tensor]:
    """Return the prediction rule of a step's method: training ids [N, ...] from logits [N, C, ...].

    Raises:
        UserError: the method is not registered here.
    """
    if info.method not in METHODS:
        raise UserError(
            f"method {info.method!r} of this step is not registered; name its file in STARSEG_METHODS, or "
            "import it first"
        )
    method = METHODS[info.method]
    return prediction_rule(method(method.Options()), choices_for(info.compat), info.background)


class Predictor:
    """Network of a step with its classes; created by :func:`load`.

    Args:
        model: in eval mode, on the device to use.
        info: of the step directory.
        precision: of the network; `auto` is bf16 where the device is fast at it, otherwise float32.

    Attributes:
        classes: names, the background first.
        dataset_ids: what each class is in a mask, in the same order; without a background, 255 for the first entry,
            which is never predicted.
        crop: side of the training crops in pixels.
        bf16: whether the network computes in bf16.
        palette: [256, 3] uint8 colours of masks.
    """

    def __init__(self, model: Segmenter, info: StepInfo, precision: Precision = "auto") -> None:
        self.model, self.info, self.rule = model, info, step_rule(info)
        self.classes, self.dataset_ids, self.crop = list(info.names), list(info.predicted_ids), info.crop
        self.bf16 = precision == "bf16" or (precision == "auto" and is_bf16_fast(model.mean.device))
        self.palette = mask_palette(self.dataset_ids, info.dataset_ids)
        self._table = np.array(self.dataset_ids, np.uint8 if max(self.dataset_ids) < 256 else np.uint16)

    @overload
    def predict(self, images: ImageSource, **options: Any) -> np.ndarray: ...

    @overload
    def predict(self, images: Sequence[ImageSource], **options: Any) -> list[np.ndarray]: ...

    def predict(self, images: ImageSource | Sequence[ImageSource], **options: Any) -> np.ndarray | list[np.ndarray]:
        """Segment one image or several.

        Args:
            images: an image, see :func:`to_tensor`, or a list of images of any sizes.
            options: see :class:`Options`.

        Returns:
            The mask, [H, W] uint8 dataset ids (uint16 with ids above 255), at the image's own size; a list of masks for
            a list.

        Raises:
            UserError: an image that cannot be read, something that is no image, or a bad option.
        """
        single = is_single(images)
        sources: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
        masks: list[Any] = [None] * len(sources)
        for done in self.stream(sources, Options(**options)):
            if done.error:
                raise done.error
            masks[done.index] = done.mask
        return masks[0] if single else masks

    def stream(
        self, sources: ImageSource | Iterable[ImageSource], options: Options | None = None
    ) -> Iterator[Prediction]:
        """Segment images batch by batch; images with the same network input size share a batch.

        Args:
            sources: images, read as they are needed; or a single image.
            options: how.

        Yields:
            A prediction for every image, as batches fill up and so not always in order.
        """
        options = options or Options()
        several: Iterable[Any] = [sources] if is_single(sources) else sources  # type: ignore[assignment]
        waiting: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for index, source in enumerate(several):
            try:
                image = to_tensor(source)
                size = self._size(image, options)
            except UserError as error:
                yield Prediction(index, torch.empty(3, 0, 0), np.empty((0, 0), np.uint8), error)
                continue
            waiting.setdefault(size, []).append((index, image))
            if len(waiting[size]) == options.batch_size:
                yield from self._finish(size, waiting.pop(size), options)
            elif sum(map(len, waiting.values())) >= 4 * options.batch_size:
                fullest = max(waiting, key=lambda s: len(waiting[s]))
                yield from self._finish(fullest, waiting.pop(fullest), options)
        for size, group in waiting.items():
            yield from self._finish(size, group, options)

    def _size(self, image: Tensor, options: Options) -> tuple[int, int]:
        """Return the network's input size at scale 1."""
        height, width = image.shape[1:]
        short = max(self.crop, min(height, width)) if options.window else self.crop
        return fitted_size(height, width, short, self.model.multiple)

    def _scaled(self, size: tuple[int, int], scale: float, options: Options) -> list[int]:
        stride = self.model.multiple
        least = self.crop // stride if options.window else 1
        return [max(least, round(side / stride * scale)) * stride for side in size]

    @torch.inference_mode()
    def _finish(self, size: tuple[int, int], group: list[tuple[int, Tensor]], options: Options) -> Iterator[Prediction]:
        """Predict a batch of images with the same network input size."""
        passes = []
        for scale in options.scales:
            scaled = self._scaled(size, scale, options)
            batch = torch.stack([resize_image(image, scaled, antialias=True) for _, image in group])
            maps = self._maps(batch, options)
            if options.flip:
                maps = (maps + self._maps(batch.flip(-1), options).flip(-1)) / 2
            passes.append(maps)
        for i, (index, image) in enumerate(group):
            yield Prediction(index, image, self._mask([maps[i : i + 1] for maps in passes], *image.shape[1:]))

    def _maps(self, images: Tensor, options: Options) -> Tensor:
        """Compute logits [N, C, h, w] of uint8 images [N, 3, H, W] whose sides are multiples of the output stride."""
        if not options.window:
            return self.logits(images)
        stride = self.model.stride
        cells, (height, width) = self.crop // stride, (side // stride for side in images.shape[-2:])
        total = torch.zeros(len(images), 1, height, width, device=self.model.mean.device)
        count = torch.zeros(height, width, device=total.device)
        places = list(product(range(len(images)), _starts(height, cells), _starts(width, cells)))
        for first in range(0, len(places), options.batch_size):
            chosen = places[first : first + options.batch_size]
            crops = [crop(images[n], y * stride, x * stride, cells * stride, cells * stride) for n, y, x in chosen]
            maps = self.logits(torch.stack(crops))
            if first == 0:
                total = total.repeat(1, maps.shape[1], 1, 1)
            for (n, y, x), window in zip(chosen, maps, strict=True):
                total[n, :, y : y + cells, x : x + cells] += window
                count[y : y + cells, x : x + cells] += n == 0
        return total / count

    def logits(self, images: Tensor) -> Tensor:
        """Compute logits [N, C, h, w] at feature resolution of uint8 images [N, 3, H, W]."""
        return self.model.predict(images, self.bf16)

    def _mask(self, passes: list[Tensor], height: int, width: int) -> np.ndarray:
        """Average logits [1, C, *, *] at the image's size, a band of rows at a time, and apply the rule."""
        tall = [resize(maps, (height, maps.shape[-1])) for maps in passes]
        rows = max(1, _MOST_LOGITS // (width * tall[0].shape[1]))
        bands = []
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            wide = [resize(maps[:, :, top:bottom], (bottom - top, width)) for maps in tall]
            ids = self.rule(torch.stack(wide).mean(0) if len(wide) > 1 else wide[0])[0]
            bands.append(self._table[ids.cpu().numpy()])
        return np.concatenate(bands)


def load(path: str | Path, device: str = "auto", precision: str = "auto") -> Predictor:
    """Load the model of a step directory or published checkpoint for prediction.

    Args:
        path: a run's ``step_<t>`` directory, or a file in a registered format (:mod:`starseg.engine.formats`): a
            published checkpoint (.pth) with its config.json beside it.
        device: "cpu", "cuda", another name of torch's, or "auto": a GPU where there is one.
        precision: "32"; "bf16"; or "auto": bf16 where the device is fast at it, otherwise float32.

    Raises:
        UserError: no step directory, damaged files, no such device, or another precision.
    """
    if precision not in get_args(Precision):
        raise UserError(f"precision: expected auto, 32 or bf16, got {precision!r}")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model, info = open_network(Path(path))
    try:
        return Predictor(model.to(name), info, cast(Precision, precision))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: cannot use {device!r} ({str(error).splitlines()[0]}); use cpu or auto") from error
