"""COCO annotations: one JSON file for all images, with polygons and run-length encodings (also CVAT's "COCO 1.0").

Smaller annotations are drawn over larger ones, and of two equally large ones the later is on top. A crowd (``iscrowd``)
is drawn as its class: its objects still belong to that class, and CVAT exports everything painted with its brush as a
crowd.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from starseg.data.annotations.classlist import ClassList, is_background
from starseg.data.annotations.photos import Photo, check_unique_stems, relative_name
from starseg.data.datasets.base import clean_name, distinct
from starseg.data.folders import list_files, some
from starseg.data.images import is_image, refuse_other_size
from starseg.errors import UserError, raise_together
from starseg.tasks import BACKGROUND
from starseg.utils.files import parse_json
from starseg.utils.terminal import print_note

Row = dict[str, Any]
# Compressed run lengths: numbers of at most 7 characters, the last one below 32 + 48.
_RUNS = re.compile(r"([P-o]{0,6}[0-O])+")
# How far a point may be outside the image, where it is clipped: tools let outlines end there, and round.
_SLACK_PIXELS, _SLACK_SHARE = 10, 0.05


@dataclass(frozen=True)
class Coco:
    """The indexed content of a COCO file.

    Attributes:
        path: the file.
        categories: category names by category id.
        images: entries of the images.
        annotations: entries of the annotations by image id.
    """

    path: Path
    categories: dict[int, str]
    images: list[Row]
    annotations: dict[int, list[Row]]

    @property
    def annotated(self) -> list[str]:
        """Names of the categories with annotations, in the order of their ids, without the background."""
        used = {row["category_id"] for rows in self.annotations.values() for row in rows}
        return [name for number, name in sorted(self.categories.items()) if number in used and not is_background(name)]

    @property
    def classes(self) -> ClassList:
        """The class list of the annotated categories.

        Raises:
            UserError: there are no annotations.
        """
        if not self.annotated:
            raise UserError(f"{self.path}: holds no annotation of any category; nothing can be learnt from it")
        return ClassList(("background", *self.annotated), None, str(self.path))

    def left_out(self, classes: ClassList) -> list[str]:
        """Return the names of annotated categories that are not in a class list."""
        wanted = {name.casefold() for name in classes.names}
        return [name for name in self.annotated if name.casefold() not in wanted]

    def photos(self, images: Path, classes: ClassList) -> list[Photo]:
        """Return the listed images with their masks, sorted by file name.

        Args:
            images: folder to which the file names are relative.
            classes: the classes to draw.

        Raises:
            UserError: a class has no category of its name, a listed image is not in the folder ``images``, or two
                images differ only in their suffixes.
        """
        numbers = {name.casefold(): number for number, name in self.categories.items()}
        if strange := [name for name in classes.names[1:] if name.casefold() not in numbers]:
            raise UserError(
                f"--classes {classes.source}: {self.path} has no category {', '.join(strange)}; it has "
                f"{', '.join(self.categories.values())}"
            )
        indices = {numbers[name.casefold()]: index for index, name in enumerate(classes.names) if index}
        indices |= {number: BACKGROUND for number, name in self.categories.items() if is_background(name)}
        files = sorted(((_file_name(row, self.path), row) for row in self.images), key=lambda pair: pair[0])
        there = {relative_name(path, images): path for path in list_files(images) if is_image(path)}
        # What the listing leaves out, such as hidden files, may still be named.
        found = [there.get(name) or images / name for name, _ in files]
        if missing := [pair for pair, path in zip(files, found, strict=True) if not os.path.isfile(path)]:
            name, row = missing[0]
            raise UserError(
                f"{self.path}: image {row['id']}: {images / name} is missing{_found(images, name)}; {len(missing)} of "
                f"{len(files)} images are: --images is the folder that file_name starts from"
            )
        self._check_listed_once(files)
        check_unique_stems(found, images)
        if unlisted := sorted(set(there.values()) - set(found)):
            print_note(f"images that {self.path} does not list are not used: {some(unlisted)}")
        return [
            Photo(Path(name).with_suffix("").as_posix(), path, self.path, partial(self.draw, row, indices))
            for (name, row), path in zip(files, found, strict=True)
        ]

    def _check_listed_once(self, files: Sequence[tuple[str, Row]]) -> None:
        """Refuse files that are listed under several image ids, given all names, sorted, with their entries."""
        listed = [(name, [row["id"] for _, row in rows]) for name, rows in groupby(files, key=lambda pair: pair[0])]
        if twice := [f"{name} (ids {', '.join(map(str, ids))})" for name, ids in listed if len(ids) > 1]:
            raise UserError(
                f"{self.path}: images listed more than once: {some(twice)}; give every file one entry, "
                "with the annotations of all of them"
            )

    def draw(self, image: Row, indices: Mapping[int, int], size: tuple[int, int]) -> np.ndarray:
        """Draw the mask of an image; pixels outside all annotations are background.

        Args:
            image: entry of the image.
            indices: class index by category id; other categories are not drawn.
            size: height and width of the image file in pixels.

        Returns:
            Class indices [H, W] uint8.

        Raises:
            UserError: the size in the entry differs from the file's, or annotations are no valid masks of the image;
                the message names all of them.
        """
        masks = _pycocotools()
        if image.get("height") and image.get("width"):
            place = f"{self.path}: image {image['id']} ({image['file_name']})"
            refuse_other_size(size, (image["height"], image["width"]), place)
        drawn = np.full(size, BACKGROUND, np.uint8)
        rows = [row for row in self.annotations.get(image["id"], []) if row["category_id"] in indices]
        regions, errors = [], []
        for row in rows:
            try:
                regions.append(_region(row.get("segmentation"), size, f"{self.path}: annotation {row['id']}"))
            except UserError as error:
                errors.append(error)
        raise_together(errors, f"annotations of {image['file_name']} cannot be drawn")
        areas = np.array([masks.area(region) for region in regions])
        for i in np.argsort(-areas.astype(np.int64), kind="stable"):
            drawn[masks.decode(regions[i]) > 0] = indices[rows[i]["category_id"]]
        return drawn


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError(
            "COCO annotations need the package pycocotools, which is missing; pip install 'starseg[learn]'"
        ) from error
    return mask


def read_coco(path: Path) -> Coco:
    """Read a COCO file and index it by image.

    Raises:
        UserError: the file is not in the COCO format, an id or category name occurs twice, an annotation refers to an
            image or category that does not exist, or pycocotools is not installed.
    """
    _pycocotools()
    try:
        tree = parse_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--masks {path}: expected a folder, or a COCO file ({error})") from error
    images = _by_id(tree, "images", {"file_name": str}, path)
    categories = _by_id(tree, "categories", {"name": str}, path)
    names = {number: clean_name(row["name"]) for number, row in categories.items()}
    if nameless := [number for number, name in names.items() if not name]:
        raise UserError(f"{path}: categories: the name of id {nameless[0]} is empty; give every category a name")
    annotations: dict[int, list[Row]] = {}
    errors = []
    for row in _rows(tree, "annotations", {"id": int, "image_id": int, "category_id": int}, path):
        for key, known in (("image_id", images), ("category_id", categories)):
            if row[key] not in known:
                text = f"{path}: annotation {row['id']}: its {key} {row[key]} is not in the file; take it out"
                errors.append(UserError(text))
        annotations.setdefault(row["image_id"], []).append(row)
    raise_together(errors, "annotations refer to entries that do not exist")
    names = _without_unused_copies(names, annotations)
    distinct([name.casefold() for name in names.values()], path)
    return Coco(path, names, list(images.values()), annotations)


def _without_unused_copies(names: Mapping[int, str], annotations: Mapping[int, list[Row]]) -> dict[int, str]:
    """Leave out categories without annotations whose name an annotated category has too.

    Roboflow writes such a category, with the name of the project, before the others.

    Args:
        names: category names by category id.
        annotations: entries of the annotations by image id.
    """
    used = {row["category_id"] for rows in annotations.values() for row in rows}
    drawn = {names[number].casefold() for number in used}
    return {number: name for number, name in names.items() if number in used or name.casefold() not in drawn}


def _rows(tree: Any, part: str, keys: Mapping[str, type], path: Path) -> list[Row]:
    """Return one of the lists in the file, after checking the types of the required keys of its entries."""
    rows = tree.get(part) if isinstance(tree, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a COCO file with the lists images, annotations and categories; no {part}")
    wanted = ", ".join(f"{key} ({kind.__name__})" for key, kind in keys.items())
    wrong = [
        UserError(f"{path}: {part}[{number}]: expected {wanted}, got {row!s:.100}")
        for number, row in enumerate(rows)
        if not isinstance(row, dict) or any(not isinstance(row.get(key), kind) for key, kind in keys.items())
    ]
    raise_together(wrong, f"entries of {part} are incomplete")
    return rows


def _by_id(tree: Any, part: str, keys: Mapping[str, type], path: Path) -> dict[int, Row]:
    found: dict[int, Row] = {}
    for row in _rows(tree, part, {"id": int, **keys}, path):
        if found.setdefault(row["id"], row) is not row:
            raise UserError(f"{path}: {part}: the id {row['id']} is there twice; give every entry an id of its own")
    return found


def _file_name(row: Row, path: Path) -> str:
    name = row["file_name"].replace("\\", "/")
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{path}: image {row['id']}: expected a file_name below --images, got {row['file_name']!r}")
    return unicodedata.normalize("NFC", Path(name).as_posix())


def _found(images: Path, missing: str) -> str:
    """Return the end of an error message: where a missing image was found instead."""
    other = next((path for path in list_files(images) if path.name == Path(missing).name), None)
    return f", but {other} is there" if other else ""


def _region(shape: Any, size: tuple[int, int], place: str) -> Row:
    """Convert an annotation's ``segmentation`` to the compressed run-length encoding of pycocotools.

    Args:
        shape: the ``segmentation``: polygons or run lengths.
        size: height and width of the image in pixels.
        place: the annotation, for error messages.

    Raises:
        UserError: it is neither polygons in the image, or a few pixels outside, nor run lengths of the image's size.
    """
    masks, (height, width) = _pycocotools(), size
    if isinstance(shape, dict):
        return _run_lengths(shape, size, place)
    if not isinstance(shape, list) or not shape:
        raise UserError(f"{place}: has no polygon and no run lengths (a box?); draw its outline, or take it out")
    outlines = []
    for polygon in shape:
        try:
            points = np.array(polygon, float).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError):
            points = np.zeros((0, 2))
        if len(points) < 3 or not np.isfinite(points).all():
            raise UserError(f"{place}: expected polygons [x1, y1, x2, y2, x3, y3, ...], got {polygon!s:.60}")
        sides = np.array([width, height])
        slack = np.maximum(_SLACK_PIXELS, _SLACK_SHARE * sides)
        if (points < -slack).any() or (points > sides + slack).any():
            x, y = points[np.abs(points - sides / 2).max(1).argmax()]
            raise UserError(
                f"{place}: its point {x:g}, {y:g} is outside the image of {width}x{height} pixels; is it of another "
                "image?"
            )
        outlines.append(points.ravel().tolist())
    return masks.merge(masks.frPyObjects(outlines, height, width))


def _run_lengths(shape: Row, size: tuple[int, int], place: str) -> Row:
    """Check run lengths and convert them for pycocotools, which accesses memory out of bounds on invalid ones."""
    if not isinstance(shape.get("size"), list) or tuple(shape["size"]) != tuple(size):
        raise UserError(
            f"{place}: its run lengths are of the size {shape.get('size')} (height, width), its image is {list(size)}"
        )
    counts = shape.get("counts")
    if isinstance(counts, str):
        counts = _uncompressed(counts) if _RUNS.fullmatch(counts) else None
    if (
        not isinstance(counts, list)
        or any(type(count) is not int or count < 0 for count in counts)
        or sum(counts) != size[0] * size[1]
    ):
        raise UserError(
            f"{place}: its run lengths do not fill the image of {size[1]}x{size[0]} pixels; export it again"
        )
    return _pycocotools().frPyObjects({"size": list(size), "counts": counts}, *size)


def _uncompressed(text: str) -> list[int]:
    """Decode COCO's compressed run lengths to numbers.

    A number is stored in groups of 5 bits, the lowest first, each as the character 48 + group, plus 32 if another group
    follows; the highest bit of the last group is the sign. From the fourth number on, the stored value is the
    difference from the number two places before.
    """
    counts: list[int] = []
    value = shift = 0
    for group in text.encode():
        value |= (group - 48 & 31) << shift
        shift += 5
        if not group - 48 & 32:
            value -= (value >> shift - 1) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
