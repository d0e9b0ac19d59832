"""Every mode of image decodes to the right pixels; every broken file is named."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dvla_fast.data.decode import as_rgb, decode, is_image, open_rgb
from dvla_fast.errors import DataError
from tests.data import trees

GREY = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))  # (32, 32)


def test_image_files_are_told_by_their_suffix() -> None:
    assert is_image(Path("A.JPG"))
    assert not is_image(Path("._a.jpg"))
    assert not is_image(Path("a.jpg.txt"))


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "RGB"])
def test_modes(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(GREY).convert("RGB").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    pixels = decode(path, 32)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), np.uint8)
    if mode not in ("1", "P"):
        assert np.abs(pixels.astype(int) - GREY).max() <= 2


def test_ycbcr() -> None:
    """In memory: Pillow before 13 cannot read the TIFFs that it writes of this mode."""
    image = Image.fromarray(GREY).convert("RGB").convert("YCbCr")
    pixels = np.asarray(as_rgb(image, "image")).transpose(2, 0, 1)
    assert np.abs(pixels.astype(int) - GREY).max() <= 2


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparency_is_dropped_without_a_warning(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(GREY).convert("RGB").quantize(16) if mode == "P" else None
    image = image or Image.fromarray(GREY).convert(mode)
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    clear = {"P": bytes(range(0, 256, 16)), "L": 8, "RGB": (8, 8, 8)}[mode]
    image.save(tmp_path / "x.png", transparency=clear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (decode(tmp_path / "x.png", 32) == expected).all()


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "x.jpg")  # red
    red, green, blue = decode(tmp_path / "x.jpg", 16)[:, 8, 8].astype(int)
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path, suffix: str) -> None:
    deep = GREY.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / f"x.{suffix}")
    assert (decode(tmp_path / f"x.{suffix}", 32) == GREY).all()


def test_wide_integers_are_taken_for_sixteen_bits() -> None:
    wide = np.array([[-300, 0, 257 * 77, 65535, 70000]], np.int32)
    pixels = np.asarray(as_rgb(Image.fromarray(wide), "image"))
    assert pixels[0, :, 0].tolist() == [0, 0, 77, 255, 255]


def test_floating_point_is_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif: holds floating-point values"):
        decode(tmp_path / "x.tif", 16)


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    with pytest.raises(DataError, match=r"x\.jpg: cannot read this image \(no such file\)"):
        decode(path, 16)
    os.mkfifo(path)  # reading would wait for somebody to write
    with pytest.raises(DataError, match=r"x\.jpg: cannot read this image \(it is no file\)"):
        decode(path, 16)
    path.unlink()
    path.write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty, 0 bytes"):
        decode(path, 16)
    Image.fromarray(trees.picture(0, (200, 200))).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"x\.jpg: cannot read .*truncated.*replace or remove"):
        decode(path, 16)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about the damage
def test_no_damage_escapes(tmp_path: Path) -> None:
    """Whatever bytes are flipped, the image decodes or a DataError comes."""
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "bmp", "tif", "webp"):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(trees.picture(1)).save(path)
        whole = bytearray(path.read_bytes())
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, min(200, len(whole)), 4):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            with contextlib.suppress(DataError):
                open_rgb(path)


def test_a_damaged_file_of_another_format_than_its_ending(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(trees.picture(1)).save(path, format="DDS")
    damaged = bytearray(path.read_bytes())
    damaged[80:84] = bytes(4)  # the flags of its pixels' format
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"x\.jpg: cannot read this image \(.*flags.*replace"):
        open_rgb(path)


def turned(path: Path, orientation: int) -> np.ndarray:
    """Write an image with an EXIF orientation; returns its pixels as they lie in the file."""
    pixels = np.zeros((40, 24, 3), np.uint8)
    pixels[:8, :8] = 255  # a mark in the first corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"x.{suffix}"
    pixels = turned(path, orientation)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        given = as_rgb(image, "image")  # loaded before, as a user's own image may be
    found = open_rgb(path)[0]
    assert found.size == ((40, 24) if orientation > 4 else (24, 40))
    assert (np.asarray(found) == expected).all()
    assert (np.asarray(given) == expected).all()
    assert (np.asarray(as_rgb(found, "turned already")) == expected).all()
    corner = pixels[:8, :8].mean() - np.asarray(found)[:8, :8].mean()
    assert (abs(corner) < 9) == (orientation in (1, 5))


def test_deep_images_are_turned(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(deep).save(tmp_path / "x.png", exif=exif)
    assert (decode(tmp_path / "x.png", 32) == GREY[::-1, ::-1]).all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about the damage
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_broken_orientation_costs_no_image(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = exif.tobytes()
    for place in range(len(whole)):
        for value in (0, 1, 127, 255):
            damaged = bytearray(whole)
            damaged[place] = value
            Image.new("RGB", (24, 40)).save(path, exif=bytes(damaged))
            assert sorted(open_rgb(path)[0].size) == [24, 40]
    for odd in (0, 9, 65535):
        turned(path, odd)
        assert open_rgb(path)[0].size == (24, 40)


def test_right_size_is_not_resampled() -> None:
    pixels = trees.picture(3, (84, 84))
    assert (decode(pixels, 84) == pixels.transpose(2, 0, 1)).all()


def test_the_middle_of_a_strip_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resized whole, it would be 730,000 pixels long."""
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *how: sizes.append(size) or resize(self, size, *how),
    )
    strip = np.zeros((1, 20_000, 3), np.uint8)
    strip[:, 9_990:10_010] = (200, 100, 50)
    for pixels in (strip, strip.transpose(1, 0, 2)):
        square = decode(np.ascontiguousarray(pixels), 32)
        assert square.shape == (3, 32, 32)
        assert (square == np.array([200, 100, 50], np.uint8)[:, None, None]).all()
    assert max(map(max, sizes)) < 400
