"""The table of evaluations: the numbers of their summaries, and text that its readers take."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

import pytest

from dvla_fast.cli import main
from tests.engine.runs import write_evaluation
from tests.test_cli import fails

RECIPE = {
    **{"kind": "metatune", "dataset": "animals", "normalisation": None, "pretrained": ""},
    **{"model": {"policy": "beta"}, "semantics": {}, "training": [{"stage": "metatune"}]},
}


def evaluation(path: Path, right: float, **changes: Any) -> Path:
    facts = {"accuracy": right, "checkpoint": f"/{path.name}/best.safetensors", "recipe": RECIPE}
    return write_evaluation(path, right, **{**facts, **changes})


def table(path: Path, *runs: Path) -> str:
    page = f"--output={path.with_suffix('.html')}"
    given = [*map(str, runs), "--text_only", page, f"--table={path}", "--overwrite"]
    assert main(["report", *given]) == 0
    return path.read_text(encoding="utf-8")


def test_trainings_of_one_recipe_are_one_row(tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / name, r) for name, r in (("a", 0.5), ("b", 0.53), ("c", 0.56))]
    other = evaluation(tmp_path / "mlp", 0.8, recipe={**RECIPE, "model": {"policy": "mlp"}})
    rows = list(csv.DictReader(table(tmp_path / "t.csv", *runs, other).splitlines()))
    assert [(row["runs"], row["method"], row["trainings"]) for row in rows] == [
        ("a, b, c", "learned gate", "3"),
        ("a, b, c", "visual prototypes", "3"),
        ("mlp", "learned gate", "1"),
        ("mlp", "visual prototypes", "1"),
    ]
    mean, half = float(rows[0]["accuracy"]), float(rows[0]["half_width"])
    spread = statistics.stdev([50, 53, 56])
    assert (mean, half) == pytest.approx((53.0, 4.302653 * spread / 3**0.5), abs=1e-4)
    assert rows[0]["interval"] == "the 95 % t interval over the trainings"
    assert (float(rows[2]["accuracy"]), float(rows[2]["half_width"])) == (80.0, 1.0)
    assert rows[2]["interval"] == "1.96·s/√n over the episodes"


def test_what_was_evaluated_otherwise_is_a_row_of_its_own(tmp_path: Path) -> None:
    """Other texts, another fixed gate, a training named again: nothing is lost or mixed."""
    one, two = ({"bank_sha256": digest, "parts": "all"} for digest in "ab")
    where = {"checkpoint": "/a/best.safetensors"}
    runs = [
        evaluation(tmp_path / "a", 0.5, semantics=one),
        evaluation(tmp_path / "b", 0.6, semantics=one),
        evaluation(tmp_path / "texts", 0.3, semantics=two),
        evaluation(tmp_path / "alpha", 0.4, semantics=one, fixed_alpha=0.25),
        evaluation(tmp_path / "last", 0.55, semantics=one, **where),
    ]
    rows = list(csv.DictReader(table(tmp_path / "t.csv", *runs).splitlines()))
    learned = {row["runs"]: float(row["accuracy"]) for row in rows if "learned" in row["method"]}
    expected = {"a, b": 55.0, "texts": 30.0, "alpha": 40.0, "last": 55.0}
    assert learned == pytest.approx(expected)


def test_a_spread_of_nothing_is_not_printed(tmp_path: Path) -> None:
    """Visual prototypes of trainings from one backbone; the learned gates' spread has a note."""
    runs = [
        evaluation(tmp_path / name, right, started_from=["x"])
        for name, right in (("a", 0.5), ("b", 0.55))
    ]
    learned, visual = csv.DictReader(table(tmp_path / "t.csv", *runs).splitlines())
    assert (visual["accuracy"], visual["half_width"]) == ("0.0000", "")
    assert visual["interval"].endswith("; n/a: these trainings have the same accuracy")
    assert float(learned["half_width"]) > 1
    from_one = "2 trainings start from one checkpoint"
    assert from_one in learned["interval"]
    for name in ("t.md", "t.tex"):
        said = table(tmp_path / name, *runs)
        assert "0.00 ± n/a" in said or r"0.00 $\pm$ n/a" in said
        assert "n/a: these trainings have the same accuracy" in said
        assert from_one in said


def test_a_column_for_each_number_of_supports(tmp_path: Path) -> None:
    run = evaluation(tmp_path / "one|two", 0.5)
    five = evaluation(tmp_path / "five", 0.75, shot=5, split="base", ci95=None)
    text = table(tmp_path / "t.md", run, five)
    assert text.splitlines()[:3] == [
        "| runs | method | animals, 5-way 1-shot | animals/base, 5-way 5-shot |",
        "| --- | --- | --- | --- |",
        "| one\\|two | learned gate | 50.00 ± 1.00 |  |",
    ]
    assert "| five | learned gate |  | 75.00 ± n/a |" in text
    assert "in percent over 200 episodes; ± 1.96·s/√n over the episodes." in text


def test_the_legend_says_what_each_half_width_is(tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / name, r) for name, r in (("a", 0.5), ("b", 0.53))]
    other = evaluation(tmp_path / "mlp", 0.8, recipe={**RECIPE, "model": {"policy": "mlp"}})
    several = "± the 95 % t interval over the trainings (2)"
    assert f" over 200 episodes; {several}; n/a" in table(tmp_path / "t.MD", *runs)
    both = f"; ± 1.96·s/√n over the episodes; {several}, where there are several; n/a"
    assert both in table(tmp_path / "t.md", *runs, other)


def test_a_method_that_one_of_several_trainings_lacks_is_left_out(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "a", 0.5)
    two = evaluation(tmp_path / "b", 0.53, methods={"learned gate": {"accuracy": 0.53, "ci95": 0}})
    (row,) = csv.DictReader(table(tmp_path / "t.csv", one, two).splitlines())
    assert (row["runs"], row["method"]) == ("a, b", "learned gate")


def test_latex(tmp_path: Path) -> None:
    run = evaluation(tmp_path / "my_run", 0.5, dataset="R&D $x$ 100%")
    lines = table(tmp_path / "t.tex", run).splitlines()
    assert lines[1:3] == [r"\begin{tabular}{llc}", r"\toprule"]
    assert lines[3] == r"runs & method & R\&D \$x\$ 100\%, 5-way 1-shot \\"
    assert lines[5] == r"my\_run & learned gate & 50.00 $\pm$ 1.00 \\"
    assert lines[-1] == r"\end{tabular}"


def test_what_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = evaluation(tmp_path / "a", 0.5), tmp_path / "p.html"
    (tmp_path / "there.md").touch()

    def given(name: str) -> list[str]:
        return ["report", str(run), "--text_only", f"--output={page}", f"--table={tmp_path / name}"]

    assert "ends in .csv, .md, .tex" in fails(given("t.docx"), capsys, 2)
    assert "there.md: exists; give --table another name" in fails(given("there.md"), capsys)
    assert "give --table a file in a folder" in fails(given("there.md/t.md"), capsys)
    both = tmp_path / "both.md"
    same = ["report", str(run), "--text_only", f"--output={both}", f"--table={both}"]
    assert "cannot be both the page and the table" in fails(same, capsys, 2)
    (run / "summary.json").unlink()
    assert "none of the runs holds a finished evaluation" in fails(given("new.md"), capsys)
    assert not page.exists()
