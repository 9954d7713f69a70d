"""Best and worst test images of each class, with ground truth and predictions, small enough to embed in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from starseg.data.palette import paint, shown_ids
from starseg.report.testset import TestSet, open_test_set, step_number
from starseg.tasks import IGNORE, WIDE_IGNORE

_CANDIDATES = 12
_MOST_CLASSES = 24
_SIDE = 224
# Of mask colours over the photo, by id: the background shows it, classes tint it.
_ALPHA = bytes([0, *[165] * 255])
# An image must show so much of a class to count as one of its cases.
_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class Case:
    """One test image of a class.

    Attributes:
        kind: "best" or "worst".
        photo, truth, before, after: data URIs; masks are to be laid over the photo.
        iou_before, iou_after: of the class in this image, percent.
        file: the image's name.
    """

    kind: str
    photo: str
    truth: str
    before: str | None
    after: str
    iou_before: float | None
    iou_after: float
    file: str


@dataclass(frozen=True)
class ClassCases:
    """Best and worst test images of one class.

    Attributes:
        name: of the class.
        colour: of its masks, CSS.
        before: what the earlier picture is the work of, "step 0"; None where there is no earlier step.
        after: the same of the later picture.
        candidates: how many images the cases were chosen from.
        cases: the best, then the worst.
    """

    name: str
    colour: str
    before: str | None
    after: str
    candidates: int
    cases: list[Case]


@dataclass(frozen=True)
class Pictures:
    """Cases of a run's classes in the order of learning, and the (name, CSS colour) pairs of the mask legend."""

    classes: list[ClassCases]
    colours: list[tuple[str, str]]


def css_colour(dataset_id: int) -> str:
    """Return the colour of a class in masks as CSS."""
    red, green, blue = paint(np.array([dataset_id]))[0]
    return f"rgb({red} {green} {blue})"


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def photo_uri(image: Tensor) -> str:
    """Encode an image [3, H, W] uint8 as a data URI of a small JPEG."""
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    photo.thumbnail((_SIDE, _SIDE))
    return _uri(photo, "JPEG", quality=72)


def mask_uri(ids: np.ndarray) -> str:
    """Encode ids [H, W] as a data URI of a small PNG, transparent at the background and translucent elsewhere."""
    mask = Image.fromarray(shown_ids(ids))
    mask.putpalette(paint(np.arange(256, dtype=np.uint8)).tobytes())
    mask.thumbnail((_SIDE, _SIDE), Image.Resampling.NEAREST)
    return _uri(mask, "PNG", optimize=True, transparency=_ALPHA)


def class_iou(predicted: np.ndarray, truth: np.ndarray, training_id: int) -> np.ndarray:
    """Return the IoU of one class, in percent, in each of N predictions [N, H, W]; ignored pixels do not count."""
    known = truth != (WIDE_IGNORE if truth.dtype == np.int32 else IGNORE)
    a, b = (predicted == training_id) & known, truth == training_id
    union = (a | b).sum((1, 2))
    return 100 * (a & b).sum((1, 2)) / np.maximum(union, 1)


def _candidates(test: TestSet, dataset_id: int) -> np.ndarray:
    """Choose test images that show the class, evenly spaced from the largest area to the smallest."""
    share = test.pixels[test.positions, dataset_id] / test.pixels[test.positions].sum(1)
    order = np.argsort(-share, kind="stable")
    order = order[: max(int((share > _LEAST_SHARE).sum()), min(2, int((share > 0).sum())))]
    picked = np.unique(np.linspace(0, len(order) - 1, min(_CANDIDATES, len(order))).astype(int))
    return test.positions[order[picked]]


def _before(test: TestSet, dataset_id: int) -> Path | None:
    """Return the step to compare with: the one that learned the class, or the last but one for the newest classes."""
    learnt = next(step for step in range(len(test.task)) if dataset_id in test.task.new(step))
    earlier = [f for f in test.folders[:-1] if step_number(f) >= learnt]
    return earlier[0] if earlier else (test.folders[-2] if len(test.folders) > 1 else None)


def _class_cases(test: TestSet, training_id: int, dataset_id: int) -> ClassCases | None:
    positions = _candidates(test, dataset_id)
    if not len(positions):
        return None
    images, truth_ids = test.samples(positions)
    ignored = test.dataset.labels.ignored_id
    truth, ids = truth_ids.numpy(), np.full(1 + ignored, ignored, np.uint16 if test.task.wide else np.uint8)
    known = test.task.dataset_ids(test.last)
    ids[: len(known)] = known
    before, last = _before(test, dataset_id), test.folders[-1]
    after = test.predict(last, images).numpy()
    earlier = test.predict(before, images).numpy() if before else None
    score = class_iou(after, truth, training_id)
    was = class_iou(earlier, truth, training_id) if earlier is not None else None
    order = score.argsort(kind="stable")
    chosen = [("best", int(order[-1])), ("worst", int(order[0]))]
    cases = [
        Case(
            kind,
            photo_uri(images[i]),
            mask_uri(ids[truth[i]]),
            mask_uri(ids[earlier[i]]) if earlier is not None else None,
            mask_uri(ids[after[i]]),
            float(was[i]) if was is not None else None,
            float(score[i]),
            test.dataset.test.images[positions[i]].name,
        )
        for kind, i in (chosen if len(positions) > 1 else chosen[:1])
    ]
    return ClassCases(
        name=test.task.label(dataset_id),
        colour=css_colour(dataset_id),
        before=f"step {step_number(before)}" if before else None,
        after=f"step {test.last}",
        candidates=len(positions),
        cases=cases,
    )


def pictures(run: Path, forgotten: Sequence[str]) -> Pictures:
    """Collect the cases of a run's classes after its last finished step.

    Args:
        run: a run directory.
        forgotten: class names, the most forgotten first; where a run has more than 24 classes, the first 16 of them
            are shown, and 8 of the last step.

    Raises:
        UserError: no finished step, or the data set is not where the run's configuration says.
    """
    test = open_test_set(run)
    seen = list(enumerate(test.task.seen(test.last), 1))
    if len(seen) > _MOST_CLASSES:
        shown = {
            *forgotten[: _MOST_CLASSES * 2 // 3],
            *map(test.task.label, test.task.new(test.last)[: _MOST_CLASSES // 3]),
        }
        seen = [(k, c) for k, c in seen if test.task.label(c) in shown]
    colours = [(test.task.label(c), css_colour(c)) for c in test.task.seen(test.last)]
    found = (_class_cases(test, training_id, dataset_id) for training_id, dataset_id in seen)
    return Pictures([cases for cases in found if cases], [*colours, ("not scored", css_colour(IGNORE))])
