"""Images and masks of every kind of file are read alike, and damaged files are named."""

import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from starseg.data import images as files
from starseg.data.images import image_size, image_tensor, read_image, read_mask, transparent_pixels
from starseg.errors import UserError

RAMP = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))
EXIF_ORIENTATION = 0x0112


def _saved(image: Image.Image, path: Path, **options: object) -> torch.Tensor:
    image.save(path, **options)
    read = read_image(path)
    assert read.dtype == torch.uint8 and read.shape[0] == 3
    return read.int()


def test_images_are_read_up_to_the_limit_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    Image.new("L", (18_000, 10_000), 7).save(path, compress_level=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(path) == (10_000, 18_000)
        mask = read_mask(path)
    assert mask.shape == (10_000, 18_000) and (mask[::999, ::999] == 7).all()
    monkeypatch.setenv("STARSEG_MAX_MEGAPIXELS", "180")
    assert image_size(path, whole=False) == (10_000, 18_000)
    monkeypatch.setenv("STARSEG_MAX_MEGAPIXELS", "179")
    for read in (read_image, read_mask, image_size, transparent_pixels):
        with pytest.raises(
            UserError, match=r"x\.png: 18000x10000 pixels are more than the limit of 179 megapixels; cut"
        ):
            read(path)
    monkeypatch.setenv("STARSEG_MAX_MEGAPIXELS", "many")
    with pytest.raises(UserError, match=r"STARSEG_MAX_MEGAPIXELS: expected a whole number .* got 'many'"):
        read_image(path)


def test_a_header_of_an_enormous_size_is_refused_without_reading_it(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    header = bytearray(buffer.getvalue())
    header[16:24] = (2**30).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(header)
    with pytest.raises(UserError, match=r"bomb\.png: 1073741824x1073741824 pixels are more than the limit of 1000"):
        read_image(tmp_path / "bomb.png")


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


# What is stored if an upright image is to be seen, by EXIF orientation.
STORED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, -1),
}
FORMATS = {
    "jpg": {"quality": 100, "subsampling": 0},
    "png": {},
    "tif": {},
    "webp": {"lossless": True},
}


def _save_turned(pixels: np.ndarray, orientation: int, path: Path, **options: object) -> None:
    """Write upright pixels [H, W] or [H, W, C] with an EXIF orientation."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](pixels)))
    image.save(path, exif=exif, **options)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", STORED)
def test_images_of_every_orientation_are_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = np.stack([RAMP, RAMP.max() - RAMP, np.full_like(RAMP, 90)], axis=-1)
    upright[:4] //= 2
    path = tmp_path / f"x.{suffix}"
    _save_turned(upright, orientation, path, **FORMATS[suffix])
    read = read_image(path).permute(1, 2, 0).numpy()
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).max() <= (3 if suffix == "jpg" else 0)
    assert image_size(path) == image_size(path, whole=False) == upright.shape[:2]
    with Image.open(path) as image:
        assert np.array_equal(image_tensor(image).permute(1, 2, 0), read)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_masks_of_every_orientation_are_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    _save_turned(ids, orientation, tmp_path / f"x.{suffix}")
    assert np.array_equal(read_mask(tmp_path / f"x.{suffix}"), ids)
    clear = np.zeros((3, 4, 4), np.uint8)
    clear[..., 3] = 255 * (ids > 5)
    _save_turned(clear, orientation, tmp_path / f"clear.{suffix}")
    assert np.array_equal(transparent_pixels(tmp_path / f"clear.{suffix}"), ids <= 5)


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0garbage", b"Exif\0\0", b"x"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_data_are_left_alone(tmp_path: Path, suffix: str, exif: bytes) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP).convert("RGB").save(path, exif=exif, **FORMATS[suffix])
    read = read_image(path)
    assert (read[0].int() - torch.from_numpy(RAMP)).abs().max() <= 2
    assert image_size(path) == image_size(path, whole=False) == RAMP.shape


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(RAMP).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "x.png")[0], torch.from_numpy(RAMP))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(["L", "RGB", "P", "RGBA", "LA", "1", "I;16"]),
    suffix=st.sampled_from(["jpg", "png", "tif", "webp", "bmp"]),
    orientation=st.sampled_from(list(STORED)),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
)
def test_every_reader_sees_the_same_size(
    tmp_path: Path, mode: str, suffix: str, orientation: int, height: int, width: int
) -> None:
    """The preview, the check, the cache and training use these functions, so that they cannot disagree."""
    image, exif, path = Image.new(mode, (width, height)), Image.Exif(), tmp_path / f"x.{suffix}"
    exif[EXIF_ORIENTATION] = orientation
    if mode == "P":
        image.putpalette([0] * 768)
    try:
        image.save(path, exif=exif)
    except (OSError, KeyError):
        assume(False)  # a mode that the format does not have
    size = tuple(read_image(path).shape[1:])
    written = orientation if suffix != "bmp" else 1
    assert size == ((width, height) if written > 4 else (height, width))
    assert image_size(path) == image_size(path, whole=False) == size
    if mode in ("L", "P") and suffix != "jpg" and suffix != "webp":
        assert read_mask(path).shape == size


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
