"""One image from a file, or from an array, to a square of 8-bit RGB."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dvla_fast.arguments import expect_whole
from dvla_fast.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
# The usual evaluation crop: resize the short side to 256, crop the central 224.
_RESIZE_RATIO = 256 / 224
_ORIENTATION = 0x0112  # EXIF tag
_BLOCK = 1024
T = TypeVar("T")


def pillow() -> Any:
    """Return ``PIL.Image``.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "reading images needs Pillow, which is not installed; run "
            "pip install 'dvla-fast[train]'"
        ) from error
    return Image


def is_image(path: Path | str) -> bool:
    """Tell image files by their suffix, in a path or the name alone; hidden files are none."""
    name = path if isinstance(path, str) else path.name
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def in_blocks(pool: Executor, work: Callable[[int], T], count: int) -> Iterator[T]:
    """Do ``work`` for 0 to count - 1, in order: a million waiting tasks would take a gigabyte."""
    for start in range(0, count, _BLOCK):
        yield from pool.map(work, range(start, min(start + _BLOCK, count)))


def open_rgb(path: Path) -> tuple[Any, str, int]:
    """Decode a whole image file.

    Returns:
        (RGB image as of ``as_rgb``, mode of the file, shorter side in pixels).

    Raises:
        DataError: empty, truncated or corrupt, no image, of floating-point values, or so large that
            Pillow takes it for an attack; with the path and the remedy.
    """
    Image = pillow()
    remedy = "replace or remove the file"
    # os.path says no where it may not look
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe, which would never end
        raise DataError(f"{path}: cannot read this image (it is no file); {remedy}")
    try:
        with Image.open(path) as image:
            mode, rgb = image.mode, as_rgb(image, str(path))
    except (DataError, MemoryError):  # the latter may be no fault of the file
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        reason: object = error
        if isinstance(error, FileNotFoundError):
            reason, remedy = "no such file", "restore the file"
        elif os.path.isfile(path) and path.stat().st_size == 0:
            reason = "the file is empty, 0 bytes"
        raise DataError(f"{path}: cannot read this image ({reason}); {remedy}") from error
    return rgb, mode, min(rgb.size)


def as_rgb(image: Any, name: str) -> Any:
    """Turn a Pillow image into upright RGB.

    Greyscale, palette, CMYK and 1-bit images are converted, an alpha channel is dropped, 16-bit
    values keep their upper 8 bits, and the image is turned as its EXIF orientation says.

    Args:
        name: what a message calls the image.

    Raises:
        DataError: floating-point values.
    """
    if image.mode == "F":
        raise DataError(f"{name}: holds floating-point values; save it as 8-bit, or remove it")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert("RGB") would clip everything above 255 to white
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        rgb = pillow().fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    elif isinstance(image.info.get("transparency"), bytes):  # Pillow warns of the direct way
        rgb = image.convert("RGBA").convert("RGB")
    else:
        rgb = image.convert("RGB")
    turn = _turn(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
        rgb.info = {}  # it still says that the image lies on its side
    return rgb


def _turn(image: Any) -> Any:
    """Return what turns a loaded image upright; None where its EXIF says nothing, or is damaged."""
    way = pillow().Transpose
    turns = {
        2: way.FLIP_LEFT_RIGHT,
        3: way.ROTATE_180,
        4: way.FLIP_TOP_BOTTOM,
        5: way.TRANSPOSE,
        6: way.ROTATE_270,
        7: way.TRANSVERSE,
        8: way.ROTATE_90,
    }
    try:
        # Not ImageOps.exif_transpose, which writes the whole block again and fails on damage.
        return turns.get(image.getexif().get(_ORIENTATION))
    except Exception:  # nearly anything, and the pixels are as good as before
        return None


def check_size(image_size: int) -> None:
    """Refuse what is no side of an image: DataError below 1, TypeError for no whole number."""
    expect_whole("image_size", image_size)
    if image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}")


def to_square(rgb: Any, size: int) -> NDArray[np.uint8]:
    """Resize the short side and crop the centre: uint8 (3, size, size).

    An image of exactly that size is kept as it is, so that 84-pixel collections are not resampled.
    """
    Image = pillow()
    if rgb.size != (size, size):
        rgb = _without_far_ends(rgb)
        scale = size * _RESIZE_RATIO / min(rgb.size)
        width, height = (max(size, round(side * scale)) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        rgb = rgb.crop((left, top, left + size, top + size))
    return np.asarray(rgb).transpose(2, 0, 1)


def _without_far_ends(rgb: Any) -> Any:
    """Keep the middle of a long strip: resized whole, 1 x 20,000 pixels would take gigabytes."""
    longest = 8 * min(rgb.size)
    if max(rgb.size) <= longest:
        return rgb
    width, height = (min(side, longest) for side in rgb.size)
    left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
    return rgb.crop((left, top, left + width, top + height))


def decode(source: Path | NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Turn a file, or an array (H, W, 3), into uint8 (3, size, size).

    Raises:
        DataError: as ``open_rgb``.
    """
    if isinstance(source, Path):
        return to_square(open_rgb(source)[0], size)
    return to_square(pillow().fromarray(source), size)
