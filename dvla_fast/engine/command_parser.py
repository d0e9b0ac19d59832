"""The argument parser of a command: its options, its help, and messages that say what was meant."""

from __future__ import annotations

import argparse
import ast
import contextlib
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
            explained = _explained(message, name, option_names(cls))
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


def config_class(name: str) -> Any:
    """Return the configuration dataclass of a command."""
    from dvla_fast.engine import config, tool_config

    wanted = COMMANDS[name].config
    return getattr(config, wanted, None) or getattr(tool_config, wanted)


def _explained(message: str, name: str, options: list[str]) -> str:
    """Return a parser's message with the options that were meant, or in the words of settings."""
    _, unknown, arguments = message.partition("nrecognized arguments: ")
    if unknown:
        given = dict.fromkeys(re.findall(r"(?:^|\s)--([^\s=]+)", arguments))
        return "; ".join([message, *filter(None, (_meant(x, name, options) for x in given))])
    listed = re.search(r'key "([^"]+)".*list\[(\w+)\].*Given value: (.*)', message, re.DOTALL)
    plain = re.search(r'key "([^"]+)".*<class \'(\w+)\'>. Got value: (.*)', message, re.DOTALL)
    if wrong := listed or plain:
        option, kind, value = wrong.groups()
        expected = {"dict": "'name: value' entries"}.get(kind, kind)
        expected += ", or a list such as [A,B] without blanks" if listed else ""
        return f"command line: {option}: expected {expected}, got {_quoted(value)}"
    return message


def _meant(given: str, name: str, options: list[str]) -> str:
    """Say which option of this command was meant, or which commands have the one that was given."""
    mine = [option for option in options if option.endswith(f".{given}")]
    if mine:
        return f"--{given}: did you mean {' or '.join(f'--{option}' for option in mine)}?"
    others = [
        other
        for other, command in COMMANDS.items()
        if command.config and given in option_names(config_class(other))
    ]
    if others:
        return f"--{given}: not an option of {name}, but of {', '.join(others)}"
    near = did_you_mean(given, options)
    return f"--{given}: did you mean --{near}?" if near else ""


def _quoted(value: str) -> str:
    """Show what was given as a message on a settings file does: words in quotes."""
    # No number, list, ...: words, or what Python cannot read, as {[1]: 2}.
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        read = ast.literal_eval(value)
        return repr(value if isinstance(read, tuple) else read)
    return repr(value)
