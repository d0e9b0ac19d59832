"""Answers from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvla_fast.errors import LanguageModelError
from dvla_fast.semantics.language_models.base import Request, answer_all
from dvla_fast.semantics.language_models.files import AnswerFile


def request(stage: str, name: str) -> Request:
    return Request("?", (), stage, name)


def test_object_and_lines_say_the_same(tmp_path: Path) -> None:
    answers = {"candidates": {"Crow": ["a", "b"], "Gull": "- c"}, "description": {"Crow": "é"}}
    whole, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    whole.write_text(json.dumps(answers))
    rows = [
        json.dumps({"stage": stage, "class": name, "answer": answer})
        for stage, by_class in answers.items()
        for name, answer in by_class.items()
    ]
    lines.write_text("\n\n".join(rows) + "\n")
    for path in (whole, lines):
        model = AnswerFile(path)
        model.check()
        found = answer_all(
            model, [request("description", "Crow"), request("candidates", "Crow")]
        )  # fmt: skip
        assert [answer.text for answer in found] == ["é", '["a", "b"]']
        assert model.usage.answers == 2


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"stage": "candidates", "class": "Crow", "answer": "a\u2028b\u0085c"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (answer,) = answer_all(AnswerFile(path), [request("candidates", "Crow")])
    assert answer.text == row["answer"]


def test_files_saved_on_windows(tmp_path: Path) -> None:
    """Editors there begin a file with a mark."""
    line = {"stage": "candidates", "class": "fox", "answer": "- red"}
    for name, content in (("a.json", {"candidates": {"fox": "- red"}}), ("a.jsonl", line)):
        text = json.dumps(content) + "\r\n"
        (tmp_path / name).write_text(text, encoding="utf-8-sig", newline="")
        (answer,) = answer_all(AnswerFile(tmp_path / name), [request("candidates", "fox")])
        assert answer.text == "- red"


def test_class_without_an_answer_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"candidates": {"Crow": "x"}}')
    found = dict(
        AnswerFile(path).answers([request("candidates", "Gull"), request("candidates", "Crow")])
    )
    assert "a.json: no candidates answer for class 'Gull'; add it" in str(found[0])
    assert found[1].text == "x"  # type: ignore[union-attr]


def test_edited_file_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"candidates": {"Crow": "x"}}')
    before = AnswerFile(path).identity
    path.write_text('{"candidates": {"Crow": "y"}}')
    assert AnswerFile(path).identity != before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", r"a.json: not valid JSON \(line 1"),
        ("a.json", "[]", "no answers; expected {"),
        ("a.json", '{"Crow": ["x"]}', "'Crow' is no stage's answers"),
        ("a.json", '{"candidates": {"a": "x", "a": "y"}}', "'a' appears twice"),
        ("a.json", "[" * 100_000, r"a.json: not valid JSON \(too deep\)"),
        ("a.jsonl", "\n" + "[" * 100_000, r"line 2: not valid JSON \(too deep\)"),
        ("a.json", "9" * 9999, r"a.json: not valid JSON \(a number of too many digits\)"),
        ("a.jsonl", '{"stage": "candidates"}', "line 1: no answer; expected"),
        ("a.jsonl", "\n{oops", r"line 2: not valid JSON \(Expecting"),
        ("a.jsonl", '{"stage": "x", "class": "a", "answer": ""}', "stage 'x' is unknown"),
        ("a.jsonl", '{"stage": "candidates", "class": "a", "answer": ""}\n' * 2, "line 2: cand"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(LanguageModelError, match=message):
        AnswerFile(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(LanguageModelError, match="cannot read the answers"):
        AnswerFile(tmp_path / "none.json")
    with pytest.raises(LanguageModelError, match=r"needs --language_model\.answers"):
        AnswerFile("")


@pytest.mark.parametrize("name", [["a"], {"a": 1}, 7, None])
def test_class_that_is_no_name(name: object, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"stage": "candidates", "class": name, "answer": "x"}
    path.write_text("\n" + json.dumps(row))
    with pytest.raises(
        LanguageModelError, match=r"a\.jsonl, line 2: class .* is no name; expected"
    ):
        AnswerFile(path)


def test_class_names_are_compared_in_composed_form(tmp_path: Path) -> None:
    composed, apart = "Aig\u00fcille", "Aigu\u0308ille"
    whole, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    whole.write_text(json.dumps({"candidates": {apart: "x"}}))
    lines.write_text(json.dumps({"stage": "candidates", "class": composed, "answer": "x"}))
    for path in (whole, lines):
        for name in (composed, apart):
            assert answer_all(AnswerFile(path), [request("candidates", name)])[0].text == "x"
    whole.write_text(json.dumps({"candidates": {apart: "x", composed: "y"}}))
    with pytest.raises(LanguageModelError, match="for the second time; keep one"):
        AnswerFile(whole)
