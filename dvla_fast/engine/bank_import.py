"""What ``dvla-fast semantics import`` does: published vectors to a bank, and what they lack."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dvla_fast.data import load_split_list
from dvla_fast.data.splits import SplitList, bundled_split_lists, class_names
from dvla_fast.engine.settings import UsageError
from dvla_fast.engine.tool_config import SemanticsImport
from dvla_fast.errors import MissingDependencyError, OutputError
from dvla_fast.names import normalised_name
from dvla_fast.semantics.bank import some_of
from dvla_fast.semantics.check import half_classes
from dvla_fast.semantics.importing import Published, read_published, save_published
from dvla_fast.semantics.vectors import vectors_path


def import_published(config: SemanticsImport) -> int:
    """Make a bank of published vectors."""
    if not config.output:
        raise UsageError("semantics import needs --output, the JSON file of the bank")
    output = Path(config.output)
    if output.suffix != ".json":
        raise UsageError(f"--output {output}: must end in .json; the vectors go beside it")
    for file in (output, vectors_path(output)):
        if file.exists():
            raise OutputError(f"{file}: exists; give --output another name, or move it away")
    published = read_published([config.path, *([config.attributes] if config.attributes else [])])
    known = load_split_list(config.splits) if config.splits else _best_list(published)
    keys = sorted({*(known.keys if known else ()), *published.classes})
    readable = dict(zip(keys, class_names(keys, known)))
    bank = save_published(published, output, readable.__getitem__, config.encoder)
    low, high = published.norms
    assert bank.vectors is not None
    print(
        f"bank        {output}: {len(bank.classes)} classes, length {bank.vectors.dim}, encoder "
        f"{bank.vectors.encoder}; norms were {low:.3g} to {high:.3g}, now 1"
    )
    for level, lacking in half_classes(bank).items():
        print(f"no {level}".ljust(12) + f"{len(lacking)} classes: {some_of(lacking)}")
    for line in _coverage(published, known):
        print(line)
    return 0


def _best_list(published: Published) -> SplitList | None:
    """Return the bundled list of which most classes are there, if it is more than half."""
    there = _forms(published.classes)
    fits = []
    for known in bundled_split_lists():
        names = _names(known)
        lacking = sum(not _forms(both) & there for both in names.items())
        unknown = len(there - _forms([*names, *names.values()]))
        if 2 * lacking < len(names):
            fits.append((lacking + unknown, -len(names), known.name))
    return load_split_list(min(fits)[-1]) if fits else None


def _names(known: SplitList) -> dict[str, str]:
    """Return the names of a list's classes by their keys: the keys, where nobody tells them."""
    keys = sorted(known.keys)
    try:
        return dict(zip(keys, class_names(keys, known)))
    except MissingDependencyError:  # wnids, without timm's tables
        return dict(zip(keys, keys))


def _forms(names: Iterable[str]) -> set[str]:
    return set(map(normalised_name, names))


def _coverage(published: Published, known: SplitList | None) -> list[str]:
    """Say which classes of the split list the files lack, and which it does not know.

    Files have a class's key, or its name, in any spelling: so a bank finds them, too.
    """
    if known is None:
        return ["split list  none fits these classes; --splits names one"]
    lines = [f"split list  {known.name}{f' ({known.title})' if known.title else ''}"]
    names = _names(known)
    there = _forms(published.classes)
    for split, classes in known.splits.items():
        missing = [key for key in classes if not _forms((key, names[key])) & there]
        if missing:
            lines.append(
                f"missing     {len(missing)} of {len(classes)} {split} classes: "
                f"{', '.join(missing)}"
            )
    listed = _forms([*names, *names.values()])
    strangers = [key for key in published.classes if normalised_name(key) not in listed]
    if strangers:
        lines.append(f"unknown     {len(strangers)} classes not in that list: {some_of(strangers)}")
    return lines
