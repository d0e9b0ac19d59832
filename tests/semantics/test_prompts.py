"""Prompt files: versions, hashes, fields."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dvla_fast.errors import LanguageModelError
from dvla_fast.semantics.prompts import load_prompt, prompt_names

# A changed prompt makes other banks: give it another version, and write its hash here.
PUBLISHED = {
    "candidates": ("1", "cb7737ff768c0f93"),
    "candidates-by-name": ("1", "e6616d108d8d1816"),
    "description": ("1", "966d9ae52a33f74f"),
    "again": ("1", "96dfce93c6a85c79"),
}


@pytest.mark.parametrize("name", prompt_names())
def test_published_prompts(name: str) -> None:
    prompt = load_prompt(name)
    assert (prompt.version, prompt.sha256[:16]) == PUBLISHED[name]
    assert hashlib.sha256(prompt.path.read_bytes()).hexdigest() == prompt.sha256
    assert "version:" not in prompt.text


def test_wording_of_the_paper() -> None:
    filled = load_prompt("candidates").fill(**{"class": "Crow", "count": "9"})
    assert "What are the key distinguishing attributes of the Crow in the given image?" in filled
    assert "Name 9 attributes" in filled
    assert '{"attributes": ["...", "..."]}' in filled


def test_values_are_not_filled_again() -> None:
    filled = load_prompt("description").fill(**{"class": "{attributes}", "attributes": "- x"})
    assert "the class {attributes}:\n- x" in filled


def test_own_prompts(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("version: fine birds 2\r\n\r\nÜber {class} {other}\r\n".encode())
    prompt = load_prompt("candidates", path)
    assert prompt.record() == {
        "version": "fine birds 2",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert prompt.fill(**{"class": "Crow", "count": "3"}) == "Über Crow {other}"
    path.write_text("version: 3\n\nAbout {class}", encoding="utf-8-sig")
    marked = load_prompt("candidates", path)
    assert (marked.version, marked.text) == ("3", "About {class}")
    path.write_text("About {class}")
    assert load_prompt("candidates", path).version == "none"


def test_unusable_prompts(tmp_path: Path) -> None:
    with pytest.raises(LanguageModelError, match=r"none.txt: cannot read .* holds \{class\}"):
        load_prompt("candidates", tmp_path / "none.txt")
    (tmp_path / "p.txt").write_text("version: 1\n\nHello {class}")
    with pytest.raises(LanguageModelError, match=r"lacks \{attributes\}; prompt 'description' n"):
        load_prompt("description", tmp_path / "p.txt")
