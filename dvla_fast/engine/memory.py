"""Memory of a training process: what a CPU step frees stays for the next one, and what is free.

glibc gives every block above 32 MiB back to the system when it is freed, and PyTorch's CPU tensors
are such blocks: each step then asks for the same pages again, zeroed one by one. A process that
trains may keep them.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from pathlib import Path

import torch

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


def free_mib(device: torch.device) -> float:
    """Return the memory that new tensors on a device could take now, in MiB.

    On a CPU what the system calls available (free, or a cache that it can drop), on a GPU what no
    process holds plus what PyTorch holds unused.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + unused) / 2**20
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found = int(line.split()[1]) / 1024
    # A container may have less than its machine (cgroup 2; "max" is no limit).
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        found = min(found, max(0, int(limit[0]) - int(used[0])) / 2**20)
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:  # no such file on this system
        return []
