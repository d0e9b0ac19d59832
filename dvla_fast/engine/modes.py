"""Evaluation mode for a while: dropout and BatchNorm do not draw or learn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_lock = threading.Lock()
# How many calls work with a module now, and its modules that were in training before the first.
_working: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each part back into its own when no call is left.

    Parts can be in different modes, as where BatchNorm is frozen; calls of several threads overlap.
    """
    with _lock:
        count, training = _working.get(module, (0, []))
        if not count:
            training = [part for part in module.modules() if part.training]
            if training:
                module.eval()
        _working[module] = count + 1, training
    try:
        yield
    finally:
        with _lock:
            count, training = _working.pop(module)
            if count > 1:
                _working[module] = count - 1, training
            else:
                for part in training:
                    part.training = True
