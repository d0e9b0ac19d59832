"""What the page says of supports and queries in each text scope."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dvla_fast.engine.checkpoint import load_checkpoint, save_checkpoint

NOTES = {"class": "queries see no text", "candidate": "queries see every class’s texts in turn"}
FUSED = {
    "episode": "The same images with the texts.",
    "class": "supports with the texts of their own class, queries as before.",
    "candidate": "those of the class that it was put into, which may be what draws it there.",
}


@pytest.mark.parametrize("alpha_scope", ["episode", "image"])
@pytest.mark.parametrize("text_scope", FUSED)
def test_what_met_text_is_drawn(
    demo: Path, copied: Path, page: Callable[..., str], text_scope: str, alpha_scope: str
) -> None:
    best = copied / "checkpoints" / "metatune-best.safetensors"
    tensors, info = load_checkpoint(best, ("metatune",))
    info["model"]["text_scope"], info["model"]["alpha_scope"] = text_scope, alpha_scope
    save_checkpoint(best, {name: tensor.clone() for name, tensor in tensors.items()}, info)
    html = page(copied)
    for scope, note in NOTES.items():
        assert (note in html) == (scope == text_scope)
    for scope, caption in FUSED.items():
        assert html.count(caption) == (3 if scope == text_scope else 0)  # once an episode
    queries = text_scope == "episode"
    assert ("<span>support of one" in html) != queries
    assert ("(the answer)" in html) == queries
    assert ("✓" in html or "✗" in html) == queries  # supports are not classified
