"""Folders of photos and masks."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starseg.data.images import read_mask

DRAWN = ["background", "disc", "square", "triangle", "hexagon", "heart"]


@pytest.fixture
def folder(shapes: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Makes image and mask folders that label some drawn classes alone, index k being the k-th of them."""

    def make(*names: str, count: int = 100) -> tuple[Path, Path]:
        images, masks = tmp_path / "_".join(names) / "photos", tmp_path / "_".join(names) / "masks"
        images.mkdir(parents=True)
        masks.mkdir()
        table = np.zeros(256, np.uint8)
        table[[DRAWN.index(name) for name in names]] = np.arange(1, 1 + len(names))
        table[255] = 255
        for mask in sorted(shapes.glob("SegmentationClassAug/*.png")):
            ids = table[read_mask(mask)]
            if ((ids > 0) & (ids < 255)).any() and len(list(images.iterdir())) < count:
                shutil.copy(shapes / "JPEGImages" / f"{mask.stem}.jpg", images)
                Image.fromarray(ids).save(masks / mask.name)
        return images, masks

    return make
