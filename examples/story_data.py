"""Create the folders for examples/story.sh from a data set in the VOC layout (docs/datasets.md).

python story_data.py VOC WORK --pets 400 --horses 150 --held-out 150

WORK/pets      photos of cats and dogs that contain no horse; only cats and dogs are labelled
WORK/horses    photos of horses; only horses are labelled, so a cat next to a horse is background
WORK/held-out  photos of cats, dogs and horses from the validation split; all three are labelled

Each folder contains images/, masks/ and classes.txt. All other VOC classes become background;
borders (255) stay ignored.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from rich.console import Console

from starseg.data.annotations.photos import save_mask
from starseg.data.datasets.base import Dataset, Split
from starseg.data.datasets.voc import open_voc
from starseg.data.images import read_mask
from starseg.data.index import class_index
from starseg.tasks import IGNORE


def write_folder(folder: Path, dataset: Dataset, split: Split, chosen: np.ndarray, names: list[str]) -> None:
    """Copy the photos at the indices ``chosen`` [N] and write masks with only the classes ``names``."""
    table = np.zeros(256, np.uint8)
    table[[dataset.names.index(name) for name in names]] = np.arange(1, 1 + len(names))
    table[IGNORE] = IGNORE
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in np.sort(chosen).tolist():
        image, mask = split.images[index], split.masks[index]
        shutil.copy(image, folder / "images")
        save_mask(folder / "masks" / f"{image.stem}.png", table[read_mask(mask)])
    (folder / "classes.txt").write_text("\n".join(["background", *names]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Folders for examples/story.sh from the VOC.")
    parser.add_argument("voc", type=Path)
    parser.add_argument("work", type=Path)
    for option in ("--pets", "--horses", "--held-out"):
        parser.add_argument(option, type=int, required=True, help="how many photos")
    args = parser.parse_args()
    dataset, draw = open_voc(args.voc), np.random.default_rng(0)
    cat, dog, horse = (dataset.names.index(name) for name in ("cat", "dog", "horse"))
    for folder, split, count, names in (
        ("pets", dataset.train, args.pets, ["cat", "dog"]),
        ("horses", dataset.train, args.horses, ["horse"]),
        ("held-out", dataset.test, args.held_out, ["cat", "dog", "horse"]),
    ):
        shown = class_index(dataset, split) > 0
        pet, horses = shown[:, cat] | shown[:, dog], shown[:, horse]
        fits = {"pets": pet & ~horses, "horses": horses, "held-out": pet | horses}[folder]
        chosen = draw.permutation(np.flatnonzero(fits))[:count]
        write_folder(args.work / folder, dataset, split, chosen, names)
        beside = f", {pet[chosen].sum()} of them beside a cat or dog" if folder == "horses" else ""
        Console().print(f"{folder}: {len(chosen)} photos of {', '.join(names)}{beside}", highlight=False)


if __name__ == "__main__":
    main()
