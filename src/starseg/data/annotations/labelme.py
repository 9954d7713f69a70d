"""Labelme annotations: one JSON file per image with labelled shapes, as written by Labelme and X-AnyLabeling."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from starseg.data.datasets.base import clean_name
from starseg.data.images import refuse_other_size
from starseg.errors import UserError, raise_together
from starseg.tasks import IGNORE
from starseg.utils.files import parse_json

# Besides rectangles, the kinds of shapes whose points are the corners of an outline.
_OUTLINES = ("polygon", "rotation", "oriented_rectangle", "quadrilateral")
_IGNORED = "__ignore__"


def draw_labelme(path: Path, size: tuple[int, int], names: Sequence[str]) -> np.ndarray:
    """Draw the shapes of a Labelme file, later ones over earlier ones.

    Args:
        path: the JSON file.
        size: height and width of the image in pixels.
        names: class names by index, the background first.

    Returns:
        Class indices [H, W] uint8; 255 where the label is ``__ignore__``.

    Raises:
        UserError: the file is missing or not in the Labelme format, its size differs from the image's, a label is
            unknown, or a shape has no area or lies outside the image. The message names all such shapes.
    """
    refuse_other_size(size, _size(tree := _read(path)), path)
    ids = {_IGNORED: IGNORE} | {name.casefold(): index for index, name in enumerate(names)}
    mask = Image.new("L", size[::-1], 0)
    errors = []
    for number, shape in enumerate(tree["shapes"], 1):
        place = f"{path}: shape {number}"
        try:
            if not isinstance(shape, dict):
                raise UserError(f"{place}: expected an object with label and points, got {shape!s:.60}")
            label = clean_name(str(shape.get("label", "")))
            if label.casefold() not in ids:
                raise UserError(
                    f"{place}: label {label!r} is none of the classes {', '.join(names[1:])}; add it to --classes"
                )
            _draw(mask, shape, ids[label.casefold()], f"{place} ({label})")
        except UserError as error:
            errors.append(error)
    raise_together(errors, f"shapes of {path} cannot be drawn")
    return np.array(mask)


def _read(path: Path) -> dict[str, Any]:
    expected = "expected a Labelme file with a list of shapes, imageHeight and imageWidth"
    try:
        tree = parse_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {expected} ({error})") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("shapes"), list):
        raise UserError(f"{path}: {expected}; it has no list of shapes")
    if not all(isinstance(side, int | float) for side in _size(tree)):
        raise UserError(f"{path}: {expected}; its height and width are {' and '.join(map(str, _size(tree)))}")
    return tree


def _size(tree: dict[str, Any]) -> tuple[Any, Any]:
    return tree.get("imageHeight"), tree.get("imageWidth")


def _draw(mask: Image.Image, shape: dict[str, Any], index: int, place: str) -> None:
    """Draw a shape on a mask, clipped to it.

    Raises:
        UserError: the shape is of another kind, damaged, or outside the mask.
    """
    points, kind = _points(shape.get("points"), place), shape.get("shape_type") or "polygon"
    canvas = ImageDraw.Draw(mask)
    if kind == "circle" and len(points) == 2:
        radius = float(np.hypot(*(points[1] - points[0])))
        points = np.stack([points[0] - radius, points[0] + radius])
    _refuse_outside(points, mask.size, place)
    corners = np.stack([points.min(0), points.max(0)])
    # X-AnyLabeling stores all four corners of a rectangle.
    upright = len(points) == 4 and np.isin(points, corners).all() and len(np.unique(points, axis=0)) == 4
    if kind == "circle" and len(points) == 2:
        canvas.ellipse(corners.ravel().tolist(), fill=index)
    elif kind == "rectangle" and (len(points) == 2 or upright):
        canvas.rectangle(corners.ravel().tolist(), fill=index)
    elif kind in ("rectangle", *_OUTLINES) and len(points) > 2:
        canvas.polygon([tuple(point) for point in points.tolist()], fill=index)
    elif kind == "mask" and len(points) == 2:
        x, y = corners[0].astype(int).tolist()
        mask.paste(index, (x, y), _bitmap(shape.get("mask"), corners.astype(int), place))
    else:
        raise UserError(
            f"{place}: expected a polygon, rectangle, circle or mask, got {kind!s:.40} with {len(points)} points; "
            "draw its outline, or take it out"
        )


def _points(given: Any, place: str) -> np.ndarray:
    """Return points [N, 2]."""
    try:
        points = np.array(given, float)
    except (TypeError, ValueError, OverflowError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise UserError(f"{place}: expected points [[x, y], ...], got {given!s:.60}; draw it again, or take it out")
    return points


def _refuse_outside(points: np.ndarray, size: tuple[int, int], place: str) -> None:
    """Refuse points [N, 2] that are farther from an image of (width, height) than its size, or all beside it."""
    far = (points < -np.array(size)) | (points > 2 * np.array(size))
    if far.any() or (points.max(0) < 0).any() or (points.min(0) > size).any():
        raise UserError(
            f"{place}: is outside the image of {size[0]}x{size[1]} pixels (x {points[:, 0].min():g} to "
            f"{points[:, 0].max():g}, y {points[:, 1].min():g} to {points[:, 1].max():g}); is it of another image?"
        )


def _bitmap(text: Any, corners: np.ndarray, place: str) -> Image.Image:
    """Decode the mask of a shape, a PNG in base64, of the pixels from one corner to the other inclusive.

    Args:
        text: the PNG; pixels other than 0 belong to the shape.
        corners: (x, y) of the first and the last pixel, [2, 2].
        place: the shape, for error messages.

    Returns:
        An image of mode "L", 255 inside the shape.
    """
    width, height = (corners[1] - corners[0] + 1).tolist()
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            found = image.size
            # Decoded only then, as a small file may hold an enormous image.
            pixels = np.asarray(image) if found == (width, height) else None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise UserError(
            f"{place}: cannot read its mask, expected a PNG in base64 ({error}); export it again"
        ) from error
    if pixels is None or pixels.ndim != 2:
        raise UserError(
            f"{place}: its mask must be a grey image of {width}x{height} pixels, from corner to corner, got {found[0]}x"
            f"{found[1]}; export it again"
        )
    return Image.fromarray((pixels != 0).astype(np.uint8) * 255)
