"""The classes' texts for the page: what was kept, what was dropped, and with which scores.

Banks of format /2 may hold the candidates of progressive top-k selection with their similarity in
every round; banks without them show the attributes alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dvla_fast import semantics as bank_tools
from dvla_fast.data import FewShotData
from dvla_fast.engine.build import _bank
from dvla_fast.engine.config import SemanticsConfig
from dvla_fast.semantics import EncodedTexts, build_encoder


@dataclass
class Candidate:
    """One proposed attribute; ``place``: when it was chosen, from 1, or None: dropped."""

    text: str
    place: int | None
    score: float | None
    rounds: str = ""


@dataclass
class ClassTexts:
    """One class's part of the page."""

    name: str
    description: str
    candidates: list[Candidate]
    recorded: bool
    images: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        """How many candidates were not chosen."""
        return sum(item.place is None for item in self.candidates)


@dataclass
class Phrases:
    """The texts of some classes: token by token, and as cards."""

    tokens: dict[str, list[str]]
    """Class -> k + 1 phrases in the tokens' order, "" where padded."""
    cards: dict[str, ClassTexts]
    provenance: str


def class_texts(
    config: SemanticsConfig, data: FewShotData, texts: EncodedTexts, names: Sequence[str]
) -> Phrases:
    """Find the phrases behind the text tokens of the named classes, and their candidates."""
    bank = _bank(config.bank)
    entries = bank.select(names)
    chosen = _chosen(bank, config, names, entries)
    tokens, cards = {}, {}
    for row, (name, entry, attributes) in enumerate(zip(names, entries, chosen)):
        mask = texts.mask[row].tolist()
        wanted = sum(mask[:-1])
        phrases = list(attributes)
        if len(phrases) != wanted:  # a bank of vectors has no words
            phrases = [f"attribute {index + 1}" for index in range(wanted)]
        padding = [""] * (len(mask) - 1 - wanted)
        last = (entry.description or "description") if mask[-1] else ""
        tokens[name] = [*phrases, *padding, last]
        cards[name] = _card(name, entry, phrases)
    return Phrases(tokens, cards, _provenance(bank))


def _chosen(
    bank: Any, config: SemanticsConfig, names: Sequence[str], entries: Sequence[Any]
) -> list[tuple[str, ...]]:
    """The attributes that became tokens."""
    select = getattr(bank_tools, "choose_attributes", None)
    top_k = getattr(config, "top_k", 0)
    if select is None or getattr(bank, "vectors", None):
        return [tuple(entry.attributes) for entry in entries]
    encoder = build_encoder(config.encoder, config.dim, truncate=True) if top_k else None
    template = getattr(config, "template", "all")
    found: list[tuple[str, ...]] = select(bank, list(names), encoder, top_k, template)
    return found


def _card(name: str, entry: Any, attributes: Sequence[str]) -> ClassTexts:
    place = {text: index + 1 for index, text in enumerate(attributes)}
    proposed = getattr(entry, "candidates", ())
    candidates = []
    for item in proposed:
        scores = [score for score in getattr(item, "scores", ()) if score is not None]
        candidates.append(
            Candidate(
                item.text,
                place.get(item.text),
                scores[-1] if scores else None,
                ", ".join(f"{score:.3f}" for score in scores),
            )
        )
    known = {item.text for item in candidates}
    candidates += [Candidate(text, place[text], None) for text in attributes if text not in known]
    candidates.sort(key=lambda item: (item.place is None, item.place or 0, -(item.score or 0)))
    seen = [str(image) for image in getattr(entry, "images", ())]
    return ClassTexts(name, entry.description, candidates, bool(proposed), seen=seen)


def _provenance(bank: Any) -> str:
    parts = [f"bank {bank.name!r}"]
    for key, value in bank.provenance.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"{key}: {text[:160]}")
    return "; ".join(parts)
