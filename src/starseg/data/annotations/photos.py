"""A user's photos and masks: paired by name, and converted to palette PNGs of class ids.

Masks are PNGs of indices or colours, or Labelme JSON files, of the same names as the images.
"""

from __future__ import annotations

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
from starseg.data.images import (
    SUFFIXES,
    image_size,
    is_image,
    note_unread,
    read_image,
    read_mask,
    refuse_other_size,
    transparent_pixels,
)
from starseg.data.index import pixels_per_id
from starseg.data.labels import LabelMap
from starseg.data.palette import IGNORE_COLOUR, voc_palette
from starseg.errors import UserError
from starseg.tasks import IGNORE
from starseg.utils.machine import cores
from starseg.utils.progress import track

# Class lists and annotations, which may lie among the images.
_BESIDE = (".txt", ".json")
_BY_COLOUR = "a file as --classes that gives every class a colour ('cat #c00080')"


@dataclass(frozen=True)
class Photo:
    """Image with the source of its mask.

    Attributes:
        name: of the image below its folder, without suffix; its converted mask is called so too.
        image: its file.
        mask: the file that says what it shows; None: nothing says so, and all is background.
        draw: gives the mask for an image of a height and width, [H, W] uint8 indices of classes.
    """

    name: str
    image: Path
    mask: Path | None
    draw: Callable[[tuple[int, int]], np.ndarray]


def _files(folder: Path, outside: Path | None = None) -> list[Path]:
    """List the files below a folder by path, without hidden ones and those in the folder ``outside``."""
    files = (p for p in folder.rglob("*") if p.is_file() and outside not in p.parents)
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


def check_unique_stems(images: Sequence[Path], folder: Path) -> None:
    """Refuse images that differ only in their suffixes.

    Raises:
        UserError: there are; names both.
    """
    by_name: dict[str, Path] = {}
    for file in images:
        if (twin := by_name.setdefault(_name(file, folder), file)) is not file:
            raise UserError(f"{file}: {twin.name} has the same stem, so both have one mask; rename one")


def pair_files(images: Path, masks: Path, classes: ClassList) -> list[Photo]:
    """Pair each image, in the order of names, with the mask (PNG or Labelme JSON) of the same name.

    Folders inside ``images`` are looked through; their masks lie in folders of the same names.

    Raises:
        UserError: no image, two images of one name, or an image without a mask; with CVAT's class list, no mask at all.
    """
    for option, folder, wanted in (("--images", images, "folder"), ("--masks", masks, "folder or COCO file")):
        if not folder.is_dir():
            raise UserError(f"{option} {folder}: no such {wanted}")
    beside = masks.resolve().is_relative_to(images.resolve()) and not masks.samefile(images)
    given = _files(images, images / masks.resolve().relative_to(images.resolve()) if beside else None)
    files = [path for path in given if is_image(path)]
    note_unread([path for path in given if not is_image(path) and path.suffix.lower() not in _BESIDE])
    if not files:
        raise UserError(f"--images {images}: no image in this folder (looked for {', '.join(SUFFIXES)})")
    check_unique_stems(files, images)
    drawn = _files(masks)
    found = {_name(p, masks): p for suffix in (".json", ".png") for p in drawn if p.suffix.lower() == suffix}
    photos = [_pair(_name(file, images), file, found.get(_name(file, images)), classes) for file in files]
    missing = [photo.name for photo in photos if not photo.mask]
    if missing and not (classes.label_map and len(missing) < len(photos)):
        lone = next((path for path in found.values() if len(missing) == len(photos) and path.suffix == ".json"), None)
        hint = f"; if {lone} is a COCO file, give it as --masks" if lone else ""
        raise UserError(
            f"{images / missing[0]}: no mask {masks / missing[0]}.png (nor .json); {len(missing)} of {len(files)} "
            f"images have none: add the masks or take the images out{hint}"
        )
    return photos


def _pair(name: str, image: Path, mask: Path | None, classes: ClassList) -> Photo:
    draw = partial(read_indices, mask, classes=classes) if mask else partial(np.zeros, dtype=np.uint8)
    return Photo(name, image, mask, draw)


def read_indices(mask: Path, size: tuple[int, int], classes: ClassList) -> np.ndarray:
    """Read a mask as indices into ``classes``, [H, W] uint8, 255 ignored.

    Raises:
        UserError: unreadable, not as large as its image (``size``, height and width), or with indices, colours or
            labels that are no class.
    """
    if mask.suffix.lower() == ".json":
        return draw_labelme(mask, size, classes.names)
    if classes.colours is not None:
        ids = _from_colours(mask, classes.colours, classes.source)
    else:
        ids = read_mask(mask, f"; masks in colour (RGB, RGBA) are read by {_BY_COLOUR}")
        unknown = LabelMap.make(len(classes.names)).unknown(pixels_per_id(ids))
        if unknown.any():
            raise UserError(
                f"{mask}: indices {np.flatnonzero(unknown).tolist()} are no lines of {classes.source} (0 to "
                f"{len(classes.names) - 1}, 255 for ignored pixels); name these classes, or give {_BY_COLOUR} if "
                "the mask is to be read by colour"
            )
    refuse_other_size(size, ids.shape, mask)
    return ids


def _packed(colours: np.ndarray) -> np.ndarray:
    """Pack colours [3, ...] uint8 into integers [...]."""
    red, green, blue = colours.astype(np.int32)
    return red << 16 | green << 8 | blue


def _from_colours(mask: Path, colours: Sequence[Colour], source: str) -> np.ndarray:
    ids = {colour: index for index, colour in reversed(list(enumerate(colours)))}
    ids.setdefault(IGNORE_COLOUR, IGNORE)
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
    """Write every mask in dataset ids into ``folder``, as <name of the image>.png.

    Args:
        photos: images and masks.
        table: [256] uint8, dataset ids by index.
        folder: where to.
        console: where the progress bar goes.

    Returns:
        [N, 256] int64 pixels of every dataset id in every mask.

    Raises:
        UserError: a mask is refused, see :func:`read_indices`; or an image is unreadable.
    """

    def convert(photo: Photo) -> np.ndarray:
        ids = table[photo.draw(image_size(photo.image))]
        path = folder / f"{photo.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_mask(path, ids)
        return pixels_per_id(ids)

    with ThreadPoolExecutor(cores()) as pool:
        counts = list(track(console, "reading masks", pool.map(convert, photos), len(photos), "masks"))
    return np.stack(counts).astype(np.int64)


def split_images(shown: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Choose a fraction of each class's images for validation; every class keeps an image for training.

    Args:
        shown: [N, C] bool, which image shows which class.
        share: of the images.
        rng: draws.

    Returns:
        [N] bool; a class that two or more images show is in both parts wherever its images allow it.
    """
    chosen = np.zeros(len(shown), bool)
    left = shown.sum(0)
    for column in np.argsort(left, kind="stable"):
        images = rng.permutation(np.flatnonzero(shown[:, column]))
        wanted = min(max(1, round(share * len(images))), len(images) - 1)
        for image in images:
            spared = (left[shown[image]] > 1).all()
            if not chosen[image] and spared and chosen[images].sum() < wanted:
                chosen[image] = True
                left = left - shown[image]
    without = rng.permutation(np.flatnonzero(~shown.any(1)))
    chosen[without[: round(share * len(without))]] = True
    return chosen
