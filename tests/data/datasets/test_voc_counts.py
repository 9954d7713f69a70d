"""Images per step of the real train_aug set equal the published counts."""

import subprocess

import numpy as np
import pytest

from conftest import SHARED
from starseg.data.datasets.voc import VOC, VOC_NAMES
from starseg.data.index import scan_masks
from starseg.data.selection import select_images

TABLE = {
    "19-1": ([10410, 548], [10034, 548]),
    "15-5": ([9568, 2145], [8437, 2145]),
    "15-1": ([9568, 487, 299, 491, 500, 548], [8437, 378, 299, 420, 500, 548]),
    "10-1": (
        [6139, 528, 1177, 444, 482, 3898, 487, 299, 491, 500, 548],
        [3706, 188, 868, 227, 201, 3247, 378, 299, 420, 500, 548],
    ),
    "5-3": ([2836, 2331, 1542, 2095, 4484, 1468], [1753, 1517, 624, 1296, 3924, 1468]),
}


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    archive, ids = SHARED / "data" / "voc_aug_masks.tar", SHARED / "data" / "voc_train_aug_ids.txt"
    if not archive.is_file():
        pytest.skip(f"needs the real VOC masks at {archive}; set STARSEG_SHARED to the folder that holds data/")
    folder = tmp_path_factory.mktemp("masks")
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
    return scan_masks([folder / "SegmentationClassAug" / f"{i}.png" for i in ids.read_text().split()])


@pytest.mark.parametrize("setting", ["overlap", "disjoint"])
@pytest.mark.parametrize("name", TABLE)
def test_images_per_step(pixels: np.ndarray, name: str, setting: str) -> None:
    task = VOC.task(VOC_NAMES, name, setting=setting)
    counts = [len(select_images(pixels, task, t, "train")) for t in range(len(task))]
    assert counts == TABLE[name][setting == "disjoint"]
    assert len(pixels) == 10582
