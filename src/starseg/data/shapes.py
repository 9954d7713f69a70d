"""A synthetic data set of textured shapes for demonstrations, written to disk in the PASCAL VOC layout.

Shapes are signed distance functions on complex coordinates ``z = x + iy`` of a rotated frame in which an
object has radius about 1; a distance is negative inside. Textures map the same ``z`` to mixing weights in
[0, 1] between an object's two colours. Colours are float32 planes (3, H, W) of RGB in [0, 1].
"""

import cmath
import colorsys
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import EllipsisType
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from starseg.data.palette import voc_palette
from starseg.errors import UserError
from starseg.tasks import IGNORE

FORMAT_VERSION = 1
_SPLIT_IDS = {"train": 0, "val": 1}
_RADIUS_RANGES = {1: (0.30, 0.40), 2: (0.26, 0.36), 3: (0.22, 0.30)}  # by object count, in image sides

Field = Callable[[np.ndarray], np.ndarray]


def _box(z: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    x, y = np.abs(z.real) - half_width, np.abs(z.imag) - half_height
    return np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0)


def _polygon(z: np.ndarray, sides: int, radius: float, sharpness: float = 2.0) -> np.ndarray:
    """Return the distance to a regular polygon (sharpness 2) or a star with `sides` tips (sharpness up to `sides`)."""
    half_angle = np.pi / sides
    edge = cmath.rect(1, np.pi / sharpness)
    folded = np.mod(np.angle(z), 2 * half_angle) - half_angle
    p = np.abs(z) * (np.cos(folded) + 1j * np.abs(np.sin(folded))) - cmath.rect(radius, half_angle)
    p = p + edge * np.clip(-(p * edge.conjugate()).real, 0, radius * math.sin(half_angle) / edge.imag)
    return np.abs(p) * np.sign(p.real)


def _cross(z: np.ndarray) -> np.ndarray:
    return np.minimum(_box(z, 1.0, 0.36), _box(z, 0.36, 1.0))


def _crescent(z: np.ndarray) -> np.ndarray:
    z = z - 0.2
    return np.maximum(np.abs(z) - 1.05, 0.8 - np.abs(z - 0.55))


def _heart(z: np.ndarray) -> np.ndarray:
    scale = 1.75
    x, y = np.abs(z.real) / scale, z.imag / scale + 0.55
    lobe = np.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    diagonal = 0.5 * np.maximum(x + y, 0)
    tip = np.minimum(np.hypot(x, y - 1), np.hypot(x - diagonal, y - diagonal)) * np.sign(x - y)
    return scale * np.where(x + y > 1, lobe, tip)


def _soft(wave: np.ndarray, gain: float = 2.0) -> np.ndarray:
    return np.clip(0.5 + gain * wave, 0, 1)


def _cell(x: np.ndarray, period: float) -> np.ndarray:
    """Return the distance from `x` to the centre of its periodic cell, from 0 to 0.5."""
    return np.abs(np.mod(x / period, 1) - 0.5)


def _honeycomb(z: np.ndarray) -> np.ndarray:
    waves = [np.cos(13.0 * (z * cmath.rect(1, np.pi * k / 3)).real) for k in range(3)]
    return _soft(np.sum(waves, axis=0) + 0.75, 1.2)


def _dots(z: np.ndarray) -> np.ndarray:
    return _soft(0.3 - np.hypot(_cell(z.real, 0.5), _cell(z.imag, 0.5)), 6)


def _lattice(z: np.ndarray) -> np.ndarray:
    return _soft(np.maximum(_cell(z.real, 0.4), _cell(z.imag, 0.4)) - 0.35, 8)


class _Shape(NamedTuple):
    distance: Field
    texture: Field
    hue: float


_SHAPES = {
    "disc": _Shape(lambda z: abs(z) - 0.9, _dots, 0.0),
    "square": _Shape(lambda z: _box(z, 0.8, 0.8), lambda z: _soft(np.sin(8 * z.real) * np.sin(8 * z.imag)), 0.3),
    "triangle": _Shape(lambda z: _polygon(z, 3, 1.15), lambda z: _soft(np.sin(15 * z.real)), 0.6),
    "hexagon": _Shape(lambda z: _polygon(z, 6, 0.98), _honeycomb, 0.7),
    "heart": _Shape(_heart, lambda z: _soft(np.sin(17 * abs(z))), 0.9),
    "pill": _Shape(
        lambda z: _box(z, 0.55, 0) - 0.52,
        lambda z: _soft(np.sin(12 * (z.real + 1.6 * _cell(z.imag, 0.55)))),
        0.52,
    ),
    "crescent": _Shape(_crescent, lambda z: _soft(np.sin(12 * z.real + 1.8 * np.sin(7 * z.imag))), 0.2),
    "ring": _Shape(lambda z: abs(abs(z) - 0.72) - 0.28, lambda z: _soft(np.sin(9 * np.angle(z))), 0.8),
    "star": _Shape(lambda z: _polygon(z, 5, 1.1, 3.2), lambda z: np.clip(1.1 - 1.2 * abs(z), 0, 1), 0.1),
    "cross": _Shape(_cross, _lattice, 0.45),
}
SHAPE_CLASSES: tuple[str, ...] = ("background", *_SHAPES)


def _colour(rng: np.random.Generator, hue: float, value: tuple[float, float]) -> np.ndarray:
    rgb = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.6, 0.95), rng.uniform(*value))
    return np.array(rgb, np.float32)[:, None, None]


def _two_colours(rng: np.random.Generator, hue: float) -> tuple[np.ndarray, np.ndarray]:
    light = _colour(rng, hue, (0.65, 1.0))
    dark = _colour(rng, hue + rng.normal(0, 0.07), (0.1, 0.45))
    return (light, dark) if rng.random() < 0.5 else (dark, light)


def _mix(weight: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return low + weight * (high - low)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.clip(np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)


def _grid(size: int) -> np.ndarray:
    """Return the pixel centres of an image as complex numbers, in image sides, with y pointing upwards."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return axis + 1j * axis[::-1, None]


def _background(rng: np.random.Generator, grid: np.ndarray) -> np.ndarray:
    size = len(grid)
    turned = (grid - (0.5 + 0.5j)) * cmath.rect(1, rng.uniform(0, math.tau))
    noise = _smooth_noise(rng, size, int(rng.integers(3, 9)))
    pattern = (
        lambda: noise,
        lambda: _soft(turned.real, 0.8),
        lambda: _soft(np.sin(rng.uniform(15, 60) * turned.real + 3 * noise), 0.6),
        lambda: _soft(noise - 0.5, 5),
        lambda: _soft(np.sin(30 * turned.real) * np.sin(30 * turned.imag) + noise - 0.5, 0.7),
    )[rng.integers(5)]()
    high, low = (_colour(rng, rng.random(), (0.2, 0.95)) for _ in range(2))
    grain = rng.uniform(0, 0.4) * (_smooth_noise(rng, size, size // 3) - 0.5)
    return _mix(rng.uniform(0.3, 1.0) * pattern, high, low) + grain


def _window(size: int, centre: complex, reach: float) -> tuple[EllipsisType, slice, slice]:
    """Return an index of the last two axes (rows, columns): the part within `reach` of `centre`, in image sides."""
    rows, columns = (
        slice(max(round((middle - reach) * size), 0), max(round((middle + reach) * size), 0))
        for middle in (1 - centre.imag, centre.real)
    )
    return ..., rows, columns


def _paint(canvas: np.ndarray, colours: np.ndarray, distance: np.ndarray) -> None:
    """Paint `colours` onto `canvas` where `distance` (in pixels) is negative, with a smooth edge."""
    canvas += np.clip(0.5 - distance, 0, 1) * (colours - canvas)


def _add_distractor(rng: np.random.Generator, canvas: np.ndarray, grid: np.ndarray) -> None:
    size, centre, radius = len(grid), complex(*rng.random(2)), rng.uniform(0.05, 0.16)
    bumps = [(k, rng.uniform(0, 0.3), rng.uniform(0, math.tau)) for k in (2, 3, 5)]
    fill = _mix(_smooth_noise(rng, size, int(rng.integers(2, 24))), *_two_colours(rng, rng.random()))
    window = _window(size, centre, 2 * radius)
    z = grid[window] - centre
    outline = 1 + np.sum([bump * np.cos(k * np.angle(z) + phase) for k, bump, phase in bumps], axis=0)
    _paint(canvas[window], fill[window], (np.abs(z) - radius * outline) * size)


def _centre(rng: np.random.Generator, others: list[complex]) -> complex:
    """Return the one of a few random positions (in image sides) that is farthest from the other centres."""
    places = rng.uniform(0.2, 0.8, (4, 2)) @ (1, 1j)
    return max(places.tolist(), key=lambda place: min((abs(place - other) for other in others), default=0.0))


def _develop(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Apply uneven light, contrast, brightness, blur and noise; return uint8 RGB."""
    size = canvas.shape[-1]
    canvas = canvas * (0.75 + 0.5 * _smooth_noise(rng, size, 3))
    canvas = 0.5 + rng.uniform(0.6, 1.15) * (canvas - 0.5) + rng.uniform(-0.12, 0.12)
    image = Image.fromarray(np.moveaxis(np.clip(canvas, 0, 1) * 255, 0, 2).astype(np.uint8, order="C"))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.0) * size / 128)))
    noisy = blurred + rng.uniform(1, 9) * rng.standard_normal(blurred.shape, dtype=np.float32)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _render(rng: np.random.Generator, size: int, primary: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene: uint8 RGB (size, size, 3) and its uint8 mask (size, size)."""
    grid = _grid(size)
    canvas, mask = _background(rng, grid), np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(3)):
        _add_distractor(rng, canvas, grid)

    count = int(rng.choice((1, 2, 3), p=(0.3, 0.4, 0.3)))
    others = np.setdiff1d(np.arange(1, 1 + classes), primary)
    labels = rng.permutation([primary, *rng.choice(others, count - 1, replace=False)])
    centres: list[complex] = []
    half_border = max(size / 128, 0.5)
    for label in labels:
        shape = _SHAPES[SHAPE_CLASSES[label]]
        centres.append(_centre(rng, centres))
        radius = rng.uniform(*_RADIUS_RANGES[count])
        window = _window(size, centres[-1], 1.4 * radius)
        z = (grid[window] - centres[-1]) / radius * cmath.rect(1, rng.uniform(0, math.tau))
        z = z.real * rng.uniform(0.9, 1.1) + 1j * z.imag
        distance = shape.distance(z) * radius * size
        weight = shape.texture(z * rng.uniform(0.8, 1.2))
        colours = _mix(weight, *_two_colours(rng, shape.hue + rng.normal(0, 0.03)))
        _paint(canvas[window], colours, distance)
        mask[window][distance < 0] = label
        mask[window][np.abs(distance) <= half_border] = IGNORE
    return _develop(rng, canvas), mask


def _write_split(root: Path, split: str, recipe: dict[str, int], masks: str) -> list[str]:
    """Write the images and masks of a split and return their ids."""
    palette, ids = voc_palette().ravel().tolist(), [f"{split}_{index:05d}" for index in range(recipe[split])]
    (root / masks).mkdir()
    for index, image_id in enumerate(ids):
        rng = np.random.default_rng((recipe["seed"], _SPLIT_IDS[split], index))
        image, mask = _render(rng, recipe["size"], 1 + index % recipe["classes"], recipe["classes"])
        Image.fromarray(image).save(root / "JPEGImages" / f"{image_id}.jpg", quality=92)
        indexed = Image.fromarray(mask)
        indexed.putpalette(palette)
        indexed.save(root / masks / f"{image_id}.png")
    return ids


def write_shapes(
    root: Path,
    *,
    train: int = 600,
    val: int = 120,
    size: int = 128,
    seed: int = 0,
    classes: int = len(_SHAPES),
) -> Path:
    """Write the shapes data set in the PASCAL VOC layout, unless `root` already contains the same one.

    JPEG images are in ``JPEGImages``; masks are palette PNGs of uint8 class indices (0 background, 255 the
    border around an object) in ``SegmentationClassAug`` (train) and ``SegmentationClass`` (val). The lists
    are ``ImageSets/Segmentation/train_aug.txt`` (one image path and mask path per line) and ``val.txt`` (ids);
    ``classes.txt`` lists the class names in the order of their indices. The same arguments give the same bytes,
    and the content of an image does not depend on the number of images.

    Args:
        root: folder to create; its parents are created as well.
        train: number of training images, at least 1.
        val: number of validation images, at least 1.
        size: height and width of each image in pixels, at least 32.
        seed: non-negative seed of the data set.
        classes: number of classes without the background, at least 3; the first ones of ``SHAPE_CLASSES``.

    Returns:
        `root`.

    Raises:
        UserError: an argument is out of range, or `root` contains anything other than this data set.
    """
    recipe = {
        "version": FORMAT_VERSION,
        "train": train,
        "val": val,
        "size": size,
        "seed": seed,
        "classes": classes,
    }
    if min(train, val) < 1 or size < 32 or seed < 0 or not 3 <= classes <= len(_SHAPES):
        raise UserError(f"need train >= 1, val >= 1, size >= 32, seed >= 0 and classes 3..{len(_SHAPES)}, got {recipe}")
    target = Path(root).resolve()
    if _holds(target, recipe):
        return root
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        build = Path(temporary) / "build"
        lists = build / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (build / "JPEGImages").mkdir()
        train_ids = _write_split(build, "train", recipe, "SegmentationClassAug")
        val_ids = _write_split(build, "val", recipe, "SegmentationClass")
        pairs = (f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in train_ids)
        (lists / "train_aug.txt").write_text("".join(pairs))
        (lists / "val.txt").write_text("".join(f"{name}\n" for name in val_ids))
        (build / "classes.txt").write_text("".join(f"{name}\n" for name in SHAPE_CLASSES[: 1 + classes]))
        (build / "shapes.json").write_text(json.dumps(recipe) + "\n")
        build.replace(target)
    return root


def _holds(target: Path, recipe: dict[str, int]) -> bool:
    """Return whether `target` contains the data set of `recipe`; raise UserError if it contains anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        found = json.loads((target / "shapes.json").read_text())
    except (OSError, ValueError):
        found = None
    if found != recipe:
        held = f"a shapes data set made with {found}" if found else "something that is not a shapes data set"
        raise UserError(f"{target} holds {held}, not {recipe}: delete that folder or choose another one")
    return True
