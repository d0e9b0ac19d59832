"""Settings as dataclasses: help texts, YAML files and command-line options from one declaration.

Every field carries its help text. ``add_arguments`` and ``from_mapping`` turn the same dataclasses
into command-line options and back, so no default is written twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dvla_fast.errors import DVLAError, MissingDependencyError

T = TypeVar("T")


class UsageError(DVLAError):
    """A setting that cannot mean anything: the command line exits with status 2."""


def about(
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    check: Callable[[Any], str] | None = None,
) -> dict[str, Any]:
    """Return a field's metadata.

    Args:
        help: help text.
        minimum, maximum: smallest and largest value, of every entry where the field is a list.
        above, below: what values must be larger and smaller than.
        check: says what is wrong with a value in words, or returns "".
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    return {"help": help, "limits": limits, "check": check}


def option(
    default: Any,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    **more: Any,
) -> Any:
    """Declare a field with its default; the other arguments are those of :func:`about`."""
    return field(default=default, metadata=about(help, minimum, maximum, **more))


def repeated(values: list[int]) -> str:
    """Say which entries a list has more than once."""
    twice = sorted({value for value in values if values.count(value) > 1})
    return f"{', '.join(map(str, twice))} is there more than once in {values}" if twice else ""


def one_of(*names: str, note: str = "") -> Callable[[str], str]:
    """A check against names; all names that a setting may have are checked by it, and only there.

    Args:
        names: what is known. ``module:CONSTANT`` stands for those that a module lists, which is
            loaded when a value is checked.
        note: more to say of a name that is not.
    """

    def check(given: str) -> str:
        known: list[str] = []
        for name in names:
            known += resolve_name(name) if ":" in name else [name]
        if given in known:
            return ""
        more = f" ({note})" if note else ""
        return f"{given!r} is unknown; choose one of {', '.join(known)}{more}"

    return check


def accepted_by(function: str) -> Callable[[Any], str]:
    """A check by a ``module:function`` that raises ValueError, ``"its name: what is wrong"``.

    It is loaded when a value is checked; an empty one stands for the default.
    """

    def check(value: Any) -> str:
        try:
            if value:
                resolve_name(function)(value)
        except ValueError as error:
            name, _, wrong = str(error).partition(": ")
            return wrong or name
        return ""

    return check


def positional(help: str, optional: bool = False) -> Any:
    """Declare a text that is given by its place on the command line, without a dash."""
    return field(default="", metadata={"help": help, "positional": "?" if optional else "1"})


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain dictionaries, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def load_yaml(source: Any) -> Any:
    """Read YAML, text or an open file, as data alone; a key given twice is a yaml.YAMLError.

    PyYAML itself takes the last of two equal keys and says nothing.
    """
    import yaml

    return yaml.load(source, _loader())


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader, strict about keys; made on first use, as PyYAML is optional."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            first: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                # "<<" takes in another mapping's keys, which those beside it may replace
                if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                    continue
                known, line = (key.tag, key.value), key.start_mark.line + 1
                if known in first:
                    raise yaml.YAMLError(
                        f"line {line}: the key {key.value!r} is there again, after line "
                        f"{first[known]}, whose settings would be lost; join the two"
                    )
                first[known] = line
            return node

    return StrictLoader


def to_yaml(config: dict[str, Any]) -> str:
    """Return settings as YAML (MissingDependencyError without PyYAML)."""
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(
            "run folders need PyYAML, which is not installed; run pip install 'dvla-fast[train]'"
        ) from error
    return yaml.safe_dump(config, sort_keys=False)


def read_settings(path: str, cls: type[T], default: T, option: str = "--config") -> T:
    """Read a YAML file of settings over ``default``.

    Args:
        option: what named the file, for messages.

    Raises:
        UsageError: unreadable, not YAML, or settings that ``from_mapping`` refuses.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as stream:
            content = load_yaml(stream)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        near = did_you_mean(Path(path).stem, (file.stem for file in _configs().glob("*.yaml")))
        hint = f"; did you mean {near!r}, which comes with the package?" if near else ""
        raise UsageError(f"{option} {path}: cannot read these settings ({reason}){hint}") from error
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise UsageError(f"{option} {path}: expected settings as 'name: value', got {content!r}")
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    others: Mapping[str, Any] = getattr(cls, "passes_over", {})
    mine = {}
    for key, value in content.items():
        if key in known or key not in others:
            mine[key] = value
        elif not is_dataclass(others[key]):
            _typed(others[key], value, f"{path}: {key}")
        else:  # another command's section: its typing errors are errors here, too
            given = {} if value is None else value
            past = key in getattr(cls, "past_sections", ())
            from_mapping(others[key], given, path, section=f"{key}.", look_up=not past)
    return from_mapping(cls, mine, path, default)


def settings_file(given: str) -> str:
    """Return the path of a settings file, which may be given as one of those in ``configs/``.

    ``cub_1shot``, ``cub_1shot.yaml`` and ``configs/cub_1shot.yaml`` name the same one from every
    folder, unless there is a file of that path.
    """
    path = Path(given)
    shipped = _configs() / f"{path.stem}.yaml"
    named = str(path.parent) in (".", "configs") and path.suffix in ("", ".yaml")
    return str(shipped) if named and not os.path.isfile(given) and shipped.is_file() else given


def _configs() -> Path:
    """The folder of the settings files that come with the package: inside it, or in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def from_mapping(
    cls: type[T],
    values: Mapping[str, Any],
    where: str = "configuration",
    default: T | None = None,
    section: str = "",
    look_up: bool = True,
) -> T:
    """Build a configuration dataclass from nested mappings; missing keys keep their defaults.

    A list may be given by its only entry.

    Args:
        where: what the values were read from, for messages.
        default: what missing keys keep; None: ``cls()``.
        section: dotted place of the values in the whole configuration, with a dot at its end.
        look_up: whether fields' own checks run, which look for what a name stands for.

    Raises:
        UsageError: an unknown key, a value of another type, or one out of its field's range.
    """
    if not isinstance(values, Mapping):
        name = section.rstrip(".") or "settings"
        raise UsageError(f"{where}: {name}: expected 'name: value' settings, got {values!r}")
    hints = get_type_hints(cls)
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    _check_known(values, known, where, section)
    base: Any = cls() if default is None else default
    arguments: dict[str, Any] = {}
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name not in values:
            continue
        value, kind = values[item.name], hints[item.name]
        name = section + item.name
        if is_dataclass(kind):
            given = {} if value is None else value  # "data:" with nothing under it
            arguments[item.name] = from_mapping(
                hints[item.name], given, where, getattr(base, item.name), f"{name}.", look_up
            )
        else:
            arguments[item.name] = _typed(kind, value, f"{where}: {name}")
            metadata = item.metadata if look_up else {**item.metadata, "check": None}
            _check_value(metadata, arguments[item.name], f"{where}: {name}")
    result: T = dataclasses.replace(base, **arguments)
    return result


def checked(config: T) -> T:
    """Return settings that were made in Python, checked as those of a command are.

    Paths may be ``pathlib``'s, numbers NumPy's.

    Raises:
        UsageError: a value of another type, or one out of its field's range.
    """
    return from_mapping(type(config), _plain_values(to_dict(config)), type(config).__name__)


def _plain_values(value: Any) -> Any:
    """Nested settings with paths as text and NumPy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_values(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _check_known(values: Iterable[Any], known: list[str], where: str, section: str) -> None:
    unknown = sorted(str(key) for key in values if key not in known)
    if not unknown:
        return
    near = did_you_mean(unknown[0], known)
    raise UsageError(
        f"{where}: unknown key(s) {', '.join(section + key for key in unknown)}"
        f"{f' (did you mean {section}{near}?)' if near else ''}; known"
        f"{f' in {section[:-1]}' if section else ''}: {', '.join(sorted(known))}"
    )


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return the known name that is closest to a mistyped one, or ""."""
    return next(iter(difflib.get_close_matches(given, list(known), 1)), "")


def _typed(kind: Any, value: Any, where: str, alone: bool = True) -> Any:
    """Check a setting's type; YAML reads ``5e-4`` as text, which a number may be written as.

    Args:
        alone: a list of plain values may be given by its only entry.
    """
    if get_origin(kind) is list:
        (entry,) = get_args(kind)
        if alone and entry in _PLAIN and not isinstance(value, list | tuple):
            bracketed = isinstance(value, str) and value.startswith("[") and value.endswith("]")
            if entry is str and bracketed:
                raise UsageError(
                    f"{where}: {value} is no list of words; put those in quotes that mean another "
                    """thing in YAML: '[visual, "true"]'"""
                )
            value = [value]
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where}: expected a list, got {value!r}")
        return [_typed(entry, item, where, alone=False) for item in value]
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: expected 'name: value' entries, got {value!r}")
        entry = get_args(kind)[1]
        return {key: _typed(entry, item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):  # text that is no number is refused below
            value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where}: expected a finite number, got {value!r}")
    right = _PLAIN.get(kind)
    wrong_bool = isinstance(value, bool) and kind is not bool
    if right is not None and (wrong_bool or not isinstance(value, right)):
        raise UsageError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


_PLAIN: dict[Any, Any] = {float: int | float, int: int, bool: bool, str: str}


def _check_value(metadata: Mapping[str, Any], value: Any, where: str) -> None:
    """Check a setting against its field's limits and its own check."""
    limits = metadata.get("limits") or {}
    low, high = limits.get("minimum"), limits.get("maximum")
    above, below = limits.get("above"), limits.get("below")
    entries = value if isinstance(value, list) else [value]
    inside = all(
        (low is None or entry >= low)
        and (high is None or entry <= high)
        and (above is None or entry > above)
        and (below is None or entry < below)
        for entry in entries
    )
    if not inside or (low is not None and not entries):
        raise UsageError(f"{where}: expected {_range(low, high, above, below)}, got {value!r}")
    problem = metadata["check"](value) if metadata.get("check") else ""
    if problem:
        raise UsageError(f"{where}: {problem}")


def _range(low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    if low is not None and high is not None:
        return f"{low} to {high}"
    words = {"at least": low, "at most": high, "above": above, "below": below}
    return " and ".join(f"{word} {x}" for word, x in words.items() if x is not None)


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
            group.add_argument(
                f"--{name}", type=_given(kind), default=value, metavar=metavar, help=text
            )
    for kind, value, nested_prefix in nested:
        add_arguments(parser, kind, value, nested_prefix)


def _given(kind: Any) -> Any:
    """The type of what is written on the command line: a list, or its only entry."""
    entry = get_args(kind)[0] if get_origin(kind) is list else None
    return kind | entry if entry in _PLAIN else kind


def option_names(cls: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of a configuration's options, without dashes."""
    hints, names = get_type_hints(cls), []
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            names += option_names(hints[item.name], f"{prefix}{item.name}.")
        elif "positional" not in item.metadata:
            names.append(prefix + item.name)
    return names


def positionals(cls: Any) -> str:
    """Return the arguments of a configuration that have no dash, as a usage line shows them."""
    shown = {"1": "{}", "?": "[{}]", "+": "{0} [{0} ...]"}
    kinds = [(item.name.upper(), item.metadata.get("positional")) for item in fields(cls)]
    return " ".join(shown[kind].format(name) for name, kind in kinds if kind)


_UNRECORDED = "not recorded"


def differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the keys whose values differ, as ``key: first -> second``; see :func:`unrecorded`."""
    found = []
    for key in sorted({*first, *second}):
        a, b = first.get(key), second.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            shown = repr(a) if key in first else _UNRECORDED
            found.append(f"{prefix}{key}: {shown} -> {b!r}")
    return found


def unrecorded(changes: Iterable[str]) -> str:
    """Say what to do about settings that a run's record lacks; "" where it lacks none.

    Args:
        changes: what :func:`differences` found between the record and the settings of now.
    """
    names = [line.partition(":")[0] for line in changes if f": {_UNRECORDED} -> " in line]
    if not names:
        return ""
    return (
        f"another version began it, which did not record {', '.join(names)}: continue with that "
        "version, or, if it did what is set now, add that to config.yaml; "
    )
