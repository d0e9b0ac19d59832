"""Banks: the shipped one is complete, and a wrong one is refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvla_fast.data.digits import DIGIT_NAMES
from dvla_fast.errors import BankError
from dvla_fast.semantics import SemanticBank, bundled_banks, load_bank

GOOD = {"attributes": ["red beak"], "description": "A bird."}


def test_digits_bank_describes_every_digit() -> None:
    bank = load_bank("digits")
    assert "digits" in bundled_banks()
    assert tuple(bank.classes) == DIGIT_NAMES
    for entry in bank.select(DIGIT_NAMES):
        assert 4 <= len(entry.attributes) <= 6
        assert len(set(entry.attributes)) == len(entry.attributes)
    assert "no image seen" in bank.provenance["method"]


def test_missing_classes_are_named() -> None:
    with pytest.raises(BankError, match=r"lacks 2 class.*'owl'.*'jay'"):
        load_bank("digits").require(["one", "owl", "jay"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"attributes": [], "description": "A bird."}, "'jay' has no attributes"),
        ({"attributes": ["x", "  "], "description": "A bird."}, "empty attribute .number 2"),
        ({"attributes": ["x"], "description": " "}, "empty description"),
        ({"attributes": ["x"]}, "empty description"),
        ("a bird", "not an object"),
    ],
)
def test_incomplete_class_is_refused(entry: object, message: str) -> None:
    with pytest.raises(BankError, match=message):
        SemanticBank.from_dict({"classes": {"owl": GOOD, "jay": entry}}, "bank.json")


@pytest.mark.parametrize(
    "content", [[], {}, {"classes": {}}, {"format": "other/9", "classes": {"owl": GOOD}}]
)
def test_other_content_is_refused(content: object) -> None:
    with pytest.raises(BankError, match=r"bank\.json"):
        SemanticBank.from_dict(content, "bank.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"classes": {', "not valid JSON"),
        ('{"classes": {"a": {}, "a": {}}}', "'a' appears twice"),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bank.json"
    path.write_text(text)
    with pytest.raises(BankError, match=message):
        load_bank(path)


def test_missing_file_names_the_path_and_the_bundled_banks(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"none\.json.*digits"):
        load_bank(tmp_path / "none.json")


def test_fingerprint_follows_the_texts(tmp_path: Path) -> None:
    path = tmp_path / "bank.json"
    path.write_text(json.dumps({"classes": {"owl": GOOD}}))
    first = load_bank(path).fingerprint()
    path.write_text(json.dumps({"classes": {"owl": {**GOOD, "description": "An owl."}}}))
    assert load_bank(path).fingerprint() != first
