"""The commands that a finished run prints as its next ones: they work as they stand."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvla_fast.engine.settings import read_settings
from dvla_fast.engine.settle import MADE_SIZES


def metatune_command(config: Any, checkpoint: str, files: Sequence[str] = ()) -> str:
    """Return the line that meta-tunes a pre-trained backbone.

    Its data and model settings come from the run's record. The texts of one's own classes are not
    known here: unless a settings file names them, the line says where they go.

    Args:
        config: the settings of the pre-training.
        checkpoint: its best checkpoint.
        files: the settings files that it was given, which may hold more sections.
    """
    words = _words("metatune", checkpoint, files)
    dataset = config.data.dataset
    if dataset == "digits" or _named_bank(files):
        return shlex.join(words)
    if dataset in MADE_SIZES:
        return shlex.join([*words, "--semantics.bank", dataset])
    return (
        f"{shlex.join(words)} --semantics.bank BANK.json\n"
        "            BANK.json: the texts of your classes; 'dvla-fast semantics build' writes it"
    )


def evaluate_command(checkpoint: str, files: Sequence[str] = (), seed: int = 0) -> str:
    """Return the line that evaluates a meta-tuned model, with the run's data and texts.

    Args:
        checkpoint: the run's best checkpoint.
        files: the settings files that it was given, which may hold more sections.
        seed: of the training. Episodes are those of seed 0 all the same, so that trainings of
            several seeds can be compared.
    """
    words = _words("evaluate", checkpoint, files)
    return shlex.join([*words, *(["--seed", "0"] if seed else [])])


def _words(command: str, checkpoint: str, files: Sequence[str]) -> list[str]:
    record = Path(checkpoint).parent.parent / "config.yaml"
    known = {Path(file).resolve() for file in files}
    given = [*files, *([] if record.resolve() in known else [str(record)])]
    options = [word for file in given for word in ("--config", file)]
    return ["dvla-fast", command, *options, "--checkpoint", checkpoint]


def _named_bank(files: Sequence[str]) -> bool:
    """Whether one of the settings files names a bank."""
    from dvla_fast.engine.config import MetatuneRun

    unnamed = MetatuneRun()
    unnamed.semantics.bank = ""
    return any(read_settings(file, MetatuneRun, unnamed).semantics.bank for file in files)
