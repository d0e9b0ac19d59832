"""Pickles of images, read without trusting them.

A pickle is a program: loading a foreign one can run anything. Only numpy arrays and plain
containers are let through here; whatever else a file names stops the loading.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from dvla_fast.errors import DataError


class _Encode:
    """Stand in for ``_codecs.encode``, by which Python 3 writes bytes under old protocols.

    A callable without attributes, as all that a pickle gets: it can set attributes of functions.
    """

    __slots__ = ()

    def __call__(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"text encoding {encoding!r} is not allowed")
        return text.encode("latin1")


class _FromBuffer:
    """Numpy's ``_frombuffer``, which is a Python function, likewise."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        return _core().numeric._frombuffer(*arguments)


def _core() -> Any:
    """What numpy 2 calls ``numpy._core`` and numpy 1 ``numpy.core``."""
    return np.core if np.__version__.startswith("1.") else np._core  # type: ignore[attr-defined]


def _allowed() -> dict[tuple[str, str], Any]:
    core = _core()
    table: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _Encode(),
        ("collections", "OrderedDict"): dict,
    }
    for name in ("core", "_core"):  # as numpy 1 and numpy 2 write it
        table[f"numpy.{name}.multiarray", "_reconstruct"] = core.multiarray._reconstruct
        table[f"numpy.{name}.multiarray", "scalar"] = core.multiarray.scalar
        table[f"numpy.{name}.numeric", "_frombuffer"] = _FromBuffer()
    for kind in (dict, list, set, frozenset, tuple, bytearray):
        for module in ("builtins", "__builtin__"):
            table[module, kind.__name__] = kind
    return table


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _allowed()[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


def load_pickle(path: Path) -> Any:
    """Read a pickle of numpy arrays and plain containers; Python 2 strings become str.

    Raises:
        DataError: unreadable, truncated, or holding anything else than arrays and containers.
    """
    try:
        with path.open("rb") as stream:
            return _Unpickler(stream, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: not loaded ({error}); only numpy arrays and plain containers are, since a "
            "pickle can run any program: get the file from its publisher again"
        ) from error
    # A damaged stream can fail at any of its instructions
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: cannot read this pickle ({reason}); it is truncated or damaged: get it again"
        ) from error
