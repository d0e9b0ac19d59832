"""The state of a training stage: saving it after every epoch, and continuing from it exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dvla_fast import __version__
from dvla_fast.engine.checkpoint import (
    load_checkpoint,
    load_weights,
    pack_optimizer,
    pack_rng,
    save_checkpoint,
    unpack_optimizer,
    unpack_rng,
    write_readable,
)
from dvla_fast.engine.description import REMEDY, RESUMED, check_entries
from dvla_fast.engine.inputs import check_inputs
from dvla_fast.engine.models import fingerprint
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.settings import differences
from dvla_fast.errors import CheckpointError


@dataclass
class TrainingState:
    """Everything a training stage must save to continue bit for bit.

    Attributes:
        folder: the run folder.
        kind: stage name: ``pretrain`` or ``metatune``; files are ``<kind>-last.safetensors``
            (weights, optimiser, random states) and ``<kind>-best.safetensors`` (weights).
        spec: description of the model, stored in the file and compared on loading.
        modules: prefix -> module to save.
        facts: more to note in the files.
    """

    folder: RunFolder
    kind: str
    spec: dict[str, Any]
    modules: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator
    facts: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = -1

    @property
    def last_path(self) -> Path:
        return self.folder.checkpoints / f"{self.kind}-last.safetensors"

    @property
    def best_path(self) -> Path:
        return self.folder.checkpoints / f"{self.kind}-best.safetensors"

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{prefix}.{name}": tensor
            for prefix, module in self.modules.items()
            for name, tensor in module.state_dict().items()
        }

    def _info(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "model": self.spec,
            "fingerprint": fingerprint(self.spec),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "dvla_fast": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **self.facts,
        }

    def save(self, score: float | None = None) -> None:
        """Save after an epoch; a score (higher is better) may make it the best one too.

        Ties go to the later epoch. The best weights are written first: a kill in between repeats
        the epoch on resuming, and writes the same ones again.
        """
        if score is not None and score >= self.best:
            self.best, self.best_epoch = score, self.epoch
            if self.folder.writes:
                save_checkpoint(self.best_path, self._weights(), self._info())
        if not self.folder.writes:
            return
        optimizer_tensors, optimizer_info = pack_optimizer(self.optimizer)
        rng_tensors, rng_info = pack_rng(self.rng)
        info = {**self._info(), "resume": {"optimizer": optimizer_info, "rng": rng_info}}
        save_checkpoint(
            self.last_path, {**self._weights(), **optimizer_tensors, **rng_tensors}, info
        )

    def restore(self) -> bool:
        """Continue from the last checkpoint; False when the run has not written one yet.

        Raises:
            CheckpointError: damaged, of another model, or of other images or texts.
        """
        if not self.last_path.exists():
            self.folder.trim(self.kind, -1)
            return False
        tensors, info = load_checkpoint(self.last_path, (self.kind,))
        check_entries(self.last_path, info, RESUMED)
        changed = differences(info["model"], self.spec)
        if changed:
            raise CheckpointError(
                f"{self.last_path}: of another model ({'; '.join(changed[:3])}); resume with the "
                "settings that the run began with"
            )
        check_inputs(
            self.last_path, info.get("inputs"), self.facts.get("inputs", {}), "begin a new run"
        )
        for prefix, module in self.modules.items():
            load_weights(module, tensors, f"{prefix}.", self.last_path)
        self._unpack(tensors, info["resume"])
        self.epoch, self.step = info["epoch"], info["step"]
        self.best, self.best_epoch = info["best"], info["best_epoch"]
        self.folder.trim(self.kind, self.epoch)
        if self.folder.writes:
            write_readable(self.last_path, info)  # which a kill may have kept from the last one
        return True

    def _unpack(self, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
        """Restore the optimiser and random states, which check what they are given."""
        name = "optimizer"
        try:
            unpack_optimizer(self.optimizer, tensors, saved[name])
            name = "rng"
            unpack_rng(self.rng, tensors, saved[name])
        except (
            AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"{self.last_path}: has resume.{name} that cannot be restored "
                f"({type(error).__name__}: {error}); {REMEDY}"
            ) from error
