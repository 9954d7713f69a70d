"""COCO annotations: a JSON file for all images, with polygons and run lengths (also CVAT's "COCO 1.0").

Smaller annotations lie over larger ones, of equal ones the later. A crowd (``iscrowd``) is drawn as its class: what is
many is still of that class, and CVAT writes everything painted with its brush as a crowd.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from starseg.data.annotations.classlist import ClassList, is_background
from starseg.data.annotations.photos import Photo, check_unique_stems
from starseg.data.datasets.base import distinct
from starseg.data.images import refuse_other_size
from starseg.errors import UserError
from starseg.tasks import BACKGROUND

Row = dict[str, Any]
_SLACK = 1.0


@dataclass(frozen=True)
class Coco:
    """COCO file, indexed by image.

    Attributes:
        path: the file.
        categories: names by category id.
        images: its entries.
        annotations: its entries by image id.
    """

    path: Path
    categories: dict[int, str]
    images: list[Row]
    annotations: dict[int, list[Row]]

    @property
    def annotated(self) -> list[str]:
        """Names of the annotated categories in the order of their ids, without the background."""
        used = {row["category_id"] for rows in self.annotations.values() for row in rows}
        return [name for number, name in sorted(self.categories.items()) if number in used and not is_background(name)]

    @property
    def classes(self) -> ClassList:
        """The annotated categories."""
        if not self.annotated:
            raise UserError(f"{self.path}: holds no annotation of any category; nothing can be learnt from it")
        return ClassList(("background", *self.annotated), None, str(self.path))

    def left_out(self, classes: ClassList) -> list[str]:
        """Return the annotated categories that are not among the classes."""
        wanted = {name.casefold() for name in classes.names}
        return [name for name in self.annotated if name.casefold() not in wanted]

    def photos(self, images: Path, classes: ClassList) -> list[Photo]:
        """Return the listed images in the order of their names.

        Raises:
            UserError: a class that no category is called, a listed image that is not below the folder ``images``, or
                two that differ in their suffixes alone.
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
        if missing := [(name, row) for name, row in files if not (images / name).is_file()]:
            name, row = missing[0]
            raise UserError(
                f"{self.path}: image {row['id']}: {images / name} is missing{_found(images, name)}; {len(missing)} of "
                f"{len(files)} images are: --images is the folder that file_name starts from"
            )
        check_unique_stems([images / name for name, _ in files], images)
        return [
            Photo(Path(name).with_suffix("").as_posix(), images / name, self.path, partial(self.draw, row, indices))
            for name, row in files
        ]

    def draw(self, image: Row, indices: Mapping[int, int], size: tuple[int, int]) -> np.ndarray:
        """Draw the mask of an image; pixels without annotation are background.

        Args:
            image: its entry.
            indices: class by category id; other categories are not drawn.
            size: height and width of its file.

        Returns:
            [H, W] uint8.

        Raises:
            UserError: the entry gives another size, or an annotation is no mask of this image.
        """
        masks = _pycocotools()
        if image.get("height") and image.get("width"):
            place = f"{self.path}: image {image['id']} ({image['file_name']})"
            refuse_other_size(size, (image["height"], image["width"]), place)
        drawn = np.full(size, BACKGROUND, np.uint8)
        rows = [row for row in self.annotations.get(image["id"], []) if row["category_id"] in indices]
        regions = [_region(row.get("segmentation"), size, f"{self.path}: annotation {row['id']}") for row in rows]
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
        UserError: not COCO's, an id or a category's name twice, an annotation of an image or a category that is not
            there, or pycocotools is missing.
    """
    _pycocotools()
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--masks {path}: expected a folder, or a COCO file ({error})") from error
    images = _by_id(tree, "images", {"file_name": str}, path)
    categories = _by_id(tree, "categories", {"name": str}, path)
    distinct([row["name"].strip().casefold() for row in categories.values()], path)
    annotations: dict[int, list[Row]] = {}
    for row in _rows(tree, "annotations", {"id": int, "image_id": int, "category_id": int}, path):
        for key, known in (("image_id", images), ("category_id", categories)):
            if row[key] not in known:
                raise UserError(f"{path}: annotation {row['id']}: its {key} {row[key]} is not in the file; take it out")
        annotations.setdefault(row["image_id"], []).append(row)
    names = {number: row["name"].strip() for number, row in categories.items()}
    return Coco(path, names, list(images.values()), annotations)


def _rows(tree: Any, part: str, keys: Mapping[str, type], path: Path) -> list[Row]:
    """Return one of the file's lists."""
    rows = tree.get(part) if isinstance(tree, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a COCO file with the lists images, annotations and categories; no {part}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or any(not isinstance(row.get(key), kind) for key, kind in keys.items()):
            wanted = ", ".join(f"{key} ({kind.__name__})" for key, kind in keys.items())
            raise UserError(f"{path}: {part}[{number}]: expected {wanted}, got {row!s:.100}")
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
    return Path(name).as_posix()


def _found(images: Path, missing: str) -> str:
    """Suggest where a missing image is."""
    other = next(images.rglob(Path(missing).name), None)
    return f", but {other} is there" if other else ""


def _region(shape: Any, size: tuple[int, int], place: str) -> Row:
    """Convert an annotation's ``segmentation`` to pycocotools' compressed run lengths.

    Raises:
        UserError: neither polygons inside the image nor run lengths of its size; ``place`` names the annotation.
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
        except (TypeError, ValueError):
            points = np.zeros((0, 2))
        if len(points) < 3 or not np.isfinite(points).all():
            raise UserError(f"{place}: expected polygons [x1, y1, x2, y2, x3, y3, ...], got {polygon!s:.60}")
        if (points < -_SLACK).any() or (points > (width + _SLACK, height + _SLACK)).any():
            x, y = points[np.abs(points - np.array([width, height]) / 2).max(1).argmax()]
            raise UserError(
                f"{place}: its point {x:g}, {y:g} is outside the image of {width}x{height} pixels; is it of another "
                "image?"
            )
        outlines.append(points.ravel().tolist())
    return masks.merge(masks.frPyObjects(outlines, height, width))


def _run_lengths(shape: Row, size: tuple[int, int], place: str) -> Row:
    """Convert run lengths for pycocotools after checking them: it accesses memory out of bounds for invalid ones."""
    if not isinstance(shape.get("size"), list) or tuple(shape["size"]) != tuple(size):
        raise UserError(
            f"{place}: its run lengths are of the size {shape.get('size')} (height, width), its image is {list(size)}"
        )
    counts = shape.get("counts")
    if isinstance(counts, str):
        counts = _uncompressed(counts)
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

    A number is written in groups of 5 bits, the lowest first, each as the character 48 + group, + 32 where another
    follows; the last group's highest bit is the sign. From the fourth on, a number is the difference to the one before
    the last.
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
