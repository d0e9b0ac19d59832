"""Memory of a training process on the CPU: what a step frees stays for the next one.

glibc gives every block above 32 MiB back to the system when it is freed, and PyTorch's CPU tensors
are such blocks: each step then asks for the same pages again, zeroed one by one. A process that
trains may keep them.
"""

from __future__ import annotations

import ctypes
import ctypes.util

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc, for this process, not to return memory; False where there is no glibc.

    For commands that own their process: a library must not decide this for its host.
    """
    try:
        libc = ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6")
        return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))
    except (OSError, AttributeError):
        return False
