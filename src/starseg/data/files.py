"""Reading one image and one mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from starseg.errors import UserError


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        reason = (isinstance(error, OSError) and error.strerror) or error or type(error).__name__
        raise UserError(
            f"{path}: cannot read this {what} ({reason}); replace the file or take it out of the data set"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode.lower().endswith("a") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(path: Path) -> Tensor:
    """An image of any colour mode as RGB, [3, H, W] uint8, rotated as its EXIF data says.

    Of 16-bit images the high byte is taken; what is transparent becomes white.

    Raises:
        UserError: missing, unreadable or truncated.
    """
    with _opened(path, "image") as image:
        rgb = np.array(_to_rgb(ImageOps.exif_transpose(image)))
    return torch.from_numpy(rgb).permute(2, 0, 1)


def read_mask(path: Path) -> np.ndarray:
    """The mask's ids, [H, W] uint8 (palette or grey PNG).

    Raises:
        UserError: missing, unreadable, or not one 8-bit channel.
    """
    with _opened(path, "mask") as image:
        if image.mode not in ("P", "L"):
            raise UserError(
                f"{path}: a mask must be an 8-bit palette or grey image, not {image.mode!r}; save the class ids as one"
            )
        return np.array(image)


def refuse_other_size(image: Sequence[int], mask: Sequence[int], path: Path) -> None:
    """Compare (height, width) of an image, upright, and its mask.

    Raises:
        UserError: they differ; names ``path``, the mask.
    """
    if tuple(image) != tuple(mask):
        raise UserError(
            f"{path}: this mask is {mask[1]}x{mask[0]}, its image {image[1]}x{image[0]} pixels when upright; "
            "make them the same size"
        )
