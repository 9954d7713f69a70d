"""Images and masks of every kind of file are read alike, and damaged files are named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from starseg.data import images as files
from starseg.data.images import read_image, read_mask
from starseg.errors import UserError

RAMP = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))
EXIF_ORIENTATION = 0x0112


def _saved(image: Image.Image, path: Path, **options: object) -> torch.Tensor:
    image.save(path, **options)
    read = read_image(path)
    assert read.dtype == torch.uint8 and read.shape[0] == 3
    return read.int()


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_colour_mode_becomes_the_same_rgb(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(RAMP if mode != "1" else np.where(RAMP > 100, 255, 0).astype(np.uint8))
    suffix = "tif" if mode == "CMYK" else "png"
    read = _saved(grey.convert(mode), tmp_path / f"x.{suffix}")
    assert (read - torch.from_numpy(np.array(grey))).abs().max() <= 1


def test_a_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 20))
    read = _saved(red.convert("CMYK"), tmp_path / "x.jpg", quality=95)
    assert (read[:, 8, 8] - torch.tensor([200, 30, 20])).abs().max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert torch.equal(_saved(deep, tmp_path / f"x.{suffix}"), torch.from_numpy(RAMP).int().expand(3, -1, -1))


@pytest.mark.parametrize("palette", [False, True])
def test_transparent_pixels_become_white(tmp_path: Path, palette: bool) -> None:
    if palette:
        image, options = Image.new("P", (4, 4), 1), {"transparency": 1}
        image.putpalette([0, 0, 0, 10, 20, 30])
    else:
        image, options = Image.new("RGBA", (4, 4), (10, 20, 30, 0)), {}
    assert (_saved(image, tmp_path / "x.png", **options) == 255).all()


def test_an_exif_rotated_image_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # turn by 90 degrees clockwise to view
    read = _saved(Image.fromarray(RAMP), tmp_path / "x.jpg", exif=exif)
    assert read.shape == (3, 24, 16)
    assert (read[0] - torch.from_numpy(np.rot90(RAMP, -1).copy())).abs().max() <= 12


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 95},
        {"quality": 30, "progressive": True},
        {"quality": 95, "subsampling": "4:4:4"},
        {"quality": 75, "subsampling": "4:2:2", "optimize": True},
        {"quality": 80, "restart_marker_rows": 1},
        {"quality": 90, "keep_rgb": True},
    ],
    ids=str,
)
def test_both_jpeg_decoders_give_the_same_pixels(
    tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).normal(128, 60, (9, 12, 3)).clip(0, 255).astype(np.uint8)
    photo = Image.fromarray(noise).resize((97, 61), Image.Resampling.BICUBIC)
    fast = _saved(photo, tmp_path / "x.jpg", **options)
    monkeypatch.delattr(files.io, "decode_jpeg", raising=False)
    assert torch.equal(fast, read_image(tmp_path / "x.jpg").int())


@pytest.mark.parametrize("damage", ["no image", "empty", "missing", "truncated", "garbled"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    for suffix, read, what in (("jpg", read_image, "image"), ("png", read_mask, "mask")):
        path = tmp_path / f"x.{suffix}"
        noise.save(path)
        good = path.read_bytes()
        garbled = good[:20] + bytes(255 - b for b in good[20:])
        content = {"no image": b"text", "empty": b"", "truncated": good[: len(good) // 2], "garbled": garbled}
        path.unlink() if damage == "missing" else path.write_bytes(content[damage])
        with pytest.raises(UserError, match=rf"x\.{suffix}: cannot read this {what} \(.+\); replace the file"):
            read(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "1"])
def test_a_mask_is_one_8_bit_channel(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png: a mask must be an 8-bit palette or grey image, not"):
        read_mask(tmp_path / "m.png")
