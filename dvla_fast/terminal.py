"""How the command line speaks and ends: statuses, one-line errors and warnings, closed pipes."""

from __future__ import annotations

import io
import os
import select
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

WRONG_USAGE = 2
# What a shell reports of a process that a signal ended: 128 + SIGINT, 128 + SIGPIPE.
INTERRUPTED, BROKEN_PIPE = 130, 141


def several_processes() -> bool:
    """Whether a launcher started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return not several_processes() or os.environ.get("RANK", "0") == "0"


@contextmanager
def speaking() -> Iterator[None]:
    """Show warnings as one line each, without the place in the code.

    All but the first of several processes show neither warnings nor results: they are the same.
    Letters that the terminal's encoding lacks, such as ± and α, become question marks: the work is
    done by then.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    usual, line = warnings.formatwarning, "warning: {}\n" if first_process() else ""
    warnings.formatwarning = lambda message, *more, **options: line.format(message)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(sys.stdout if first_process() else nowhere),
        ):
            yield
    finally:
        warnings.formatwarning = usual


def output_closed() -> bool:
    """Whether nobody reads on (``| head``); what is left to say then goes nowhere."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if _reader_gone(stream)]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def _reader_gone(stream: Any) -> bool:
    """Whether a stream is a pipe that is closed at its other end."""
    try:
        ask = select.poll()
        ask.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in ask.poll(0))
    except (OSError, ValueError, AttributeError):  # no file behind it, or a system without poll
        return False


def fail(message: str, status: int = 1) -> int:
    """Print an error as one line; returns the exit status.

    Of several processes all but the first say which they are. None keeps silent, though most meet
    the same error: it may be the only one, or the launcher may end the first before it speaks. An
    interruption alone is the first's to tell.
    """
    who = "" if first_process() else f" (process {os.environ['RANK']})"
    if not who or status != INTERRUPTED:
        # in one piece: others may write at the same moment
        sys.stderr.write(f"error{who}: {' '.join(message.split())}\n")
    return status
