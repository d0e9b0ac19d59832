"""The run folder: configuration, metrics, TensorBoard events, summary.

A run writes one folder and owns it: it starts in a new or empty folder only, and continues in its
own one with ``resume``, in one process at a time. ``metrics.jsonl`` holds one JSON object a line;
on resuming, lines newer than the checkpoint are cut, so the file reads as if the run had never
stopped.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.entries import count, record, text
from dvla_fast.engine.settings import differences, load_yaml, to_yaml, unrecorded
from dvla_fast.engine.settle import absolute_paths
from dvla_fast.errors import MissingDependencyError, OutputError
from dvla_fast.files import (
    RUN_REMEDY,
    json_text,
    unwritable,
    write_atomic,
    write_text_atomic,
)

# The file that the writing process locks, and what a run that ends at once leaves.
_LOCK = ".lock"
_TEMPORARY = (_LOCK, ".write-test-*", ".config.yaml.*.tmp", "wandb")
_EVENTS = "tensorboard"
_NO_CURVES = ("collapsed",)  # a list of layers: not a figure of each
_ROW = record(stage=text, step=count())  # what every line of the metrics holds
# What may differ between a run and its continuation.
_FREE_KEYS = ("output", "resume")
_LOGGED_TO = "wandb"  # saved, for a continuation goes on logging there, but may differ as well
# Why a setting cannot, where one might think that it could.
_REMARKS = {
    "pretrain.epochs": "the learning rate falls to zero over the epochs that a run began with, so "
    "a longer pre-training begins anew, in another --output without --resume: "
}


class RunFolder:
    """One run's folder; ``with`` closes it, whatever happens.

    Args:
        path: the folder.
        config: the resolved configuration, saved as ``config.yaml``.
        resume: continue the run in the folder instead of starting one.
        writes: False in all but one of several processes: such a folder is read, never written.
        wandb: Weights & Biases project that gets the figures too.
        free: settings that may change on resuming: they are not kept.
        grows: numbers that may be larger on resuming, e.g. ``metatune.epochs``: the larger one is
            kept.

    Raises:
        OutputError: not writable, not empty, nothing to resume, settings that differ from those of
            the run to resume, or another process writes the run.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        *,
        resume: bool = False,
        writes: bool = True,
        wandb: str = "",
        free: Sequence[str] = (),
        grows: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.resume = resume
        self.writes = writes
        self.checkpoints = self.path / "checkpoints"
        self._metrics = self.path / "metrics.jsonl"
        self._writer: Any = None
        self._wandb: Any = None
        self._lock: _Lock | None = None
        if not writes:
            return
        self._free = (*_FREE_KEYS, *free)
        kept = {key: value for key, value in config.items() if key not in self._free}
        if resume:
            self._check_resumable(kept, grows)
        else:
            self._check_new()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(_unwritable(self.path, error)) from error
        self._lock = _lock(self.path)
        if not resume:
            self._check_new()  # what another process began and left meanwhile
        self._tidy()
        self._probe()
        if wandb:  # before the folder holds a run: a start that fails leaves it free
            self._wandb = _start_wandb(wandb, self.path, kept)
        if not resume or grows:
            write_text_atomic(self.path / "config.yaml", to_yaml(kept))

    def _check_new(self) -> None:
        try:
            if self.path.exists() and not self.path.is_dir():
                raise OutputError(f"{self.path}: is a file; give --output a new folder")
            occupied = self.path.is_dir() and not all(map(_left_at_once, self.path.iterdir()))
        except OSError as error:
            raise OutputError(_unwritable(self.path, error)) from error
        if not occupied:
            return
        if (self.path / "config.yaml").exists():
            raise OutputError(
                f"{self.path}: already holds a run; continue it with --resume, or give --output "
                "a new folder"
            )
        raise OutputError(f"{self.path}: not empty; give --output a new or empty folder")

    def _check_resumable(self, config: dict[str, Any], grows: Sequence[str]) -> None:
        saved = read_config(self.path)
        for key in self._free:
            saved.pop(key, None)
        now = json.loads(json.dumps(absolute_paths(config)))
        if _LOGGED_TO in now:
            saved[_LOGGED_TO] = now[_LOGGED_TO]
        for section, _, key in (name.partition(".") for name in grows):
            theirs, wanted = saved.get(section), now[section][key]
            if not isinstance(theirs, dict):
                continue
            known = theirs.get(key)
            if isinstance(known, int | float) and known < wanted:
                theirs[key] = wanted
        changed = differences(absolute_paths(saved), now)
        if changed:
            names = {change.partition(":")[0] for change in changed}
            remarks = [text for name, text in _REMARKS.items() if name in names]
            remarks.append(unrecorded(changed))
            raise OutputError(
                f"{self.path}: cannot resume with other settings than the run began with "
                f"({'; '.join(changed[:4])}); {''.join(remarks)}leave them out, or start a new run"
            )

    def _tidy(self) -> None:
        """Remove what a kill left half-written: a checkpoint may be large."""
        for folder in (self.path, self.checkpoints):
            for file in (*folder.glob(".*.tmp"), *folder.glob(".write-test-*")):
                with contextlib.suppress(OSError):
                    file.unlink()

    def _probe(self) -> None:
        # The first real write may come minutes into the work: find out now.
        probe = self.path / f".write-test-{os.getpid()}"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OutputError(_unwritable(self.path, error)) from error

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``, and the numbers to TensorBoard if installed."""
        if not self.writes:
            return
        row = {"stage": stage, "step": step, **values}
        try:
            with self._metrics.open("a", encoding="utf-8") as stream:
                stream.write(json_text(row) + "\n")
        except OSError as error:
            raise unwritable(self._metrics, error, RUN_REMEDY) from error
        self._show(stage, step, values)

    def _show(self, stage: str, step: int, values: dict[str, Any]) -> None:
        """Give numbers to TensorBoard and Weights & Biases."""
        figures = {}
        for key, value in values.items():
            if key in _NO_CURVES:
                continue
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                name = f"{stage}/{key}" + (f"_{index}" if isinstance(value, list) else "")
                if isinstance(item, int | float):
                    figures[name] = item
        try:
            writer = self._tensorboard()
            if writer is not None:
                for name, item in figures.items():
                    writer.add_scalar(name, item, step)
        except OSError as error:
            raise unwritable(self.path / _EVENTS, error, RUN_REMEDY) from error
        if self._wandb is None:
            return
        try:  # stages count their own steps: no common one
            self._wandb.log({**figures, f"{stage}/step": step})
        except OSError as error:
            raise OutputError(
                f"Weights & Biases: cannot log ({error.strerror or error}); continue with --resume,"
                " and without --wandb if it goes on failing"
            ) from error

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Read the metrics back, optionally of one stage; a torn last line is left out."""
        return read_metrics(self.path, stage)

    def trim(self, stage: str, last_step: int) -> None:
        """Cut the lines of a stage after ``last_step``, and the torn line a kill may leave."""
        if not self.writes or not self._metrics.exists():
            return
        rows = [row for row in self.rows() if row["stage"] != stage or row["step"] <= last_step]
        kept = "".join(json_text(row) + "\n" for row in rows)
        self.write_text(self._metrics.name, kept)

    def write_summary(self, summary: dict[str, Any]) -> Path:
        """Write ``summary.json`` atomically and return its path."""
        return self.write_text("summary.json", json_text(summary, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically and return its path."""
        path = self.path / name
        if self.writes:
            write_text_atomic(path, text, RUN_REMEDY)
        return path

    def write_file(self, name: str, write: Any) -> Path:
        """Write a file atomically through ``write(path)`` and return its path."""
        path = self.path / name
        if self.writes:
            write_atomic(path, write, RUN_REMEDY)
        return path

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, error: type[BaseException] | None, *more: object) -> None:
        self.close(failed=error is not None)

    def close(self, *, failed: bool = False) -> None:
        """Flush TensorBoard, end the Weights & Biases run, and let other processes write."""
        if self._writer:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish(**({"exit_code": 1} if failed else {}))
        self._writer = self._wandb = self._lock = None

    def _tensorboard(self) -> Any:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._writer = False  # optional: metrics.jsonl holds the same numbers
            else:
                self._writer = SummaryWriter(str(self.path / _EVENTS))
        return self._writer or None


def _left_at_once(path: Path) -> bool:
    """Whether a run that was killed before its first setting was saved may have left this."""
    if path.name == "checkpoints" and path.is_dir():
        return not any(path.iterdir())
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _TEMPORARY)


class _Lock:
    """An open lock file. The system's lock on it ends with this object, or with the process."""

    def __init__(self, file: int) -> None:
        weakref.finalize(self, os.close, file)


# The locks of this process, by device and inode: two RunFolders of one folder share theirs.
_locks: weakref.WeakValueDictionary[tuple[int, int], _Lock] = weakref.WeakValueDictionary()


def _lock(folder: Path) -> _Lock:
    """Keep other processes from writing a run (OutputError where one does already)."""
    try:
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(_unwritable(folder, error)) from error
    lock, status = _Lock(file), os.fstat(file)
    place = (status.st_dev, status.st_ino)
    if place in _locks:
        return _locks[place]
    try:
        import fcntl  # not on every system

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"{folder}: another process is writing this run; wait for it") from error
    except (ImportError, OSError):
        pass  # a file system without locks
    _locks[place] = lock
    return lock


def open_folder(
    path: str,
    config: dict[str, Any],
    processes: Processes,
    resume: bool = False,
    wandb: str = "",
    grows: Sequence[str] = (),
) -> RunFolder:
    """Open one run folder for all processes; the main one makes it, and alone writes.

    Raises:
        OutputError, MissingDependencyError: as RunFolder and ``wandb``.
    """
    path = processes.same(path)  # a default name holds the time, which differs
    made = processes.first(lambda: RunFolder(path, config, resume=resume, wandb=wandb, grows=grows))
    return made or RunFolder(path, config, resume=resume, writes=False)


def _start_wandb(project: str, path: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingDependencyError(
            f"--wandb {project} needs wandb, which is not installed; run pip install wandb, or "
            "leave the option out"
        ) from error
    # The path is the identity of a run: a resumed one continues its curves.
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return wandb.init(
        project=project, name=path.name, id=name, resume="allow", config=config, dir=str(path)
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the ``config.yaml`` of a run folder.

    Raises:
        OutputError: there is no run in the folder, or its configuration is damaged.
    """
    import yaml

    path = Path(folder) / "config.yaml"
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OutputError(
            f"{folder}: no run to resume here (config.yaml is missing or damaged); leave out "
            "--resume to start one"
        ) from error
    if not isinstance(content, dict):
        raise OutputError(f"{path}: damaged (not a mapping); start a new run in another folder")
    return content


def read_metrics(folder: str | Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl`` of a run folder, leaving out torn lines and those no run wrote."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _ROW(row) and stage in (None, row["stage"]):
            rows.append(row)
    return rows


def _unwritable(path: Path, error: OSError) -> str:
    return (
        f"{path}: cannot write the run here ({error.strerror or error}); give --output a folder "
        "that you may write to"
    )
