"""Looks through a bank before it is used: format, texts, classes of a data set, images seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dvla_fast.checks import Report
from dvla_fast.errors import BankError
from dvla_fast.semantics.bank import SemanticBank, read_bank
from dvla_fast.semantics.encoders import TextEncoder
from dvla_fast.semantics.vectors import read_stored


def check_bank(
    name_or_path: str | Path,
    encoder: TextEncoder | None = None,
    class_names: Sequence[str] = (),
    images: Mapping[str, Collection[str]] | None = None,
) -> Report:
    """Check a bank, most often a file.

    Args:
        name_or_path: the JSON file, or the name of a bank that comes with the package.
        encoder: whose limit the lengths of texts are compared with; None: none.
        class_names: classes that the bank must have.
        images: image ids of a data set by split name, to be compared with what the bank has seen.

    Raises:
        BankError: the file cannot be read, or is not JSON.
    """
    report = Report()
    content, source = read_bank(name_or_path)
    try:
        bank = SemanticBank.from_dict(content, source)
    except BankError as error:
        report.problems.append(str(error))
        return report
    kinds = "vectors, no words" if bank.vectors else "words"
    report.facts.append(
        f"{source}: bank {bank.name!r}, {len(bank.classes)} classes, {kinds}, made from: "
        f"{bank.kind}"
    )
    if not bank.provenance:
        report.notes.append("no provenance: nobody can tell what its texts were written from")
    if bank.vectors:
        try:
            read_stored(bank)
        except BankError as error:
            report.problems.append(str(error))
        for level, lacking in half_classes(bank).items():
            report.add(
                report.notes, [f"{x!r} has no {level}, which other classes have" for x in lacking]
            )
    else:
        report.add(report.problems, _texts(bank, encoder))
        report.add(report.notes, _unknown_keys(bank))
    if class_names:
        try:
            bank.resolve(class_names)
        except BankError as error:
            report.problems.append(str(error))
        else:
            report.facts.append(f"all {len(class_names)} classes of the data set are in the bank")
    if images is not None:
        _images(bank, images, report)
    return report


def _texts(bank: SemanticBank, encoder: TextEncoder | None) -> list[str]:
    problems = []
    lengths, limit = getattr(encoder, "lengths", None), getattr(encoder, "max_tokens", 0)
    for name, entry in bank.classes.items():
        for kind, texts in (("attribute", entry.attributes), ("candidate", _candidates(entry))):
            folded = [" ".join(text.casefold().split()).rstrip(".") for text in texts]
            twice = sorted({text for text in folded if folded.count(text) > 1})
            problems += [f"{name!r}: {kind} {text!r} appears twice" for text in twice]
        strangers = [text for text in entry.attributes if text not in _candidates(entry)]
        if entry.candidates and strangers:
            problems.append(f"{name!r}: attribute {strangers[0]!r} is not one of its candidates")
        whole = [*entry.attributes, *_candidates(entry), entry.description]
        for text, length in zip(whole, lengths(whole) if lengths else []):
            if length > limit:
                problems.append(
                    f"{name!r}: {length} {getattr(encoder, 'unit', 'tokens')}, but "
                    f"{encoder.name if encoder else ''} reads {limit}: {text[:50]!r}..."
                )
    return problems


def half_classes(bank: SemanticBank) -> dict[str, list[str]]:
    """Return, of a bank of vectors, the classes that lack a level of text which others have."""
    found = {}
    for level in ("attributes", "description"):
        lacking = [name for name, e in bank.classes.items() if not getattr(e.stored, level)]
        if 0 < len(lacking) < len(bank.classes):
            found[level] = lacking
    return found


def _candidates(entry: Any) -> tuple[str, ...]:
    return tuple(item.text for item in entry.candidates)


def _unknown_keys(bank: SemanticBank) -> list[str]:
    return [
        f"{name!r}: the key {key!r} is kept, but nothing reads it"
        for name, entry in bank.classes.items()
        for key in entry.extra
    ]


def _images(bank: SemanticBank, images: Mapping[str, Collection[str]], report: Report) -> None:
    seen = {image for entry in bank.classes.values() for image in entry.images}
    if not seen:
        report.facts.append("the bank lists no image that its texts were written from")
        return
    for split, ids in images.items():
        overlap = len(seen.intersection(ids))
        if overlap:
            report.notes.append(
                f"{overlap} image(s) of {split} were seen when the texts were written: an "
                "evaluation on that split does not draw them as queries"
            )
    unknown = seen.difference(*images.values())
    if unknown:
        report.problems.append(
            f"{len(unknown)} image(s) that the bank has seen are not in the data set "
            f"({min(unknown)}, ...): they cannot be kept out of the queries"
        )
