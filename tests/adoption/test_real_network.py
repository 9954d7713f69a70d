"""A network with published weights: examples/tflite_deeplab.py turns it into one of transformers, which is adopted."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from starseg.adoption.adopt import AdoptRequest, adopt
from starseg.inference.predictor import load
from starseg.utils.files import read_json

EXAMPLE = Path(__file__).parents[2] / "examples" / "tflite_deeplab.py"
FILE = "deeplabv3_mnv2_pascal_quant.tflite"
CLASSES = {"cat": 8, "cow": 10, "dog": 12, "horse": 13}
PHOTOS = 6


def test_a_real_network_is_adopted(voc_subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the animals in photos that it was not trained on; no random network would."""
    for package in ("tflite", "transformers"):
        pytest.importorskip(package)
    models = voc_subset.parent / "models"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(models / FILE), "--out", str(tmp_path / "deeplab")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    step = adopt(AdoptRequest(str(tmp_path / "deeplab"), tmp_path / "run"), Console(quiet=True))
    assert read_json(step / "metrics.json")["adopted"]["agreement"] > 0.9999
    predictor = load(step, "cpu", "32")
    seen, overlap = dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, np.zeros(2, int))
    for name in (voc_subset / "ImageSets/Segmentation/val.txt").read_text().split():
        truth = np.asarray(Image.open(voc_subset / "SegmentationClass" / f"{name}.png"))
        found = [c for c, i in CLASSES.items() if (truth == i).any() and seen[c] < PHOTOS]
        mask = predictor.predict(voc_subset / "JPEGImages" / f"{name}.jpg") if found else truth
        for c in found:
            mine, theirs, scored = mask == CLASSES[c], truth == CLASSES[c], truth != 255
            overlap[c] = overlap[c] + [(mine & theirs).sum(), ((mine | theirs) & scored).sum()]
            seen[c] += 1
    iou = {c: both / either for c, (both, either) in overlap.items()}
    assert min(seen.values()) == PHOTOS and min(iou.values()) > 0.5 and np.mean([*iou.values()]) > 0.65, iou
