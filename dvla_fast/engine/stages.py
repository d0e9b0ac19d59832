"""What the stages of training have in common: what they work with, their epochs, their summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dvla_fast.data import FewShotData
from dvla_fast.engine.config import MetatuneConfig, MetatuneRun, PretrainConfig, PretrainRun
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.divergence import DivergenceWatch
from dvla_fast.engine.execution import Execution
from dvla_fast.engine.monitor import validation_facts
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.state import TrainingState


@dataclass(frozen=True)
class StageRun:
    """What a stage works with, whatever it trains.

    Attributes:
        folder: run folder; its ``resume`` continues from the last epoch saved there.
        rng: the run's NumPy generator, saved with the checkpoints.
        seed: of the episodes.
        progress: display.
        execution: precision, compilation, processes.
    """

    folder: RunFolder
    rng: np.random.Generator
    seed: int = 0
    progress: Progress = field(default_factory=lambda: Progress({}, enabled=False))
    execution: Execution = field(default_factory=Execution)


class Validation(NamedTuple):
    """How checkpoints are selected.

    key: which of the figures decides; numbers: of the episodes, from ``monitor_episodes``; figures:
    computes them, for the model as it is; images: what the episodes are of, in a word.
    """

    key: str
    numbers: Mapping[str, Any]
    figures: Callable[[], dict[str, Any]]
    images: str


def run_epochs(
    config: PretrainConfig | MetatuneConfig,
    run: StageRun,
    watch: DivergenceWatch,
    epoch: Callable[[TrainingState], dict[str, Any]],
    validation: Validation,
    describe: Callable[[Mapping[str, Any]], str],
) -> Path:
    """Train, validate, log and save, from the epoch that the state has reached to the last one.

    Args:
        watch: of the stage, with its state.
        epoch: trains for one, counts it in the state and its work in the display, and returns its
            figures.
        describe: says them in a line.

    Returns:
        Path of the checkpoint that validated best.

    Raises:
        TrainingError: training diverged.
    """
    state, numbers = watch.state, validation.numbers
    while state.epoch < config.epochs:
        row, score = epoch(state), None
        if state.epoch % config.validate_every == 0 or state.epoch == config.epochs:
            with run.execution.eager(), watch.after("validation"):
                figures = validation.figures()
            row, score = row | figures, figures[validation.key]
        run.folder.log(state.kind, state.epoch, **row)
        with watch.after("saving"):
            state.save(score)
        text = f"epoch {state.epoch}/{config.epochs}  {describe(row)}"
        if score is not None:
            text += f"  {validation.images} {numbers['way']}-way {numbers['shot']}-shot {score:.1%}"
        run.progress.note(text)
    return state.best_path


def training_summary(
    config: PretrainRun | MetatuneRun,
    data: FewShotData,
    folder: RunFolder,
    processes: Processes,
    key: str,
    numbers: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run of one stage was, and how its validations went.

    Args:
        key, numbers: as of its ``Validation``.
    """
    stage: PretrainConfig | MetatuneConfig
    if isinstance(config, PretrainRun):
        command, stage = "pretrain", config.pretrain
    else:
        command, stage = "metatune", config.metatune
    rows = folder.rows(command)
    return {
        "command": command,
        "dataset": data.name,
        "seed": config.seed,
        "epochs": stage.epochs,
        "loss": rows[-1]["loss"],
        "monitor": data.monitor_kind,
        **validation_facts(rows, key, numbers, stage.validation_episodes),
        "device": str(processes.device),
        "processes": processes.count,
        "precision": config.execution.precision,
        "torch": torch.__version__,
    }
