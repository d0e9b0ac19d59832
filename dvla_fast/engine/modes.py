"""Evaluation mode for a while: dropout and BatchNorm do not draw or learn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_lock = threading.Lock()
# How many calls work with a part of a model now, and whether it was in training before the first.
_working: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each part back into its own when no call is left.

    Parts can be in different modes, as where BatchNorm is frozen; calls of several threads overlap,
    and some work with a part of what others work with.
    """
    parts = list(module.modules())
    with _lock:
        for part in parts:
            count, training = _working.get(part, (0, part.training))
            _working[part] = count + 1, training
        if any(part.training for part in parts):
            module.eval()
    try:
        yield
    finally:
        with _lock:
            for part in parts:
                count, training = _working.pop(part)
                if count > 1:
                    _working[part] = count - 1, training
                elif training:
                    part.training = True
