"""Arrows point one way: no package imports one that is built on it, not even inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dvla_fast"
# Each may import those before it. What is not listed (errors, files, ...) serves all of them.
ORDER = ("ops", "nn", "rl", "pictures", "data", "semantics", "engine", "report", "runners", "cli")


def imported(path: Path) -> Iterator[str]:
    """Names of this package's modules that a file imports anywhere, from their second part on."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".", 1)[1] for name in names if name.startswith("dvla_fast."))


@pytest.mark.parametrize("layer", ORDER)
def test_layers_import_only_what_is_below(layer: str) -> None:
    place, above = PACKAGE / layer, set(ORDER[ORDER.index(layer) + 1 :])
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    wrong = [
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in files
        for name in imported(file)
        if name.split(".")[0] in above
    ]
    assert not wrong
