"""A folder of one's own photos and masks, made into the prepared layout that a run reads.

Given: images (any suffix), masks of the same stem (PNG, or Labelme JSON), a class list. Prepared, in the run directory:

classes.txt            a name a line by dataset id, the background first
train.txt, val.txt     image, tab, mask a line; relative paths start at the prepared folder
masks/*.png            palette PNGs of dataset ids
learn.json             where it comes from, and which classes its masks show ("labelled", dataset ids)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from starseg.data.dataset import Dataset, Split, distinct, read_lines
from starseg.data.files import SUFFIXES, image_size, read_image, read_mask, refuse_other_size
from starseg.data.index import count_ids, unknown_ids
from starseg.data.labelme import draw_labelme
from starseg.data.palette import IGNORE_COLOUR, voc_palette
from starseg.engine.progress import track
from starseg.errors import UserError
from starseg.tasks import BACKGROUND, IGNORE

Colour = tuple[int, int, int]
_EXPECTED = "data.root must be a folder prepared by `starseg learn`: classes.txt, train.txt, val.txt (docs/learn.md)"
_LINE = re.compile(r"(?P<name>.+?)(?:\s+#(?P<hex>[0-9a-fA-F]{6})|(?P<rgb>(?:[\s,]+\d+){3}))?")


@dataclass(frozen=True)
class ClassList:
    """The classes that masks show.

    Attributes:
        names: by index in the masks, the background first.
        colours: of each class, where masks are read by colour; else None, and a pixel is the index of its class.
        source: for messages.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...] | None
    source: str


def read_classes(given: str) -> ClassList:
    """A class list from a file, a class a line and the background first, or from "horse,cow".

    A line is ``name``, ``name R G B`` or ``name #rrggbb``; black is the background's colour by default.

    Raises:
        UserError: no such file, no background, no class, a name or colour twice, or some classes without colours.
    """
    path = Path(given)
    if path.is_file():
        lines = read_lines(path, "--classes: a class a line, the background first")
        if not lines or not _is_background(_parse(lines[0], path)[0]):
            raise UserError(
                f"{path}: its first line must be 'background', which index 0 in the masks stands for, got "
                f"{lines[0] if lines else 'an empty file'!r}; add it"
            )
    elif "/" in given or path.suffix == ".txt":
        raise UserError(f"--classes {given}: no such file; give a file, or names with commas between them")
    else:
        lines = [name.strip() for name in given.split(",") if name.strip()]
        if not lines or not _is_background(_parse(lines[0], path)[0]):
            lines.insert(0, "background")
    names, colours = zip(*(_parse(line, path) for line in lines), strict=True)
    if len(names) < 2:
        raise UserError(f"--classes {given}: expected at least one class beside the background")
    distinct([name.casefold() for name in names], path)
    return ClassList(names, _colour_map(names, colours, path), given)


def _is_background(name: str) -> bool:
    return name.casefold().strip("_") == "background"


def _parse(line: str, path: Path) -> tuple[str, Colour | None]:
    """Name and colour of a line."""
    match = _LINE.fullmatch(line)
    if not match:
        raise UserError(f"{path}: expected 'name', 'name R G B' or 'name #rrggbb', got {line!r}")
    if match["hex"]:
        return match["name"], tuple(bytes.fromhex(match["hex"]))  # type: ignore[return-value]
    if not match["rgb"]:
        return line, None
    red, green, blue = map(int, re.findall(r"\d+", match["rgb"]))
    if max(red, green, blue) > 255:
        raise UserError(f"{path}: expected colours of three numbers from 0 to 255, got {line!r}")
    return match["name"], (red, green, blue)


def _colour_map(names: Sequence[str], colours: Sequence[Colour | None], path: Path) -> tuple[Colour, ...] | None:
    if not any(colours[1:]):
        return None
    found = [colours[0] or (0, 0, 0), *colours[1:]]
    if bare := [name for name, colour in zip(names, found, strict=True) if colour is None]:
        raise UserError(f"{path}: these classes have no colour while others have one: {', '.join(bare)}; give all one")
    if len(set(found)) < len(found):
        raise UserError(f"{path}: two classes have the same colour; give every class a colour of its own")
    return tuple(c for c in found if c)


def pair_files(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Images in order of their names, each with the mask (PNG, else Labelme JSON) of the same stem.

    Raises:
        UserError: no image, two images of one stem, or an image without a mask.
    """
    for option, folder in (("--images", images), ("--masks", masks)):
        if not folder.is_dir():
            raise UserError(f"{option} {folder}: no such folder")
    files = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise UserError(f"--images {images}: no image in this folder (looked for {', '.join(SUFFIXES)})")
    by_stem: dict[str, Path] = {}
    for file in files:
        if file.stem in by_stem:
            raise UserError(f"{file}: {by_stem[file.stem].name} has the same stem, so both have one mask; rename one")
        by_stem[file.stem] = file
    found = {p.stem: p for suffix in (".json", ".png") for p in masks.iterdir() if p.suffix.lower() == suffix}
    if missing := [p for p in files if p.stem not in found]:
        raise UserError(
            f"{missing[0]}: no mask {masks / missing[0].stem}.png (nor .json); {len(missing)} of {len(files)} images "
            "have none: add the masks or take the images out"
        )
    return [(file, found[file.stem]) for file in files]


def read_indices(mask: Path, size: tuple[int, int], classes: ClassList) -> np.ndarray:
    """A mask as [H, W] uint8 indices into ``classes``, 255 ignored.

    Raises:
        UserError: unreadable, not as large as its image (``size``, height and width), or with indices, colours or
            labels that are no class.
    """
    if mask.suffix.lower() == ".json":
        return draw_labelme(mask, size, classes.names)
    if classes.colours is not None:
        ids = _from_colours(mask, classes.colours, classes.source)
    else:
        ids = read_mask(mask)
        unknown = unknown_ids(count_ids(ids), len(classes.names))
        if unknown.any():
            raise UserError(
                f"{mask}: indices {np.flatnonzero(unknown).tolist()} are no lines of {classes.source} (0 to "
                f"{len(classes.names) - 1}, 255 for ignored pixels); name these classes, or give every class a colour "
                "there if the mask is to be read by colour"
            )
    refuse_other_size(size, ids.shape, mask)
    return ids


def _packed(colours: np.ndarray) -> np.ndarray:
    """[3, ...] uint8 colours as [...] integers."""
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
        first = pixels[wrong][0]
        raise UserError(
            f"{mask}: colour {first >> 16} {first >> 8 & 255} {first & 255} is no class of {source} ({wrong.sum()} "
            "pixels of other colours); add it there, or save the mask without smoothed edges"
        )
    return np.array(list(ids.values()), np.uint8)[places]


def save_mask(path: Path, ids: np.ndarray) -> None:
    """Write [H, W] uint8 ids as a palette PNG."""
    image = Image.fromarray(ids)
    image.putpalette(voc_palette().ravel().tolist())
    image.save(path)


def convert_masks(
    pairs: Sequence[tuple[Path, Path]], classes: ClassList, table: np.ndarray, folder: Path, console: Console
) -> np.ndarray:
    """Write every mask in dataset ids into ``folder``, as <stem of the image>.png.

    Args:
        pairs: images and masks.
        classes: of the masks.
        table: [256] uint8, dataset ids by index.
        folder: where to.
        console: where the progress bar goes.

    Returns:
        [N, 256] int64 pixels of every dataset id in every mask.

    Raises:
        UserError: see :func:`read_indices`; or an image is unreadable.
    """
    folder.mkdir(parents=True)

    def convert(pair: tuple[Path, Path]) -> np.ndarray:
        image, mask = pair
        ids = table[read_indices(mask, image_size(image), classes)]
        save_mask(folder / f"{image.stem}.png", ids)
        return count_ids(ids)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return np.stack(list(track(console, "reading masks", pool.map(convert, pairs), len(pairs)))).astype(np.int64)


def split_images(shown: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Choose images for validation, a share of those of each class; a class keeps an image to train on.

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


def write_list(path: Path, pairs: Iterable[tuple[Path, Path]]) -> None:
    """Write image and mask of each pair on a line."""
    path.write_text("".join(f"{image}\t{mask}\n" for image, mask in pairs), encoding="utf-8")


def _read_split(root: Path, name: str) -> Split:
    rows = [line.split("\t") for line in read_lines(root / name, _EXPECTED)]
    if wrong := [row for row in rows if len(row) != 2]:
        raise UserError(f"{root / name}: expected 'image<tab>mask' a line, got {wrong[0]}")
    images, masks = zip(*rows, strict=True) if rows else ((), ())
    return Split(tuple(root / p for p in images), tuple(root / p for p in masks), tuple(Path(p).stem for p in images))


def open_folder(root: Path) -> Dataset:
    """Open a prepared folder; classes that its masks never show are not scored.

    Raises:
        UserError: another layout.
    """
    from starseg.engine.checkpoint import read_json

    names = distinct(read_lines(root / "classes.txt", _EXPECTED), root / "classes.txt")
    about = root / "learn.json"
    labelled = read_json(about)["labelled"] if about.is_file() else range(len(names))
    return Dataset(
        "folder",
        root,
        names,
        _read_split(root, "train.txt"),
        _read_split(root, "val.txt"),
        test_fill=BACKGROUND,
        unlabelled=frozenset(range(1, len(names))) - frozenset(labelled),
    )
