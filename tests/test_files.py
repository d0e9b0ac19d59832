"""What files hold, whatever is written into them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from dvla_fast.errors import OutputError
from dvla_fast.files import check_writable, json_text, write_text_atomic
from tests.test_cli import fails


def test_json_has_no_infinity() -> None:
    value = {"a": math.inf, "b": [1.5, -math.inf, (math.nan, 2)], "c": None, "d": "Infinity"}
    expected = {"a": None, "b": [1.5, None, [None, 2]], "c": None, "d": "Infinity"}
    assert json.loads(json_text(value)) == expected
    assert json_text({"a": [0.1, 1]}, indent=2) == json.dumps({"a": [0.1, 1]}, indent=2)


def test_the_folder_of_an_output_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder" / "page.html")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"page.html: cannot write \(.*\); free space or choose"):
        check_writable(tmp_path / "file" / "page.html")
    with pytest.raises(OutputError, match=r"folder: cannot write \(Is a directory\)"):
        check_writable(tmp_path / "new" / "folder")


def test_mode_is_that_of_any_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a moment in which other threads make files that anybody may write."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            write_text_atomic(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "file").chmod(0o600)
    write_text_atomic(tmp_path / "file", "other text")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127 + "x", "x" * 249 + ".jsonl"])
def test_every_name_that_a_file_can_have(tmp_path: Path, name: str) -> None:
    check_writable(tmp_path / name)
    write_text_atomic(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"
    with pytest.raises(OutputError, match=r"\(File name too long\); give it a shorter name"):
        check_writable(tmp_path / f"x{name}")


@pytest.mark.parametrize(
    "command",
    [
        ["report", "run", "--output={}.html"],
        ["compare", "a", "b", "--output={}.json"],
        ["predict", "a.png", "--checkpoint=a", "--supports=b", "--output={}.csv"],
        ["ablate", "--output={}"],
    ],
)
def test_names_that_are_too_long(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Told before any input is looked at: none of them exists."""
    monkeypatch.chdir(tmp_path)
    message = fails([part.format("ü" * 128) for part in command], capsys)
    assert "cannot write (File name too long); give it a shorter name" in message
