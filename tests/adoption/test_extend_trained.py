"""Small networks, trained by plain PyTorch on a synthetic data set, learn a class of it and keep their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from adoption.originals import logits_of
from starseg.adoption.adopt import AdoptRequest, adopt
from starseg.data.shapes import write_shapes
from starseg.finetuning.run import LearnRequest, learn
from starseg.inference.predictor import load

pytestmark = pytest.mark.slow
QUIET = Console(quiet=True)
NEW, SIDE, BATCH = 4, 64, 16
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    write_shapes(root / "data", train=240, val=60, size=SIDE, classes=NEW)
    (root / "photos").mkdir()
    (root / "masks").mkdir()
    for image, mask in _files(root, "train"):
        if (labels := np.array(Image.open(mask)) == NEW).any():
            (root / "photos" / image.name).symlink_to(image)
            Image.fromarray(labels.astype(np.uint8)).save(root / "masks" / mask.name)
    return root


def _files(root: Path, split: str) -> list[tuple[Path, Path]]:
    masks = {path.stem: path for path in root.glob("data/SegmentationClass*/*.png")}
    return [(path, masks[path.stem]) for path in sorted(root.glob(f"data/JPEGImages/{split}_*"))]


def _tensors(root: Path, split: str) -> tuple[Tensor, Tensor]:
    pairs = [(np.array(Image.open(i)), np.array(Image.open(m))) for i, m in _files(root, split)]
    images = torch.stack([torch.from_numpy(i).permute(2, 0, 1) for i, _ in pairs])
    return (images / 255 - MEAN) / STD, torch.stack([torch.from_numpy(m).long() for _, m in pairs])


def _train(network: nn.Module, root: Path, classes: int, iterations: int) -> nn.Module:
    """Train on classes 1 to ``classes``; others are background."""
    images, labels = _tensors(root, "train")
    labels = torch.where((labels > classes) & (labels != 255), 0, labels)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, iterations, 0.9)
    draw = torch.Generator().manual_seed(0)
    for _ in range(iterations):
        rows = torch.randint(len(images), (BATCH,), generator=draw)
        logits = nn.functional.interpolate(logits_of(network.train()(images[rows])), (SIDE, SIDE), mode="bilinear")
        loss = nn.functional.cross_entropy(logits, labels[rows], ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _lraspp(outputs: int, folder: Path) -> tuple[nn.Module, Callable[[nn.Module], tuple[str, str | None]]]:
    name = "lraspp_mobilenet_v3_large"

    def save(network: nn.Module) -> tuple[str, str | None]:
        torch.save(network.state_dict(), folder / "w.pth")
        return f"torchvision:{name}", str(folder / "w.pth")

    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=outputs), save


def _fpn(outputs: int, folder: Path) -> tuple[nn.Module, Callable[[nn.Module], tuple[str, str | None]]]:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")

    def save(network: Any) -> tuple[str, str | None]:
        network.save_pretrained(folder)
        return str(folder), None

    sizes = {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32}
    return smp.FPN("resnet18", encoder_weights=None, classes=outputs, **sizes), save


def _segformer(outputs: int, folder: Path) -> tuple[nn.Module, Callable[[nn.Module], tuple[str, str | None]]]:
    t = pytest.importorskip("transformers", reason="needs transformers")
    names = ["background", *(f"class{c}" for c in range(1, outputs))]
    sizes = {"depths": [1] * 4, "hidden_sizes": [16, 32, 64, 128], "num_attention_heads": [1, 2, 4, 8]}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    def save(network: Any) -> tuple[str, str | None]:
        network.save_pretrained(folder)
        return str(folder), None

    return t.SegformerForSemanticSegmentation(t.SegformerConfig(**sizes, decoder_hidden_size=64, **labels)), save


def _iou(step: Path, root: Path) -> np.ndarray:
    """IoU of each class, by its id in the data set; None of the networks knows another class."""
    predictor, matrix = load(step), np.zeros((NEW + 1, NEW + 1), np.int64)
    for image, mask in _files(root, "val"):
        truth, found = np.array(Image.open(mask)), predictor.predict(image)
        valid = truth != 255
        matrix += np.bincount(truth[valid] * (NEW + 1) + found[valid], minlength=matrix.size).reshape(matrix.shape)
    return matrix.diagonal() / np.maximum(1, matrix.sum(0) + matrix.sum(1) - matrix.diagonal())


@pytest.mark.parametrize(
    ("family", "iterations"),
    [(_lraspp, 1000), (_fpn, 300), (_segformer, 600)],
    ids=["torchvision-lraspp", "smp-fpn", "transformers-segformer"],
)
def test_old_classes_are_kept_and_the_new_one_is_learnt(
    family: Any, iterations: int, drawn: Path, tmp_path: Path
) -> None:
    steps = {}
    for name, classes in (("old", NEW - 1), ("joint", NEW)):
        torch.manual_seed(0)
        folder = tmp_path / f"{name}-net"
        folder.mkdir()
        network, save = family(classes + 1, folder)
        source, weights = save(_train(network, drawn, classes, iterations))
        names = ",".join(["background", *(f"class{c}" for c in range(1, classes + 1))])
        given = names if weights or "fpn" in family.__name__ else None
        steps[name] = adopt(AdoptRequest(source, tmp_path / name, weights, given, crop=SIDE), QUIET)
    request = LearnRequest(steps["old"], drawn / "photos", drawn / "masks", "class4", tmp_path / "learnt")
    learnt = learn(request, QUIET)
    assert learnt is not None
    before, after, joint = (_iou(step, drawn) for step in (steps["old"], learnt, steps["joint"]))
    print(f"before {before.round(3)}, after {after.round(3)}, joint {joint.round(3)}")
    _check_kept(steps["old"], learnt, drawn)
    assert after[1:NEW].mean() >= 0.98 * before[1:NEW].mean()
    assert after[NEW] >= 0.8 * joint[NEW]


def _check_kept(before: Path, after: Path, root: Path) -> None:
    """Check that masks in which the network finds all of its classes change to the new class alone."""
    images = [image for image, _ in _files(root, "val")]
    found = zip(load(before).predict(images), load(after).predict(images), strict=True)
    seen = set()
    for one, other in found:
        kept = other != NEW
        assert (one[kept] == other[kept]).all()
        seen |= set(np.unique(one[kept]).tolist())
    assert seen == set(range(NEW))
