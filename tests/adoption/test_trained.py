"""Small networks, trained by plain PyTorch on a synthetic data set, learn a class of it and keep their own."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import starseg
from adoption.originals import logits_of
from starseg.adoption.adopt import AdoptRequest, adopt
from starseg.data.shapes import write_shapes
from starseg.finetuning.run import LearnRequest, learn
from starseg.inference.predictor import load
from starseg.models.foreign.module import MODELS
from starseg.tasks import IGNORE

QUIET = Console(quiet=True)
NEW, SIDE, BATCH = 6, 64, 16
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def _write_data(root: Path, train: int, val: int) -> Path:
    """Write the data set, and photos of its last class with masks that label it alone."""
    write_shapes(root / "data", train=train, val=val, size=SIDE, classes=NEW)
    (root / "photos").mkdir()
    (root / "masks").mkdir()
    for image, mask in _files(root, "train"):
        if (labels := np.array(Image.open(mask)) == NEW).any():
            (root / "photos" / image.name).symlink_to(image)
            Image.fromarray(labels.astype(np.uint8)).save(root / "masks" / mask.name)
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_data(tmp_path_factory.mktemp("drawn"), train=600, val=100)


def _files(root: Path, split: str) -> list[tuple[Path, Path]]:
    masks = {path.stem: path for path in root.glob("data/SegmentationClass*/*.png")}
    return [(path, masks[path.stem]) for path in sorted(root.glob(f"data/JPEGImages/{split}_*"))]


def _tensors(root: Path, split: str) -> tuple[Tensor, Tensor]:
    pairs = [(np.array(Image.open(i)), np.array(Image.open(m))) for i, m in _files(root, split)]
    images = torch.stack([torch.from_numpy(i).permute(2, 0, 1) for i, _ in pairs])
    return (images / 255 - MEAN) / STD, torch.stack([torch.from_numpy(m).long() for _, m in pairs])


def _train(network: nn.Module, root: Path, classes: int, iterations: int) -> nn.Module:
    """Train on random crops of the images that show none but the classes 1 to ``classes``."""
    images, labels = _tensors(root, "train")
    own = ((labels <= classes) | (labels == IGNORE)).all(2).all(1)
    images, labels = images[own], labels[own]
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, iterations, 0.9)
    augment = v2.Compose([v2.RandomResizedCrop(SIDE, (0.25, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    for _ in range(iterations):
        rows = torch.randint(len(images), (BATCH,))
        seen, truth = augment(tv_tensors.Image(images[rows]), tv_tensors.Mask(labels[rows]))
        logits = nn.functional.interpolate(logits_of(network.train()(seen)), (SIDE, SIDE), mode="bilinear")
        loss = nn.functional.cross_entropy(logits, truth, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


class Family(NamedTuple):
    """How to build a network with a number of outputs, and to adopt it; and whether it learns with a tuned copy."""

    build: Callable[[list[str]], nn.Module]
    adopt: Callable[[Any, Path, list[str]], Path]
    iterations: int
    tune_copy: bool = False


def _build_lraspp(names: list[str]) -> nn.Module:
    kind = "lraspp_mobilenet_v3_large"
    return torchvision.models.get_model(kind, weights=None, weights_backbone=None, num_classes=len(names))


def _adopt_lraspp(network: nn.Module, out: Path, names: list[str]) -> Path:
    weights = out.with_suffix(".pth")
    torch.save(network.state_dict(), weights)
    request = AdoptRequest("torchvision:lraspp_mobilenet_v3_large", out, str(weights), ",".join(names), crop=SIDE)
    return adopt(request, QUIET)


def _build_fpn(names: list[str]) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")
    sizes = {"encoder_depth": 4, "upsampling": 2, "decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32}
    return smp.FPN("resnet18", encoder_weights=None, classes=len(names), **sizes)


def _build_segformer(names: list[str]) -> nn.Module:
    t = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"depths": [1] * 4, "hidden_sizes": [16, 32, 64, 128], "num_attention_heads": [1, 2, 4, 8]}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return t.SegformerForSemanticSegmentation(t.SegformerConfig(**sizes, decoder_hidden_size=64, **labels))


def _adopt_saved(network: Any, out: Path, names: list[str]) -> Path:
    saved = out.with_suffix(".saved")
    network.save_pretrained(saved)
    given = None if (saved / "config.json").read_text().count("id2label") else ",".join(names)
    return adopt(AdoptRequest(str(saved), out, None, given, crop=SIDE), QUIET)


def own_network(outputs: int) -> nn.Module:
    """Build a network that is none of a library's."""
    layers: list[nn.Module] = []
    for channels, width, stride, dilation in ((3, 32, 2, 1), (32, 64, 2, 1), (64, 64, 1, 2), (64, 64, 1, 4)):
        conv = nn.Conv2d(channels, width, 3, stride, dilation, dilation, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(64, outputs, 1))


def _adopt_own(network: nn.Module, out: Path, names: list[str]) -> Path:
    return starseg.adopt(network, out, names, crop=SIDE, model="own_network", features="5")


FAMILIES = {
    "torchvision LR-ASPP": Family(_build_lraspp, _adopt_lraspp, 1000, tune_copy=True),
    "smp FPN": Family(_build_fpn, _adopt_saved, 300, tune_copy=True),
    "transformers SegFormer": Family(_build_segformer, _adopt_saved, 600),
    "your own": Family(lambda names: own_network(len(names)), _adopt_own, 600),
}


@pytest.fixture
def registered() -> Iterator[None]:
    starseg.register_model("own_network")(own_network)
    yield
    del MODELS["own_network"]


def _trained(family: Family, root: Path, classes: int, iterations: int, out: Path) -> Path:
    """Train a network on the first classes and return the step directory that it is adopted as."""
    torch.manual_seed(0)
    names = ["background", *(f"class{c}" for c in range(1, classes + 1))]
    return family.adopt(_train(family.build(names), root, classes, iterations), out, names)


def _learn(step: Path, root: Path, out: Path, **options: Any) -> Path:
    request = LearnRequest(step, root / "photos", root / "masks", f"class{NEW}", out, **options)
    learnt = learn(request, QUIET)
    assert learnt is not None
    return learnt


def _iou(step: Path, root: Path) -> np.ndarray:
    """Return the IoU of each class by its id in the data set; a class that the network does not know is a miss."""
    predictor, matrix = load(step), np.zeros((NEW + 1, NEW + 1), np.int64)
    for image, mask in _files(root, "val"):
        truth, found = np.array(Image.open(mask)), predictor.predict(image)
        valid = truth != IGNORE
        matrix += np.bincount(truth[valid] * (NEW + 1) + found[valid], minlength=matrix.size).reshape(matrix.shape)
    return matrix.diagonal() / np.maximum(1, matrix.sum(0) + matrix.sum(1) - matrix.diagonal())


def _check_kept(before: Path, after: Path, root: Path) -> None:
    """Check that masks in which the network finds all of its classes change to the new class alone."""
    images = [image for image, _ in _files(root, "val")]
    seen = set()
    for one, other in zip(load(before).predict(images), load(after).predict(images), strict=True):
        kept = other != NEW
        assert (one[kept] == other[kept]).all()
        seen |= set(np.unique(one[kept]).tolist())
    assert seen == set(range(NEW))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_old_classes_are_kept_and_the_new_one_is_learnt(
    name: str, drawn: Path, registered: None, tmp_path: Path
) -> None:
    """Keeps 98 % of the IoU of old classes, and reaches 80 % of that of a network trained on all classes."""
    family = FAMILIES[name]
    old, joint = (
        _trained(family, drawn, classes, family.iterations, tmp_path / f"on{classes}") for classes in (NEW - 1, NEW)
    )
    start = time.monotonic()
    learnt = _learn(old, drawn, tmp_path / "learnt", tune_copy=family.tune_copy)
    seconds = time.monotonic() - start
    before, after, full = (_iou(step, drawn) for step in (old, learnt, joint))
    row = (100 * before[1:NEW].mean(), 100 * after[1:NEW].mean(), 100 * after[NEW], 100 * full[NEW], seconds)
    print(f"\n| {name} | {' | '.join(f'{value:.1f}' for value in row)} |")
    _check_kept(old, learnt, drawn)
    assert after[1:NEW].mean() >= 0.98 * before[1:NEW].mean()
    assert after[NEW] >= 0.8 * full[NEW]


def test_a_briefly_trained_network_learns_a_class(registered: None, tmp_path: Path) -> None:
    root = _write_data(tmp_path / "drawn", train=160, val=40)
    old = _trained(FAMILIES["your own"], root, NEW - 1, 150, tmp_path / "old")
    learnt = _learn(old, root, tmp_path / "learnt", epochs=2)
    _check_kept(old, learnt, root)
    assert _iou(learnt, root)[NEW] > 0.3
