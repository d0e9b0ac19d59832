"""Training that diverges ends with where it did, the likely cause and what to do.

NaN and infinity show up in several places: in a loss, in the policy's check of its inputs, in
validation, in the weights that a checkpoint would hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dvla_fast.engine.state import TrainingState
from dvla_fast.errors import TrainingError


class DivergenceWatch:
    """Turns what a diverging training stage runs into a ``TrainingError``.

    Args:
        stage: in words, e.g. "pre-training".
        state: of the stage: its epoch and step, and where its checkpoints are.
        rates: learning rates by option, e.g. ``{"pretrain.lr": 2e-3}``.
    """

    def __init__(self, stage: str, state: TrainingState, rates: Mapping[str, float]) -> None:
        self.stage, self.state, self.rates = stage, state, rates

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around optimiser steps, of which ``state.step`` are done.

        Raises:
            TrainingError: the body met NaN or infinity. Other errors pass.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            what = _trouble(error)
            if not what:
                raise
            where = f"epoch {self.state.epoch + 1}, step {self.state.step + 1}"
            raise self._error(where, what) from error

    @contextmanager
    def after(self, what: str) -> Iterator[None]:
        """Around what comes after an epoch's steps: ``what`` is "validation" or "saving".

        Raises:
            TrainingError: as :meth:`training`.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            trouble = _trouble(error)
            if not trouble:
                raise
            raise self._error(f"{what} of epoch {self.state.epoch}", trouble) from error

    def check(self, mean: float, losses: Sequence[Tensor]) -> None:
        """Check an epoch's loss when its steps are done and ``state.epoch`` does not count it yet.

        Args:
            mean: over the epoch and all processes.
            losses: this process's, of each step, on any device; read only if the mean is not
                finite.

        Raises:
            TrainingError: the mean is NaN or infinite.
        """
        if math.isfinite(mean):
            return
        finite = torch.stack([loss.detach() for loss in losses]).isfinite().tolist()
        first = finite.index(False) if False in finite else len(finite) - 1
        step = self.state.step - len(losses) + first + 1
        raise self._error(
            f"epoch {self.state.epoch + 1}, step {step}", "the loss became NaN or infinite"
        )

    def _error(self, where: str, what: str) -> TrainingError:
        options = ", ".join(f"--{name} {rate:g}" for name, rate in self.rates.items())
        kept = "no checkpoint was written yet"
        if self.state.last_path.exists():
            kept = f"the checkpoints in {self.state.folder.checkpoints} are the last good ones"
        return TrainingError(
            f"{self.stage}, {where}: {what}; most likely the learning rate is too high ({options}):"
            f" start a new run with a lower one, or check the images for NaN; {kept}"
        )


def _trouble(error: Exception) -> str:
    """What NaN or infinity an error speaks of; "" for any other error."""
    if isinstance(error, TrainingError):
        return "features or weights became NaN or infinite"
    if isinstance(error, ValueError) and "NaN" in str(error):  # the policy's check of its inputs
        if str(error).startswith("reward "):
            return f"{error} (by its formula, or because features became so)"
        return "features became NaN or infinite"
    return ""
