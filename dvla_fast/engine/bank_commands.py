"""What the ``dvla-fast semantics`` commands on banks do; each returns its exit status."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvla_fast.characters import printable
from dvla_fast.data import is_cache, list_data
from dvla_fast.data.cache_index import check_split, read_index
from dvla_fast.engine.build import build_data, pick_device
from dvla_fast.engine.config import DataConfig
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.settings import UsageError
from dvla_fast.engine.settle import MADE_SIZES
from dvla_fast.engine.texts import bank_encoder
from dvla_fast.engine.tool_config import (
    SemanticsCheck,
    SemanticsDiff,
    SemanticsEdit,
    SemanticsEncode,
    SemanticsShow,
)
from dvla_fast.errors import BankError
from dvla_fast.files import write_bytes_atomic, write_text_atomic
from dvla_fast.names import normalised_name
from dvla_fast.semantics import ClassEntry, SemanticBank, encode_bank
from dvla_fast.semantics.bank import (
    FORMAT,
    format_json,
    load_bank,
    parse_json,
    read_bank,
    read_bank_json,
)
from dvla_fast.semantics.bundled import bank_path, bundled_banks, is_made
from dvla_fast.semantics.check import check_bank
from dvla_fast.semantics.entry_checks import entry_problem
from dvla_fast.semantics.tokens import check_top_k
from dvla_fast.semantics.topk import Selection, progressive_top_k
from dvla_fast.semantics.vectors import CachedEncoder, make_room, vectors_path

_BAR = 20
# Texts of which a stopped `encode` loses at most one lot.
_BATCH = 1024


def show(config: SemanticsShow) -> int:
    """Show a bank in short, or all that it knows of one class."""
    from rich.console import Console

    bank = load_bank(config.bank)
    check_top_k(bank, config.top_k)
    console = Console(highlight=False)
    if not config.class_name:
        console.print(_overview_table(bank))
        return 0
    name = _find(bank, config.class_name)
    entry = bank.classes[name]
    console.print(f"[bold]{_plain(name)}[/bold]  in bank {_plain(bank.name)}")
    if entry.stored:
        console.print(
            f"vectors: {entry.stored.attributes} of attributes, {entry.stored.description} of a "
            "description; no words"
        )
    else:
        console.print(_plain(entry.description), soft_wrap=True)
        selection = None
        if config.top_k:
            encoder = bank_encoder(config, bank, pick_device("cpu"))
            (selection,) = progressive_top_k(
                [name], [entry.proposals], encoder, config.top_k, config.template
            )
        console.print(_candidate_table(entry, selection))
    images = "\n  ".join(entry.images) or "none recorded"
    console.print(f"images seen: {_plain(images)}", soft_wrap=True)
    for stage, answer in entry.answers.items():
        text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        console.print(f"answer ({_plain(stage)}): {_plain(text)}", soft_wrap=True)
    rows = "\n".join(f"  {key}: {value}" for key, value in bank.provenance.items())
    console.print(f"provenance:\n{_plain(rows or '  none')}", soft_wrap=True)
    return 0


def _plain(text: str) -> str:
    """Keep words of others from being taken for mark-up, or for orders to the terminal."""
    from rich.markup import escape

    return escape(printable(text))


def _overview_table(bank: SemanticBank) -> Any:
    from rich.table import Table

    table = Table("class", "candidates", "chosen", "images", "description")
    table.title = _plain(f"{bank.name}: {len(bank.classes)} classes, made from: {bank.kind}")
    for name, entry in bank.classes.items():
        counts = [len(entry.candidates), len(entry.attributes), len(entry.images)]
        first = entry.description.split(". ")[0]
        if entry.stored:
            counts[1], first = entry.stored.attributes, "(vectors, no words)"
        table.add_row(_plain(name), *map(str, counts), _plain(first))
    return table


def _candidate_table(entry: ClassEntry, selection: Selection | None) -> Any:
    """One row for each candidate: bar of its best score, scores by round, what became of it."""
    from rich.table import Table

    texts = entry.proposals
    if selection is not None:
        chosen = [texts[place] for place in selection.order]
        scores: list[Sequence[float | None]] = [list(row) for row in selection.scores]
    else:
        chosen = list(entry.attributes)
        scores = [item.scores for item in entry.candidates] or [() for _ in texts]
    numbers = [[s for s in row if s is not None] for row in scores]
    last = [row[-1] for text, row in zip(texts, numbers) if chosen and text == chosen[-1] and row]
    top = max((abs(value) for row in numbers for value in row), default=0.0) or 1.0
    table = Table("", "candidate", "score", "by round", "kept")
    for text, row in zip(texts, numbers):
        bar = "█" * round(_BAR * max(row[-1], 0.0) / top) if row else ""
        rounds = " ".join(f"{value:.3f}" for value in row)
        fate, why = _fate(text, chosen, row, last)
        table.add_row(fate, _plain(text), bar, rounds, why)
    return table


def _fate(
    text: str, chosen: Sequence[str], row: Sequence[float], last: Sequence[float]
) -> tuple[str, str]:
    """Say in which round a candidate was kept, or why it was not.

    Args:
        last: the score of what the last round kept, where it is recorded.
    """
    if text in chosen:
        place = chosen.index(text) + 1
        return str(place), f"kept in round {place}"
    if not chosen:
        return "", "nothing chosen yet: all are used"
    if not row or not last:
        return "–", "dropped (no score recorded)"
    return "–", f"dropped: {row[-1]:.3f} in the last round, where {last[0]:.3f} was kept"


def diff(config: SemanticsDiff) -> int:
    """Show what differs between two banks, class by class."""
    first, second = load_bank(config.first), load_bank(config.second)
    theirs = {normalised_name(name): name for name in second.classes}
    lines = _other(first.kind, second.kind, "made from")
    lines += _changed_keys(first.provenance, second.provenance)
    matched = set()
    for name, entry in first.classes.items():
        twin = name if name in second.classes else theirs.get(normalised_name(name))
        if twin is None:
            lines.append(f"- class {name!r}")
            continue
        matched.add(twin)
        changes = _changes(entry, second.classes[twin])
        if changes:
            lines += [f"{name}:", *(f"  {change}" for change in changes)]
    lines += [f"+ class {name!r}" for name in second.classes if name not in matched]
    print(printable("\n".join(lines)) if lines else "no difference")
    return 0


def _changes(first: ClassEntry, second: ClassEntry) -> list[str]:
    lines = []
    for kind, before, after in (
        ("attribute", first.attributes, second.attributes),
        ("candidate", *(tuple(c.text for c in e.candidates) for e in (first, second))),
        ("image", first.images, second.images),
    ):
        lines += [f"- {kind} {text!r}" for text in before if text not in after]
        lines += [f"+ {kind} {text!r}" for text in after if text not in before]
        common = [text for text in before if text in after]
        if common != [text for text in after if text in before]:
            places = {text: place for place, text in enumerate(before, 1)}
            moved = ", ".join(f"{places[text]}" for text in after if text in places)
            lines.append(f"~ {kind}s reordered: {moved}")
    if first.description != second.description:
        lines += [f"- description {first.description!r}", f"+ description {second.description!r}"]
    lines += _other(first.stored, second.stored, "vectors")
    scores = [{c.text: c.scores for c in e.candidates} for e in (first, second)]
    scored = scores[0].keys() & scores[1].keys()
    rescored = sum(scores[0][text] != scores[1][text] for text in scored)
    lines += [f"~ scores of {rescored} candidates"] if rescored else []
    lines += ["~ the model's answers"] if first.answers != second.answers else []
    return lines + [f"~ {key}" for key in _differing(first.extra, second.extra)]


def _changed_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Say what of the provenance differs, but for what the kind of bank already says."""
    keys = [key for key in _differing(first, second) if key != "kind"]
    return [f"~ provenance: {', '.join(keys)}"] if keys else []


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    keys = dict.fromkeys([*first, *second])
    return [
        key for key in keys if (key in first, first.get(key)) != (key in second, second.get(key))
    ]


def _other(before: object, after: object, what: str) -> list[str]:
    return [] if before == after else [f"~ {what}: {before} -> {after}"]


def _find(bank: SemanticBank, class_name: str) -> str:
    """Return a bank's own name of a class (BankError where it has none, or several fit)."""
    if bank.missing([class_name]):
        near = difflib.get_close_matches(class_name, bank.classes, 3)
        hint = f" (near it: {', '.join(map(repr, near))})" if near else ""
        raise BankError(
            f"{bank.source}: the bank has no class {class_name!r}{hint}; 'dvla-fast semantics "
            f"show' without a class lists all {len(bank.classes)}"
        )
    (name,) = bank.resolve([class_name])
    return name


def edit(config: SemanticsEdit) -> int:
    """Open one class in the editor, and put it back into the bank if it is valid."""
    path = Path(config.bank)
    if config.bank in bundled_banks():
        copy = f"copy {bank_path(config.bank)}"
        if is_made(config.bank):
            save = f"load_bank({config.bank!r}).save('my-{config.bank}.json')"
            copy = f'save a copy (python -c "from dvla_fast.semantics import load_bank; {save}")'
        raise UsageError(f"{config.bank}: comes with the package; {copy} and edit that")
    content = read_bank_json(path)
    bank = SemanticBank.from_dict(content, str(path))
    name = _find(bank, config.class_name)
    before = content["classes"][name]
    # With a hash: "a/b" and "a b" are two classes.
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    word = re.sub(r"\W+", "-", name)[:30].strip("-") or "class"
    slug = f"{word}-{digest}"
    kept = path.with_name(f"{path.stem}.{slug}.rejected.json")
    start = kept.read_bytes() if kept.exists() else f"{format_json(before, 0)}\n".encode()
    edited, problem = _in_editor(start, slug)
    try:
        after = parse_json(edited.decode("utf-8-sig"), "the edited class")
        problem = problem or entry_problem(after, bank.vectors is not None)
        now = read_bank_json(path)  # the editor may have been open for long
        SemanticBank.from_dict(now, str(path))
        if not problem and now["classes"].get(name) != before:
            problem = "was changed in the bank meanwhile"
    except UnicodeDecodeError as error:
        problem = problem or f"is not UTF-8 text any more (byte {error.start})"
    except BankError as error:
        problem = problem or str(error)
    if problem:
        write_bytes_atomic(kept, edited)
        raise BankError(
            f"{path}: class {name!r} {problem}; the bank is as it was, your edit is kept in "
            f"{kept}: the same command opens it again"
        )
    if after == before:
        print("no change")
    else:
        now["classes"][name] = after
        # not in the place of a link to it
        write_text_atomic(path.resolve(), format_json({**now, "format": FORMAT}) + "\n")
        print(f"changed     {name!r} in {path}")
    kept.unlink(missing_ok=True)
    return 0


def _in_editor(content: bytes, slug: str) -> tuple[bytes, str | None]:
    """Let a file be edited; returns its content, and what went wrong after a change was saved."""
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{slug}.json"
        file.write_bytes(content)
        try:
            done = subprocess.run([*shlex.split(command), str(file)], check=False)
        except (OSError, ValueError) as error:  # ValueError: a quote that is not closed
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"cannot start the editor {command!r} ({reason}); set EDITOR to yours"
            ) from error
        try:
            edited = file.read_bytes()
        except OSError as error:
            raise UsageError(
                f"the editor {command!r} left no file to read ({error.strerror}); nothing changed"
            ) from error
    if not done.returncode:
        return edited, None
    failure = f"the editor {command!r} ended with {done.returncode}"
    if edited == content:
        raise UsageError(f"{failure}; nothing changed")
    return edited, f"was saved, but {failure}"


def encode(config: SemanticsEncode) -> int:
    """Encode a bank's texts into the file beside it: those that are not there yet."""
    bank = load_bank(config.bank)
    if bank.vectors:
        raise BankError(f"{bank.source}: has vectors and no words; there is nothing to encode")
    make_room(vectors_path(bank.source))  # before the work
    encoder = bank_encoder(config, bank, pick_device(config.device), cache=True)
    assert isinstance(encoder, CachedEncoder)
    texts = [
        text
        for entry in bank.classes.values()
        for text in (
            *(entry.proposals if config.top_k else entry.attributes or entry.proposals),
            entry.description,
        )
    ]
    missing = encoder.missing(texts)
    with Progress({"encode": 1.0}) as progress:
        progress.begin("encode", len(missing))
        for start in range(0, len(missing), _BATCH):
            part = missing[start : start + _BATCH]
            encoder.add(part)
            encoder.save()  # what a kill may cost
            progress.advance(len(part))
        # what is left: the templates of top-k selection, one round after another
        encode_bank(bank, list(bank.classes), encoder, top_k=config.top_k, template=config.template)
    held = encoder.save(prune=config.prune)
    print(
        f"vectors     {encoder.path}: {held} of {encoder.name}, length {encoder.dim} "
        f"({encoder.encoded} encoded now)"
    )
    if encoder.truncated:
        print(f"cut         {encoder.truncated} texts longer than the encoder reads")
    return 0


def check(config: SemanticsCheck) -> int:
    """Look through a bank, alone and against a data set."""
    names, images = _data_set(config.data) if config.data.dataset else ([], None)
    content, source = read_bank(config.bank)
    words = not (isinstance(content, Mapping) and "vectors" in content)
    encoder = None
    if words:
        from dvla_fast.semantics import build_encoder

        encoder = build_encoder(config.encoder, config.dim, truncate=config.truncate)
    report = check_bank(config.bank, encoder, names, images)
    print(report.text())
    if report.problems:
        raise BankError(f"{source}: {len(report.problems)} line(s) of problems above")
    print("no problems found")
    return 0


def _data_set(config: DataConfig) -> tuple[list[str], dict[str, Sequence[str]]]:
    """Return the class names and the image ids by split of a data set, without its images."""
    if config.dataset in MADE_SIZES:
        data = build_data(replace(config, image_size=16), pick_device("cpu"))  # drawn in a moment
        parts = {"base": data.base, "monitor": data.monitor, "novel": data.novel}
        return list(data.class_names), {name: part.ids for name, part in parts.items()}
    if is_cache(config.dataset):
        index = read_index(config.dataset)
        check_split(config.dataset, index, config.splits)
        splits = index["splits"]
        names = [name for entry in splits.values() for name in entry["names"]]
        return names, {split: entry["files"] for split, entry in splits.items()}
    listing = list_data(config.dataset, config.splits)
    names = [name for split in listing.splits.values() for name in split.names]
    return names, {name: listing.image_ids(split) for name, split in listing.splits.items()}
