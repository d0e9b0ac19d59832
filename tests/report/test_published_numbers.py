"""Numbers of other people beside results: which, and whose they are said to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dvla_fast.data import split_list_names
from dvla_fast.report.published import _TABLE, benchmark, published_for
from tests.engine.runs import write_evaluation

Write = Callable[..., str]
CUB = "cub_140_30_30"


def test_published_numbers_are_quoted(tmp_path: Path, page: Write) -> None:
    run = write_evaluation(tmp_path / "mini", 0.7, split_list="miniimagenet_ravi", shot=1)
    html = page(run)
    assert "published: DVLA-RL, ICLR 2026, arXiv 2602.00795" in html
    assert "81.69 ± 0.36" in html
    assert "quoted as theirs" in html


def test_published_numbers_are_those_of_every_training(tmp_path: Path, page: Write) -> None:
    """Trained on two data sets, results of the same episodes have two columns."""
    lists = {"birds": CUB, "mini": "miniimagenet_ravi"}
    runs = [
        write_evaluation(
            tmp_path / name, 0.7, split_list=CUB, trained_on=name, trained_split_list=trained
        )
        for name, trained in lists.items()
    ]
    html = page(*runs, options=("--text_only",))
    for number in ("91.93 ± 0.28", "67.46 ± 0.47"):
        assert number in html
    assert "numbers of other people for CUB, miniImageNet to CUB, quoted" in html


@pytest.mark.parametrize(
    ("result", "column", "first"),
    [
        ({"split_list": CUB, "trained_on": "birds", "trained_split_list": CUB}, "CUB", 91.93),
        ({"split_list": CUB}, "CUB", 91.93),  # weights of the authors
        (
            {"split_list": CUB, "trained_on": "mini", "trained_split_list": "miniimagenet_ravi"},
            "miniImageNet to CUB",
            59.07,
        ),
        ({"split_list": "places365_fwt", "trained_on": "x", "trained_split_list": ""}, "", None),
        ({"dataset": "miniImageNet"}, "", None),  # a version that did not say
        ({"dataset": "rc-cars", "trained_on": "rc-cars", "split_list": ""}, "", None),
        ({"split_list": CUB, "trained_on": "CUB", "trained_split_list": ""}, "", None),
        ({"split_list": CUB, "trained_on": "CUB"}, "", None),
        ({"split_list": CUB, "shot": 5}, "CUB", 95.06),
        ({"split_list": CUB, "shot": 3}, "", None),
        ({"split_list": CUB, "split": "monitor"}, "", None),
        ({"split_list": "my_list"}, "", None),
    ],
)
def test_published_column(result: dict, column: str, first: float | None) -> None:
    found = published_for({"way": 5, "shot": 1, "split": "novel", **result})
    assert found[0] == column
    assert (found[1][0].accuracy if found[1] else None) == first


@pytest.mark.parametrize(("shot", "number", "half"), [(1, 81.69, 0.36), (5, 88.25, 0.28)])
def test_published_numbers_have_their_intervals(shot: int, number: float, half: float) -> None:
    result = {"way": 5, "shot": shot, "split": "novel", "split_list": "miniimagenet_ravi"}
    found = {entry.source: entry for entry in published_for(result)[1]}
    assert found["DVLA-RL, ICLR 2026, arXiv 2602.00795"][1:] == (number, half)
    assert found["SP (Semantic Prompt)"].half is None


def test_every_published_column_is_of_a_known_data_set() -> None:
    known = {benchmark(name) for name in split_list_names()}
    assert None not in known
    assert known >= {name for column in _TABLE for name in column.split(" to ")}
