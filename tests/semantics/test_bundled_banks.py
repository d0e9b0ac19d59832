"""The banks that ship: all classes of the split lists, texts to choose from, provenance."""

from __future__ import annotations

import re

import pytest

from dvla_fast.data.splits import bundled_split_lists, class_names
from dvla_fast.semantics import HashedNGramEncoder, SemanticBank, load_bank

BANKS = {
    "cub": "cub_", "dogs": "dogs_", "cars": "cars_", "cifar100": ("cifar_fs", "fc100"),
    "miniimagenet": "miniimagenet", "chestx": "chestx",
}  # fmt: skip


@pytest.fixture(params=BANKS)
def bank(request: pytest.FixtureRequest) -> SemanticBank:
    return load_bank(request.param)


def test_every_published_split_is_covered(bank: SemanticBank) -> None:
    lists = [item for item in bundled_split_lists() if item.name.startswith(BANKS[bank.name])]
    assert lists
    seen = set()
    for item in lists:
        names = class_names(sorted(item.keys), item)
        bank.require(names)  # raises for a class that is missing
        seen |= set(names)
    assert seen == set(bank.classes)


def test_texts(bank: SemanticBank) -> None:
    for name, entry in bank.classes.items():
        texts = [candidate.text for candidate in entry.candidates]
        assert 8 <= len(texts) <= 16, name
        assert len({text.casefold() for text in texts}) == len(texts), name
        own = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
        assert not any(own.search(text) for text in texts), name
        assert all(2 <= len(text.split()) <= 8 for text in texts), name
        assert 20 <= len(entry.description.split()) <= 60, name
        assert not entry.images
    descriptions = [entry.description for entry in bank.classes.values()]
    assert len(set(descriptions)) == len(descriptions)


def test_provenance_says_that_no_image_was_seen(bank: SemanticBank) -> None:
    assert bank.provenance["kind"] == "class-names"
    assert "no image was seen" in bank.provenance["note"]


def test_offline_encoder_reads_every_text(bank: SemanticBank) -> None:
    encoder = HashedNGramEncoder()
    for entry in bank.classes.values():
        encoder.encode([candidate.text for candidate in entry.candidates] + [entry.description])
    assert encoder.truncated == 0
