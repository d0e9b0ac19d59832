"""PNG files that a pickle holds in a list, decoded one by one as they are asked for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvla_fast.data.decode import pillow
from dvla_fast.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PngImages:
    """Stands for an array of images (N, H, W, 3), and takes the memory of the files alone.

    Args:
        path: of the pickle, for messages.
        files: bytes, or arrays of uint8.

    Raises:
        DataError: the first cannot be read.
    """

    def __init__(self, path: Path, files: Sequence[Any]) -> None:
        self.path, self.files = path, files
        self.shape: tuple[int, ...] = (len(files), *self._decoded(0).shape)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """Decode an image: uint8 (H, W, 3).

        Raises:
            DataError: it cannot be read, or has another size than the first.
        """
        pixels = self._decoded(row)
        if pixels.shape != self.shape[1:]:
            raise DataError(
                f"{self.path}: image {row} is {pixels.shape}, the first {self.shape[1:]}; get it "
                "again"
            )
        return pixels

    def file(self, row: int) -> bytes:
        """Return an image as it is stored; of what is none, nothing, which cannot be read."""
        item = self.files[row]
        if isinstance(item, bytes):
            return item
        try:
            return np.asarray(item, dtype=np.uint8).tobytes()
        except (TypeError, ValueError, OverflowError):
            return b""

    def _decoded(self, row: int) -> NDArray[np.uint8]:
        Image = pillow()
        try:
            with Image.open(io.BytesIO(self.file(row)), formats=["PNG"]) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{self.path}: cannot read image {row} of {len(self.files)} ({error}); get it again"
            ) from error
