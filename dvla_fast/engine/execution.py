"""How a training step is computed: precision, memory format, compilation, processes, the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dvla_fast.engine.config import ExecutionConfig
from dvla_fast.engine.distributed import Processes


def adamw(parameters: Any, **options: float) -> torch.optim.AdamW:
    """AdamW that updates all parameters in one pass.

    On the CPU, and on GPUs in a few launches, several times as fast as PyTorch's default. It reads
    parameters, gradients and averages by their place in memory: all of a parameter have one memory
    format (autograd sees to the gradients, ``checkpoint.unpack_optimizer`` to what was saved).

    Args:
        parameters, options: as ``torch.optim.AdamW`` takes them.

    Raises:
        ValueError: a parameter whose numbers do not lie side by side in memory.
    """
    optimizer = torch.optim.AdamW(parameters, fused=True, **options)  # type: ignore[arg-type]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.stride() != torch.empty_like(parameter, device="meta").stride():
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is a view with gaps (strides "
                    f"{parameter.stride()}), which cannot be trained here; make it contiguous()"
                )
    return optimizer


class Execution:
    """Runs the steps of a training stage as configured.

    Args:
        config: precision, memory format, compilation; how cuDNN chooses, for the whole process.
        processes: who takes part, and on which device.
    """

    def __init__(
        self, config: ExecutionConfig | None = None, processes: Processes | None = None
    ) -> None:
        self.config = config or ExecutionConfig()
        self.processes = processes or Processes()
        assert self.config.precision in ("float32", "bfloat16")  # the option checks what is given
        if self.processes.device.type == "cuda":
            torch.backends.cudnn.benchmark = self.config.cudnn_benchmark

    def prepare(self, module: nn.Module) -> nn.Module:
        """Ready a module for training: memory format, shared norms, compilation.

        Names of weights stay as they are, and so do checkpoints.
        """
        if self.config.channels_last:
            module = module.to(memory_format=torch.channels_last)
        module = self.processes.synchronise_norms(module)
        if self.config.compile:
            module.compile()
        return module

    def images(self, images: Tensor) -> Tensor:
        """Network input (B, C, H, W) in the memory format of the model."""
        if self.config.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass and its loss."""
        mixed = self.config.precision == "bfloat16"
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=mixed)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Validation: its batches have other sizes, which are not worth compiling for."""
        if not self.config.compile:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    def update(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        clip_norms: Sequence[tuple[Sequence[nn.Parameter], float]] = (),
    ) -> None:
        """One optimiser step; ``clip_norms`` limits the gradient norms of sets of parameters."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        groups = optimizer.param_groups
        self.processes.average_gradients(p for group in groups for p in group["params"])
        for parameters, limit in clip_norms:
            if limit and parameters:
                nn.utils.clip_grad_norm_(parameters, limit)
        optimizer.step()
