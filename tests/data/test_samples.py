"""Samples, batches and the class index: reproducible crops, aligned masks, selection of images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from starseg.config import DataConfig
from starseg.data import index as index_module
from starseg.data.datasets import Split, open_dataset
from starseg.data.datasets.voc import open_voc
from starseg.data.images import image_tensor
from starseg.data.index import cache_dir, class_index
from starseg.data.loader import PersistentLoader
from starseg.data.samples import Batch, EpochSampler, StepDataset, sample_seed
from starseg.data.selection import select_images
from starseg.data.transforms import eval_transform as centre_transform
from starseg.data.transforms import train_transform
from starseg.errors import UserError
from starseg.tasks import TaskSequence

IDENTITY = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_holds_every_sample_once(drop_last: bool) -> None:
    sampler = EpochSampler(10, 4, range(3), (0, 1), drop_last)
    batches = list(sampler)
    assert len(batches) == len(sampler) == (6 if drop_last else 9)
    for epoch in range(3):
        mine = [i for batch in batches for e, i in batch if e == epoch]
        assert len(set(mine)) == len(mine) == (8 if drop_last else 10)
    assert batches == list(EpochSampler(10, 4, range(3), (0, 1), drop_last))
    assert [i for _, i in batches[0]] != [i for _, i in next(iter(EpochSampler(10, 4, range(3), (0, 2))))]


def test_crops_depend_on_seed_step_epoch_and_sample_alone(shapes: Path) -> None:
    split = open_voc(shapes).train

    def crops(workers: int, seed: tuple[int, int]) -> torch.Tensor:
        data = StepDataset(split, np.arange(8), IDENTITY, 48, seed)
        return torch.cat(
            [b.images for b in PersistentLoader(workers).over(data, EpochSampler(8, 4, [0, 1, "after"], seed))]
        )

    one = crops(0, (0, 0))
    assert torch.equal(one, crops(2, (0, 0)))
    assert not torch.equal(one, crops(0, (0, 1)))
    assert not torch.equal(one[:8].float().mean(), one[8:16].float().mean())


def test_augmentation_leaves_the_global_generators_alone(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = StepDataset(open_voc(shapes).train, np.arange(2), IDENTITY, 48, (0, 0))
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs"))
    data[0, 0]
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize("transform", [train_transform, centre_transform])
def test_image_and_mask_stay_aligned(transform) -> None:
    mask = torch.zeros(1, 90, 120, dtype=torch.uint8)
    mask[:, 20:70, 40:100] = 7
    image = (mask * 30).expand(3, -1, -1).contiguous()
    image, mask = transform(image, mask, 64)
    assert image.shape == (3, 64, 64) and mask.shape == (1, 64, 64) and image.dtype == mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) <= {0, 7}
    wrong = ((image[0] > 105) != (mask[0] == 7)).float().mean()
    assert wrong < 0.02


def _plain_transform(image: torch.Tensor, mask: torch.Tensor, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
    box = RandomResizedCrop.get_params(image, scale=[0.5, 2.0], ratio=[3 / 4, 4 / 3])
    image = F.resized_crop(image, *box, [crop, crop], antialias=True)
    mask = F.resized_crop(mask, *box, [crop, crop], InterpolationMode.NEAREST_EXACT)
    return (F.horizontal_flip(image), F.horizontal_flip(mask)) if torch.rand(()) < 0.5 else (image, mask)


@pytest.mark.parametrize("size", [(375, 500), (61, 47), (1, 9), (256, 256)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_crops_equal_those_of_the_plain_transforms(size: tuple[int, int], channels_last: bool) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    if channels_last:
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    mask = torch.randint(0, 256, (2, *size), dtype=torch.uint8)
    for seed in range(12):
        made = []
        for transform in (train_transform, _plain_transform):
            torch.manual_seed(seed)
            made.append((*transform(image, mask, 128), torch.rand(1)))
        assert all(map(torch.equal, *made))


def test_a_sample_equals_that_of_the_plain_order_of_operations(shapes: Path) -> None:
    split, table = open_voc(shapes).train, np.random.default_rng(0).permutation(256).astype(np.uint8)
    for index in range(6):
        got = StepDataset(split, np.arange(6), table, 96, (5, 1))[3, index]
        torch.manual_seed(sample_seed(5, 1, 3, index))
        labels = torch.from_numpy(table[np.array(Image.open(split.masks[index]))])[None]
        image, labels = _plain_transform(image_tensor(Image.open(split.images[index])), labels, 96)
        assert torch.equal(got.images, image) and torch.equal(got.labels, labels[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_channels_last(shapes: Path, workers: int) -> None:
    data = StepDataset(open_voc(shapes).train, np.arange(4), IDENTITY, 48, (0, 0))
    (batch,) = PersistentLoader(workers).over(data, EpochSampler(4, 4, [0]))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images, torch.stack([data[0, i].images for i in range(4)]))


def test_the_loader_can_pin_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for this very method; what it does not know, it leaves where it is."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batch = pin_memory(Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), torch.arange(2)))
    assert isinstance(batch, Batch) and len(pinned) == 3 and not batch.extras


def test_test_labels_are_resized_like_pil() -> None:
    mask = np.random.default_rng(0).integers(0, 5, (80, 111), dtype=np.uint8)
    _, ours = centre_transform(torch.zeros(3, 80, 111, dtype=torch.uint8), torch.from_numpy(mask)[None], 48)
    pil = np.asarray(Image.fromarray(mask).resize((66, 48), Image.Resampling.NEAREST))
    assert np.array_equal(ours[0].numpy(), pil[:, 9:57])


def test_a_mask_of_another_size_is_named(shapes: Path, tmp_path: Path) -> None:
    mask = tmp_path / "wrong.png"
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(mask)
    data = StepDataset(Split((open_voc(shapes).train.images[0],), (mask,), ("x",)), np.arange(1), IDENTITY, 48, None)
    with pytest.raises(UserError, match=r"wrong\.png: this mask is 20x10, its image 64x64"):
        data[0, 0]


def test_unreadable_files_are_named(tmp_path: Path, shapes: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    colour = tmp_path / "colour.png"
    Image.new("RGB", (64, 64)).save(colour)
    good = open_voc(shapes).train
    for image, mask, name in ((broken, good.masks[0], "broken"), (good.images[0], colour, "colour")):
        with pytest.raises(UserError, match=name):
            StepDataset(Split((image,), (mask,), ("x",)), np.arange(1), IDENTITY, 48, None)[0, 0]


def test_the_index_is_scanned_once_and_follows_the_files(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_voc(shapes)
    first = class_index(dataset, dataset.test)
    counted = [np.bincount(np.asarray(Image.open(m)).ravel(), minlength=256) for m in dataset.test.masks]
    assert np.array_equal(first, counted)
    monkeypatch.setattr(index_module, "scan_masks", lambda masks: pytest.fail("scanned again"))
    assert np.array_equal(class_index(dataset, dataset.test), first)
    for file in (cache_dir() / "index").iterdir():
        file.write_bytes(b"damaged")
    monkeypatch.undo()
    assert np.array_equal(class_index(dataset, dataset.test), first)


def test_without_a_home_directory_the_index_is_not_kept(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    dataset = open_voc(shapes)
    expected = class_index(dataset, dataset.test)
    monkeypatch.delenv("STARSEG_CACHE")
    monkeypatch.setattr(Path, "home", classmethod(lambda _: (_ for _ in ()).throw(RuntimeError("no home directory"))))
    assert cache_dir() is None
    assert np.array_equal(class_index(dataset, dataset.test), expected)
    note = "note: the class index is not kept, this user has no home directory; see $STARSEG_CACHE"
    assert note in capsys.readouterr().err.replace("\n", " ")


def test_in_an_unwritable_cache_the_index_is_not_kept(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    dataset = open_voc(shapes)
    expected = class_index(dataset, dataset.test)
    (tmp_path / "file").touch()
    monkeypatch.setenv("STARSEG_CACHE", str(tmp_path / "file"))
    assert np.array_equal(class_index(dataset, dataset.test), expected)
    assert "note: the class index is not kept" in capsys.readouterr().err


def test_published_identifiers_are_the_lines_of_the_lists(shapes: Path) -> None:
    dataset = open_voc(shapes)
    assert dataset.train.ids[0] == "/JPEGImages/train_00000.jpg /SegmentationClassAug/train_00000.png"
    assert dataset.test.ids[0] == "val_00000"
    assert all(len(split.ids) == len(split) for split in dataset.splits.values())


def test_wrong_layouts_are_explained(tmp_path: Path, shapes: Path) -> None:
    with pytest.raises(UserError, match=r"train_aug\.txt: cannot read this list.*VOC layout"):
        open_voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("x\n")
    for content, message in (
        (b"a b c\n", r"train_aug\.txt, line 1: expected"),
        (b"\n", "list of training images is empty"),
        (b"x\n", r"1 of 1 training images are missing, the first is .*JPEGImages/x\.jpg"),
        (b"\xff\xfe", r"train_aug\.txt: cannot read this list \(not a UTF-8 text\)"),
    ):
        (lists / "train_aug.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_dataset(DataConfig(root=tmp_path))


def test_selection_of_the_real_subset(voc_subset: Path) -> None:
    """Counted independently with NumPy from the masks: overlap, steps [cat, cow, dog], [horse], [person], [sheep]."""
    dataset = open_voc(voc_subset)
    train, test = (class_index(dataset, s) for s in (dataset.train, dataset.test))
    task = TaskSequence("real", ((8, 10, 12), (13,), (15,), (17,)), dataset.names)
    assert [len(select_images(train, task, t, "train")) for t in range(4)] == [2406, 444, 588, 299]
    assert [len(select_images(test, task, t, "test")) for t in range(4)] == [313, 390, 392, 445]
    crop = StepDataset(dataset.train, np.arange(4), task.relabelling(3, "test"), 192, (0, 0))[0, 2]
    assert crop.images.shape == (3, 192, 192) and set(crop.labels.unique().tolist()) <= {0, 1, 2, 3, 4, 5, 6, 255}


def test_an_empty_split_has_no_batches() -> None:
    assert list(EpochSampler(0, 4, [0])) == [] and len(EpochSampler(0, 4, [0])) == 0
