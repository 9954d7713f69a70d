"""Training crops of JPEGs that are decoded at a reduced size (`data.decode: scaled`)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from starseg.config import parse_config
from starseg.data import samples
from starseg.data.datasets import Split
from starseg.data.images import scalable_size
from starseg.data.samples import StepDataset
from starseg.data.transforms import draw_crop
from starseg.engine.setup import prepare
from starseg.errors import UserError

IDENTITY = np.arange(256, dtype=np.uint8)


def _photo(folder: Path, size: tuple[int, int]) -> Split:
    """A photo-like JPEG with bright rectangles, and a mask of them."""
    height, width = size
    rng, mask = np.random.default_rng(0), np.zeros(size, np.uint8)
    for y, x in ((0.1, 0.1), (0.1, 0.6), (0.55, 0.3), (0.7, 0.75)):
        mask[int(y * height) : int((y + 0.2) * height), int(x * width) : int((x + 0.2) * width)] = 1
    image = (60 + 130 * mask[..., None] + rng.integers(0, 30, (*size, 3))).astype(np.uint8)
    files = folder / "photo.jpg", folder / "photo.png"
    Image.fromarray(image).save(files[0], quality=95)
    Image.fromarray(mask).save(files[1])
    return Split((files[0],), (files[1],), ("photo",))


@pytest.mark.parametrize(
    ("size", "crop"), [((701, 1003), 48), ((701, 1003), 96), ((701, 1003), 256), ((1003, 701), 160)]
)
def test_image_and_mask_stay_aligned_where_the_decoder_reduces_the_image(
    size: tuple[int, int], crop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that are no multiple of the scale, and every scale; the difference to full decoding is small."""
    split, scales = _photo(tmp_path, size), set()
    full, scaled = (StepDataset(split, np.arange(1), IDENTITY, crop, (0, 0), scaled=s) for s in (False, True))
    read = samples.read_scaled
    monkeypatch.setattr(samples, "read_scaled", lambda *args: scales.add(args[2]) or read(*args))
    for epoch in range(12):
        want, got = full[epoch, 0], scaled[epoch, 0]
        assert got.images.shape == (3, crop, crop) and set(got.labels.unique().tolist()) <= {0, 1}
        assert ((got.images.float().mean(0) > 140) != (got.labels == 1)).float().mean() < 0.01
        # The edges of the crop are moved by less than a pixel of the crop.
        assert (want.labels != got.labels).float().mean() < 0.05
    assert scales == {48: {8}, 96: {4}, 256: {2}, 160: {2, 4}}[crop]


def test_crops_that_are_not_reduced_by_half_are_decoded_as_before(tmp_path: Path) -> None:
    split = _photo(tmp_path, (300, 400))
    for crop, seed in ((208, (0, 0)), (48, None)):  # the latter as in tests
        full, scaled = (StepDataset(split, np.arange(1), IDENTITY, crop, seed, scaled=s)[0, 0] for s in (False, True))
        assert torch.equal(full.images, scaled.images) and torch.equal(full.labels, scaled.labels)


def test_only_upright_rgb_jpegs_are_decoded_at_a_reduced_size(tmp_path: Path) -> None:
    size = (400, 600)
    split = _photo(tmp_path, size)
    photo = Image.open(split.images[0])
    exif = Image.Exif()
    exif[0x0112] = 3  # Orientation: upside down
    for name, image, options in (
        ("turned.jpg", photo, {"exif": exif}),
        ("grey.jpg", photo.convert("L"), {}),
        ("cmyk.jpg", photo.convert("CMYK"), {}),
        ("png.jpg", photo, {"format": "PNG"}),
    ):
        path = tmp_path / name
        image.save(path, **options)
        assert scalable_size(path) is None
        data = [
            StepDataset(Split((path,), split.masks, ("x",)), np.arange(1), IDENTITY, 48, (0, 0), scaled=scaled)
            for scaled in (False, True)
        ]
        assert torch.equal(data[0][0, 0].images, data[1][0, 0].images)
    assert scalable_size(split.images[0]) == size


def test_crops_of_every_scale_lie_within_the_reduced_image() -> None:
    for seed in range(300):
        torch.manual_seed(seed)
        size = tuple(torch.randint(100, 2000, (2,)).tolist())
        crop, side = draw_crop(size), int(torch.randint(8, 300, ()))
        scale = crop.scale(side)
        aligned = crop.aligned(scale, size)
        assert all(edge % scale == 0 for edge in aligned.box)
        assert min(aligned.top, aligned.left) >= 0 and min(aligned.height, aligned.width) // scale >= min(
            side, crop.height, crop.width
        )
        assert aligned.top + aligned.height <= size[0] and aligned.left + aligned.width <= size[1]
        moved = (abs(a - b) for a, b in zip(aligned.box, crop.box, strict=True))
        assert all(distance < scale for distance in moved)
        assert scale > 1 or aligned == crop


def test_scaled_decoding_turns_the_cache_off(tiny: dict) -> None:
    data = {**tiny["data"], "decode": "scaled"}
    prepared = prepare(parse_config({**tiny, "data": data}), Console(quiet=True))
    assert prepared.data.loading.cache is None
    loader = prepared.data.train_loader(0, [0], False)
    assert loader.dataset.request((0, 0)).scaled and not prepared.data.test_loaders(0)[0].dataset.request((0, 0)).scaled
    with pytest.raises(UserError, match=r"data\.cache: ram keeps whole images.*data\.decode=full"):
        parse_config({**tiny, "data": {**data, "cache": "ram"}})
