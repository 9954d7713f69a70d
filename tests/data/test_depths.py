"""Pixels of every depth are read at their true values or refused, by every reader alike."""

import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from rich.console import Console

from starseg.data.annotations.classlist import ClassList
from starseg.data.annotations.photos import Photo, convert_masks, read_indices
from starseg.data.datasets.base import Split
from starseg.data.images import image_size, image_tensor, read_image, read_mask
from starseg.data.index import _count
from starseg.data.labels import LabelMap
from starseg.data.samples import StepDataset
from starseg.errors import UserError
from starseg.report.data_check import _inspect

GREY, PALETTE = 0, 3
RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
PIXELS = {
    "8 bits": RAMP,
    "16 bits": RAMP.astype(np.uint16) * 257,
    "16 bits, low": RAMP.astype(np.uint16),
    "int32": RAMP.astype(np.int32),
    "float": RAMP.astype(np.float32) / 255,
    "bool": RAMP > 100,
}


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(path: Path, values: np.ndarray, bits: int, colour: int) -> Path:
    """Write a PNG of so many bits, which Pillow cannot."""
    rows = []
    for row in values:
        packed = "".join(format(value, f"0{bits}b") for value in row)
        packed += "0" * (-len(packed) % 8)
        rows.append(b"\0" + bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8)))
    palette = _chunk(b"PLTE", bytes(k for i in range(2**bits) for k in (i, 255 - i, 0))) if colour == PALETTE else b""
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, colour, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), palette, _chunk(b"IDAT", zlib.compress(b"".join(rows))), _chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_masks_of_any_depth_hold_their_indices(tmp_path: Path, bits: int) -> None:
    ids = (np.arange(21).reshape(3, 7) % 2**bits).astype(np.uint8)
    np.testing.assert_array_equal(read_mask(_png(tmp_path / "m.png", ids, bits, PALETTE)), ids)


@pytest.mark.parametrize(
    ("bits", "message"),
    [(1, "not '1'"), (2, "grey of 2 bits, which readers stretch"), (4, "grey of 4 bits"), (16, "not 'I")],
)
def test_grey_masks_of_other_depths_are_refused(tmp_path: Path, bits: int, message: str) -> None:
    """Pillow stretches 2 and 4 bits to 0..255, so that id 3 or 15 would be 255 and be ignored."""
    path = _png(tmp_path / "m.png", np.array([[0, 1], [1, 0]]), bits, GREY)
    with pytest.raises(UserError, match=rf"m\.png: .*{message}"):
        read_mask(path)


def test_grey_photos_of_few_bits_are_stretched(tmp_path: Path) -> None:
    for bits, step in ((1, 255), (2, 85), (4, 17)):
        values = np.arange(8).reshape(2, 4) % 2**bits
        read = read_image(_png(tmp_path / "x.png", values, bits, GREY))
        np.testing.assert_array_equal(read[1].numpy(), values * step)


def test_inverted_and_multiple_masks_are_refused(tmp_path: Path) -> None:
    mask = Image.fromarray(RAMP)
    mask.save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    with pytest.raises(UserError, match=r"inverted\.tif: grey inverted, so that its values are ambiguous"):
        read_mask(tmp_path / "inverted.tif")
    for name in ("pages.tif", "animated.png"):
        mask.save(tmp_path / name, save_all=True, append_images=[Image.fromarray(RAMP[::-1].copy())])
        with pytest.raises(UserError, match=rf"{name}: holds 2 images; a mask must be one"):
            read_mask(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_profiles_gamma_and_transparency_do_not_change_ids(tmp_path: Path, suffix: str) -> None:
    options = {"png": {"transparency": 0, "icc_profile": b"x" * 200}, "tif": {"icc_profile": b"x" * 200}}[suffix]
    Image.fromarray(RAMP).save(tmp_path / f"m.{suffix}", **options)
    if suffix == "png":
        whole = (tmp_path / "m.png").read_bytes()
        (tmp_path / "m.png").write_bytes(whole[:33] + _chunk(b"gAMA", struct.pack(">I", 20000)) + whole[33:])
    np.testing.assert_array_equal(read_mask(tmp_path / f"m.{suffix}"), RAMP)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("float", "floating-point numbers, .* convert it to 8 or unsigned 16 bits"),
        ("int32", "signed or 32-bit integers"),
        ("16 bits, low", "stored in 16 bits, but no pixel uses the high 8"),
    ],
)
def test_photos_without_a_known_range_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    image = Image.fromarray(PIXELS[kind])
    image.save(tmp_path / "x.tif")
    for read in (read_image, image_size):
        with pytest.raises(UserError, match=rf"x\.tif: .*{message}"):
            read(tmp_path / "x.tif")
    with pytest.raises(UserError, match=f"^image: .*{message}"):
        image_tensor(image)


def test_a_black_16_bit_photo_and_one_of_12_bits(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3, 4), np.uint16)).save(tmp_path / "black.tif")
    assert read_image(tmp_path / "black.tif").shape == (3, 3, 4) and not read_image(tmp_path / "black.tif").any()
    # Two pixels, 0x123 and 0xFED, in three bytes; tags: width, height, bits, no compression, black is 0, strip.
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (279, 4, 3)]
    tags[5:5] = [(266, 3, 1)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    file = b"II*\0" + struct.pack("<I", 12) + b"\x12\x3f\xed\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    (tmp_path / "x.tif").write_bytes(file)
    assert read_image(tmp_path / "x.tif")[0].tolist() == [[0x12, 0xFE]]


def _circles(step: int) -> np.ndarray:
    y, x = np.mgrid[:96, :96]
    return (np.hypot(y - 40, x - 40) < 30).astype(np.uint8) * step + (np.hypot(y - 70, x - 70) < 15) * np.uint8(step)


@pytest.mark.parametrize("step", [1, 2, 50, 127])
@pytest.mark.parametrize("quality", [75, 90, 95, 100])
def test_jpeg_masks_with_changed_ids_are_refused(tmp_path: Path, quality: int, step: int) -> None:
    ids = _circles(step)
    Image.fromarray(ids).save(tmp_path / "m.jpg", quality=quality)
    with Image.open(tmp_path / "m.jpg") as image:
        assert (np.asarray(image) != ids).any(), "the test is about masks that compression has changed"
    with pytest.raises(UserError, match=r"m\.jpg: JPEG compression has changed the class ids .* save it as PNG"):
        read_mask(tmp_path / "m.jpg")


def test_jpeg_masks_with_the_ids_as_saved_are_read(tmp_path: Path) -> None:
    ids = np.zeros((64, 64), np.uint8)
    ids[4:16, 5:40], ids[22:34, 5:40] = 1, 2
    Image.fromarray(ids).save(tmp_path / "m.jpg", quality=100)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.jpg"), ids)


MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "16 bits", "16 bits, low", "int32", "float")
FORMATS = ("jpg", "png", "webp", "bmp", "tif")


def _save(path: Path, mode: str, turn: int) -> None:
    """Save a picture in a mode, upright or turned, if the format has that mode."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    image = Image.fromarray(PIXELS[mode]) if mode in PIXELS else Image.fromarray(RAMP).convert("RGB").convert(mode)
    try:
        image.save(path, exif=exif, **({"quality": 100} if path.suffix == ".jpg" else {}))
    except (OSError, KeyError):
        assume(False)


def _outcome(read: Callable[..., object], *args: object) -> object:
    """What a reader returns; None if it refuses."""
    try:
        return read(*args)
    except UserError:
        return None


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(MODES),
    st.integers(1, 8),
    st.sampled_from(FORMATS),
    st.sampled_from((*MODES, *4 * ("L", "P"))),
    st.integers(1, 8),
    st.sampled_from([None, None, None, "photo", "mask"]),
)
def test_every_reader_takes_or_refuses_a_pair_alike(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    mode: str,
    turn: int,
    mask_suffix: str,
    mask_mode: str,
    mask_turn: int,
    cut: str | None,
) -> None:
    """`learn` (convert_masks), `data check` (_inspect) and `train` (_count, StepDataset) agree on sizes and ids."""
    folder = tmp_path_factory.mktemp("pair")
    image, mask = folder / f"photos/x.{suffix}", folder / f"masks/x.{mask_suffix}"
    for path, how in ((image, (mode, turn)), (mask, (mask_mode, mask_turn))):
        path.parent.mkdir()
        assume(not (path.suffix == ".png" and how[0] == "int32"))  # Pillow would write 16 bits, and warn
        _save(path, *how)
    if cut:
        path = image if cut == "photo" else mask
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    pixels, ids = _outcome(read_image, image), _outcome(read_mask, mask)
    bad = {path for path, read in ((image, pixels), (mask, ids)) if read is None}
    if not bad and pixels.shape[1:] != ids.shape:
        bad = {mask}
    labels, identity = LabelMap.make(255), np.arange(256, dtype=np.uint8)
    counts, problems = _inspect(image, mask, labels)
    assert {path for path, _ in problems} == bad
    counted = _outcome(_count, mask, image)
    classes = ClassList(tuple(map(str, range(255))), None, "a list")
    photo = Photo("x", image, mask, partial(read_indices, mask, classes=classes))
    learnt = _outcome(convert_masks, [photo], identity, folder / "run", Console(quiet=True))
    if bad:
        assert counted is None and learnt is None
        return
    np.testing.assert_array_equal(counted, counts)
    np.testing.assert_array_equal(learnt, [counts])
    np.testing.assert_array_equal(read_mask(folder / "run" / "x.png"), ids)
    assert image_size(image) == image_size(image, whole=False) == ids.shape
    batch = StepDataset(Split((image,), (mask,), ("x",)), np.array([0]), identity, 16, None)[0, 0]
    height, width = ids.shape
    assert batch.images.shape == (3, 16, 16) and batch.labels.shape == (16, 16)
    assert set(np.unique(batch.labels)) <= {*np.unique(ids), 255} and (height, width) in ((4, 6), (6, 4))
