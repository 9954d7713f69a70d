"""A user's own photos and masks: pairing by name, and conversion of masks to palette PNGs of class ids.

Masks are images of class indices or colours, usually PNGs, or Labelme JSON files, with the same names as the images.
"""

from __future__ import annotations

import filecmp
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from starseg.data.annotations.classlist import ClassList, Colour
from starseg.data.annotations.labelme import draw_labelme
from starseg.data.folders import list_files, some
from starseg.data.images import (
    SUFFIXES,
    has_values,
    image_size,
    is_image,
    is_jpeg,
    is_predicted,
    note_unread,
    read_image,
    read_mask,
    refuse_other_size,
    transparent_pixels,
)
from starseg.data.index import pixels_per_id
from starseg.data.palette import IGNORE_COLOUR, voc_palette
from starseg.errors import UserError, raise_together
from starseg.tasks import IGNORE
from starseg.utils.machine import cores
from starseg.utils.progress import track
from starseg.utils.terminal import print_note

# Suffixes of class lists and annotations, which may be stored among the images.
_BESIDE = (".txt", ".json")
# Masks in other image formats are taken only where there is none in these.
_MASKS = (".png", ".json")
# Colours this far apart are not confused: compression that changes a pixel so much leaves others with unknown colours.
_JPEG_ERROR = 32
_BY_COLOUR = "a file as --classes that gives every class a colour ('cat #c00080')"


@dataclass(frozen=True)
class Photo:
    """An image and the source of its mask.

    Attributes:
        name: path of the image relative to its folder, without suffix; also the name of the converted mask.
        image: the image file.
        mask: the file from which the mask is made; None if the image has no annotation and is all background.
        draw: function that returns the mask, [H, W] uint8 class indices, given height and width of the image.
    """

    name: str
    image: Path
    mask: Path | None
    draw: Callable[[tuple[int, int]], np.ndarray]


def relative_name(file: Path, folder: Path) -> str:
    """Return the path relative to a folder in the form in which file names are compared.

    Letters with accents are composed (NFC): macOS stores them in two characters, other systems mostly in one.
    """
    return unicodedata.normalize("NFC", file.relative_to(folder).as_posix())


def _stem(file: Path, folder: Path) -> str:
    return Path(relative_name(file, folder)).with_suffix("").as_posix()


def check_unique_stems(images: Sequence[Path], folder: Path) -> None:
    """Check that no two images differ only in their suffixes, as both would have the same mask.

    Raises:
        UserError: two images do; the message names both.
    """
    by_name: dict[str, Path] = {}
    for file in images:
        if (twin := by_name.setdefault(_stem(file, folder), file)) is not file:
            raise UserError(
                f"{file}: {twin.name} has the same stem, so both have one mask; rename one, or move "
                "masks to a folder of their own"
            )


def pair_files(images: Path, masks: Path, classes: ClassList) -> list[Photo]:
    """Pair the images, sorted by name, with the masks of the same names.

    A mask is a PNG or a Labelme JSON file, or where there is neither, an image in another format. Folders inside
    ``images`` are searched as well; their masks are in folders of the same names. The folder ``masks`` itself may be
    inside ``images``, or be the same folder; an image or a copy of it is not taken for its own mask. Images without a
    mask that `starseg predict` has written are left out.

    Raises:
        UserError: there is no image, two images have the same stem, an image has two masks, or it has none (with CVAT's
            class list, only if no image has one).
    """
    for option, folder, wanted in (("--images", images, "folder"), ("--masks", masks, "folder or COCO file")):
        if not folder.is_dir():
            raise UserError(f"{option} {folder}: no such {wanted}")
    given = list_files(images, skip=() if masks.samefile(images) else (masks,))
    files = [path for path in given if is_image(path)]
    note_unread([path for path in given if not is_image(path) and path.suffix.lower() not in _BESIDE])
    if not files:
        raise UserError(f"--images {images}: no image in this folder (looked for {', '.join(SUFFIXES)})")
    check_unique_stems(files, images)
    found = _mask_files(masks)
    paired = [_pair(_stem(file, images), file, found.pop(_stem(file, images), []), classes) for file in files]
    photos = [photo for photo in paired if photo.mask or not is_predicted(photo.image)]
    if made := [photo.image for photo in paired if photo not in photos]:
        print_note(f"left out, as `starseg predict` wrote them: {some(made)}")
    missing = [photo.name for photo in photos if not photo.mask]
    lone = sorted(path for paths in found.values() for path in paths if path.suffix.lower() in _MASKS)
    if missing and not (classes.label_map and len(missing) < len(photos)):
        coco = next((path for path in lone if len(missing) == len(photos) and path.suffix == ".json"), None)
        names = f"; these have names of no image: {some(lone)}" if lone else ""
        hint = f"; if {coco} is a COCO file, give it as --masks" if coco else names
        raise UserError(
            f"{images / missing[0]}: no mask {masks / missing[0]}.png (nor .json); {len(missing)} of {len(photos)} "
            f"images have none: add the masks or take the images out{hint}"
        )
    _note_links(files)
    if lone:
        print_note(f"masks without an image of the same name are not used: {some(lone)}")
    return photos


def _note_links(files: Sequence[Path]) -> None:
    """Note images that are the same file under two names, which may be in training and validation at once."""
    names: dict[Path, Path] = {}
    pairs = [f"{path} is {first}" for path in files if (first := names.setdefault(path.resolve(), path)) is not path]
    if pairs:
        print_note(f"links make the same image count twice, perhaps in training and validation: {some(pairs)}")


def _mask_files(folder: Path) -> dict[str, list[Path]]:
    """Return the image and JSON files below a folder by name."""
    found: dict[str, list[Path]] = {}
    for path in list_files(folder):
        if is_image(path) or path.suffix.lower() in _MASKS:
            found.setdefault(_stem(path, folder), []).append(path)
    return found


def _pair(name: str, image: Path, given: Sequence[Path], classes: ClassList) -> Photo:
    others = [path for path in given if path.suffix != image.suffix or not filecmp.cmp(path, image, shallow=False)]
    masks = [path for path in others if path.suffix.lower() in _MASKS] or others
    if len(masks) > 1:
        raise UserError(f"{image}: {' and '.join(map(str, masks))} could both be its mask; move all but one away")
    mask = masks[0] if masks else None
    draw = partial(read_indices, mask, classes=classes) if mask else partial(np.zeros, dtype=np.uint8)
    return Photo(name, image, mask, draw)


class UnknownValues(UserError):
    """Values in masks that are not in the class list.

    Attributes:
        pixels: [256] number of pixels of every value in these masks.
        others: [256] number of pixels of every dataset id in the other masks.
    """

    def __init__(self, message: str, pixels: np.ndarray, others: np.ndarray | None = None) -> None:
        super().__init__(message)
        self.pixels, self.others = pixels, np.zeros(256, np.int64) if others is None else others


def read_indices(mask: Path, size: tuple[int, int], classes: ClassList) -> np.ndarray:
    """Read a mask as indices into ``classes``, [H, W] uint8, 255 ignored.

    Args:
        mask: the mask file.
        size: height and width of the image in pixels.
        classes: the class list.

    Raises:
        UnknownValues: the mask is read by value, and values are not in the class list.
        UserError: the mask is unreadable, its size differs from the image's, or a colour or label is not in the class
            list.
    """
    if mask.suffix.lower() == ".json":
        return draw_labelme(mask, size, classes.names)
    if classes.colours is not None and not (classes.numbered and has_values(mask)):
        ids = _from_colours(mask, classes.colours, classes)
        refuse_other_size(size, ids.shape, mask)
        return ids
    values = read_mask(mask, f"; masks in colour (RGB, RGBA) are read by {_BY_COLOUR}")
    refuse_other_size(size, values.shape, mask)
    pixels, labels = pixels_per_id(values), classes.labels
    if (unknown := labels.unknown(pixels)).any():
        raise UnknownValues(
            f"{mask}: indices {np.flatnonzero(unknown).tolist()} are no lines of {classes.source} ({labels}); name "
            f"these classes, or give {_BY_COLOUR} if the mask is to be read by colour",
            pixels,
        )
    return labels.compose(np.arange(256, dtype=np.uint8))[values]


def _packed(colours: np.ndarray) -> np.ndarray:
    """Pack colours [3, ...] uint8 into integers [...]."""
    red, green, blue = colours.astype(np.int32)
    return red << 16 | green << 8 | blue


def _nearest(colours: Sequence[Colour]) -> int:
    """Return the smallest distance of two colours, in the channel in which they differ most."""
    values = np.array(colours, int)
    distances = np.abs(values[:, None] - values).max(-1)
    return int(distances[~np.eye(len(values), dtype=bool)].min())


def _from_colours(mask: Path, colours: Sequence[Colour], classes: ClassList) -> np.ndarray:
    first, source = 0 if classes.background else 1, classes.source
    ids = {colour: index for index, colour in reversed(list(enumerate(colours))) if index >= first}
    for colour in (IGNORE_COLOUR, *classes.ignored_colours):
        ids.setdefault(colour, IGNORE)
    if is_jpeg(mask) and (near := _nearest(list(ids))) < _JPEG_ERROR:
        raise UserError(
            f"{mask}: JPEG compression may turn one colour of {source} into another, as two are only {near} apart; "
            "save the mask as PNG from its source"
        )
    keys = _packed(np.array(list(ids), np.uint8).T)
    order = np.argsort(keys)
    pixels = _packed(read_image(mask).numpy())
    places = order[np.searchsorted(keys, pixels, sorter=order).clip(max=len(keys) - 1)]
    if (wrong := keys[places] != pixels).any():
        first, clear = pixels[wrong][0], (wrong & transparent_pixels(mask)).sum()
        also = f", {clear} of them transparent, over white; save the mask without transparency" if clear else ""
        raise UserError(
            f"{mask}: colour {first >> 16} {first >> 8 & 255} {first & 255} is no class of {source} ({wrong.sum()} "
            f"pixels of other colours{also}); add it there, or save the mask without smoothed edges"
        )
    return np.array(list(ids.values()), np.uint8)[places]


def save_mask(path: Path, ids: np.ndarray) -> None:
    """Write [H, W] uint8 ids as a palette PNG."""
    image = Image.fromarray(ids)
    image.putpalette(voc_palette().ravel().tolist())
    image.save(path)


def convert_masks(photos: Sequence[Photo], table: np.ndarray, folder: Path, console: Console) -> np.ndarray:
    """Convert every mask to dataset ids and write it to ``folder`` as <name of the image>.png.

    Args:
        photos: images and masks.
        table: [256] uint8, dataset ids by class index.
        folder: the output folder.
        console: where the progress bar is shown.

    Returns:
        [N, 256] int64, number of pixels of every dataset id in every mask.

    Raises:
        UnknownValues: nothing else is wrong than values that are not in the class list.
        UserError: masks are rejected, see :func:`read_indices`, or images are unreadable; the message names them all.
    """
    errors: list[UserError] = []

    def convert(photo: Photo) -> np.ndarray:
        try:
            ids = table[photo.draw(image_size(photo.image))]
        except UserError as error:
            errors.append(error)
            return np.zeros(256, np.int64)
        path = folder / f"{photo.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_mask(path, ids)
        return pixels_per_id(ids)

    with ThreadPoolExecutor(cores()) as pool:
        counts = list(track(console, "reading masks", pool.map(convert, photos), len(photos), "masks"))
    errors.sort(key=str)
    unknown = [error for error in errors if isinstance(error, UnknownValues)]
    if unknown and len(unknown) == len(errors):
        rest = f"; so it is with {len(errors) - 1} more masks" if len(errors) > 1 else ""
        pixels = np.sum([error.pixels for error in unknown], axis=0)
        raise UnknownValues(f"{errors[0]}{rest}", pixels, np.sum(counts, axis=0))
    raise_together(errors, "photos cannot be used")
    return np.stack(counts).astype(np.int64)
