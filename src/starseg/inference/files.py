"""Prediction of mask files from image files (`starseg predict`)."""

from __future__ import annotations

import glob
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from starseg.data.folders import list_files, some
from starseg.data.images import SUFFIXES, is_image, note_unread
from starseg.data.palette import paint, voc_palette
from starseg.errors import UserError
from starseg.inference.predictor import Options, Prediction, Predictor
from starseg.utils.files import write_atomic, write_json
from starseg.utils.progress import bar
from starseg.utils.terminal import labelled, print_note

_GLOB = set("*?[")
_MARK = "starseg"


@dataclass(frozen=True)
class Target:
    """Output files of one image."""

    image: Path
    mask: Path
    overlay: Path | None


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Return the image files named by paths, folders and glob patterns, each once, in the given order.

    A folder stands for the images directly inside it; ``photos/**/*.jpg`` (quoted) reaches deeper. Other files that a
    folder or pattern holds are named on stderr; a file named itself is tried, whatever its name.

    Raises:
        UserError: nothing is there, or a folder or pattern without an image.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        for path in _files_of(text):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _files_of(text: str) -> list[Path]:
    path, known = Path(text), ", ".join(SUFFIXES)
    if path.is_dir():
        files = list_files(path, deep=False)
        if not any(map(is_image, files)):
            deep = any(map(is_image, list_files(path)))
            hint = f"; folders in it hold some, which the pattern '{path}/**/*' (quoted) reaches" if deep else ""
            raise UserError(f"{path}: no image in this folder (looked for {known}){hint}")
    elif path.exists():
        return [path]
    elif _GLOB & set(text):
        found = sorted(map(Path, glob.glob(text, recursive=True)))
        files = [path for path in found if path.is_file()]
        if dangling := [path for path in found if not path.exists()]:
            print_note(f"left out, as they are links that lead nowhere: {some(dangling)}")
        if not any(map(is_image, files)):
            raise UserError(f"{text}: no file matches this pattern that is an image ({known})")
    else:
        raise UserError(f"{path}: no such file or folder")
    note_unread([path for path in files if not is_image(path)])
    return [path for path in files if is_image(path)]


def plan_targets(images: Sequence[Path], out: Path, overlays: bool) -> list[Target]:
    """Name the mask and overlay of each image by its stem, with a number appended where that is taken.

    Raises:
        UserError: a result would overwrite one of the images, or a file that no prediction made.
    """
    taken: set[str] = set()
    targets = []
    for image in images:
        name, number = image.stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{image.stem}-{number}"
        taken.add(name.lower())
        overlay = out / "overlays" / f"{name}.jpg" if overlays else None
        targets.append(Target(image, out / f"{name}.png", overlay))
    inputs = {image.resolve() for image in images}
    written = [path for t in targets for path in (t.mask, t.overlay) if path]
    if lost := [path for path in written if path.resolve() in inputs]:
        raise UserError(f"--out: {lost[0]} is one of the images and would be overwritten; give another folder")
    if alien := next((path for path in written if path.exists() and not _is_predicted(path)), None):
        raise UserError(f"--out: {alien} is there and was not made by `starseg predict`; give another folder")
    return targets


def _is_predicted(path: Path) -> bool:
    """Whether a mask (PNG) or overlay (JPEG) was written by starseg."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _MARK or image.info.get("comment") == _MARK.encode()
    except Exception:  # Pillow raises nearly anything on damaged bytes
        return False


def _encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def mask_png(mask: np.ndarray) -> bytes:
    """Encode ids [H, W] uint8 as a palette PNG in VOC's colours, marked as written by starseg."""
    image, about = Image.fromarray(mask), PngInfo()
    image.putpalette(voc_palette().tobytes())
    about.add_text("Software", _MARK)
    return _encoded(image, format="PNG", optimize=True, pnginfo=about)


def _legend(width: int, entries: Sequence[tuple[str, tuple[int, ...]]], size: int) -> Image.Image:
    """Draw a legend of colour patches with names, in as many rows as needed."""
    font, gap, places = ImageFont.load_default(size), size // 2, []
    x = y = gap
    for name, _ in entries:
        wide = size + gap + round(font.getlength(name)) + 2 * gap
        if x > gap and x + wide > width:
            x, y = gap, y + size + gap
        places.append((x, y))
        x += wide
    strip = Image.new("RGB", (width, y + size + gap), "white")
    draw = ImageDraw.Draw(strip)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y, x + size, y + size), fill=colour, outline="black")
        draw.text((x + size + gap, y + size / 2), name, fill="black", font=font, anchor="lm")
    return strip


def draw_overlay(image: np.ndarray, mask: np.ndarray, names: dict[int, str]) -> Image.Image:
    """Draw the image with coloured classes and a legend below.

    Args:
        image: [H, W, 3] uint8.
        mask: [H, W] uint8 dataset ids; 0 is left as it is.
        names: by dataset id.
    """
    tinted = np.where(mask[..., None] > 0, (image.astype(np.uint16) + paint(mask)) // 2, image).astype(np.uint8)
    shown = [(names[i], tuple(voc_palette()[i].tolist())) for i in np.unique(mask).tolist() if i]
    if not shown:
        return Image.fromarray(tinted)
    height, width = mask.shape
    strip = _legend(width, shown, size=max(10, min(height, width) // 24))
    whole = Image.new("RGB", (width, height + strip.height))
    whole.paste(Image.fromarray(tinted), (0, 0))
    whole.paste(strip, (0, height))
    return whole


def class_shares(mask: np.ndarray, names: dict[int, str]) -> dict[str, float]:
    """Return the percentage of pixels of each class in ids [H, W] uint8; ``names`` by dataset id."""
    counts = np.bincount(mask.ravel(), minlength=256)
    return {name: 100 * int(counts[i]) / mask.size for i, name in names.items()}


def _write(done: Prediction, target: Target, names: dict[int, str]) -> dict[str, Any]:
    """Write one image's files and return its entry of the JSON file."""
    write_atomic(target.mask, mask_png(done.mask))
    if target.overlay:
        drawn = draw_overlay(done.image.permute(1, 2, 0).numpy(), done.mask, names)
        write_atomic(target.overlay, _encoded(drawn, format="JPEG", quality=90, comment=_MARK))
    height, width = done.mask.shape
    return {
        "image": str(target.image),
        "mask": str(target.mask),
        "width": width,
        "height": height,
        "percent": class_shares(done.mask, names),
    }


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str],
    out: Path,
    console: Console,
    options: Options | None = None,
    overlays: bool = False,
    json_file: Path | None = None,
) -> list[dict[str, Any]]:
    """Write the masks of image files; a file that cannot be read is reported and skipped.

    Args:
        predictor: the model.
        inputs: files, folders, glob patterns.
        out: folder for ``<stem>.png`` and ``overlays/<stem>.jpg``.
        console: where progress goes.
        options: how to predict.
        overlays: also draw them.
        json_file: takes the share of each class in percent of the pixels, by image, and the failures.

    Returns:
        The failures: {"image", "error"}.

    Raises:
        UserError: no image, or a result that would overwrite one.
    """
    images = find_images(inputs)
    targets = plan_targets(images, out, overlays)
    if out.resolve() in {Path(text).resolve() for text in inputs if Path(text).is_dir()}:
        raise UserError(f"--out: {out} is a folder of images; masks in it would pass for images, give another folder")
    if json_file and json_file.resolve() in {image.resolve() for image in images}:
        raise UserError(f"--json: {json_file} is one of the images and would be overwritten; give another file")
    try:
        (out / "overlays" if overlays else out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made a folder ({error.strerror}); give another one") from error
    names = dict(zip(predictor.dataset_ids, predictor.classes, strict=True))
    entries: list[tuple[int, dict[str, Any]]] = []
    failed, start = [], time.monotonic()
    with bar(console, "predict", len(images)) as shown:
        for done in predictor.stream(images, options):
            if done.error:
                failed.append({"image": str(images[done.index]), "error": str(done.error)})
                console.print(labelled("failed:", "red", str(done.error)), soft_wrap=True)
            else:
                entries.append((done.index, _write(done, targets[done.index], names)))
            shown.advance()
    seconds = time.monotonic() - start
    if json_file:
        ordered = [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]
        write_json(json_file, {"classes": predictor.classes, "images": ordered, "failed": failed})
    rest = f", {len(failed)} of {len(images)} images failed" if failed else ""
    speed = f"{seconds:.1f} s, {len(images) / seconds:.1f} images/s"
    drawn = f", overlays in {out / 'overlays'}" if overlays else ""
    console.print(f"{len(entries)} masks in {out}{drawn}{rest} ({speed})", highlight=False, soft_wrap=True)
    return failed
