"""Teach an adopted network the class horse without old images, and compare with other ways (benchmarks/README.md).

Usage: python benchmarks/adopted.py VOC WORK

VOC is the data set. WORK gets everything else: two networks trained by examples/train_smp.py without starseg, on cat,
cow and dog (fpn) and on these and horse (joint), unless they are there already; the photos, of which those of horses
have masks that label horses alone; and the runs. The table at the end has IoU in percent on the validation images.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

import starseg

ROOT = Path(__file__).parents[1]
CLASSES = {"cat": 8, "cow": 10, "dog": 12, "horse": 13}
OLD = ("cat", "cow", "dog")
NETWORK = ["--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--crop", "192"]
HORSES, UNLABELLED = 200, 200
LEARN = {
    "constellation-extend": [],
    "constellation-extend, --photos": ["--photos", "old"],
    "constellation-extend, --refine": ["--refine"],
    "constellation-extend, --tune-copy": ["--tune-copy"],
    "constellation-extend, --photos --tune-copy": ["--photos", "old", "--tune-copy"],
    "finetune": ["--method", "finetune", "--star"],
    "mib": ["--method", "mib"],
    "star, bank of old photos": ["--method", "star", "--star"],
}


def run(*words: object) -> None:
    """Run a command of starseg, or a script of this repository, and print how long it took."""
    words = tuple(map(str, words))
    head = [sys.executable] if words[0].endswith(".py") else [sys.executable, "-m", "starseg"]
    start = time.monotonic()
    subprocess.run([*head, *words], check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
    print(f"[{time.monotonic() - start:.0f} s] {' '.join(words)}", flush=True)


def names(voc: Path, split: str) -> list[str]:
    """Return the names of the images of a split."""
    lines = (voc / f"ImageSets/Segmentation/{split}.txt").read_text().split()
    return list(dict.fromkeys(Path(line).stem for line in lines))


def mask(voc: Path, name: str) -> np.ndarray:
    """Return the labels of an image."""
    files = (voc / f"{folder}/{name}.png" for folder in ("SegmentationClassAug", "SegmentationClass"))
    return np.array(Image.open(next(file for file in files if file.exists())))


def make_photos(voc: Path, work: Path) -> None:
    """Write photos of horses without an old class, their masks (0 other, 1 horse), and photos of old classes alone."""
    for folder in ("horses", "masks", "old"):
        shutil.rmtree(work / folder, ignore_errors=True)
        (work / folder).mkdir(parents=True)
    taken = {"horses": 0, "old": 0}
    for name in names(voc, "train_aug"):
        labels = mask(voc, name)
        horse, old = (labels == CLASSES["horse"]).any(), np.isin(labels, [CLASSES[n] for n in OLD]).any()
        if horse == old or taken["horses" if horse else "old"] == (HORSES if horse else UNLABELLED):
            continue
        kind = "horses" if horse else "old"
        taken[kind] += 1
        (work / kind / f"{name}.jpg").symlink_to((voc / f"JPEGImages/{name}.jpg").resolve())
        if horse:
            only = np.where(labels == 255, 255, labels == CLASSES["horse"]).astype(np.uint8)
            Image.fromarray(only).save(work / f"masks/{name}.png")


def score(voc: Path, step: Path) -> dict[str, float]:
    """Return the IoU of a network on the validation images, in percent by class."""
    predictor, tested = starseg.load(step), names(voc, "val")
    table = np.zeros(256, np.int64)
    table[255] = 255
    for index, number in enumerate(CLASSES.values(), 1):
        table[number] = index
    known = {"background": 0} | {name: index for index, name in enumerate(CLASSES, 1)}
    ids = np.zeros(256, np.int64)
    for name, number in zip(predictor.classes, predictor.dataset_ids, strict=True):
        ids[number] = known[name]
    matrix = np.zeros((len(known), len(known)), np.int64)
    for name in tested:
        truth, found = table[mask(voc, name)], ids[predictor.predict(voc / f"JPEGImages/{name}.jpg")]
        valid = truth != 255
        pairs = np.bincount(truth[valid] * len(known) + found[valid], minlength=matrix.size)
        matrix += pairs.reshape(matrix.shape)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return dict(zip(known, (100 * matrix.diagonal() / np.maximum(union, 1)).tolist(), strict=True))


def adopted(work: Path, source: str, classes: str, out: str, *more: object) -> Path:
    """Adopt a network unless that has been done, and return its step directory."""
    if not (work / out).exists():
        run("adopt", work / source, "--classes", f"background,{classes}", *NETWORK, "--out", work / out, *more)
    return work / out / "step_0"


def main(voc: Path, work: Path) -> None:
    """Run everything that is not there yet, and print the table."""
    for network, classes in (("fpn", ",".join(OLD)), ("joint", ",".join(CLASSES))):
        if not (work / network).exists():
            run(ROOT / "examples/train_smp.py", voc, work / network, "--classes", classes)
    if not (work / "masks").exists():
        make_photos(voc, work)
    before = adopted(work, "fpn", ",".join(OLD), "plain")
    rows = {"before": score(voc, before)}
    for name, words in LEARN.items():
        start = before
        if "--star" in words:
            start = adopted(work, "fpn", ",".join(OLD), "with_bank", "--photos", work / "old")
        given = [work / w if w == "old" else w for w in words if w != "--star"]
        out = work / name.replace(", ", "_").replace(" ", "_").replace("--", "")
        if not (out / "step_1/metrics.json").exists():
            data = ("--images", work / "horses", "--masks", work / "masks", "--classes", "horse")
            run("learn", start, *data, "--out", out, *given)
        rows[name] = score(voc, out / "step_1")
    rows["joint training"] = score(voc, adopted(work, "joint", ",".join(CLASSES), "joint_adopted"))
    print(f"| | background | {' | '.join(OLD)} | mIoU of {', '.join(OLD)} | horse |\n|---|{'---|' * (len(OLD) + 3)}")
    for name, found in rows.items():
        old = [found[n] for n in OLD]
        cells = [found["background"], *old, float(np.mean(old)), found["horse"]]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
