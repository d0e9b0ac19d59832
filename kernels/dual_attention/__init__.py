"""Dual attention on NVIDIA GPUs: ``launch`` chooses tiles, ``forward`` and ``backward`` run.

Importing it raises ImportError where Triton is missing.
"""

try:
    import triton  # noqa: F401  (here first, for one message)
except ImportError as error:
    raise ImportError(
        "the Triton kernels of dvla_fast need the package 'triton' (Linux; `pip install triton`, "
        "or any CUDA build of torch, which brings it); backend='reference' works without"
    ) from error

# Bound here at once: importing a submodule later must not put the module under its name.
from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
