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

from starseg.data.folders import some
from starseg.errors import UserError
from starseg.utils.terminal import print_note

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_MEGAPIXELS = 1000
"""Default of $STARSEG_MAX_MEGAPIXELS, the size of the largest image that is read, in millions of pixels."""
PREDICTED = "starseg"
"""Mark in the files that `starseg predict` writes: PNG text "Software", JPEG comment."""
# The limit of Pillow is below the size of photos of telephones, so that :func:`_refuse_too_large` replaces it.
Image.MAX_IMAGE_PIXELS = None
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
_EXACT = ("L;R",)
_JPEG = ("JPEG", "MPO")


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of a supported image format and is not hidden, as macOS's ``._x.jpg`` are."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def is_predicted(path: Path) -> bool:
    """Whether a mask (PNG) or overlay (JPEG) was written by `starseg predict`."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == PREDICTED or image.info.get("comment") == PREDICTED.encode()
    except Exception:  # Pillow raises nearly anything on damaged bytes
        return False


def note_unread(files: Sequence[Path]) -> None:
    """Print a note on stderr about files that are not supported images; hidden files are not mentioned."""
    if names := [path.name for path in files if not path.name.startswith(".")]:
        what = "1 file is no image" if len(names) == 1 else f"{len(names)} files are no images"
        print_note(f"{what} starseg reads: {some(names)}")


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


def _raw_mode(image: Image.Image) -> str:
    """Return how an opened file stores its pixels, in Pillow's notation: "L;4" is grey of 4 bits.

    Returns:
        The mode of the image if it is loaded already, or if its format does not tell.
    """
    tiles = getattr(image, "tile", [])
    args = tiles[0][3] if tiles else ()
    first = args if isinstance(args, str) else next(iter(args), None) if isinstance(args, tuple) else None
    return first if isinstance(first, str) else image.mode


def _bits(image: Image.Image, place: str) -> int:
    """Return the number of bits of a channel: 12 or 16 where the high 8 are to be taken, else 8.

    Raises:
        UserError: the pixels have no fixed range that corresponds to black and white.
    """
    # Older versions of Pillow give 16-bit PNG files the mode of 32-bit integers.
    if image.mode in ("F", "LAB") or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = {"F": "floating-point numbers", "I": "signed or 32-bit integers", "LAB": "L*a*b* colours"}[image.mode]
        raise UserError(
            f"{place}: its pixels are {kind}, for which starseg knows no values of black and white; convert it to 8 or "
            "unsigned 16 bits a channel"
        )
    raw = _raw_mode(image)
    return 12 if ";12" in raw else 16 if image.mode.startswith("I") or ";16" in raw else 8


def _to_rgb(image: Image.Image, bits: int) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> bits - 8).clip(0, 255).astype(np.uint8))
    if image.mode.lower().endswith("a") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_tensor(image: Image.Image, place: str = "image") -> Tensor:
    """Convert an image to an RGB tensor, [3, H, W] uint8, rotated according to its EXIF data.

    12-bit and 16-bit images are reduced to their high 8 bits; transparent pixels are composited over white.

    Args:
        image: of any mode with 1 to 16 bits a channel.
        place: the image, for error messages.

    Raises:
        UserError: the pixels are floating-point numbers or 32-bit integers, or they are stored in 16 bits but use only
            the low 8, so that the image would be black.
    """
    bits = _bits(image, place)
    image = _upright(image)
    rgb = np.array(_to_rgb(image, bits))
    if bits > 8 and not rgb.any() and image.getextrema() != (0, 0):
        raise UserError(
            f"{place}: stored in {bits} bits, but no pixel uses the high 8, so it would be black; save it in 8 bits"
        )
    return torch.from_numpy(rgb).permute(2, 0, 1)


def read_image(path: Path) -> Tensor:
    """Read an image file as an RGB tensor, see :func:`image_tensor`.

    Raises:
        UserError: the file is missing, unreadable or truncated, or its pixels cannot be converted.
    """
    with _opened(path, "image") as image:
        if image.format == "JPEG" and image.mode == "RGB" and _orientation(image) == 1:
            # The same JPEG library, without Pillow's four bytes per pixel. Pillow reads, or reports an error for, files
            # that this decoder rejects, and all files if torchvision lacks it (deprecated in 0.29).
            with suppress(Exception):
                return io.decode_jpeg(io.read_file(str(path)), mode=io.ImageReadMode.RGB)
        return image_tensor(image, str(path))


def scalable_size(path: Path) -> tuple[int, int] | None:
    """Return height and width of an image that :func:`read_scaled` can read: an upright RGB JPEG; otherwise None.

    Raises:
        UserError: the file is missing or unreadable.
    """
    with _opened(path, "image") as image:
        scalable = image.format == "JPEG" and image.mode == "RGB" and _orientation(image) == 1
        return (image.height, image.width) if scalable else None


def read_scaled(path: Path, box: tuple[int, int, int, int], scale: int) -> Tensor:
    """Read a part of a JPEG at a reduced size, which the decoder computes from a part of the DCT coefficients.

    Args:
        path: a file of which :func:`scalable_size` is known.
        box: top, left, height and width of the part in pixels of the whole image, multiples of ``scale``.
        scale: 2, 4 or 8 pixels along each axis become one; the last of a row or column stands for the rest.

    Returns:
        [3, height / scale, width / scale] uint8.

    Raises:
        UserError: the file is unreadable or truncated.
    """
    top, left, height, width = (edge // scale for edge in box)
    with _opened(path, "image") as image:
        reduced = -(-image.width // scale), -(-image.height // scale)
        image.draft("RGB", (image.width // scale, image.height // scale))
        assert image.size == reduced, "the decoder reduces by 2, 4 and 8, and rounds up"
        return torch.from_numpy(np.array(image.crop((left, top, left + width, top + height)))).permute(2, 0, 1)


def transparent_pixels(path: Path) -> np.ndarray:
    """Return the mask of partly or fully transparent pixels of an image file, [H, W] bool, upright.

    Raises:
        UserError: the file is missing, unreadable or truncated.
    """
    with _opened(path, "image") as image:
        return np.asarray(_upright(image).convert("RGBA"))[..., 3] < 255


def is_jpeg(path: Path) -> bool:
    """Whether a file is stored in the JPEG format, whatever its suffix.

    Raises:
        UserError: the file is missing or unreadable.
    """
    with _opened(path, "image") as image:
        return image.format in _JPEG


def has_values(path: Path) -> bool:
    """Whether an image file has one 8-bit channel, palette or grey, which can be read as class ids.

    Raises:
        UserError: the file is missing or unreadable.
    """
    with _opened(path, "mask") as image:
        return image.mode in ("P", "L")


def image_size(path: Path, whole: bool = True) -> tuple[int, int]:
    """Return height and width of an image in upright orientation.

    Args:
        path: the file.
        whole: decode the whole file instead of only its header, JPEG at a reduced scale.

    Raises:
        UserError: the file is missing or unreadable; with ``whole``, also whatever :func:`read_image` raises.
    """
    with _opened(path, "image") as image:
        size = _upright_size(image)
        if whole and image.format == "JPEG":
            image.draft(None, (1, 1))
            image.load()
        elif whole:
            image_tensor(image, str(path))
    return size


def read_mask(path: Path, otherwise: str = "", wide: bool = False) -> np.ndarray:
    """Read the ids of a mask (palette or grey, usually PNG), [H, W] uint8, rotated according to its EXIF data.

    Args:
        path: the file.
        otherwise: alternative remedy for a colour mask, appended to the error message.
        wide: read a grey mask of 16 bits instead, [H, W] uint16.

    Raises:
        UserError: the file is missing or unreadable, does not have a single 8-bit channel, stores other values than
            those read, holds several images, or is a JPEG file whose compression has changed the ids.
    """
    with _opened(path, "mask") as image:
        raw, frames = _raw_mode(image), getattr(image, "n_frames", 1)
        if wide:
            return _wide_ids(image, frames, path)
        if image.mode not in ("P", "L"):
            raise UserError(
                f"{path}: a mask must be an 8-bit palette or grey image, not {image.mode!r}; save the class ids as one"
                f"{otherwise}"
            )
        if image.mode == "L" and raw.startswith("L;") and raw not in _EXACT:
            kind = "inverted" if raw.endswith("I") else f"of {raw[2:3]} bits, which readers stretch to 0 to 255"
            raise UserError(f"{path}: grey {kind}, so that its values are ambiguous; save the class ids in 8 bits")
        if frames > 1:
            raise UserError(f"{path}: holds {frames} images; a mask must be one, save the right one alone")
        ids = np.array(_upright(image))
        if image.format in _JPEG and _changed_by_compression(ids, image):
            raise UserError(
                f"{path}: JPEG compression has changed the class ids in this mask; save it as PNG from its source"
            )
        return ids


def _wide_ids(image: Image.Image, frames: int, path: Path) -> np.ndarray:
    """Return the ids of a 16-bit mask, [H, W] uint16, upright; see :func:`read_mask`."""
    # Older versions of Pillow give 16-bit PNG files the mode of 32-bit integers.
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")):
        raise UserError(
            f"{path}: a mask of this data set must be a 16-bit grey image, not {image.mode!r}, as it has more than 254 "
            "classes; save the class ids as one"
        )
    if frames > 1:
        raise UserError(f"{path}: holds {frames} images; a mask must be one, save the right one alone")
    return np.array(_upright(image)).astype(np.uint16)


def _changed_by_compression(ids: np.ndarray, image: Image.Image) -> bool:
    """Whether ids [H, W] of a JPEG file may differ from those saved.

    Only a file of the highest quality can hold ids, which may differ by 1. Where even that has changed some, there are
    pixels along the outlines that differ from all their neighbours.
    """
    if max(max(table) for table in image.quantization.values()) > 1:  # type: ignore[attr-defined]
        return True
    padded = np.pad(ids.astype(np.int16), 1, constant_values=-1)
    height, width = ids.shape
    shifts = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    return not np.any([padded[y : y + height, x : x + width] == ids for y, x in shifts], axis=0).all()


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
