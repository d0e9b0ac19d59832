"""Files that are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvla_fast.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = "free space or choose another --output folder"
RUN_REMEDY = "free space and continue with --resume"  # of runs that have begun


def write_atomic(path: Path, write: Callable[[Path], None], remedy: str = REMEDY) -> None:
    """Write a file under a temporary name in the same folder, flush it, and rename it into place.

    Raises:
        OutputError: the folder cannot be written or the disk is full, with the remedy; the old
            file stays.
    """
    temporary = path.parent / f"{_prefix(path)}{secrets.token_hex(8)}.tmp"
    try:
        # not mkstemp: its file is private, and asking for the umask sets it for all threads
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        write(temporary)
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))  # as the file that it replaces
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error, remedy) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: Path, remedy: str = REMEDY) -> None:
    """Check that a file can be written before the work that it is for; makes its folder.

    Raises:
        OutputError: its folder cannot be made or written, or no file can have its name; with the
            remedy.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # the system knows which names are too long
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.NamedTemporaryFile(prefix=_prefix(path), dir=path.parent):
            pass
    except OSError as error:
        raise unwritable(path, error, remedy) from error


def _prefix(path: Path) -> str:
    """The begin of a temporary file's name: short, as those may not be longer than others."""
    return f".{path.name[:40]}."


def check_new(path: Path, overwrite: bool, option: str = "--output") -> None:
    """Check that no file is replaced unasked, before the work that it is for (OutputError)."""
    if not overwrite and os.path.lexists(path):
        raise OutputError(
            f"{path}: exists; give {option} another name, or --overwrite to replace it"
        )


def state_of(path: Path) -> str:
    """Size and time of change of a file; "missing" also for a link that leads nowhere."""
    try:
        state = path.stat()
    except OSError:
        return "missing"
    return f"{state.st_size}\0{state.st_mtime_ns}"


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON that any reader takes: NaN and infinity, which it lacks, are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def unwritable(path: Path, error: OSError, remedy: str = REMEDY) -> OutputError:
    """Return the error to raise where a file cannot be written."""
    if error.errno == errno.ENAMETOOLONG:
        remedy = "give it a shorter name"
    return OutputError(f"{path}: cannot write ({error.strerror or error}); {remedy}")


def write_text_atomic(path: Path, text: str, remedy: str = REMEDY) -> None:
    """Replace a text file atomically (OutputError when it cannot be written)."""
    write_bytes_atomic(path, text.encode(), remedy)


def write_bytes_atomic(path: Path, content: bytes, remedy: str = REMEDY) -> None:
    """Likewise for any file."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomic(path, write, remedy)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # makes the rename itself survive a power cut
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_tensors_atomic(
    path: Path, tensors: dict[str, Tensor], description: str, remedy: str = REMEDY
) -> None:
    """Likewise for tensors on the CPU, as safetensors with a description inside."""
    import safetensors.torch

    def save(temporary: Path) -> None:
        try:
            safetensors.torch.save_file(tensors, str(temporary), {"dvla_fast": description})
        except safetensors.SafetensorError as error:  # a full disk is no OSError to it
            raise OSError(str(error)) from error

    write_atomic(path, save, remedy)
