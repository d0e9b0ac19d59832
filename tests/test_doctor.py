"""The doctor names what is missing and how to get it."""

from __future__ import annotations

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
