"""How the command line takes its words and ends: usage, settings files, interruptions, pipes."""

from __future__ import annotations

import builtins
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dvla_fast.cli import _parse, main
from dvla_fast.runners import RUNNERS
from dvla_fast.terminal import speaking
from tests.test_cli import TINY_PRETRAIN, fails

COMMANDS = ["demo", "pretrain", "metatune", "evaluate", "predict", "doctor"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["dmeo"],
        ["demo", "--no-such-option"],
        ["demo", "--pretrain.epochs", "many"],
        ["demo", "--config", "missing.yaml"],
        ["demo", "--pretrain.epochs", "0"],
        ["demo", "--resume"],
        ["doctor", "--loud"],
        ["pretrain", "--model.width", "7"],
        ["pretrain", "--device", "tpu"],
    ],
)
def test_wrong_usage_is_status_2(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert "error" in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "--seed=20000000000000000000"], "seed: expected 0 to 9223372036854775807"),
        (["semantics", "build", "--seed=20000000000000000000"], "seed: expected 0 to 92233720368"),
        (["demo", "--seed=5000000000", "--evaluate.episode_list=authors"], "--seed 5000000000: "),
        (["demo", "--evaluate.episode_list=mine"], "evaluate.episode_list: 'mine' is unknown"),
    ],
)
def test_impossible_episodes_are_found_before_the_work(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in fails(arguments, capsys, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "start"), [("0", "error: "), ("3", "error (process 3): ")])
def test_errors_of_several_processes(
    rank: str,
    start: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--resume", "--output=nowhere"]) == 1
    assert capsys.readouterr().err.startswith(f"{start}nowhere")
    Path("settings.yaml").write_text("pretrain: {epochs: 0}")
    for wrong in (["pretrain", "--config=settings.yaml"], ["dmeo"]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith(start)
    assert main(["pretrain", "--no-such-option=1"]) == 2
    said = capsys.readouterr().err
    assert "no-such-option" in said
    assert said.startswith("usage: " if rank == "0" else start)

    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dvla_fast.cli._parse", interrupted)
    assert main(["pretrain"]) == 130
    assert capsys.readouterr().err == ("error: interrupted\n" if rank == "0" else "")


def test_no_command_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without_jsonargparse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("jsonargparse"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_jsonargparse)
    assert "pip install 'dvla-fast[train]'" in fails(["demo"], capsys)
    assert main(["doctor"]) == 0


def test_later_settings_files_win(tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for seed, path in enumerate(files):
        path.write_text(f"seed: {seed + 5}")
    orders = [["--config", str(files[0]), f"--config={files[1]}"], [f"--config={files[1]}"]]
    for given in orders:
        assert _parse("pretrain", given).seed == 6
    assert _parse("pretrain", [*orders[0], "--config", str(files[0])]).seed == 5
    assert _parse("pretrain", [*orders[0], "--seed", "1"]).seed == 1


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--conf", "settings.yaml"]) == 2
    assert "--conf" in capsys.readouterr().err


def test_mistyped_options_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, words in (
        ("--pretrain.epoch=3", "did you mean --pretrain.epochs?"),
        ("--zzz=3", "nrecognized arguments: --zzz=3\n"),
    ):
        assert main(["pretrain", argument]) == 2
        assert words in capsys.readouterr().err
    two = ["pretrain", "--pretrain.val_episodes", "20", "--pretrain.validate_evry=1"]
    assert fails(two, capsys, 2).endswith(
        "; --pretrain.val_episodes: did you mean --pretrain.validation_episodes?"
        "; --pretrain.validate_evry: did you mean --pretrain.validate_every?"
    )
    assert fails(["evaluate", "--model.backbone", "clip"], capsys, 2).endswith(
        "clip; --model.backbone: not an option of evaluate, but of demo, pretrain, metatune, ablate"
    )
    for command, option, meant in (
        ("evaluate", "episodes", "--evaluate.episodes"),
        ("metatune", "template", "--semantics.template"),
    ):
        said = fails([command, f"--{option}", "5"], capsys, 2)
        assert said.endswith(f"5; --{option}: did you mean {meant}?")
    said = fails(["metatune", "--model.backbone_options", "{[1]: 2}"], capsys, 2)
    assert "model.backbone_options: expected 'name: value' entries, got '{[1]: 2}'" in said
    assert "evaluate.way: expected at least 2" in fails(["evaluate", "--evaluate.way=1"], capsys, 2)
    given = _parse("evaluate", ["--evaluate.shots", "5", "--checkpoints", "X.safetensors"])
    assert (given.evaluate.shots, given.checkpoints) == ([5], ["X.safetensors"])
    given = _parse("evaluate", ["--evaluate.shots=[1,5]", "--checkpoints=[a,b]"])
    assert (given.evaluate.shots, given.checkpoints) == ([1, 5], ["a", "b"])


@pytest.mark.parametrize(
    ("command", "name", "value", "words"),
    [
        ("pretrain", "pretrain.epochs", "ten", "expected int, got 'ten'"),
        ("pretrain", "pretrain.lr", "abc", "expected float, got 'abc'"),
        ("pretrain", "pretrain.augment.flip", "3", "expected bool, got 3"),
        ("pretrain", "model.backbone_options", "3", "expected 'name: value' entries, got 3"),
        ("ablate", "ablate.seeds", "[0,1]", "expected int, got [0, 1]"),
        ("evaluate", "evaluate.shots", "1,2", "expected int{}, got '1,2'"),
    ],
)
def test_a_wrong_type_reads_alike_on_the_command_line_and_in_a_file(
    command: str,
    name: str,
    value: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = fails([command, f"--{name}", value], capsys, 2)
    either = words.format(", or a list such as [A,B] without blanks")
    assert said == f"error: command line: {name}: {either}"
    content = yaml.safe_load(value)
    for part in reversed(name.split(".")):
        content = {part: content}
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(content))
    said = fails([command, f"--config={file}"], capsys, 2)
    assert said == f"error: {file}: {name}: {words.format('')}"


@pytest.mark.parametrize("arguments", [["evaluate", "--help"], ["pretrain", "--no-such-option"]])
def test_help_and_wrong_options_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from dvla_fast.cli import main; main(sys.argv[1:]);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert arguments[0] in done.stdout + done.stderr


def test_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 130, and "--resume" only where there is a run to continue."""
    output = tmp_path / "run"
    arguments = ["pretrain", f"--output={output}", *TINY_PRETRAIN]

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dvla_fast.engine.pretrain.build_data", stop)
        message = fails(arguments, capsys, 130)
    assert "nothing is kept" in message
    assert "resume" not in message
    with monkeypatch.context() as patch:
        patch.setattr("dvla_fast.engine.pretrain.Epoch.__call__", stop)
        message = fails(arguments, capsys, 130)
    assert f"continue: dvla-fast pretrain --resume --output {output}" in message
    with monkeypatch.context() as patch:
        patch.setattr("dvla_fast.doctor.report", stop)
        assert fails(["doctor"], capsys, 130) == "error: interrupted"
    with monkeypatch.context() as patch:
        patch.setattr("dvla_fast.data.prepare_cache", stop)
        message = fails(["data", "prepare", "photos", f"--output={output}"], capsys, 130)
        assert message == "error: interrupted; the same command continues"
    with monkeypatch.context() as patch:
        patch.setattr("dvla_fast.engine.bank_commands.load_bank", stop)
        message = fails(["semantics", "encode", "digits"], capsys, 130)
        assert message == "error: interrupted; the same command continues"
        for command in (["show", "digits"], ["diff", "shapes", "shapes-true"]):
            assert fails(["semantics", *command], capsys, 130) == "error: interrupted"


def test_output_that_nobody_reads_on() -> None:
    code = (
        "import os, sys; from dvla_fast.cli import main; sys.stdin.read();"
        "sys.argv[1:] = ['--help']; sys.exit(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdin
        assert process.stderr
        process.stdout.close()  # before it writes
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_full_disk_wherever_it_is_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(config: Any) -> int:
        with open("/dev/full", "w") as stream:
            stream.write("x")
        return 0

    monkeypatch.setitem(RUNNERS, "compare", full)
    message = fails(["compare", "a", "b"], capsys)
    assert "the disk is full" in message
    assert "free space and run the same command again, a run that has begun with --res" in message


def test_bad_data_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    arguments = ["pretrain", f"--data.dataset={tmp_path / 'none'}", f"--output={output}"]
    assert "none: no such folder" in fails(arguments, capsys)
    (tmp_path / "empty").mkdir()
    arguments = ["pretrain", f"--data.dataset={tmp_path / 'empty'}", f"--output={output}"]
    assert "data.image_size: " in fails(arguments, capsys, 2)
    arguments.append("--data.image_size=16")
    assert "no data set here" in fails(arguments, capsys)
    assert not output.exists()


def test_unwritable_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    message = fails(["pretrain", f"--output={tmp_path / 'file' / 'run'}"], capsys)
    assert "cannot write the run here" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no such folder"):
        main(["pretrain", "--debug", f"--data.dataset={tmp_path / 'none'}"])


def test_data_check_and_prepare_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    assert "cub_100_50_50" in text
    for name in ("check", "prepare"):
        assert f"data {name}" in text
        assert main(["data", name, "--help"]) == 0
        text_of_one = capsys.readouterr().out
        assert f"  dvla-fast data {name}" in text_of_one
        for option in ("PATH", "--config", "--splits", "--debug"):
            assert option in text_of_one


@pytest.mark.parametrize(
    "arguments",
    [["data"], ["data", "chekc"], ["data", "check"], ["data", "prepare", "photos"]],
)
def test_wrong_data_usage_is_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "error" in captured.err or "usage" in captured.out


def test_letters_that_a_terminal_lacks_end_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of an hour are printed last."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    with speaking():
        print("α 0.5 ± 0.1", flush=True)
    assert written.getvalue() == b"? 0.5 \xb1 0.1\n"


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in COMMANDS:
        assert name in overview
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"  dvla-fast {name}" in text
        if name not in ("doctor", "predict"):  # no runs
            for option in (
                "--config", "--print_settings", "--seed", "--resume", "--debug", "--output",
            ):  # fmt: skip
                assert option in text


def test_settings_are_printed_as_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, ready for ``--config``; nothing is run or written."""
    output = tmp_path / "run"
    given = ["--metatune.epochs=7", "--data.dataset=shapes", f"--output={output}"]
    assert main(["metatune", *given, "--print_settings"]) == 0
    text = capsys.readouterr().out
    settings = yaml.safe_load(text)
    assert (settings["metatune"]["epochs"], settings["data"]["dataset"]) == (7, "shapes")
    assert settings["metatune"]["way"] == 5  # a default
    assert not output.exists()
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["metatune", f"--config={tmp_path / 'mine.yaml'}", "--print_settings"]) == 0
    assert capsys.readouterr().out == text


def test_doctor_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "extra 'train'" in text
