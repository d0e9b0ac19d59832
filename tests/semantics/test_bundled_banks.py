"""The banks that ship: all classes of the split lists, texts to choose from, provenance."""

from __future__ import annotations

import re

import pytest

from dvla_fast.data.splits import bundled_split_lists, class_names
from dvla_fast.semantics import HashedNGramEncoder, SemanticBank, load_bank
from dvla_fast.semantics.topk import template_text

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


# Places, company, behaviour, and the photo itself: what the package's own prompts forbid to name.
_NOT_OF_THE_CLASS = re.compile(
    r"\b(?:settings?|photo\w*|portrait|close-up|macro|viewed|viewpoint|outdoors|indoors|flocks?"
    r"|nests?|nesting|feeders|nearby|foreground)\b"
    r"|(?<!green or black )\bbackground\b|\b(?:blue|wide|open) sky\b(?! reflected)"
    r"|^(?:perched|clinging|hovering|foraging|swimming|flying|floating|soaring|gliding|singing"
    r"|visiting|feeding|walking|nibbling|grazing|howling|resting) "
    r"|\b(?:wagged|pumped|flicked|twitched)\b"
)


def test_candidates_are_about_the_class_itself(bank: SemanticBank) -> None:
    found = [
        (name, candidate.text)
        for name, entry in bank.classes.items()
        for candidate in entry.candidates
        if _NOT_OF_THE_CLASS.search(candidate.text)
    ]
    assert found == []


def test_clip_reads_every_template_of_eight_attributes(bank: SemanticBank) -> None:
    tokenizer = pytest.importorskip("open_clip").get_tokenizer("ViT-B-16")

    def length(text: str) -> int:
        return len(tokenizer.encode(text)) + 2

    for name, entry in bank.classes.items():
        texts = sorted((item.text for item in entry.candidates), key=length)
        # the last round's template names the seven chosen before
        assert length(template_text(name, texts[-7:])) <= 77, name
        assert length(entry.description) <= 77, name


def test_provenance_says_that_no_image_was_seen(bank: SemanticBank) -> None:
    assert bank.provenance["kind"] == "class-names"
    assert "no image was seen" in bank.provenance["note"]


def test_offline_encoder_reads_every_text(bank: SemanticBank) -> None:
    encoder = HashedNGramEncoder()
    for entry in bank.classes.values():
        encoder.encode([candidate.text for candidate in entry.candidates] + [entry.description])
    assert encoder.truncated == 0
