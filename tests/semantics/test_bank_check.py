"""The check of a bank, and the published schema: both say the same of good and bad banks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dvla_fast.data.shapes import BANKS
from dvla_fast.errors import BankError
from dvla_fast.semantics import HashedNGramEncoder, SemanticBank, bundled_banks
from dvla_fast.semantics.bank import SCHEMA, read_bank
from dvla_fast.semantics.check import check_bank

jsonschema = pytest.importorskip("jsonschema")

GOOD = {"attributes": ["red beak"], "description": "A bird."}
UNCHOSEN = {"candidates": ["red beak", "a crest"], "description": "A bird."}
STORED = {"encoder": "clip", "dim": 4, "sha256": "00"}
ONE = {"vectors": {"attributes": 2, "description": 1}}

GOOD_BANKS: list[Any] = [
    {"classes": {"jay": GOOD}},
    {"format": "dvla-fast-bank/1", "name": "x", "provenance": {"a": 1}, "classes": {"jay": GOOD}},
    {"format": "dvla-fast-bank/2", "classes": {"jay": UNCHOSEN, "owl": GOOD}, "note": "free"},
    {"classes": {"jay": {**UNCHOSEN, "attributes": []}}},
    {"classes": {"jay": {**GOOD, "candidates": [{"text": "x", "scores": [0.5, None, 1]}]}}},
    {"classes": {"jay": {**GOOD, "answers": {"a": ["b"]}, "images": ["1.jpg"], "more": 3}}},
    {"classes": {"jay": GOOD}, "provenance": None},
    {"vectors": STORED, "classes": {"jay": ONE, "owl": {**ONE, "images": ["1.jpg"]}}},
]
BAD_ENTRIES: list[Any] = [
    3,
    {},
    {"attributes": ["x"]},
    {"attributes": [], "description": "A bird."},
    {"attributes": None, "description": "A bird."},
    {"attributes": ["x", "\n"], "description": "A bird."},
    {"attributes": ["x"], "description": "  "},
    {"attributes": "x", "description": "A bird."},
    {"candidates": ["x"], "description": "A bird."},
    {"candidates": ["x", 3], "description": "A bird."},
    {**GOOD, "candidates": None},
    {**GOOD, "candidates": [{"scores": [1]}]},
    {**GOOD, "candidates": [{"text": "x", "scores": 1}]},
    {**GOOD, "candidates": [{"text": "x", "scores": [True]}]},
    {**GOOD, "answers": ["x"]},
    {**GOOD, "images": [" "]},
    {**GOOD, "images": "1.jpg"},
]
BAD_STORED: list[Any] = [
    GOOD,
    {"vectors": {"attributes": 2}},
    {"vectors": {"attributes": 0, "description": 0}},
    {"vectors": {"attributes": -1, "description": 1}},
    {"vectors": {"attributes": 1, "description": 2}},
    {"vectors": {"attributes": 1, "description": 1, "more": 1}},
    {**ONE, "images": [4]},
]
BAD_BANKS: list[Any] = [
    [],
    {},
    {"classes": {}},
    {"classes": [GOOD]},
    {"classes": {" ": GOOD}},
    {"classes": {"jay": GOOD}, "format": "dvla-fast-bank/3"},
    {"classes": {"jay": GOOD}, "provenance": "mine"},
    {"classes": {"jay": GOOD}, "provenance": []},
    {"classes": {"jay": ONE}, "vectors": {**STORED, "dim": 0}},
    {"classes": {"jay": ONE}, "vectors": {"encoder": "clip", "dim": 4}},
    {"classes": {"jay": ONE}, "vectors": None},
    {"classes": {"jay": ONE}},
    *({"classes": {"owl": GOOD, "jay": entry}} for entry in BAD_ENTRIES),
    *({"classes": {"owl": ONE, "jay": entry}, "vectors": STORED} for entry in BAD_STORED),
]


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("content", GOOD_BANKS)
def test_good_banks(content: Any, validator: Any) -> None:
    bank = SemanticBank.from_dict(content, "bank.json")
    validator.validate(content)
    validator.validate(bank.to_dict())


@pytest.mark.parametrize("content", BAD_BANKS)
def test_bad_banks(content: Any, validator: Any) -> None:
    with pytest.raises(BankError):
        SemanticBank.from_dict(content, "bank.json")
    assert not validator.is_valid(content)


@pytest.mark.parametrize("name", bundled_banks())
def test_bundled_banks_pass(name: str, validator: Any) -> None:
    content, source = read_bank(name)
    validator.validate(content)
    report = check_bank(name, HashedNGramEncoder())
    assert not report.problems, report.text()
    kind = "definitions" if name in BANKS else "class-names"
    assert report.facts[0].startswith(f"{source}: bank {name!r}")
    assert report.facts[0].endswith(f"made from: {kind}")


def check(tmp_path: Path, entry: dict[str, Any], **options: Any) -> Any:
    path = tmp_path / "bank.json"
    path.write_text(json.dumps({"provenance": {"kind": "hand"}, "classes": {"jay": entry}}))
    return check_bank(path, **options)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({**GOOD, "attributes": ["red beak", "Red  beak."]}, "attribute 'red beak' appears twice"),
        ({**UNCHOSEN, "candidates": ["a", "a"]}, "candidate 'a' appears twice"),
        ({**UNCHOSEN, "attributes": ["a tail"]}, "'a tail' is not one of its candidates"),
        ({**GOOD, "description": "bird " * 80}, "80 words, but hashed-ngram reads 77"),
        ({**GOOD, "attributes": [" "]}, "empty attribute"),
    ],
)
def test_texts_to_put_right(tmp_path: Path, entry: dict[str, Any], problem: str) -> None:
    report = check(tmp_path, entry, encoder=HashedNGramEncoder())
    assert len(report.problems) == 1
    assert problem in report.text()


def test_keys_that_nothing_reads_are_named(tmp_path: Path) -> None:
    report = check(tmp_path, {**GOOD, "atributes": ["x"]})
    assert "the key 'atributes' is kept, but nothing reads it" in report.text()
    assert not report.problems


def test_missing_classes_and_seen_images(tmp_path: Path) -> None:
    images = {"train": ["train/jay/1.jpg"], "test": ["test/jay/1.jpg", "test/jay/2.jpg"]}
    entry = {**GOOD, "images": ["test/jay/2.jpg"]}
    report = check(tmp_path, entry, class_names=["Jay", "wren"], images=images)
    assert "lacks 1 class(es) of the data set: 'wren'" in report.problems[0]
    assert "1 image(s) of test were seen" in report.notes[0]
    report = check(tmp_path, {**GOOD, "images": ["2.jpg"]}, images=images)
    assert "are not in the data set (2.jpg" in report.problems[0]
