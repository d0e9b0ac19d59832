"""The doctor names what is missing and how to get it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dvla_fast import doctor


def test_a_missing_compiler_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    text, _ = doctor.report()
    assert "C++ compiler: missing (Debian, Ubuntu: apt install g++)" in text
    assert "to build: pip install --no-build-isolation -e ." in text


def test_a_missing_extra_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    text, healthy = doctor.report()
    assert "remedy: pip install 'dvla-fast[train]'" in text
    assert not healthy


@pytest.mark.parametrize("extra", doctor._EXTRAS)
def test_every_package_of_an_extra_is_looked_for(extra: str) -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    declared = re.search(rf"^{extra} = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    assert declared is not None
    names = {name.lower().replace("_", "-") for name in re.findall(r'"([\w-]+)', declared[1])}
    assert names <= {name.lower() for name in doctor._EXTRAS[extra]}
