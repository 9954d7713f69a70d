"""Pixels of every depth are read at their true values or refused, by every reader alike."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from starseg.data.images import image_size, image_tensor, read_image, read_mask
from starseg.data.index import _count
from starseg.data.labels import LabelMap
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


@given(
    st.sampled_from(list(PIXELS)), st.sampled_from(["png", "tif"]), st.integers(1, 8), st.sampled_from([*PIXELS, "P"])
)
def test_every_reader_takes_or_refuses_a_pair_alike(
    tmp_path_factory: pytest.TempPathFactory, photo: str, suffix: str, turn: int, mask: str
) -> None:
    """`learn` (image_size), `data check` (_inspect) and `train` (_count, read_image) agree."""
    folder, exif = tmp_path_factory.mktemp("pair"), Image.Exif()
    exif[0x0112] = turn
    image_file, mask_file = folder / f"x.{'tif' if photo in ('float', 'int32') else suffix}", folder / "m.tif"
    Image.fromarray(PIXELS[photo]).save(image_file, exif=exif)
    ids = Image.fromarray(RAMP if mask == "P" else PIXELS[mask])
    (ids.convert("P") if mask == "P" else ids).save(mask_file, exif=exif)

    def refused(read: object, *args: object) -> bool:
        try:
            read(*args)  # type: ignore[operator]
        except UserError:
            return True
        return False

    bad = {file for read, file in ((read_image, image_file), (read_mask, mask_file)) if refused(read, file)}
    _, problems = _inspect(image_file, mask_file, LabelMap.make(256))
    assert {path for path, _ in problems} == bad
    assert refused(_count, mask_file, image_file) == bool(bad)
    assert refused(image_size, image_file) == (image_file in bad)
    if image_file not in bad:
        assert image_size(image_file) == tuple(read_image(image_file).shape[1:])
