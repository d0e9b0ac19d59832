"""The ``dvla-fast`` command line: from arguments to a subcommand's settings and an exit status.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C), 141 nobody reads the output.
A failure is one line that says what to do; the traceback comes with ``--debug``. Only the
subcommand that runs imports what it needs, so ``--help`` is quick and ``doctor`` works on an
incomplete installation.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvla_fast.commands import COMMANDS, GROUPS
from dvla_fast.errors import DVLAError
from dvla_fast.runners import CONTINUED, RUNNERS
from dvla_fast.terminal import (
    BROKEN_PIPE,
    INTERRUPTED,
    WRONG_USAGE,
    fail,
    first_process,
    output_closed,
    several_processes,
    speaking,
)

SHARED_OUT = ("demo", "pretrain", "metatune")  # among the processes of a launcher
# No runs, yet what they have done is kept, and the same command does the rest.
CONTINUE_BY_THEMSELVES = ("data prepare", "semantics build", "semantics encode")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, as above."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    processes = os.environ.get("WORLD_SIZE")
    given = [argument for argument in given if argument != "--debug"]
    try:
        with speaking():
            status = _dispatch(given, owns_process=arguments is None)
        sys.stdout.flush()  # a reader that is gone shows here, not when Python ends
        return status
    except SystemExit as stop:  # from the argument parser: --help (0) or wrong usage (2)
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        if debug:
            raise
        if " ".join(given[:2]) in CONTINUE_BY_THEMSELVES:
            return fail("interrupted; the same command continues", INTERRUPTED)
        return fail("interrupted", INTERRUPTED)
    except DVLAError as error:
        if debug:
            raise
        from dvla_fast.engine.settings import UsageError

        return fail(str(error), WRONG_USAGE if isinstance(error, UsageError) else 1)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_closed():
            return BROKEN_PIPE
        if debug:
            raise
        message = " ".join(str(error).split()) or "no message"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return fail(
                f"the disk is full ({message}); free space and run the same command again, a run "
                "that has begun with --resume"
            )
        return fail(f"{type(error).__name__}: {message} (--debug shows the traceback)")
    finally:
        if processes is not None:
            os.environ["WORLD_SIZE"] = processes  # a command that runs alone changes it


def _dispatch(given: list[str], owns_process: bool) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0 if given else 2
    if given[0] == "--version":
        from dvla_fast import __version__

        print(f"dvla-fast {__version__}")
        return 0
    name, rest = given[0], given[1:]
    if name in GROUPS:
        if not rest or rest[0] in ("-h", "--help"):
            print(_group_overview(name))
            return 0 if rest else 2
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        from dvla_fast.engine.settings import did_you_mean

        near = did_you_mean(name, COMMANDS)
        hint = f"; did you mean {near!r}?" if near else "."
        return fail(f"no command {name!r}{hint} Choose one of {', '.join(COMMANDS)}", WRONG_USAGE)
    if name not in SHARED_OUT and several_processes():
        if not first_process():
            return 0
        print(f"note: {name} runs in one process; the others end here", file=sys.stderr)
        os.environ["WORLD_SIZE"] = "1"
    if name == "doctor":
        return _doctor(rest)
    if name == "ablate" and rest and not rest[0].startswith("-"):
        rest = ["--config", *rest]
    config = _parse(name, rest)
    if not hasattr(config, "resume"):  # no run, no run folder
        return RUNNERS[name](config)
    if "--print_settings" in rest:
        print(_settings_text(config), end="")
        return 0
    if owns_process:
        from dvla_fast.engine.memory import keep_freed_memory

        keep_freed_memory()
    if not config.output:
        config.output = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        from dvla_fast.engine.settle import settle, size_line

        given, config = config, settle(config)
        if (line := size_line(given, config)) and first_process():
            print(line, file=sys.stderr, flush=True)
        if name in CONTINUED:
            return CONTINUED[name](config, _config_files(rest))
        return RUNNERS[name](config)
    except KeyboardInterrupt:
        if not Path(config.output, "config.yaml").exists():
            return fail("interrupted before the run began; nothing is kept", INTERRUPTED)
        again = shlex.join(["dvla-fast", name, "--resume", "--output", config.output])
        return fail(f"interrupted; continue: {again}", INTERRUPTED)


def _settings_text(config: Any) -> str:
    """A run's settings as a file for ``--config`` holds them."""
    from dvla_fast.engine.settings import to_dict, to_yaml

    return to_yaml({k: v for k, v in to_dict(config).items() if k not in ("output", "resume")})


def _group_overview(group: str) -> str:
    from dvla_fast.data import split_list_names
    from dvla_fast.semantics import bundled_banks

    known = {
        "data": ("published split lists, for --splits", split_list_names()),
        "semantics": ("banks that come with the package", bundled_banks()),
    }
    commands = {n: c for n, c in COMMANDS.items() if n.startswith(f"{group} ")}
    width = max(map(len, commands)) + 1
    rows = "\n".join(f"  {name:<{width}} {command.summary}" for name, command in commands.items())
    examples = "\n".join(command.examples.splitlines()[0] for command in commands.values())
    title, names = known[group]
    return (
        f"usage: dvla-fast {group} {'|'.join(name.split()[1] for name in commands)} [options]\n\n"
        f"commands:\n{rows}\n\n{title}:\n  {', '.join(names)}\n\nexamples:\n{examples}"
    )


def _overview() -> str:
    rows = "\n".join(f"  {name:<17} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: dvla-fast COMMAND [options]\n\n"
        "Few-shot image classification with text, gated by reinforcement learning (DVLA-RL).\n\n"
        f"commands:\n{rows}\n\n"
        "options of every command: --help (with examples), --debug (tracebacks);\n"
        "of every run: --config FILE.yaml, --print_settings, --seed N, --output FOLDER, "
        "--resume\n\n"
        "examples:\n  dvla-fast demo --quick\n  dvla-fast pretrain --help\n  dvla-fast --version"
    )


def _doctor(rest: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="dvla-fast doctor",
        description=COMMANDS["doctor"].summary,
        epilog="example:\n  dvla-fast doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(rest)
    from dvla_fast.doctor import report

    text, healthy = report()
    print(text)
    return 0 if healthy else 1


def _parse(name: str, rest: list[str]) -> Any:
    """Turn arguments into the command's configuration.

    Defaults come from the dataclasses; over them, when resuming, the configuration of the run
    folder; over that, ``--config``; and over all, the options on the command line.
    """
    from dvla_fast.engine import settings
    from dvla_fast.engine.command_parser import config_class

    cls = config_class(name)
    default, files = cls(), _config_files(rest)
    if name == "demo":
        from dvla_fast.engine.config import demo_config

        asked = (settings.read_settings(path, cls, default).quick for path in files)
        default = demo_config(quick="--quick" in rest or any(asked))
    for path in files:
        default = settings.read_settings(path, cls, default)
    parsed = _parse_with(name, rest, cls, default)
    if not getattr(parsed, "resume", False):
        return parsed
    if not parsed.output:
        raise settings.UsageError(
            f"--resume needs --output, the folder of the run to continue: dvla-fast {name} "
            "--resume --output runs/..."
        )
    from dvla_fast.engine.run_folder import read_config  # loads torch

    record = read_config(parsed.output)
    theirs = _whose(record, name)
    if theirs != name:
        raise settings.UsageError(
            f"{parsed.output}: a run of 'dvla-fast {theirs}', not of {name}; continue it with "
            f"dvla-fast {theirs} --resume --output {shlex.quote(parsed.output)}"
        )
    saved = settings.from_mapping(cls, record, parsed.output)
    for path in files:
        saved = settings.read_settings(path, cls, saved)
    return _parse_with(name, rest, cls, saved)


# Settings that tell whose record it is, the most telling first.
_SIGNS = {
    "ablate": "ablate",
    "quick": "demo",
    "metatune": "metatune",
    "pretrain": "pretrain",
    "evaluate": "evaluate",
}


def _whose(record: Mapping[str, Any], name: str) -> str:
    """Return the command whose run a record is of; ``name`` where it does not tell."""
    several = {"pretrain", "metatune", "evaluate"} <= set(record)
    if several and not {"ablate", "quick"} & set(record):
        return name  # a backbone of an ablation
    return next((command for key, command in _SIGNS.items() if key in record), name)


def _config_files(rest: list[str]) -> list[str]:
    """The files of ``--config FILE`` and ``--config=FILE``, in order; later ones win."""
    from dvla_fast.engine.settings import settings_file

    following = [*rest[1:], ""]
    found = (
        item.split("=", 1)[1] if item.startswith("--config=") else after
        for item, after in zip(rest, following)
        if item == "--config" or item.startswith("--config=")
    )
    return [settings_file(given) for given in found if given]


def _parse_with(name: str, rest: list[str], cls: type, default: Any) -> Any:
    from dvla_fast.engine.command_parser import build_parser
    from dvla_fast.engine.settings import from_mapping

    values = build_parser(name, cls, default).parse_args(rest).as_dict()
    for shared in ("config", "debug", "print_settings"):
        values.pop(shared, None)
    return from_mapping(cls, values, "command line")
