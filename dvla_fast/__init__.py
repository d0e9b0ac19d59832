"""dvla_fast: fused kernels and drop-in modules for DVLA-RL few-shot image classification."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dvla_fast.backends import get_backend, set_backend

__version__ = "0.1.0"

_LAZY = {
    "RLAGate": "dvla_fast.nn",
    "GateOutput": "dvla_fast.nn",
    "DVLA": "dvla_fast.nn",
    "FewShotClassifier": "dvla_fast.engine.classifier",
    "ReinforceLoss": "dvla_fast.rl",
    "build_info": "dvla_fast._extension",
    "functional": "",
    "distributions": "",
    "nn": "",
    "rl": "",
    "semantics": "",
    "report": "",
}

__all__ = ["__version__", "get_backend", "set_backend", *_LAZY]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from dvla_fast import distributions as distributions
    from dvla_fast import functional as functional
    from dvla_fast import nn as nn
    from dvla_fast import report as report
    from dvla_fast import rl as rl
    from dvla_fast import semantics as semantics
    from dvla_fast._extension import build_info as build_info
    from dvla_fast.engine.classifier import FewShotClassifier as FewShotClassifier
    from dvla_fast.nn import DVLA as DVLA
    from dvla_fast.nn import GateOutput as GateOutput
    from dvla_fast.nn import RLAGate as RLAGate
    from dvla_fast.rl import ReinforceLoss as ReinforceLoss
else:  # which would make every name known to type checkers

    def __getattr__(name: str) -> Any:
        """Resolves public names on first use: ``import dvla_fast`` costs little beside torch."""
        if name not in _LAZY:
            raise AttributeError(f"module 'dvla_fast' has no attribute {name!r}")
        module = _LAZY[name]
        value = (
            getattr(importlib.import_module(module), name)
            if module
            else importlib.import_module(f"dvla_fast.{name}")
        )
        globals()[name] = value
        return value
