"""The texts that the page shows and draws attention of are those that the gates read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dvla_fast.data import load_digits
from dvla_fast.semantics import load_bank

Write = Callable[..., str]


def test_candidates_of_a_bank(demo: Path, copied: Path, page: Write) -> None:
    """Kept and dropped proposals with their scores, from the bank or from the run's selection."""
    bank = json.loads(
        (Path(__file__).parents[2] / "dvla_fast/semantics/banks/digits.json").read_text()
    )
    bank["format"] = "dvla-fast-bank/2"
    for entry in bank["classes"].values():
        chosen = entry["attributes"]
        entry["candidates"] = [
            *({"text": text, "scores": [0.5 - 0.01 * i]} for i, text in enumerate(chosen)),
            {"text": "a furry tail", "scores": [0.11, 0.12]},
        ]
        entry["images"] = ["train/7.png"]
    bank["classes"]["nine"]["images"] = list(load_digits().novel.ids[-2:])
    path = copied / "bank.json"
    path.write_text(json.dumps(bank))
    text = (copied / "config.yaml").read_text()
    assert "seen_images: exclude" in text  # as the run drew its episodes before the bank knew any
    text = text.replace("seen_images: exclude", "seen_images: report")
    (copied / "config.yaml").write_text(text.replace("bank: digits", f"bank: {path}"))
    html = page(copied)
    assert html.count("a furry tail <em>dropped</em>") == 5  # of the five novel classes
    assert 'title="by round: 0.110, 0.120"' in html
    assert "Written from 1 image(s) that this data set does not name: train/7.png" in html
    assert html.count("that the texts were written from, nine") == 2
    assert "The bank holds no candidates" not in html
    assert "The bank holds no candidates" in page(demo)


def with_settings(run: Path, **changes: str) -> Path:
    """Change settings of a run's record, each "name: value" that is there once."""
    text = (run / "config.yaml").read_text()
    for name, value in changes.items():
        text, count = re.subn(rf"^  {name}: .*$", f"  {name}: {value}", text, flags=re.MULTILINE)
        assert count == 1, name
    (run / "config.yaml").write_text(text)
    return run


def drawn_texts(html: str) -> dict[str, str]:
    """The texts whose attention is drawn, with their level."""
    found = re.findall(r'<li class="(attribute|description)">.*?class="phrase">(.*?)<', html, re.S)
    return {text: level for level, text in found}


@pytest.mark.parametrize("parts", ["all", "attributes", "description", "name"])
def test_attention_is_shown_of_the_texts_that_were_read(
    copied: Path, page: Write, parts: str
) -> None:
    html = page(with_settings(copied, parts=parts))
    bank = load_bank("digits").classes
    texts = drawn_texts(html)
    attributes = {text for entry in bank.values() for text in entry.attributes}
    descriptions = {entry.description for entry in bank.values()}
    expected = {
        "attribute": attributes if parts in ("all", "attributes") else set(),
        "description": descriptions if parts in ("all", "description") else set(),
    }
    if parts == "name":
        expected["description"] = {f"A photo of a {name}" for name in bank}
    assert texts
    for text, level in texts.items():
        assert text in expected[level]
    assert len(set(texts.values())) == (2 if parts == "all" else 1)
    assert "dropped</em>" not in html  # nothing was: the gates did not read it
    assert ("(semantics.parts: " in html) == (parts != "all")


def test_a_bank_of_the_evaluated_split_alone(copied: Path, page: Write) -> None:
    path = Path(__file__).parents[2] / "dvla_fast/semantics/banks/digits.json"
    bank = json.loads(path.read_text())
    for name in load_digits().base.class_names:
        del bank["classes"][name]
    (copied / "novel.json").write_text(json.dumps(bank))
    html = page(with_settings(copied, bank=str(copied / "novel.json")))
    assert "are missing" not in html
    assert drawn_texts(html)


def test_texts_of_each_episode_are_not_those_of_a_bank(copied: Path, page: Write) -> None:
    html = page(with_settings(copied, construct="build.yaml"))
    assert "are missing: each episode had texts of its own there" in html
    assert not drawn_texts(html)


def test_the_first_of_several_checkpoints_is_drawn(copied: Path, page: Write) -> None:
    path = copied / "episodes-1shot.npz"
    with np.load(path) as file:
        arrays = dict(file)
    labels = arrays["labels"]
    first = labels.copy()
    first[3] = (labels[3] + 1) % 5  # all wrong in one episode, and the other checkpoint in another
    other = labels.copy()
    other[5] = (labels[5] + 1) % 5
    for index in range(len(arrays["methods"])):
        arrays[f"predictions_{index}"] = np.stack([first, other, other])
    arrays["alphas"] = np.repeat(arrays["alphas"], 3, 0)
    np.savez_compressed(path, **arrays)
    html = page(copied)
    assert "Features, episodes and attention are of the first of 3 checkpoints." in html
    assert re.search(r"Episode 3 <small>the lowest accuracy of all", html)
