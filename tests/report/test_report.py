"""The page's content: complete for a sound run, and plain about what is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla_fast.cli import main
from dvla_fast.report.scenes import _limits, _some
from tests.engine.runs import write_evaluation
from tests.test_cli import fails

Write = Callable[..., str]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def lose_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    edit(run / "summary.json", lambda summary: summary.update(checkpoint="gone.safetensors"))


def test_sound_run_is_shown_whole(demo: Path, page: Write) -> None:
    html = page(demo)
    for title in (
        *("Accuracy", "Paired differences", "Pre-training: loss", "Meta-tuning: accuracy"),
        *("Gate α over training", "α by episode, 1-shot, stage 2", "Reward", "Parts of the reward"),
        *("Advantage", "Entropy of the policy", "Variance of the policy gradient"),
        *("Confusion, 5-shot", "Accuracy by class", "Features before fusion"),
        *("Features after fusion", "the lowest accuracy of all", "Settings of demo"),
    ):
        assert title in html, title
    assert "No published numbers are known" in html
    assert "from one training seed" in html
    summary = json.loads((demo / "summary.json").read_text())
    assert f"{100 * summary['accuracy']:.2f} ± {100 * summary['ci95']:.2f}" in html
    assert html.count('class="points') >= 4
    assert len(re.findall(r"Attention of “", html)) > 40
    assert "http:" not in html
    assert "https:" not in html
    assert len(html) < 3_000_000


def test_chosen_episodes(demo: Path, page: Write) -> None:
    html = page(demo, options=("--shot=5", "--episodes=[3,99]"))
    assert re.findall(r'<h3 id="episode-(\d+)"', html) == ["3"]
    assert "5-shot. Grey: no more than even" in html
    assert "The list ends at episode 7" in html


def test_pictures_can_be_left_out(demo: Path, page: Write) -> None:
    html = page(demo, options=("--text_only", "--title=A & B"))
    assert "<title>A &amp; B</title>" in html
    assert "Features before fusion" not in html
    assert "were left out" in html


def test_run_cut_off_half_way(copied: Path, page: Write) -> None:
    (copied / "summary.json").unlink()
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    rows = [line for line in lines if '"evaluate"' not in line and '"step": 3' not in line]
    (copied / "metrics.jsonl").write_text("\n".join(rows) + '\n{"stage": "meta')
    for path in copied.glob("*.npz"):
        path.unlink()
    html = page(copied)
    assert "cut off half-way, or still going: meta-tuning logged 2 of 3 epochs" in html
    assert "the evaluation did not finish" in html
    assert "Meta-tuning: loss" in html
    assert "No run has a finished evaluation" in html
    assert "one of the first of the list" in html  # episodes can be drawn without a record


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: lose_checkpoint(run), "the checkpoint gone.safetensors is not there"),
        (lambda run: (run / "episodes-1shot.npz").write_bytes(b"PK"), "missing or damaged"),
        (lambda run: (run / "confusion-1shot.json").unlink(), "class names were not found"),
        (lambda run: (run / "summary.json").write_text("{"), "summary.json is damaged"),
        (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml is missing or damaged"),
        (
            lambda run: (run / "config.yaml").write_text("data: 5\nmodel: []\n"),
            "config.yaml is damaged: no settings under data.",
        ),
        (
            lambda run: edit(run / "summary.json", lambda s: s["results"][0].update(accuracy=12)),
            "summary.json is damaged (the 1-shot result has accuracy 12, which cannot be): that",
        ),
        (
            lambda run: edit(run / "summary.json", lambda s: s["results"][1].update(leaks=[5])),
            "summary.json is damaged (the 5-shot result has leaks [5]",
        ),
        (
            lambda run: edit(run / "summary.json", lambda s: s.update(results=5)),
            "summary.json is damaged (no list of results): results are not shown",
        ),
        (lambda run: edit(run / "summary.json", lambda s: s.update(gated_layers=[5])), "stage 2,"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no epoch of meta-tuning was logged"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe"), "metrics.jsonl cannot be"),
    ],
)
def test_damaged_runs(
    copied: Path, page: Write, damage: Callable[[Path], object], words: str
) -> None:
    damage(copied)
    assert words in page(copied)


@pytest.mark.parametrize("seed", ["x", "[1]", "null", "-1", "1.5"])
def test_seeds_that_cannot_be(copied: Path, page: Write, seed: str) -> None:
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(re.sub(r"(?m)^seed: .*", f"seed: {seed}", text))
    assert "are missing: its config.yaml has the seed" in page(copied)


@pytest.mark.parametrize("file", ["summary.json", "config.yaml"])
def test_seeds_of_any_kind_are_compared(tmp_path: Path, page: Write, file: str) -> None:
    runs = [write_evaluation(tmp_path / name, 0.6) for name in "ab"]
    for run in runs:
        edit(run / "summary.json", lambda summary: summary.pop("seed"))
    if file == "summary.json":
        edit(runs[0] / file, lambda summary: summary.update(seed=[1]))
    else:
        (runs[0] / file).write_text("seed: {a: 1}\n")
    assert "Accuracy" in page(*runs, options=("--text_only",))


def test_errors_of_ours_are_not_notes(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("dvla_fast.report.scenes._Studio.pictures", broken)
    output = copied.parent / "page.html"
    assert "TypeError: a bug" in fails(["report", str(copied), f"--output={output}"], capsys)
    assert not output.exists()


def test_values_that_are_no_numbers_are_left_out_of_curves(copied: Path, page: Write) -> None:
    """A diverged run logs null; other programs write NaN."""
    rows = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    rows[0]["loss"], rows[-2]["alpha_mean"] = None, [float("nan"), 0.5]
    # these have no value at times: a single episode no interval, tied pairs no better one
    rows[-1]["ci95"] = rows[-3]["preference_accuracy"] = None
    (copied / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = page(copied, options=("--text_only",))
    assert "values of loss, alpha_mean that are not the finite numbers that a run logs" in html


@pytest.mark.parametrize("what", ["labels", "methods", "names"])
def test_records_of_another_evaluation(copied: Path, page: Write, what: str) -> None:
    path = copied / "episodes-1shot.npz"
    with np.load(path) as file:
        arrays = dict(file)
    if what == "names":
        (copied / "confusion-1shot.json").write_text('{"classes": ["a"]}')
    else:
        arrays[what] = arrays[what][:, :-1] if what == "labels" else np.array(["x"] * 4)
        np.savez(path, **arrays)
    said = "class names were not found" if what == "names" else "is missing or damaged"
    assert f"1-shot: {'' if what == 'names' else path.name + ' '}{said}" in page(
        copied, options=("--text_only",)
    )


def test_missing_images(copied: Path, page: Write) -> None:
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("dataset: digits", "dataset: /no/such/place"))
    html = page(copied)
    assert "Features and attention of run are missing: /no/such/place" in html
    assert "See the notes at the top" in html
    assert "Reward" in html


@pytest.mark.parametrize("key", ["episodes_sha256", "images_sha256"])
def test_other_images_than_the_runs(copied: Path, page: Write, key: str) -> None:
    """Episodes are drawn only if the images there give the episodes that the run met."""

    def change(summary: Any) -> None:
        summary["results"][0][key] = "0" * 64

    edit(copied / "summary.json", change)
    assert "give other episodes than the run met" in page(copied)


def test_runs_that_cannot_be_compared(
    tmp_path: Path, page: Write, recwarn: pytest.WarningsRecorder
) -> None:
    one = write_evaluation(tmp_path / "one", 0.7, pixels_sha256="x")
    two = write_evaluation(tmp_path / "two", 0.6, pixels_sha256="x")
    other = write_evaluation(tmp_path / "other", 0.6, seed=4)
    edited = write_evaluation(tmp_path / "edited", 0.6, pixels_sha256="y")
    plants = write_evaluation(tmp_path / "plants", 0.6, dataset="plants")
    html = page(one, two, other, edited, plants, tmp_path / "none")
    assert "one is better than two by" in html
    assert "one and other are not comparable episode by episode: different episode lists" in html
    assert "one and edited: the images have the same names but other pixels" in html
    assert not [item for item in recwarn if "other pixels" in str(item.message)]  # said once
    assert "one and two: the images" not in html
    assert "The runs are of different data sets (animals, plants)" in html
    assert "none: no run here" in html
    assert "α by class, 1-shot, stage 2, block 1" in html  # six classes, five an episode
    assert "is not there" in html  # the checkpoints


def test_two_data_sets_of_one_name_have_a_chart_each(tmp_path: Path, page: Write) -> None:
    one, two = (write_evaluation(tmp_path / name, 0.7) for name in ("one", "two"))
    other = write_evaluation(tmp_path / "other", 0.6, images_sha256="j", split_sha256="t")
    html = page(one, two, options=("--text_only",))
    assert "animals, novel classes, 5-way 1-shot<" in html
    html = page(one, two, other, options=("--text_only",))
    assert "animals, novel classes, 5-way 1-shot, images of one, two<" in html
    assert "animals, novel classes, 5-way 1-shot, images of other<" in html
    assert "one and other are not comparable episode by episode: splits of different" in html


def test_a_page_is_not_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_evaluation(tmp_path / "one", 0.7)
    (tmp_path / "report.html").write_text("an earlier page")
    assert main(["report", "one", "--text_only"]) == 1
    assert "report.html: exists; give --output another name, or --over" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "an earlier page"
    assert main(["report", "one", "--text_only", "--overwrite"]) == 0
    assert "an earlier page" not in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dvla_fast.report.page.read_runs", None)
    monkeypatch.setattr("dvla_fast.engine.compare.compare_groups", None)
    long = tmp_path / f"{'n' * 251}.html"  # a byte more than a name may have
    for arguments in (["report", str(tmp_path)], ["compare", "a", "b"]):
        assert main([*arguments, f"--output={long}"]) == 1
        assert "cannot write (File name too long)" in capsys.readouterr().err


def test_a_device_that_is_not_known(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    arguments = ["report", str(demo), f"--output={output}", "--device=tpu"]
    assert "device 'tpu' is unknown" in fails(arguments, capsys, status=2)
    assert not output.exists()


def test_nothing_to_show_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_evaluation(tmp_path / "one", 0.7)
    (tmp_path / "ablation" / "cells").mkdir(parents=True)
    (tmp_path / "ablation" / "config.yaml").write_text("ablate: {seeds: 2}")
    for arguments, status, words in (
        ([str(tmp_path / "none")], 1, "none: no run here"),
        ([str(tmp_path / "ablation")], 1, "an ablation, which is no single run; its table"),
        ([], 2, "runs"),
        ([str(one), f"--output={tmp_path}"], 1, "is a folder; give --output the name of"),
        ([str(one), "--episodes=[-1]"], 2, "numbered from 0"),
    ):
        assert main(["report", *arguments]) == status
        message = capsys.readouterr().err
        assert words in message
        assert ("--output" in message) == ("--output" in words)
        assert not (Path.cwd() / "report.html").exists()


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "queries of classes that training never saw got"),
        ({"split": "base"}, "queries of the classes that training works on (split base) got"),
        ({"split": "monitor"}, "by which checkpoints are selected"),
        ({"split": "base", "cross_domain": True}, "the split base of another data set than"),
    ],
)
def test_accuracy_says_whose_queries(
    tmp_path: Path, page: Write, facts: dict[str, Any], words: str
) -> None:
    html = page(write_evaluation(tmp_path / "run", 0.7, **facts), options=("--text_only",))
    assert words in html
    assert ("that training never saw" in html) == (facts == {})
    assert ("5-way 1-shot, split " in html) == bool(facts)


def test_ablation_beside_a_run(tmp_path: Path, page: Write) -> None:
    one = write_evaluation(tmp_path / "one", 0.7)
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "ablation.json").write_text("{}")
    html = page(one, tmp_path / "ablation", options=("--text_only",))
    assert "its table and plot are ablation.md and ablation.png there" in html
    assert "did not finish" not in html


def test_foreign_text_stays_text(tmp_path: Path, page: Write) -> None:
    run = write_evaluation(tmp_path / "<b>run&amp;", 0.7, dataset="<script>alert(1)</script>")
    names = ["</svg><script>", '"quoted"', "a&b", "d", "e", "f"]
    edit(run / "confusion-1shot.json", lambda content: content.update(classes=names))
    html = page(run)
    assert html.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in html
    assert "&lt;/svg&gt;&lt;script&gt;" in html


def test_several_checkpoints(tmp_path: Path, page: Write) -> None:
    over = {"learned gate": {"accuracies": [0.7, 0.74], "accuracy": 0.72, "ci95": 0.254}}
    run = write_evaluation(tmp_path / "two", 0.72, checkpoints=2, over_checkpoints=over)
    edit(run / "summary.json", lambda s: s["results"][0].update(checkpoints=["a", "b"]))
    html = page(run)
    assert "two, over 2 checkpoints: 72.00 ± 25.40 % (70.0, 74.0)" in html
    assert "from one training seed" not in html


def test_trainings_of_one_recipe(tmp_path: Path, page: Write) -> None:
    """Their mean and t interval; a training counts once, and another recipe not at all."""
    recipe = {
        **{"kind": "metatune", "dataset": "animals", "normalisation": None, "pretrained": ""},
        **{"model": {"policy": "beta"}, "semantics": {}, "training": [{"stage": "metatune"}]},
    }

    def evaluation(name: str, accuracy: float, training: str, **changes: Any) -> Path:
        facts = {"accuracy": accuracy, "checkpoint": f"/{training}.safetensors", "recipe": recipe}
        return write_evaluation(tmp_path / name, accuracy, **{**facts, **changes})

    runs = [
        evaluation("a", 0.5, "one/metatune-best"),
        evaluation("b", 0.53, "two/metatune-best"),
        evaluation("again", 0.9, "two/metatune-last"),
        evaluation("c", 0.56, "three/metatune-best"),
        evaluation("mlp", 0.8, "four/x", recipe={**recipe, "model": {"policy": "mlp"}}),
        evaluation("list", 0.8, "five/x", episodes_sha256="another"),
        evaluation("damaged", 0.8, "six/x", recipe={"model": 3}),
        evaluation("untold", 0.8, "seven/x", recipe=None),
    ]
    html = page(*runs)
    half = 4.302653 * 3 / 3**0.5  # t(0.975, 2) · s / √3
    said = f"over 3 trainings of one recipe (a, b, c): 53.00 ± {half:.2f} % (50.0, 53.0, 56.0)"
    assert f"5-way 1-shot, learned gate, {said}; this t interval" in html
    assert html.count("trainings of one recipe") == 1
    assert "trainings of one recipe" not in page(runs[0], runs[4])
    alone = page(runs[0], runs[3])  # neither of two seeds is the better one
    assert "is better than" not in alone
    assert "no difference shown" not in alone
    assert "mlp is better than a" in page(runs[0], runs[3], runs[4])


def test_leaks_are_said(tmp_path: Path, page: Write) -> None:
    leaks = {"verdict": "leak", "seen_queries": 12, "queries": 6000}
    html = page(write_evaluation(tmp_path / "run", 0.7, leaks=leaks))
    assert "12 of 6000 queries are images that the texts were written from" in html


def test_what_is_open_about_trained_classes_is_said(tmp_path: Path, page: Write) -> None:
    known = {"stage": "pretrain", "dataset": "birds", "classes": 64}
    silent = {"stage": "metatune", "dataset": "birds", "classes": None}
    facts = {"split": "novel", "trained_on": [], "same_name": [], "stages": [known]}
    twins = [f"bird {number}" for number in range(7)]
    cases = {
        "clean": {},
        "base classes": {},
        "same names": {"same_name": twins},
        "unknown": {"stages": [known, silent]},
    }
    for verdict, changes in cases.items():
        classes = {**facts, **changes, "verdict": verdict}
        html = page(write_evaluation(tmp_path / verdict, 0.7, leaks={"classes": classes}))
        assert (
            "7 class(es) of the split novel (bird 0, bird 1, bird 2, bird 3, bird 4, ...) have the"
            " names of classes that the checkpoint was trained on (birds)" in html
        ) == (verdict == "same names")
        assert (
            "Whether training saw classes of the split novel is not known: a stage (metatune)"
            in html
        ) == (verdict == "unknown")


def test_texts_that_the_gates_did_not_learn_with(tmp_path: Path, page: Write) -> None:
    differences = {
        "top_k": {"trained": 0, "evaluated": 3},
        "bank_sha256": {"trained": "a", "evaluated": "b"},
    }
    html = page(write_evaluation(tmp_path / "run", 0.7, text_differences=differences))
    said = "The gates learned with other texts: top_k was 0, now 3; another bank, or a bank that"
    assert said in html
    html = page(write_evaluation(tmp_path / "same", 0.7, text_differences={}))
    assert "The gates learned with other texts" not in html


def test_an_interval_of_zero_is_one(tmp_path: Path, page: Write) -> None:
    assert "<small> ± 0.0 %" in page(write_evaluation(tmp_path / "zero", 0.7, ci95=0.0))
    assert "<small> ± ? %" in page(write_evaluation(tmp_path / "one", 0.7, ci95=None))


def test_the_headline_is_in_percent(tmp_path: Path, page: Write) -> None:
    html = page(write_evaluation(tmp_path / "run", 0.7, accuracy=0.7654, ci95=0.0123))
    assert re.search(r"76\.5\s*<small> ± 1\.2 %", html)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("report", "compare"):
        assert main([name, "--help"]) == 0
        assert f"  dvla-fast {name} runs/result" in capsys.readouterr().out


def test_even_attention_has_no_colour() -> None:
    """A pattern of a few hundredths must not look like one that means something."""
    assert _limits(torch.full((3, 16), 1 / 16)) == pytest.approx((1 / 16, 1.5 / 16))
    assert _limits(torch.eye(4)) == pytest.approx((0.25, 1.0))


def test_wrong_queries_come_first_and_from_different_classes() -> None:
    right = [True, False, False, True, False]
    assert _some(right, [0, 0, 1, 2, 0]) == [1, 2, 3, 0]
    assert _some([True, True], [0, 0]) == [0, 1]
    assert _some([False] * 3, [0, 0, 0]) == [0, 1]
