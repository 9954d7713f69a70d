"""The image cache: what it keeps, and that it changes no sample."""

import multiprocessing
import os
import shutil
from dataclasses import astuple
from io import StringIO
from multiprocessing.synchronize import Event
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
from starseg.utils import shared_memory

COUNT, CROP = 8, 48
SIZE = COUNT * (64 * 64 * 4 + 2)


@pytest.fixture(autouse=True)
def _own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes of this machine that run starseg do not share their memory with the test."""
    monkeypatch.setattr(shared_memory, "_PREFIX", f"starseg-test-{os.getpid()}-")


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
    ("setting", "available", "kept"),
    [
        ("off", 10 * SIZE, False),
        ("auto", 2 * SIZE, True),
        ("auto", 2 * SIZE - 1, False),
        ("auto", SIZE - 1, False),
        ("ram", SIZE, True),
    ],
)
def test_the_cache_setting_decides_what_is_kept(
    setting: str, available: int, kept: bool, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "available_memory", lambda: available)
    said = StringIO()
    assert (make_cache(setting, split, Console(file=said, width=200)) is not None) == kept
    lines = said.getvalue().splitlines()
    if setting == "off":
        assert not lines
    else:
        assert len(lines) == 1 and f"8 images and masks are {'' if kept else 'not '}kept in memory: 0.0 GB" in lines[0]


def test_a_data_set_that_does_not_fit_is_refused(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "available_memory", lambda: SIZE - 1)
    with pytest.raises(UserError, match=r"data\.cache: 8 decoded images .* available are 0\.0 GB; set it to off"):
        make_cache("ram", split, Console(quiet=True))


def test_auto_caches_only_where_the_available_memory_is_known(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.sys, "platform", "darwin")
    assert make_cache("auto", split, Console(quiet=True)) is None


def test_no_memory_is_promised_twice(split: Split, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three data sets of the same size, half the memory is enough for the first two, until one of them is filled."""
    others = [
        Split(*(files[first : first + COUNT] for files in astuple(open_voc(shapes).train)[:3])) for first in (8, 16)
    ]
    monkeypatch.setattr(cache_module, "_CHUNK", 64 * 64)
    monkeypatch.setattr(cache_module, "available_memory", lambda: 3 * SIZE)
    first, second, third = (make_cache("auto", each, Console(quiet=True)) for each in (split, *others))
    assert first and second and third is None
    for path in split.images:
        first.image(path)
    for path in split.masks:
        first.mask(path)
    # What is filled is no longer promised; here the available memory does not shrink by it.
    assert make_cache("auto", others[1], Console(quiet=True))


def test_a_cache_stops_growing_before_the_memory_is_used_up(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_CHUNK", 64 * 64 * 3)
    left = 32 * SIZE
    monkeypatch.setattr(cache_module, "available_memory", lambda: left)
    cache = make_cache("ram", split, Console(quiet=True))
    assert cache is not None
    cache.image(split.images[0])
    left = 2 * SIZE
    want = [read_image(path) for path in split.images]
    assert all(torch.equal(cache.image(path), image) for path, image in zip(split.images, want, strict=True))
    for path in split.images:
        path.unlink()
    assert torch.equal(cache.image(split.images[0]), want[0])
    with pytest.raises(UserError):
        cache.image(split.images[1])


def test_without_shared_memory_forked_workers_share_the_cache(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "create", lambda name, size: None)
    want, cache = _batches(split, None, 0, range(2)), make_cache("ram", split, Console(quiet=True))
    got = _batches(split, cache, 2, range(1))
    for path in (*split.images, *split.masks):
        path.unlink()
    assert all(map(torch.equal, [*got, *_batches(split, cache, 2, range(1, 2))], want))


def _fill(split: Split, filled: Event, done: Event) -> None:
    cache = make_cache("auto", split, Console(quiet=True))
    assert cache is not None
    for image, mask in zip(split.images, split.masks, strict=True):
        cache.image(image), cache.mask(mask)
    filled.set()
    done.wait()


def test_runs_on_the_same_files_share_their_memory(split: Split) -> None:
    """Also after the process that created it has ended; a changed file is read again."""
    want, context = _batches(split, None, 0, range(2)), multiprocessing.get_context("fork")
    filled, done = context.Event(), context.Event()
    process = context.Process(target=_fill, args=(split, filled, done))
    process.start()
    assert filled.wait(60)
    said = StringIO()
    cache = make_cache("auto", split, Console(file=said, width=200))
    assert "8 images and masks are shared with another process" in said.getvalue()
    done.set()
    process.join()
    kept = split.images[0].read_bytes()
    for path in split.images:
        path.write_bytes(b"")
    got = _batches(split, cache, 2, range(2))
    assert all(map(torch.equal, got, want))
    for path in split.images:
        path.write_bytes(kept)
    changed = make_cache("auto", split, Console(quiet=True))
    assert changed is not None and cache is not None
    assert torch.equal(changed.image(split.images[1]), cache.image(split.images[0]))
