"""Exceptions of dvla_fast: every one carries a single line that says what is wrong and what to do.

Wrong arguments raise the built-in ``ValueError`` and ``TypeError``; the classes here are for the
world outside the program: files, folders, missing packages, builds.
"""

from __future__ import annotations


class DVLAError(RuntimeError):
    """Base class: the command line prints its message as one line and exits with status 1."""


class DataError(DVLAError):
    """A data set is missing, empty, unreadable or too small for the episodes asked for."""


class BankError(DVLAError):
    """A semantic bank is missing, malformed, lacks a class or holds an unreadable text."""


class LanguageModelError(DVLAError):
    """A language model cannot be reached or loaded, or does not give an answer that is of use."""


class CheckpointError(DVLAError):
    """A checkpoint is missing, truncated, or belongs to another model or run."""


class OutputError(DVLAError):
    """An output folder cannot be written, or already holds another run."""


class TrainingError(DVLAError):
    """Training or evaluation met a value it cannot go on from (NaN or infinity)."""


class BackendError(DVLAError):
    """A backend was asked for by name and cannot run here or with these inputs."""


class MissingDependencyError(DVLAError):
    """An optional package is needed for this feature; the message names the extra to install."""
