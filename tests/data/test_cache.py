"""The image cache: what it keeps, and that it changes no sample."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from starseg.data import cache as cache_module
from starseg.data.cache import ImageCache, decoded_shapes, make_cache
from starseg.data.datasets.base import Split
from starseg.data.datasets.voc import open_voc
from starseg.data.images import read_image, read_mask
from starseg.data.loader import PersistentLoader
from starseg.data.samples import EpochSampler, StepDataset
from starseg.errors import UserError

COUNT, CROP = 8, 48
DECODED = COUNT * 64 * 64 * 4


@pytest.fixture
def split(shapes: Path, tmp_path: Path) -> Split:
    """Files of its own, which a test may delete."""
    first, pairs = open_voc(shapes).train, []
    for files in (first.images, first.masks):
        pairs.append(tuple(Path(shutil.copy(path, tmp_path)) for path in files[:COUNT]))
    return Split(*pairs, first.ids[:COUNT])


def _batches(split: Split, cache: ImageCache | None, workers: int, epochs: range) -> list[torch.Tensor]:
    data = StepDataset(split, np.arange(COUNT), np.arange(256, dtype=np.uint8), CROP, (0, 0))
    loader = PersistentLoader(workers, cache).over(data, EpochSampler(COUNT, 4, epochs, (0, 0)))
    return [part for batch in loader for part in (batch.images, batch.labels)]


@pytest.mark.parametrize("workers", [0, 2])
def test_later_epochs_and_loaders_read_from_the_cache(split: Split, workers: int) -> None:
    want = _batches(split, None, 0, range(3))
    cache = ImageCache(decoded_shapes(split))
    got = _batches(split, cache, workers, range(2))
    for path in (*split.images, *split.masks):
        path.unlink()
    got += _batches(split, cache, workers, range(2, 3))
    assert len(got) == len(want) and all(map(torch.equal, got, want))


def test_files_outside_the_cache_are_read_from_disk(split: Split, shapes: Path) -> None:
    cache = ImageCache(decoded_shapes(split))
    other = open_voc(shapes).train
    assert torch.equal(cache.image(other.images[-1]), read_image(other.images[-1]))
    Image.new("L", (5, 7), 3).save(split.masks[0])  # changed since its size was looked up
    assert (cache.mask(split.masks[0]) == 3).all() and cache.mask(split.masks[0]).shape == (7, 5)
    with pytest.raises(UserError, match=r"none\.png"):
        cache.mask(Path("none.png"))


def test_a_rotated_photograph_and_a_palette_image_keep_their_shapes(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees to view
    image, mask = tmp_path / "i.jpg", tmp_path / "m.png"
    Image.effect_noise((30, 20), 60).convert("RGB").save(image, exif=exif)
    Image.effect_noise((20, 30), 60).convert("P").save(mask)
    cache = ImageCache(decoded_shapes(Split((image,), (mask,), ("x",))))
    want = read_image(image), read_mask(mask)
    for _ in range(2):
        assert torch.equal(cache.image(image), want[0]) and np.array_equal(cache.mask(mask), want[1])


@pytest.mark.parametrize(
    ("setting", "available", "processes", "kept"),
    [
        ("off", 10 * DECODED, 1, False),
        ("auto", 2 * DECODED, 1, True),
        ("auto", 2 * DECODED - 1, 1, False),
        ("auto", 4 * DECODED - 1, 2, False),
        ("ram", DECODED, 1, True),
        ("ram", 3 * DECODED, 3, True),
    ],
)
def test_the_cache_setting_decides_what_is_kept(
    setting: str, available: int, processes: int, kept: bool, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "available_memory", lambda: available)
    assert (make_cache(setting, split, processes, Console(quiet=True)) is not None) == kept


def test_a_data_set_that_does_not_fit_is_refused(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "available_memory", lambda: 2 * DECODED - 1)
    with pytest.raises(UserError, match=r"data\.cache: 8 decoded images .* each of 2 process\(es\); set it to off"):
        make_cache("ram", split, 2, Console(quiet=True))
