"""Training on several processes: the same steps on the same global batch as one process takes.

Every process holds the model and the optimiser, computes its share of each batch, and averages
gradients before the update, so all weights stay equal. ``accelerate launch`` (or torchrun) starts
the processes; the commands and their settings stay the same. The first process alone writes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from dvla_fast.engine.build import pick_device
from dvla_fast.engine.settings import UsageError
from dvla_fast.errors import DVLAError, MissingDependencyError, TrainingError

T = TypeVar("T")
_BUCKET = 64 * 2**20  # bytes of gradients that travel together


@contextmanager
def _together() -> Iterator[None]:
    """Say in words what gloo and NCCL say of a process that is gone.

    Raises:
        TrainingError: the others cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DVLAError):
            raise
        reason = " ".join(str(error).split())
        raise TrainingError(
            "another process of this run ended, or cannot be reached; its own message, or its "
            "machine's log, says why. End those that are left and continue with --resume "
            f"({reason:.200})"
        ) from error


class Processes:
    """The processes of a run; one, unless a launcher started several.

    Args:
        device: cpu, cuda, cuda:N or auto; with several processes, each takes the GPU of its local
            rank.

    Raises:
        MissingDependencyError: several processes, and accelerate is not installed.
        DVLAError: no such device.
        UsageError: several processes are spoken of, and no launcher started them.
        TrainingError: the others cannot be reached, here or in any other call.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = 0
        self.device = pick_device(device)
        if self.count == 1:
            return
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingDependencyError(
                "several processes need accelerate, which is not installed; run "
                "pip install 'dvla-fast[distributed]'"
            ) from error
        try:
            with _together():
                state: Any = PartialState(cpu=self.device.type == "cpu")
        except ValueError as error:  # what else a launcher sets is not there
            raise UsageError(
                f"WORLD_SIZE is {self.count}, but no launcher started this process ({error}); "
                "start it by torchrun or accelerate launch, or unset WORLD_SIZE"
            ) from error
        self.rank, self.count, self.device = state.process_index, state.num_processes, state.device
        if self.device.type == "cpu":
            atexit.unregister(_leave_group)  # one command may follow another
            atexit.register(_leave_group)

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, total: int, what: str) -> slice:
        """This process's rows of a batch of ``total``.

        Raises:
            UsageError: ``total`` does not fall into equal shares.
        """
        if total % self.count:
            raise UsageError(
                f"{what}: {total} do not fall into equal shares for {self.count} processes; give a "
                f"multiple of {self.count}"
            )
        size = total // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def first(self, work: Callable[[], T]) -> T | None:
        """Let the main process work while the others wait; its result there, None elsewhere."""
        result = work() if self.main else None
        self.wait()
        return result

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            with _together():
                distributed.barrier()

    def same(self, value: T) -> T:
        """The main process's value (picklable), everywhere."""
        if self.count == 1:
            return value
        box = [value]
        with _together():
            distributed.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the processes, without gradient."""
        if self.count == 1:
            return tensor
        return _sum(tensor.detach()) / self.count

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The processes' tensors of one shape, side by side along ``dim``, without gradient."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        with _together():
            distributed.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts, dim)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes.

        All run the same steps on equal shares, so they lack the same gradients: those of
        parameters that a step does not use, which then stay as they are, as in one process.
        """
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if bucket and (size > _BUCKET or gradient.dtype != bucket[0].dtype):
                self._average(bucket)
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.numel() * gradient.element_size()
        if bucket:
            self._average(bucket)

    def _average(self, gradients: list[Tensor]) -> None:
        flat = _sum(torch.cat([gradient.flatten() for gradient in gradients]), in_place=True)
        flat /= self.count
        for gradient, part in zip(gradients, flat.split([x.numel() for x in gradients])):
            gradient.copy_(part.view_as(gradient))

    def synchronise_norms(self, module: T) -> T:
        """Give BatchNorm layers the statistics of the whole batch; in place where it can be."""
        if self.count == 1:
            return module
        if self.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(module)
        for part in module.modules():  # type: ignore[attr-defined]
            if isinstance(part, nn.BatchNorm2d):
                part.__class__ = _SyncBatchNorm2d
        return module


def _leave_group() -> None:
    """Stop gloo's threads: one that drops a tensor while Python ends aborts the process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _sum(tensor: Tensor, in_place: bool = False) -> Tensor:
    """Sum over the processes."""
    total = tensor if in_place else tensor.clone()
    with _together():
        distributed.all_reduce(total)
    return total


class _Sum(torch.autograd.Function):
    """Sum over the processes; every process's loss sends its gradient to all of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _sum(gradient)


class _SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over all processes' images where nn.SyncBatchNorm, made for GPUs, does not run."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        with torch.autocast("cpu", enabled=False):
            values = images.to(torch.promote_types(images.dtype, torch.float32))
            mean, count = self._average(values)
            centred = values - mean[:, None, None]
            variance, _ = self._average(centred.square())
            self._track(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
            scale = (variance + self.eps).rsqrt()
            if self.weight is not None:
                scale = scale * self.weight
            result = centred * scale[:, None, None]
            if self.bias is not None:
                result = result + self.bias[:, None, None]
            return result.to(images.dtype)

    @staticmethod
    def _average(values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (C,) of all processes' values (B, C, H, W), and how many of a channel there are.

        Processes may have unequal numbers: where padding is left out, each has its own.
        """
        own = values.new_full((1,), values[:, 0].numel())
        sums: Tensor = _Sum.apply(torch.cat([values.sum((0, 2, 3)), own]))
        count = sums[-1].detach()
        return sums[:-1] / count, count

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share = self.momentum  # of what is new
        if share is None:  # the mean over all batches so far
            share = 0.0 if self.num_batches_tracked is None else 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(unbiased, share)
