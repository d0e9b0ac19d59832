"""The progress display: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console

from dvla_fast.engine.bars import live_bars
from dvla_fast.engine.progress import Progress


def test_calls_with_what_is_done_drive_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress({"read": 0.5, "write": 0.5}) as progress:
        for stage, done in (("read", 1), ("read", 4), ("write", 2)):
            progress.reach(stage, done, 4)
            progress.note(f"{done} of 4")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(", about .* left", "", line) for line in lines] == [
        "[ 12 %] read: 1 of 4", "[ 50 %] read: 4 of 4", "[ 75 %] write: 2 of 4"
    ]  # fmt: skip


def test_a_line_after_half_a_minute_of_silence(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Progress({"evaluate": 1.0}, clock=lambda: now[0]) as progress:
        progress.begin("evaluate", 100)

        def said(seconds: float, count: int = 1) -> str:
            now[0] += seconds
            progress.advance(count)
            return capsys.readouterr().err

        assert said(29.0) == ""
        assert said(1.0, 9) == "[ 10 %, about 270 s left] evaluate\n"
        assert said(29.0, 0) == ""
        progress.note("5-shot 80 %")
        assert capsys.readouterr().err.endswith("evaluate: 5-shot 80 %\n")
        assert said(29.0, 0) == ""
        now[0] += 2.0
        progress.tick("32 of 640 images")
        assert capsys.readouterr().err == "[ 10 %, about 810 s left] evaluate: 32 of 640 images\n"
        progress.tick("64 of 640 images")
        assert said(1.0) == ""
    silent = Progress({"evaluate": 1.0}, enabled=False, clock=lambda: now[0])
    silent.begin("evaluate", 2)
    now[0] += 100.0
    silent.advance()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("told", ["begin", "skip", "reach"])
def test_work_of_an_earlier_process_says_nothing_of_the_time_left(told: str) -> None:
    now = [0.0]
    progress = Progress({"train": 0.5, "test": 0.5}, enabled=False, clock=lambda: now[0])
    if told == "reach":
        progress.reach("train", 25, 100, 25)
        progress.reach("train", 60, 100, 60)
    else:
        progress.begin("train", 100, done=60 if told == "begin" else 0)
    if told == "skip":
        progress.skip(60)
    assert progress.fraction() == pytest.approx(0.3)
    assert progress.seconds_left() is None
    now[0] = 30.0
    # A tenth of the run in half a minute, and six tenths are left.
    progress.reach("train", 80, 100, 60) if told == "reach" else progress.advance(20)
    assert progress.seconds_left() == pytest.approx(180.0)


def test_progress_counts_the_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress({"first": 0.25, "second": 0.75}) as progress:
        progress.begin("first", 10, done=4)
        assert progress.fraction() == pytest.approx(0.1)
        progress.advance(6)
        progress.begin("second", 4)
        assert progress.fraction() == pytest.approx(0.25)
        progress.advance(2)
        progress.note("half way")
        assert progress.fraction() == pytest.approx(0.625)
    assert "second: half way" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_notes_are_shown_as_they_are(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first stage too, and with brackets, which mean something to rich."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Progress({"stage": 1.0}) as progress:
        progress.note("the gates of runs/[a] learn on")
        progress.begin("stage", 1)
        progress.note("failed: no [/such] tag")
        progress.advance()
    said = capsys.readouterr().err
    assert "the gates of runs/[a] learn on" in said
    assert "None" not in said
    assert "failed: no [/such]" in said


@pytest.mark.parametrize("width", [40, 80, 100, 160])
def test_bars_tell_how_far_it_is_whatever_the_width(width: int) -> None:
    console = Console(width=width, color_system=None, file=io.StringIO(), force_terminal=True)
    bars = live_bars(console)
    figures = "epoch 5/20  loss 3.135  accuracy 4.2%  held-out 5-way 1-shot 24.4%"
    bars.add_task("pre-train", total=20, completed=5, note=figures)
    console.print(bars.get_renderable())
    (line,) = console.file.getvalue().splitlines()
    assert re.search(r"^pre\S* .* +25% 0:00:00 left -:--:-- ", line)
    assert (figures[:26] in line) == (width >= 80)
    assert (figures in line) == (width == 160)
