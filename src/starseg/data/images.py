"""Reading of image and mask files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision import io

from starseg.errors import UserError
from starseg.utils.terminal import print_note

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_MEGAPIXELS = 1000
"""Default of $STARSEG_MAX_MEGAPIXELS, the size of the largest image that is read, in millions of pixels."""
# The limit of Pillow is below the size of photos of telephones, so that :func:`_refuse_too_large` replaces it.
Image.MAX_IMAGE_PIXELS = None
_NAMED = 5
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of a supported image format and is not hidden, as macOS's ``._x.jpg`` are."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def note_unread(files: Sequence[Path]) -> None:
    """Print a note on stderr about files that are not supported images; hidden files are not mentioned."""
    names = [path.name for path in files if not path.name.startswith(".")]
    if not names:
        return
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    what = "1 file is no image" if len(names) == 1 else f"{len(names)} files are no images"
    print_note(f"{what} starseg reads: {', '.join(names[:_NAMED])}{rest}")


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Image.Image]:
    try:
        # Given a path, Pillow maps uncompressed files into memory, and garbles sideways TIFF images if grey.
        with path.open("rb") as file, Image.open(file) as image:
            _refuse_too_large(image, path)
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        reason = (isinstance(error, OSError) and error.strerror) or error or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "cannot identify image file"
        raise UserError(
            f"{path}: cannot read this {what} ({reason}); replace the file or take it out of the data set"
        ) from error


def _refuse_too_large(image: Image.Image, path: Path) -> None:
    """Refuse an image whose pixels would take more memory than a photo can, as a damaged or malicious file may.

    Raises:
        UserError: the image exceeds the limit, or the limit is not a number.
    """
    limit = os.environ.get("STARSEG_MAX_MEGAPIXELS") or str(MAX_MEGAPIXELS)
    if not limit.isdecimal():
        raise UserError(f"STARSEG_MAX_MEGAPIXELS: expected a whole number of millions of pixels, got {limit!r}")
    if image.width * image.height > int(limit) * 10**6:
        raise UserError(
            f"{path}: {image.width}x{image.height} pixels are more than the limit of {limit} megapixels; cut the image "
            "into parts or scale it down, or set STARSEG_MAX_MEGAPIXELS to a higher limit if the memory suffices"
        )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or the EXIF data are damaged."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's parser raises nearly anything on damaged bytes
        return 1
    return found if found in _TRANSPOSITIONS else 1


def _upright(image: Image.Image) -> Image.Image:
    """Return an image in upright orientation, as every reader of images and masks sees it."""
    image.load()  # Pillow itself turns TIFF images here and takes their orientation out
    turn = _TRANSPOSITIONS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width of an opened, not yet loaded file in upright orientation."""
    width, height = image.size
    if isinstance(image, TiffImageFile):
        # As stored: some versions of Pillow turn the size when the file is opened, others when it is loaded.
        width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode.lower().endswith("a") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_tensor(image: Image.Image) -> Tensor:
    """Convert an image of any colour mode to an RGB tensor, [3, H, W] uint8, rotated according to its EXIF data.

    16-bit images are reduced to their high byte; transparent pixels are composited over white.
    """
    return torch.from_numpy(np.array(_to_rgb(_upright(image)))).permute(2, 0, 1)


def read_image(path: Path) -> Tensor:
    """Read an image file as an RGB tensor, see :func:`image_tensor`.

    Raises:
        UserError: the file is missing, unreadable or truncated.
    """
    with _opened(path, "image") as image:
        if image.format == "JPEG" and image.mode == "RGB" and _orientation(image) == 1:
            # The same JPEG library, without Pillow's four bytes per pixel. Pillow reads, or reports an error for, files
            # that this decoder rejects, and all files if torchvision lacks it (deprecated in 0.29).
            with suppress(Exception):
                return io.decode_jpeg(io.read_file(str(path)), mode=io.ImageReadMode.RGB)
        return image_tensor(image)


def transparent_pixels(path: Path) -> np.ndarray:
    """Return the mask of partly or fully transparent pixels of an image file, [H, W] bool, upright.

    Raises:
        UserError: the file is missing, unreadable or truncated.
    """
    with _opened(path, "image") as image:
        return np.asarray(_upright(image).convert("RGBA"))[..., 3] < 255


def image_size(path: Path, whole: bool = True) -> tuple[int, int]:
    """Return height and width of an image in upright orientation.

    Args:
        path: the file.
        whole: decode the whole file, at a reduced scale if the format supports it, instead of only its header.

    Raises:
        UserError: the file is missing, unreadable or, if decoded as a whole, truncated.
    """
    with _opened(path, "image") as image:
        size = _upright_size(image)
        if whole:
            image.draft(None, (1, 1))
            image.load()
    return size


def read_mask(path: Path, otherwise: str = "") -> np.ndarray:
    """Read the ids of a mask (palette or grey PNG), [H, W] uint8, rotated according to its EXIF data.

    Args:
        path: the file.
        otherwise: alternative remedy for a colour mask, appended to the error message.

    Raises:
        UserError: the file is missing, unreadable, or does not have a single 8-bit channel.
    """
    with _opened(path, "mask") as image:
        if image.mode not in ("P", "L"):
            raise UserError(
                f"{path}: a mask must be an 8-bit palette or grey image, not {image.mode!r}; save the class ids as one"
                f"{otherwise}"
            )
        return np.array(_upright(image))


def refuse_other_size(image: Sequence[int], mask: Sequence[int], path: Path | str) -> None:
    """Check that an image, in upright orientation, and its mask have the same size.

    Args:
        image: (height, width) of the image in pixels.
        mask: (height, width) of the mask in pixels.
        path: the mask, for the error message.

    Raises:
        UserError: the sizes differ.
    """
    if tuple(image) != tuple(mask):
        raise UserError(
            f"{path}: this mask is {mask[1]}x{mask[0]}, its image {image[1]}x{image[0]} pixels when upright; "
            "make them the same size"
        )
