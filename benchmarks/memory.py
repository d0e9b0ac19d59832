"""Peak memory of one call on the CPU, as the system sees it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path


def peak_mib(call: Callable[[], object]) -> float | None:
    """MiB that one call takes above what the process holds before, its results included.

    Resident pages, so freed memory is handed back to the system first. ``None`` where the system
    does not tell (not Linux, or no right to reset the mark).
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return round((_status("VmHWM") - before) / 1024, 2)


def _status(field: str) -> int:
    """A line of /proc/self/status, in KiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])
