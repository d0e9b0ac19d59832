"""Verdicts in words on paired runs, by class and over seeds, and the refusals."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dvla_fast.cli import main
from dvla_fast.engine.compare import NotComparableError, compare_groups, comparison_text, verdict
from dvla_fast.engine.records import EpisodeRecord, checkpoints_table
from dvla_fast.errors import OutputError
from dvla_fast.statistics import checkpoint_interval, holm, unpaired_difference
from tests.engine.runs import CLASSES, evaluate_arguments, write_evaluation


def test_better_run_is_named(tmp_path: Path) -> None:
    good, bad = (write_evaluation(tmp_path / n, r) for n, r in (("good", 0.7), ("bad", 0.6)))
    row = compare_groups([str(good)], [str(bad)])["results"][0]
    first, second = (EpisodeRecord.read(p / "episodes-1shot.npz") for p in (good, bad))
    a, b = first.accuracies("learned gate"), second.accuracies("learned gate")
    expected = stats.ttest_rel(a.numpy(), b.numpy())
    assert row["difference"] == pytest.approx((a - b).mean().item())
    assert row["p_value"] == pytest.approx(expected.pvalue)
    assert row["verdict"].startswith("A is better than B by ")
    assert "95 % interval" in row["verdict"]
    back = compare_groups([str(bad)], [str(good)])["results"][0]
    assert back["verdict"].startswith("B is better than A by ")
    assert row["over_checkpoints"] is None


def test_equal_runs_show_no_difference(tmp_path: Path) -> None:
    one, two = (write_evaluation(tmp_path / name, 0.6) for name in ("one", "two"))
    row = compare_groups([str(one)], [str(two)])["results"][0]
    assert row["verdict"].startswith("no difference shown")


@pytest.mark.parametrize(
    ("value", "half", "p", "words"),
    [
        (0.013, 0.009, 0.004, "x is better than y by 1.3 points, 95 % interval 0.4 to 2.2,"),
        (-0.02, 0.01, 1e-5, "y is better than x by 2.0 points, 95 % interval 1.0 to 3.0,"),
        (0.002, 0.01, 0.7, "no difference shown: x - y = +0.2 points"),
        (0.009, 0.01, 0.07, "no difference shown: x - y = +0.9 points"),
        (0.5, None, None, "no difference shown: +50.0 points, without a spread to judge by"),
    ],
)  # fmt: skip
def test_words(value: float, half: float, p: float, words: str) -> None:
    row = {"difference": value, "ci95": half, "p_value": p}
    text = verdict(row, ("x", "y"))
    assert text.startswith(words)
    assert half is None or text.endswith("p < 0.001" if p < 0.001 else f"p = {p}")


def test_classes_are_paired_and_corrected(tmp_path: Path) -> None:
    good, bad = (write_evaluation(tmp_path / n, r) for n, r in (("good", 0.7), ("bad", 0.6)))
    rows = compare_groups([str(good)], [str(bad)])["results"][0]["classes"]
    assert [row["name"] for row in rows] == CLASSES
    record, other = (EpisodeRecord.read(p / "episodes-1shot.npz") for p in (good, bad))
    holds = (record.classes == 2).any(1)  # "cat"
    place = (record.classes[holds] == 2).long().argmax(1)
    mine = record.labels[holds] == place[:, None]

    def accuracy(found: EpisodeRecord) -> torch.Tensor:
        right = found.predictions["learned gate"][0][holds] == found.labels[holds]
        return (right & mine).sum(1) / mine.sum(1)

    expected = [accuracy(found).mean().item() for found in (record, other)]
    assert rows[2]["episodes"] == int(holds.sum())
    assert rows[2]["accuracies"] == pytest.approx(expected)
    assert rows[2]["difference"] == pytest.approx(expected[0] - expected[1])
    raw = [row["p_value"] for row in rows]
    assert [row["p_holm"] for row in rows] == holm(raw) != raw


def test_classes_of_the_largest_differences_come_first(tmp_path: Path) -> None:
    good, bad = (write_evaluation(tmp_path / n, r) for n, r in (("good", 0.7), ("bad", 0.6)))
    compared = compare_groups([str(good)], [str(bad)])
    rows = compared["results"][0]["classes"]
    for row, difference in zip(rows, (0.01, -0.3, 0.2), strict=False):
        row["difference"] = difference
    for row in rows[3:]:
        row["difference"] = 0.0
    lines = comparison_text(compared, classes=2).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("  by class")) + 1
    assert [line.split()[0] for line in lines[first : first + 2]] == CLASSES[1:3]
    assert lines[first + 2].startswith(f"    and {len(rows) - 2} more")


def test_several_seeds_a_side(tmp_path: Path) -> None:
    """Episodes stay paired on the means; training again is judged by the spread of the runs."""
    first = [str(write_evaluation(tmp_path / f"a{i}", 0.7 + 0.01 * i)) for i in range(3)]
    second = [str(write_evaluation(tmp_path / f"b{i}", 0.6 + 0.01 * i)) for i in range(2)]
    row = compare_groups(first, second)["results"][0]
    assert row["checkpoints"] == [3, 2]
    means = [
        [EpisodeRecord.read(Path(p) / "episodes-1shot.npz").accuracies("learned gate").mean().item()
         for p in group]
        for group in (first, second)
    ]  # fmt: skip
    expected = stats.ttest_ind(*means, equal_var=False)
    assert row["over_checkpoints"]["p_value"] == pytest.approx(expected.pvalue, rel=1e-6)
    assert row["accuracies"] == pytest.approx([sum(m) / len(m) for m in means])


def test_two_methods_of_the_same_trainings_are_paired(tmp_path: Path) -> None:
    """In whatever order the runs are named; what a training's seed gives both cancels."""
    level = [0.5, 0.7, 0.6]

    def write(side: str, gain: float) -> list[str]:
        return [
            str(
                write_evaluation(tmp_path / f"{side}{i}", base + gain, checkpoints_sha256=[f"h{i}"])
            )
            for i, base in enumerate(level)
        ]

    first, second = write("a", 0.05), write("b", 0.0)
    compared = compare_groups(first, second[::-1])
    over = compared["results"][0]["over_checkpoints"]
    values = [
        [EpisodeRecord.read(Path(p) / "episodes-1shot.npz").accuracies("learned gate").mean().item()
         for p in side]
        for side in (first, second)
    ]  # fmt: skip
    assert over["p_value"] == pytest.approx(stats.ttest_rel(*values).pvalue, rel=1e-6)
    assert over["p_value"] < 0.001 < stats.ttest_ind(*values, equal_var=False).pvalue
    assert "3 and 3 checkpoints, paired t test" in comparison_text(compared)
    welch = compare_groups(first, second[:2])  # not the same trainings
    assert "3 and 2 checkpoints, Welch's t test" in comparison_text(welch)


def test_one_training_named_twice_is_no_pair(tmp_path: Path) -> None:
    twice = {"checkpoints": 2, "checkpoints_sha256": ["h", "h"]}
    first, second = (
        write_evaluation(tmp_path / name, right, **twice)
        for name, right in (("a", 0.7), ("b", 0.6))
    )
    row = compare_groups([str(first)], [str(second)])["results"][0]
    assert row["over_checkpoints"]["test"] == "Welch's t test"


def test_trainings_that_share_what_is_compared(tmp_path: Path) -> None:
    """Visual prototypes of trainings from one backbone: no spread, and no warning of SciPy's."""
    first = [str(write_evaluation(tmp_path / f"a{i}", 0.7 + 0.01 * i)) for i in range(2)]
    second = [str(write_evaluation(tmp_path / f"b{i}", 0.6)) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compared = compare_groups(first, second)
    said = "B (learned gate): all 3 trainings have the same accuracy; they seem to share what"
    assert [note[: len(said)] for note in compared["results"][0]["notes"]] == [said]
    assert f"\n  {said}" in comparison_text(compared)
    assert compare_groups(first, second[:1])["results"][0]["notes"] == []
    over = {"x": checkpoint_interval([0.5, 0.5]), "y": checkpoint_interval([0.5, 0.501])}
    table = checkpoints_table([{"shot": 1, "over_checkpoints": over}])
    assert "\n1-shot x: all 2 trainings have the same accuracy" in table
    assert "1-shot y" not in table


def test_trainings_from_one_backbone_say_so(tmp_path: Path) -> None:
    """Their spread is that of meta-tuning, whatever is compared."""

    def write(side: str, origins: list[str | None]) -> list[str]:
        return [
            str(write_evaluation(tmp_path / f"{side}{i}", 0.6 + 0.01 * i, started_from=[origin]))
            for i, origin in enumerate(origins)
        ]

    one, apart = write("a", ["x", "x", "y"]), write("b", ["x", "y", None])
    compared = compare_groups(one, apart)
    said = "A (learned gate): 3 trainings start from 2 checkpoints: their spread understates"
    assert [note[: len(said)] for note in compared["results"][0]["notes"]] == [said]
    text = comparison_text(compared)
    assert f"\n  {said}" in text
    assert "(but see below)\n" in text
    assert "see below" not in comparison_text(compare_groups(one[1:], apart))
    over = {"x": checkpoint_interval([0.5, 0.6])}
    result = {"shot": 1, "over_checkpoints": over, "started_from": ["x", "x"]}
    said = (
        "\n2 trainings start from one checkpoint: their spread reflects repeated meta-tuning only"
    )
    assert said in checkpoints_table([result])


def test_each_checkpoint_counts_once_whatever_run_it_is_in(tmp_path: Path) -> None:
    """Both verdicts, and those by class, are about one and the same mean."""
    three = write_evaluation(tmp_path / "three", 0.7, checkpoints=3)
    one, other = (write_evaluation(tmp_path / n, r) for n, r in (("one", 0.5), ("other", 0.6)))
    again = write_evaluation(tmp_path / "again", 0.62)
    row = compare_groups([str(three), str(one)], [str(other), str(again)])["results"][0]
    assert row["checkpoints"] == [4, 2]
    right = []
    for run in (three, one):
        record = EpisodeRecord.read(run / "episodes-1shot.npz")
        right += list((record.predictions["learned gate"] == record.labels).double())
    assert row["accuracies"][0] == pytest.approx(torch.stack(right).mean().item())
    assert row["over_checkpoints"]["difference"] == pytest.approx(row["difference"])
    weights = [found["episodes"] for found in row["classes"]]
    classes = [found["accuracies"][0] for found in row["classes"]]
    assert row["accuracies"][0] == pytest.approx(np.average(classes, weights=weights))


def test_a_training_counts_once_a_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, hashes in (("a", ["x"]), ("b", ["y"]), ("again", ["z", "x"]), ("old", [None])):
        write_evaluation(tmp_path / name, 0.6, checkpoints_sha256=hashes)
    shutil.copytree("a", "a-copy")
    write_evaluation(tmp_path / "demo", 0.6)  # its summary has no hashes
    for one, two in (("a", "a-copy"), ("a", "again"), ("old", "./old"), ("demo", "demo/")):
        for sides in ([f"{one},b,{two}", "b"], ["b", f"{one},{two}"]):
            assert main(["compare", *sides]) == 2
            said = capsys.readouterr().err
            assert f"compare: {one} and {two} evaluate the same checkpoint" in said
    for name in ("best", "last"):
        file = f"{tmp_path}/run/checkpoints/metatune-{name}.safetensors"
        write_evaluation(tmp_path / name, 0.6, checkpoint=file, checkpoints_sha256=[name])
    assert main(["compare", "a,best,last", "b"]) == 2
    assert "best and last evaluate the same checkpoint, or the best" in capsys.readouterr().err
    # on both sides: two methods of one training
    assert main(["compare", "a,b,old", "a,b,demo", "--method_b=visual prototypes"]) == 0


def test_holm_is_the_step_down_procedure() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match="two or more runs"):
        unpaired_difference([0.5], [0.4, 0.3])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": "plants"}, "different data sets (animals and plants)"),
        (
            {"episodes_sha256": "x", "seed": 3},
            "seeds (0 and 3: evaluate that of seed 3 again with --seed 0)",
        ),
        ({"episodes_sha256": "x"}, "different episode lists"),
        ({"query": 15}, "different numbers of queries (6 and 15)"),
        ({"images_sha256": "x"}, "different images (renamed, added or taken away) (i and x)"),
    ],
)
def test_other_episodes_are_refused(tmp_path: Path, changes: dict, reason: str) -> None:
    one = write_evaluation(tmp_path / "one", 0.6)
    two = write_evaluation(tmp_path / "two", 0.6, **changes)
    with pytest.raises(NotComparableError, match="not comparable") as caught:
        compare_groups([str(one)], [str(two)])
    assert reason in str(caught.value)


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """It does not say which images it is of, so that it cannot be paired."""
    one, old = (write_evaluation(tmp_path / name, 0.6) for name in ("one", "old"))
    summary = json.loads((old / "summary.json").read_text())
    del summary["results"][0]["images_sha256"]
    (old / "summary.json").write_text(json.dumps(summary))
    for sides in ((one, old), (old, one)):
        with pytest.raises(NotComparableError, match="images_sha256 was not recorded"):
            compare_groups([str(sides[0])], [str(sides[1])])


def test_other_pixels_under_the_same_names_are_told(tmp_path: Path) -> None:
    def write(name: str, size: int, pixels: str) -> Path:
        return write_evaluation(tmp_path / name, 0.6, image_size=size, pixels_sha256=pixels)

    one, other, large = write("one", 84, "x"), write("other", 84, "y"), write("large", 224, "z")
    with pytest.warns(UserWarning, match="one and .*other: the images have the same names but"):
        compare_groups([str(one)], [str(other)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_groups([str(one)], [str(large)])
        compare_groups([str(one)], [str(write_evaluation(tmp_path / "unknown", 0.6))])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = (write_evaluation(tmp_path / n, r) for n, r in (("good", 0.7), ("bad", 0.6)))
    output = tmp_path / "out.json"
    assert main(["compare", str(good), str(bad), "--classes=2", f"--output={output}"]) == 0
    text = capsys.readouterr().out
    assert "A is better than B" in text
    assert "and 4 more" in text
    assert "not of training again" in text
    saved = json.loads(output.read_text())
    assert main(["compare", str(good), str(bad), f"--output={output}"]) == 1
    assert "out.json: exists; give --output another name" in capsys.readouterr().err
    assert main(["compare", str(good), str(bad), f"--output={output}", "--overwrite"]) == 0
    capsys.readouterr()
    assert saved["results"][0]["verdict"] in text
    assert main(["compare", str(good), str(good), "--method_b=visual prototypes"]) == 0
    assert "visual prototypes" in capsys.readouterr().out
    for arguments, status, words in (
        ([str(good)], 2, "run_b"),
        ([str(good), ","], 2, "two run folders"),
        ([str(good), f"{bad},{bad}"], 2, "twice"),
        ([str(good), str(tmp_path / "none")], 1, "no finished evaluation"),
        ([str(good), str(bad), "--method_b=magic"], 1, "no predictions of 'magic'"),
        ([str(good), str(write_evaluation(tmp_path / "5", 0.6, shot=5))], 1, "not comparable"),
    ):
        assert main(["compare", *arguments]) == status
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("results", None, "no list of results"),
        ("results", [], "no list of results"),
        ("results", [5], "a result is 5, no mapping"),
        ("shot", [1], "a result has shot [1], which cannot be"),
        ("shot", -1, "a result has shot -1"),
        ("episodes", "200", "the 1-shot result has episodes '200'"),
        ("accuracy", float("nan"), "the 1-shot result has accuracy nan"),
        ("accuracy", 12, "the 1-shot result has accuracy 12"),
        ("ci95", float("inf"), "the 1-shot result has ci95 inf"),
        ("method", ["learned gate"], "the 1-shot result has method ['learned gate']"),
        ("methods", {"learned gate": {"ci95": 0.01}}, "the 1-shot result has methods {"),
        ("paired", {"a - b": {"difference": 0, "ci95": None, "p_value": -1}}, "has paired {"),
        ("checkpoints", [None], "the 1-shot result has checkpoints [None]"),
        ("fixed_alpha", "half", "the 1-shot result has fixed_alpha 'half'"),
    ],
)
def test_results_that_cannot_be_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any, words: str
) -> None:
    good, bad = (write_evaluation(tmp_path / name, 0.6) for name in ("good", "bad"))
    summary = json.loads((bad / "summary.json").read_text())
    (summary if key == "results" else summary["results"][0])[key] = value
    (bad / "summary.json").write_text(json.dumps(summary))
    for sides in ((good, bad), (bad, good)):
        assert main(["compare", *map(str, sides)]) == 1
        said = capsys.readouterr().err
        assert f"{bad / 'summary.json'}: damaged (" in said
        assert words in said


def test_a_result_that_lacks_something_is_told(tmp_path: Path) -> None:
    good, bad = (write_evaluation(tmp_path / name, 0.6) for name in ("good", "bad"))
    summary = json.loads((bad / "summary.json").read_text())
    for key in ("shot", "method"):
        del summary["results"][0][key]
    (bad / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(OutputError, match=r"damaged \(a result lacks shot, method\)"):
        compare_groups([str(good)], [str(bad)])


def test_predictions_on_other_episodes_are_not_paired(tmp_path: Path) -> None:
    """A summary may lie beside the predictions of another run, copied or left there."""
    one, two = (write_evaluation(tmp_path / name, 0.6) for name in ("one", "two"))
    other = write_evaluation(tmp_path / "other", 0.6, seed=4)
    shutil.copy(other / "episodes-1shot.npz", two)
    for sides in ((one, two), (two, one)):
        with pytest.raises(OutputError, match="predictions on other episodes than their summ"):
            compare_groups([str(sides[0])], [str(sides[1])])
    with pytest.raises(OutputError, match="predictions on other episodes than their summaries"):
        compare_groups([str(one), str(two)], [str(one)])


@pytest.mark.parametrize("content", ["5", '{"classes": null}'])
def test_damaged_class_names_become_numbers(tmp_path: Path, content: str) -> None:
    runs = [str(write_evaluation(tmp_path / name, 0.5)) for name in "ab"]
    Path(runs[0], "confusion-1shot.json").write_text(content)
    compared = compare_groups(runs[:1], runs[1:])
    assert compared["results"][0]["classes"][0]["name"].startswith("class ")


def test_infinite_intervals_are_null_in_json(tmp_path: Path) -> None:
    """JSON has no infinity, and readers other than Python's refuse it."""
    one = write_evaluation(tmp_path / "one", 0.6)
    record = EpisodeRecord.read(one / "episodes-1shot.npz")
    assert record.alphas is not None
    EpisodeRecord(
        record.classes[:1],
        record.labels[:1],
        {name: found[:, :1] for name, found in record.predictions.items()},
    ).write(one / "episodes-1shot.npz")
    output = tmp_path / "out.json"
    assert main(["compare", str(one), str(one), f"--output={output}"]) == 0
    assert "Infinity" not in output.read_text()


def test_comparing_two_runs(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(evaluate_arguments(backbone, tmp_path / "a")) == 0
    assert main(evaluate_arguments(backbone, tmp_path / "b", f"--compare={tmp_path / 'a'}")) == 0
    assert "no difference shown: A - B = +0.0 points" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "b/summary.json").read_text())["compared"]["results"]
    assert (row["difference"], row["ci95"], row["p_value"]) == (0.0, 0.0, 1.0)
    seed = evaluate_arguments(backbone, tmp_path / "c", "--seed=1", f"--compare={tmp_path / 'a'}")
    assert main(seed) == 1
    assert "this evaluation and" in (said := capsys.readouterr().err)
    assert "a, 1-shot: different episode lists" in said
    other = evaluate_arguments(
        backbone, tmp_path / "d", "--evaluate.way=3", f"--compare={tmp_path / 'a'}"
    )
    assert main(other) == 1
    assert "1-shot: different numbers of classes in an episode (3 and 5)" in capsys.readouterr().err
    wrong = evaluate_arguments(backbone, tmp_path / "d", f"--compare={tmp_path / 'none'}")
    assert main(wrong) == 1
    assert "no finished evaluation here" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "d").exists()
    whole = (tmp_path / "a/episodes-1shot.npz").read_bytes()
    for torn in (b"torn", whole[: len(whole) // 2]):
        (tmp_path / "a/episodes-1shot.npz").write_bytes(torn)
        with pytest.raises(OutputError, match="no readable predictions"):
            compare_groups([str(tmp_path / "b")], [str(tmp_path / "a")])
