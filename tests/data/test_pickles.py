"""Pickles: arrays and containers load; anything that could run does not."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dvla_fast.data.pickles import _core, load_pickle
from dvla_fast.errors import DataError


class Runs:
    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers(tmp_path: Path, protocol: int) -> None:
    content = {
        "a": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "b": [1, "x", b"\xff", {2}],
        "c": np.int64(3),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    loaded = load_pickle(tmp_path / "x.pkl")
    assert (loaded["a"] == content["a"]).all()
    assert (loaded["b"], loaded["c"]) == (content["b"], content["c"])


def test_python_2_strings(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x80\x02}q\x00U\x04dataq\x01U\x02\xff\xfeq\x02s.")
    assert load_pickle(tmp_path / "x") == {"data": "\xff\xfe"}


@pytest.mark.parametrize("content", [Runs(), [os.getcwd], np.array([Runs()], dtype=object)])
def test_programs_are_refused(tmp_path: Path, content, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=r"x\.pkl: not loaded \(it refers to posix"):
        load_pickle(tmp_path / "x.pkl")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["numpy._core.numeric\n_frombuffer", "_codecs\nencode"])
def test_nothing_in_the_process_is_changed(name: str, tmp_path: Path) -> None:
    """The BUILD instruction sets attributes of what is on the stack, functions included."""
    before = _core().numeric._frombuffer.__defaults__
    program = b"\x80\x02c" + name.encode() + b"\n(N}X\x0c\0\0\0__defaults__K\x01\x85stb."
    (tmp_path / "x").write_bytes(program)
    with pytest.raises(DataError, match="cannot read this pickle"):
        load_pickle(tmp_path / "x")
    assert _core().numeric._frombuffer.__defaults__ == before


def test_damaged_and_missing(tmp_path: Path) -> None:
    whole = pickle.dumps({"a": np.arange(100)})
    for content in (b"", whole[:-20], b"no pickle"):
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.pkl: "):
            load_pickle(tmp_path / "x.pkl")
    with pytest.raises(DataError, match=r"none\.pkl: cannot read this pickle"):
        load_pickle(tmp_path / "none.pkl")
