"""The classes' texts for the page: what was kept, what was dropped, and with which scores.

A bank may hold the candidates of progressive top-k selection with their similarity in every round;
a run may have chosen from them itself (``--semantics.top_k``). Banks without candidates show the
attributes alone, banks of vectors their number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from dvla_fast.engine.config import SemanticsConfig
from dvla_fast.engine.texts import bank_encoder
from dvla_fast.semantics import (
    ClassEntry,
    EncodedTexts,
    SemanticBank,
    load_bank,
    progressive_top_k,
)
from dvla_fast.semantics.topk import template_text

Scores = Sequence[Sequence[float | None]]

_READ = {  # what the gates read of the cards, by semantics.parts
    "attributes": "the gates read the attributes alone",
    "description": "the gates read the descriptions alone",
    "name": "the gates read neither, but the names: “A photo of a NAME”",
    "shuffled": "each class has the texts of another",
}


@dataclass
class ShownCandidate:
    """One proposed attribute.

    Attributes:
        place: when it was chosen, from 1; None: dropped.
        score: its last similarity to the template: in the round that chose it, or in the last.
        rounds: all its similarities, as text.
    """

    text: str
    place: int | None
    score: float | None
    rounds: str = ""


@dataclass
class ClassTexts:
    """One class's part of the page.

    Attributes:
        recorded: more than the chosen attributes is known.
        images: pictures (data URLs); ``drawn_seen``: they are those that the texts were written
            from, whose ids are ``seen``, and not just some of the class.
    """

    name: str
    description: str
    candidates: list[ShownCandidate]
    recorded: bool
    images: list[str] = field(default_factory=list)
    seen: tuple[str, ...] = ()
    drawn_seen: bool = False

    @property
    def dropped(self) -> int:
        """How many candidates were not chosen."""
        return sum(item.place is None for item in self.candidates)


@dataclass
class Phrases:
    """The texts of some classes: token by token, and as cards."""

    tokens: dict[str, list[str]]
    """Class -> phrases in the tokens' order, "" where padded."""
    cards: dict[str, ClassTexts]
    provenance: str


def class_texts(config: SemanticsConfig, texts: EncodedTexts, sources: Sequence[str]) -> Phrases:
    """Find the phrases behind encoded texts, and the candidates that they were chosen from.

    Args:
        sources: the class whose texts each class has (``texts.text_sources``).

    Raises:
        BankError: as ``build_texts``.
    """
    bank = load_bank(config.bank)
    names = texts.class_names
    entries = bank.select(sources)
    if tuple(sources) != names:  # those images are of other classes
        entries = [replace(entry, images=()) for entry in entries]
    tokens, cards = {}, {}
    selections = _selections(config, bank, sources, entries)
    levels = texts.levels.tolist()
    for row, (name, entry, (chosen, scores)) in enumerate(zip(names, entries, selections)):
        mask = texts.mask[row].tolist()
        wanted = sum(there and not level for there, level in zip(mask, levels))
        phrases = list(chosen)
        if len(phrases) != wanted:  # a bank of vectors has no words
            phrases = [f"attribute {index + 1}" for index in range(wanted)]
        last = entry.description or "description"
        if config.parts == "name":
            last = template_text(bank.resolve([name])[0])
        words = iter(phrases)
        tokens[name] = [
            "" if not there else last if level else next(words)
            for there, level in zip(mask, levels)
        ]
        cards[name] = _card(name, entry, chosen or phrases, scores)
    provenance = _provenance(bank)
    if config.parts in _READ:
        provenance += f"; {_READ[config.parts]} (semantics.parts: {config.parts})"
    return Phrases(tokens, cards, provenance)


def _selections(
    config: SemanticsConfig, bank: SemanticBank, names: Sequence[str], entries: Sequence[ClassEntry]
) -> list[tuple[Sequence[str], Scores]]:
    """Of each class the attributes that became tokens, and the scores of its proposals."""
    if config.top_k == 0 or bank.vectors:
        return [
            (entry.attributes or entry.proposals, [item.scores for item in entry.candidates])
            for entry in entries
        ]
    proposals = [entry.proposals for entry in entries]
    encoder = bank_encoder(config, bank, torch.device("cpu"))
    found = progressive_top_k(
        bank.resolve(names), proposals, encoder, config.top_k, config.template
    )
    return [
        (tuple(texts[place] for place in selection.order), selection.scores)
        for texts, selection in zip(proposals, found)
    ]


def _card(name: str, entry: ClassEntry, chosen: Sequence[str], scores: Scores) -> ClassTexts:
    place = {text: index + 1 for index, text in enumerate(chosen)}
    shown = []
    for index, text in enumerate(entry.proposals):
        found = scores[index] if index < len(scores) else ()
        known = [score for score in found if score is not None]
        last = known[-1] if known else None
        rounds = ", ".join(f"{score:.3f}" for score in known)
        shown.append(ShownCandidate(text, place.get(text), last, rounds))
    proposed = {item.text for item in shown}
    shown += [ShownCandidate(text, place[text], None) for text in chosen if text not in proposed]
    shown.sort(key=lambda item: (item.place is None, item.place or 0, -(item.score or 0)))
    recorded = bool(entry.candidates) or bool(scores)
    return ClassTexts(name, entry.description, shown, recorded, seen=entry.images)


def _provenance(bank: SemanticBank) -> str:
    parts = [f"bank “{bank.name}”"]
    for key, value in bank.provenance.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"{key}: {text[:160]}")
    return "; ".join(parts)
