"""Prediction of mask files from image files (`starseg predict`)."""

from __future__ import annotations

import glob
import io
import os
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from starseg.data.folders import list_files, some
from starseg.data.images import PREDICTED, SUFFIXES, is_image, is_predicted, note_unread
from starseg.data.palette import voc_palette
from starseg.errors import UserError
from starseg.inference.predictor import Options, Prediction, Predictor
from starseg.tasks import BACKGROUND
from starseg.utils.files import LONGEST_NAME, write_atomic, write_json
from starseg.utils.progress import bar
from starseg.utils.terminal import labelled, print_note

_GLOB = set("*?[")


@dataclass(frozen=True)
class Target:
    """Output files of one image."""

    image: Path
    mask: Path
    overlay: Path | None


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Return the image files named by paths, folders and glob patterns, each once, in the given order.

    A folder stands for the images directly inside it; ``photos/**/*.jpg`` (quoted) reaches deeper. Other files that a
    folder or pattern holds are named on stderr; a file named itself is returned whatever its name, even if it does not
    exist, unless none of the images does.

    Raises:
        UserError: there is no image at all, or none in a folder or for a pattern.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        for path in _files_of(text):
            found.setdefault(path.resolve(), path)
    if found and not any(map(os.path.exists, found)):
        raise UserError(f"{next(iter(found.values()))}: no such file or folder")
    return list(found.values())


def _without_results(images: Sequence[Path], out: Path) -> list[Path]:
    """Leave out what an earlier call has written to ``out``, which may be inside a folder of images."""
    folder = out.resolve()
    results = {path for path in images if path.resolve().is_relative_to(folder) and is_predicted(path)}
    if results:
        print_note(f"left out, as `starseg predict` wrote them: {some(sorted(results))}")
    return [path for path in images if path not in results]


def _files_of(text: str) -> list[Path]:
    path, known = Path(text), ", ".join(SUFFIXES)
    if os.path.isdir(path):
        files = list_files(path, deep=False)
        if not any(map(is_image, files)):
            deep = any(map(is_image, list_files(path)))
            hint = f"; folders in it hold some, which the pattern '{path}/**/*' (quoted) reaches" if deep else ""
            raise UserError(f"{path}: no image in this folder (looked for {known}){hint}")
    elif os.path.exists(path) or not _GLOB & set(text):
        return [path]
    else:
        found = sorted(map(Path, glob.glob(_escape_folder(text), recursive=True)))
        files = [path for path in found if path.is_file()]
        if dangling := [path for path in found if not path.exists()]:
            print_note(f"left out, as they are links that lead nowhere: {some(dangling)}")
        if not any(map(is_image, files)):
            raise UserError(f"{text}: no file matches this pattern that is an image ({known})")
    note_unread([path for path in files if not is_image(path)])
    return [path for path in files if is_image(path)]


def _escape_folder(pattern: str) -> str:
    """Escape the part of a pattern that names an existing folder, which may contain brackets."""
    folder = next(str(parent) for parent in Path(pattern).parents if os.path.isdir(parent))
    return glob.escape(folder) + pattern[len(folder) :] if pattern.startswith(folder) else pattern


def _numbered(stem: str, number: int) -> str:
    """Return a stem with "-<number>", from 2 on, shortened so that a file name with a suffix of 4 bytes can be made."""
    end = f"-{number}" if number > 1 else ""
    while len(os.fsencode(stem + end)) > LONGEST_NAME - len(".png"):
        stem = stem[:-1]
    return stem + end


def plan_targets(images: Sequence[Path], out: Path, overlays: bool) -> list[Target]:
    """Name the mask and overlay of each image by its stem, with a number appended where that is taken.

    Raises:
        UserError: a result would overwrite one of the images, or a file that no prediction made.
    """
    taken: set[str] = set()
    targets = []
    for image in images:
        names = (_numbered(image.stem, number) for number in count(1))
        # Names that differ only in case, or in how accents are stored, are the same on some systems.
        name = next(name for name in names if unicodedata.normalize("NFC", name).lower() not in taken)
        taken.add(unicodedata.normalize("NFC", name).lower())
        overlay = out / "overlays" / f"{name}.jpg" if overlays else None
        targets.append(Target(image, out / f"{name}.png", overlay))
    inputs = {image.resolve() for image in images}
    written = [path for t in targets for path in (t.mask, t.overlay) if path]
    if lost := [path for path in written if path.resolve() in inputs]:
        raise UserError(f"--out: {lost[0]} is one of the images and would be overwritten; give another folder")
    if alien := next((path for path in written if path.exists() and not is_predicted(path)), None):
        raise UserError(f"--out: {alien} is there and was not made by `starseg predict`; give another folder")
    return targets


def _encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def mask_png(mask: np.ndarray, palette: np.ndarray | None = None) -> bytes:
    """Encode ids [H, W] uint8 as a palette PNG, marked as written by starseg; by default in VOC's colours.

    Ids [H, W] uint16 are encoded as a grey PNG of 16 bits.
    """
    image, about = Image.fromarray(mask), PngInfo()
    if mask.dtype == np.uint8:
        image.putpalette((voc_palette() if palette is None else palette).tobytes())
    about.add_text("Software", PREDICTED)
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


def draw_overlay(
    image: np.ndarray,
    mask: np.ndarray,
    names: dict[int, str],
    palette: np.ndarray | None = None,
    background: int = BACKGROUND,
) -> Image.Image:
    """Draw the image with coloured classes and a legend below.

    Args:
        image: [H, W, 3] uint8.
        mask: [H, W] uint8 ids.
        names: by id in the mask.
        palette: [256, 3] uint8 colours by id in the mask; by default VOC's.
        background: id whose pixels are left as they are.
    """
    colours = voc_palette() if palette is None else palette
    blended = (image.astype(np.uint16) + colours[mask]) // 2
    tinted = np.where(mask[..., None] != background, blended, image).astype(np.uint8)
    shown = [(names[i], tuple(colours[i].tolist())) for i in np.unique(mask).tolist() if i != background]
    if not shown:
        return Image.fromarray(tinted)
    height, width = mask.shape
    strip = _legend(width, shown, size=max(10, min(height, width) // 24))
    whole = Image.new("RGB", (width, height + strip.height))
    whole.paste(Image.fromarray(tinted), (0, 0))
    whole.paste(strip, (0, height))
    return whole


def class_shares(mask: np.ndarray, names: dict[int, str]) -> dict[str, float]:
    """Return the percentage of pixels of each class in ids [H, W]; ``names`` by dataset id."""
    counts = np.bincount(mask.ravel(), minlength=1 + max(names))
    return {name: 100 * int(counts[i]) / mask.size for i, name in names.items()}


def _write(done: Prediction, target: Target, predictor: Predictor) -> dict[str, Any]:
    """Write one image's files and return its entry of the JSON file."""
    write_atomic(target.mask, mask_png(done.mask, predictor.palette))
    names = predictor.info.predictable
    if target.overlay:
        image, background = done.image.permute(1, 2, 0).numpy(), predictor.dataset_ids[0]
        drawn = draw_overlay(image, done.mask, names, predictor.palette, background)
        write_atomic(target.overlay, _encoded(drawn, format="JPEG", quality=90, comment=PREDICTED))
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
    images = _without_results(find_images(inputs), out)
    targets = plan_targets(images, out, overlays)
    if out.resolve() in {Path(text).resolve() for text in inputs if os.path.isdir(text)}:
        raise UserError(f"--out: {out} is a folder of images; masks in it would pass for images, give another folder")
    if json_file and json_file.resolve() in {image.resolve() for image in images}:
        raise UserError(f"--json: {json_file} is one of the images and would be overwritten; give another file")
    try:
        (out / "overlays" if overlays else out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made a folder ({error.strerror}); give another one") from error
    entries: list[tuple[int, dict[str, Any]]] = []
    failed, start = [], time.monotonic()
    with bar(console, "predict", len(images)) as shown:
        for done in predictor.stream(images, options):
            if done.error:
                failed.append({"image": str(images[done.index]), "error": str(done.error)})
                console.print(labelled("failed:", "red", str(done.error)), soft_wrap=True)
            else:
                entries.append((done.index, _write(done, targets[done.index], predictor)))
            shown.advance()
    seconds = time.monotonic() - start
    if json_file:
        ordered = [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]
        write_json(json_file, {"classes": [*predictor.info.predictable.values()], "images": ordered, "failed": failed})
    rest = f", {len(failed)} of {len(images)} images failed" if failed else ""
    speed = f"{seconds:.1f} s, {len(images) / seconds:.1f} images/s"
    drawn = f", overlays in {out / 'overlays'}" if overlays else ""
    console.print(f"{len(entries)} masks in {out}{drawn}{rest} ({speed})", highlight=False, soft_wrap=True)
    return failed
