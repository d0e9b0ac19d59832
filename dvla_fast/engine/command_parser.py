"""The argument parser of a command: its options, its help, and messages that say what was meant."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import Any, NoReturn

from dvla_fast.commands import COMMANDS
from dvla_fast.engine.settings import add_arguments, did_you_mean, option_names, positionals
from dvla_fast.errors import MissingDependencyError
from dvla_fast.terminal import WRONG_USAGE, fail, first_process


def build_parser(name: str, cls: type, default: Any) -> Any:
    """Return the parser of a command.

    Args:
        name: the command, a key of ``COMMANDS``.
        cls: its configuration dataclass.
        default: an instance that holds the default values.

    Raises:
        MissingDependencyError: jsonargparse is not installed.
    """
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise MissingDependencyError(
            f"'dvla-fast {name}' needs jsonargparse, which is not installed; run "
            "pip install 'dvla-fast[train]'"
        ) from error

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            explained = _explained(message, option_names(cls))
            if not first_process():  # whose usage lines are enough
                raise SystemExit(fail(explained, WRONG_USAGE))
            super().error(explained, ex)

    command = COMMANDS[name]
    places = "[CONFIG.yaml]" if name == "ablate" else positionals(cls)
    parser = Parser(
        prog=f"dvla-fast {name}",
        usage=f"dvla-fast {name}{f' {places}' if places else ''} [options]",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"examples:\n{command.examples}",
        # keeps the examples' line breaks; the defaults are already in each help text
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # "--conf" would be taken for --config, whose file is read before
    )
    parser.add_argument(  # read before, for the defaults that the other options override
        "--config",
        metavar="FILE",
        help="YAML file with any of these settings, or one of configs/ by name, as cub_1shot",
    )
    if any(item.name == "resume" for item in fields(cls)):
        parser.add_argument(
            "--print_settings",
            action="store_true",
            help="print all settings as a YAML file and end",
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    add_arguments(parser, cls, default)
    return parser


def _explained(message: str, options: list[str]) -> str:
    """Return a parser's message with the option that was meant, or the form that a list has."""
    unknown = re.search(r"nrecognized arguments: --([^\s=]+)", message)
    if unknown:
        near = did_you_mean(unknown[1], options)
        return f"{message}; did you mean --{near}?" if near else message
    listed = re.search(r'key "([^"]+)".*list\[(\w+)\].*Given value: (.*)', message, re.DOTALL)
    if listed:
        option, kind, value = listed.groups()
        return f"--{option}: expected {kind}, or a list such as [A,B] without blanks, got {value}"
    return message
