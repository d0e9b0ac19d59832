"""Settings as dataclasses: help texts, YAML files and command-line options from one declaration.

Every field carries its help text. ``add_arguments`` and ``from_mapping`` turn the same dataclasses
into command-line options and back, so no default is written twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from dvla_fast.errors import DVLAError

T = TypeVar("T")


class UsageError(DVLAError):
    """A setting that cannot mean anything: the command line exits with status 2."""


def about(help: str, minimum: float | None = None) -> dict[str, Any]:
    """Return a field's metadata: help text and smallest value."""
    return {"help": help, "minimum": minimum}


def option(default: Any, help: str, minimum: float | None = None) -> Any:
    """Declare a field with its default, help text and smallest value."""
    return field(default=default, metadata=about(help, minimum))


def positional(help: str, optional: bool = False) -> Any:
    """Declare a text that is given by its place on the command line, without a dash."""
    return field(default="", metadata={"help": help, "positional": "?" if optional else "1"})


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain dictionaries, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def read_settings(path: str, cls: type[T], default: T) -> T:
    """Read a YAML file of settings over ``default``.

    Raises:
        UsageError: unreadable, not YAML, or settings that ``from_mapping`` refuses.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"--config {path}: cannot read these settings ({reason})") from error
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise UsageError(f"--config {path}: expected settings as 'name: value', got {content!r}")
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    others = getattr(cls, "passes_over", ())
    mine = {key: value for key, value in content.items() if key in known or key not in others}
    return from_mapping(cls, mine, path, default)


def from_mapping(
    cls: type[T],
    values: Mapping[str, Any],
    where: str = "configuration",
    default: T | None = None,
) -> T:
    """Build a configuration dataclass from nested mappings; missing keys keep their defaults.

    Args:
        default: what missing keys keep; None: ``cls()``.

    Raises:
        UsageError: an unknown key, or a value below a field's minimum.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: expected settings of {cls.__name__}, got {values!r}")
    hints = get_type_hints(cls)
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(
            f"{where}: unknown key(s) {', '.join(unknown)} in {cls.__name__}; known: "
            f"{', '.join(sorted(known))}"
        )
    base: Any = cls() if default is None else default
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        kind: Any = hints[name]
        if is_dataclass(kind):
            section = {} if value is None else value  # "data:" with nothing under it
            arguments[name] = from_mapping(hints[name], section, where, getattr(base, name))
        else:
            arguments[name] = _typed(kind, value, f"{where}: {name}")
    _check_minimums(cls, arguments, where)
    result: T = dataclasses.replace(base, **arguments)
    return result


def _typed(kind: Any, value: Any, where: str) -> Any:
    """Check a plain setting; YAML reads ``5e-4`` as text, which a number may be written as."""
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    right = {float: int | float, int: int, bool: bool, str: str}.get(kind)
    wrong_bool = isinstance(value, bool) and kind is not bool
    if right is not None and (wrong_bool or not isinstance(value, right)):
        raise UsageError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _check_minimums(cls: type, arguments: Mapping[str, Any], where: str) -> None:
    for item in fields(cls):
        minimum, value = item.metadata.get("minimum"), arguments.get(item.name)
        if minimum is None or value is None:
            continue
        entries = value if isinstance(value, list) else [value]
        number = all(isinstance(entry, int | float) for entry in entries)
        if not entries or not number or any(entry < minimum for entry in entries):
            raise UsageError(f"{where}: {item.name} must be at least {minimum:g}, got {value!r}")


def add_arguments(parser: Any, cls: Any, default: Any, prefix: str = "") -> None:
    """Declare one command-line option per field of a configuration dataclass.

    Args:
        parser: a jsonargparse (or argparse) parser.
        cls: the dataclass.
        default: an instance that holds the default values.
        prefix: dotted name of the group.
    """
    hints = get_type_hints(cls)
    group = parser.add_argument_group(
        prefix.rstrip(".") or "run", (cls.__doc__ or "").split("\n")[0]
    )
    nested: list[tuple[Any, Any, str]] = []
    for item in fields(cls):
        name, value = prefix + item.name, getattr(default, item.name)
        kind = hints[item.name]
        text = f"{item.metadata.get('help', '')} (default: {value!r})"
        if is_dataclass(kind):
            nested.append((kind, value, f"{name}."))
        elif "positional" in item.metadata:
            number = {"?": {"nargs": "?", "default": value}, "+": {"nargs": "+", "type": str}}
            given = number.get(item.metadata["positional"], {})
            text = item.metadata["help"]
            group.add_argument(name, metavar=item.name.upper(), help=text, **given)
        elif kind is bool and not prefix:  # --resume, --quick: plain switches
            group.add_argument(f"--{name}", action="store_true", default=value, help=text)
        else:
            metavar = item.name.upper()
            group.add_argument(f"--{name}", type=kind, default=value, metavar=metavar, help=text)
    for kind, value, nested_prefix in nested:
        add_arguments(parser, kind, value, nested_prefix)


def positionals(cls: Any) -> str:
    """Return the arguments of a configuration that have no dash, as a usage line shows them."""
    shown = {"1": "{}", "?": "[{}]", "+": "{0} [{0} ...]"}
    kinds = [(item.name.upper(), item.metadata.get("positional")) for item in fields(cls)]
    return " ".join(shown[kind].format(name) for name, kind in kinds if kind)


def differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the keys whose values differ, as ``key: first -> second``."""
    found = []
    for key in sorted({*first, *second}):
        a, b = first.get(key), second.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found
