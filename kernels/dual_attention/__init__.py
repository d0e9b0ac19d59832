"""Dual attention on NVIDIA GPUs: ``launch`` chooses tiles, ``forward`` holds kernel and launcher.

Importing it raises ImportError where Triton is missing.
"""

# Bound here at once: importing the submodule later must not put the module under this name.
from .forward import forward

__all__ = ["forward"]
