"""The commands that a finished run prints as its next ones: they work as they stand."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.settings import UsageError, read_settings
from dvla_fast.engine.settle import MADE_SIZES
from dvla_fast.files import json_text

_FILES = "config-files.json"


def keep_settings_files(folder: RunFolder, files: Sequence[str]) -> None:
    """Note in a run's folder which settings files it was given, also when it is resumed.

    The run's own record has its own settings alone: those of the commands that follow are there.
    """
    known = _kept(folder.path)
    new = [path for path in map(os.path.abspath, files) if path not in known]
    if new:
        folder.write_text(_FILES, json_text([*known, *new]) + "\n")


def settings_files(folder: str | Path, files: Sequence[str], resume: bool) -> list[str]:
    """Return the settings files that a run's next command repeats.

    Args:
        folder: of the run.
        files: given to this command.
        resume: whether it went on with a run: then also those of before that are still there.
    """
    return [path for path in _kept(folder) if os.path.isfile(path)] if resume else list(files)


def _kept(folder: str | Path) -> list[str]:
    """The absolute paths that the folder of a run notes; none in those of earlier versions."""
    try:
        return [str(path) for path in json.loads(Path(folder, _FILES).read_text("utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


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
    with contextlib.suppress(UsageError):  # a file was changed since the run began
        return any(read_settings(file, MetatuneRun, unnamed).semantics.bank for file in files)
    return False
