"""Banks: the shipped one is complete, and a wrong one is refused with what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dvla_fast.data.digits import DIGIT_NAMES
from dvla_fast.data.shapes import BANKS
from dvla_fast.errors import BankError
from dvla_fast.semantics import (
    Candidate,
    ClassEntry,
    SemanticBank,
    bundled,
    bundled_banks,
    load_bank,
)

DIGITS_SHA256 = "5e31161695bbb89539db052fbc58561c0fa68cff2308e09945345f85374ca726"
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
    with pytest.raises(BankError, match=r"lacks 1 class.*: 'sevn' \(near 'sevn': 'seven'"):
        load_bank("digits").require(["one", "sevn"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"attributes": [], "description": "A bird."}, "'jay' has no attributes"),
        ({"attributes": ["x", "  "], "description": "A bird."}, "empty attribute .number 2"),
        ({"attributes": ["x"], "description": " "}, "empty description"),
        ({"attributes": ["x"]}, "empty description"),
        ("a bird", "not an object"),
        ({"candidates": ["x"], "description": "A bird."}, "has no attributes .and fewer than two"),
        ({"candidates": ["x", " "], "description": "A bird."}, "empty candidate .number 2"),
        ({"candidates": "x, y", "description": "A bird."}, "'candidates' that are not a list"),
        (
            {"candidates": [{"text": "x", "scores": ["0.3"]}, "y"], "description": "A bird."},
            "candidate number 1 with scores",
        ),
        (
            {"candidates": ["x", {"text": "y", "scores": [math.nan]}], "description": "A bird."},
            "candidate number 2 with scores",
        ),
        (
            {"candidates": ["x", {"text": "y", "scores": [10**400]}], "description": "A bird."},
            "candidate number 2 with scores",
        ),
        ({**GOOD, "answers": "red"}, "'answers' that are not an object"),
        ({**GOOD, "images": [3]}, "'images' that are not a list of image ids"),
        ({**GOOD, "description": "A bird \ud83d."}, "'jay' holds half a character"),
        ({**GOOD, "answers": {"description": ["\ud83d"]}}, "'jay' holds half a character"),
        ({**GOOD, "images": ["caf\udce9.jpg"]}, "'jay' holds half a character"),
    ],
)
def test_incomplete_class_is_refused(entry: object, message: str) -> None:
    with pytest.raises(BankError, match=message):
        SemanticBank.from_dict({"classes": {"owl": GOOD, "jay": entry}}, "bank.json")


@pytest.mark.parametrize("wrong", [{"encoder": 3}, {"dim": 0}, {"dim": True}, {"sha256": None}])
def test_wrong_notes_of_vectors_are_refused(wrong: dict) -> None:
    vectors = {"encoder": "x", "dim": 16, "sha256": "0", **wrong}
    with pytest.raises(BankError, match=r"'vectors' must be \{encoder, dim, sha256\}"):
        SemanticBank.from_dict({"vectors": vectors, "classes": {"owl": GOOD}})


def test_texts_are_taken_without_the_blanks_around_them() -> None:
    entry = {
        "attributes": [" a "],
        "description": " A bird.\n",
        "candidates": [{"text": "x "}, "a"],
    }
    bank = SemanticBank.from_dict({"classes": {"owl": entry}})
    candidates = (Candidate("x"), Candidate("a"))
    assert bank.classes["owl"] == ClassEntry(("a",), "A bird.", candidates)


@pytest.mark.parametrize(
    "content", [[], {}, {"classes": {}}, {"format": "other/9", "classes": {"owl": GOOD}}]
)
def test_other_content_is_refused(content: object) -> None:
    with pytest.raises(BankError, match=r"bank\.json"):
        SemanticBank.from_dict(content, "bank.json")


def test_halves_of_characters_are_refused_everywhere() -> None:
    with pytest.raises(BankError, match=r"'caf\\udce9' holds half a character"):
        SemanticBank.from_dict({"classes": {"caf\udce9": GOOD}})
    for other in ({"name": "\ud83d"}, {"provenance": {"model": "\ud83d"}}):
        with pytest.raises(BankError, match="its name or its provenance holds half"):
            SemanticBank.from_dict({**other, "classes": {"jay": GOOD}})


def test_bank_with_a_number_that_json_lacks_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "bank.json"
    path.write_text("old")
    for value in (math.nan, math.inf):
        bank = SemanticBank.from_dict({"provenance": {"x": value}, "classes": {"jay": GOOD}})
        with pytest.raises(BankError, match="a number that is NaN or infinite"):
            bank.save(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"classes": {', "not valid JSON"),
        ("[" * 100_000, r"not valid JSON \(too deep\)"),
        (f'{{"note": {"9" * 9999}}}', r"not valid JSON \(a number of too many digits\)"),
        ('{"classes": {"a": {"note": NaN}}}', "NaN is no number that JSON has"),
        ('{"classes": {"a": {"note": [-Infinity]}}}', "-Infinity is no number"),
        ('{"classes": {"a": {"note": 1e999}}}', "1e999 is no number"),
        ('{"classes": {"a": {}, "b": {}, "a": {}}}', r"bank\.json: 'a' appears twice"),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bank.json"
    path.write_text(text)
    with pytest.raises(BankError, match=message):
        load_bank(path)


def test_a_bank_saved_on_windows(tmp_path: Path) -> None:
    """Its editors begin a file with a mark and end lines in two characters."""
    path = tmp_path / "bank.json"
    text = load_bank("digits").to_json()
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_bank(path).to_json() == text


def test_missing_file_names_the_path_and_the_bundled_banks(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"none\.json.*digits.*shapes-true"):
        load_bank(tmp_path / "none.json")


def test_fingerprint_follows_the_texts(tmp_path: Path) -> None:
    path = tmp_path / "bank.json"
    path.write_text(json.dumps({"classes": {"owl": GOOD}}))
    first = load_bank(path).fingerprint()
    path.write_text(json.dumps({"classes": {"owl": {**GOOD, "description": "An owl."}}}))
    assert load_bank(path).fingerprint() != first


FULL = {
    "format": "dvla-fast-bank/2",
    "name": "birds",
    "provenance": {"kind": "support-images", "model": "a model"},
    "classes": {
        "Sooty Albatross": {
            "candidates": [{"text": "dark wings", "scores": [0.3, 0.25]}, "a crème bill", "x"],
            "attributes": ["dark wings"],
            "description": "A seabird.",
            "answers": {"candidates": ["dark wings, a crème bill"]},
            "images": ["train/albatross/1.jpg"],
            "reviewed": True,
        },
        "jay": {"candidates": ["blue wing", "black bib"], "description": "A loud bird."},
    },
}


def test_a_full_bank_survives_saving(tmp_path: Path) -> None:
    bank = SemanticBank.from_dict(FULL)
    assert bank.classes["Sooty Albatross"] == ClassEntry(
        ("dark wings",),
        "A seabird.",
        (Candidate("dark wings", (0.3, 0.25)), Candidate("a crème bill"), Candidate("x")),
        {"candidates": ["dark wings, a crème bill"]},
        ("train/albatross/1.jpg",),
        {"reviewed": True},
    )
    path = tmp_path / "birds.json"
    bank.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == FULL
    assert "crème" in path.read_text(encoding="utf-8")
    again = load_bank(path)
    assert (again.classes, again.fingerprint()) == (bank.classes, bank.fingerprint())
    before = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == before


def test_short_lists_stay_on_one_line(tmp_path: Path) -> None:
    SemanticBank.from_dict(FULL).save(tmp_path / "birds.json")
    lines = (tmp_path / "birds.json").read_text(encoding="utf-8").splitlines()
    assert '        "dark wings"' not in lines
    assert any(line.strip() == '"attributes": ["dark wings"],' for line in lines)
    assert max(map(len, lines)) <= 110


def test_old_banks_keep_their_fingerprint() -> None:
    # Results name the bank by this hash: another format must not change it.
    assert load_bank("digits").fingerprint() == DIGITS_SHA256


@pytest.mark.parametrize(
    "name",
    ["sooty albatross", "Sooty_Albatross", "003.Sooty_Albatross", "n02085620-sooty-albatross"],
)
def test_class_names_are_found_however_they_are_written(name: str) -> None:
    assert SemanticBank.from_dict(FULL).resolve(["jay", name]) == ["jay", "Sooty Albatross"]


def test_class_names_in_two_normal_forms() -> None:
    composed, decomposed = "caf\u00e9 jay", "cafe\u0301 jay"
    assert SemanticBank.from_dict({"classes": {composed: GOOD}}).resolve([decomposed]) == [composed]
    assert SemanticBank.from_dict({"classes": {decomposed: GOOD}}).missing([composed]) == []


def test_bundled_banks_without_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvla_fast.data import load_digits
    from dvla_fast.engine.config import SemanticsConfig
    from dvla_fast.engine.texts import build_texts

    data = load_digits()
    entries = {
        name.upper(): {"candidates": [f"{name} {part}" for part in "abcd"], "description": name}
        for name in data.class_names
    }
    content = {"format": "dvla-fast-bank/2", "provenance": {"kind": "class-names"}}
    (tmp_path / "cub.json").write_text(json.dumps({**content, "classes": entries}))
    monkeypatch.setattr(bundled, "_BUNDLED", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert bundled_banks() == ("cub", *BANKS)
    assert load_bank("cub").name == "cub"
    device = torch.device("cpu")
    texts, described = build_texts(SemanticsConfig(bank="cub"), data, device)
    assert texts.tokens.shape == (10, 5, 512)
    assert (described["top_k"], described["bank_kind"]) == (0, "class-names")
    texts, described = build_texts(SemanticsConfig(bank="cub", top_k=3), data, device)
    assert texts.tokens.shape == (10, 4, 512)
    assert (described["top_k"], described["template"]) == (3, "all")


def test_ambiguous_class_names_are_refused() -> None:
    bank = SemanticBank.from_dict({"classes": {"blue jay": GOOD, "Blue_Jay": GOOD}})
    assert bank.resolve(["Blue_Jay"]) == ["Blue_Jay"]
    with pytest.raises(BankError, match="'Blue Jay' fits 'blue jay' and 'Blue_Jay'"):
        bank.resolve(["Blue Jay"])
