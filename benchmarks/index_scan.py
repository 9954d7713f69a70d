"""Count the images per step of the real VOC 2012 train_aug masks and time the class index.

    python benchmarks/index_scan.py MASKS.tar IDS.txt

MASKS.tar contains SegmentationClassAug/*.png; IDS.txt contains one image id per line. The index is built by
scanning the masks and then loaded from its cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from starseg.data.datasets.base import Split
from starseg.data.datasets.voc import VOC, VOC_NAMES
from starseg.data.index import class_index
from starseg.data.selection import select_images


def main(archive: Path, ids: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["STARSEG_CACHE"] = str(root / "cache")
        subprocess.run(["tar", "-xf", archive, "-C", root], check=True)
        stems = tuple(ids.read_text().split())
        masks = tuple(root / "SegmentationClassAug" / f"{stem}.png" for stem in stems)
        split = Split(masks, masks, stems)
        dataset = VOC.dataset(root, split, split)
        for name in ("first scan", "cached start"):
            start = time.perf_counter()
            pixels = class_index(dataset, split)
            print(f"{name} of {len(masks)} masks: {time.perf_counter() - start:.2f} s")
    for name in ("19-1", "15-5", "15-1", "10-1", "5-3"):
        for setting in ("overlap", "disjoint"):
            task = VOC.task(VOC_NAMES, name, setting=setting)
            counts = [len(select_images(pixels, task, t, "train")) for t in range(len(task))]
            print(f"{name:5} {setting:9} {', '.join(map(str, counts))}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
