"""Labelme annotations: one JSON file per image, with labelled polygons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from starseg.data.datasets.base import clean_name
from starseg.data.images import refuse_other_size
from starseg.errors import UserError
from starseg.utils.files import parse_json


def draw_labelme(path: Path, size: tuple[int, int], names: Sequence[str]) -> np.ndarray:
    """Draw the shapes of a Labelme file, later ones over earlier ones.

    Args:
        path: the JSON file.
        size: height and width of the image in pixels.
        names: class names by index, the background first.

    Returns:
        Class indices [H, W] uint8.

    Raises:
        UserError: the file is missing or not in the Labelme format, its size differs from the image's, a label is
            unknown, or a shape has no area.
    """
    try:
        tree = parse_json(path)
        shapes, found = tree["shapes"], (tree["imageHeight"], tree["imageWidth"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a Labelme file with shapes, imageHeight and imageWidth ({error})") from error
    refuse_other_size(size, found, path)
    ids = {name.casefold(): index for index, name in enumerate(names)}
    mask = Image.new("L", size[::-1], 0)
    for shape in shapes:
        label = clean_name(str(shape.get("label", "")))
        if label.casefold() not in ids:
            raise UserError(
                f"{path}: label {label!r} is none of the classes {', '.join(names[1:])}; add it to --classes"
            )
        _draw(ImageDraw.Draw(mask), shape, ids[label.casefold()], path)
    return np.array(mask)


def _draw(canvas: ImageDraw.ImageDraw, shape: dict[str, Any], index: int, path: Path) -> None:
    points, kind = [tuple(point) for point in shape["points"]], shape.get("shape_type") or "polygon"
    if kind == "polygon" and len(points) > 2:
        canvas.polygon(points, fill=index)
    elif kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        canvas.rectangle([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], fill=index)
    elif kind == "circle" and len(points) == 2:
        (x, y), (x1, y1) = points
        radius = float(np.hypot(x1 - x, y1 - y))
        canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill=index)
    else:
        raise UserError(f"{path}: expected polygons, rectangles and circles, got {kind!r} with {len(points)} points")
