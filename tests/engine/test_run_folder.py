"""The run folder: it starts empty, belongs to one run, and reads as one after a resume."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dvla_fast.engine.config import DemoRun, EvaluateRun, MetatuneRun, PretrainRun
from dvla_fast.engine.demo import run_demo
from dvla_fast.engine.evaluate import run_evaluate
from dvla_fast.engine.metatune import run_metatune
from dvla_fast.engine.pretrain import run_pretrain
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.errors import OutputError

CONFIG = {"output": "x", "resume": False, "seed": 1, "pretrain": {"epochs": 3}}


def test_new_folder_holds_the_resolved_configuration(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run", CONFIG)
    assert folder.checkpoints.is_dir()
    assert "epochs: 3" in (folder.path / "config.yaml").read_text()


def test_another_run_is_never_overwritten(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", CONFIG)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(OutputError, match=r"already holds a run.*--resume"):
        RunFolder(tmp_path / "run", {**CONFIG, "seed": 2})
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_foreign_folder_and_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        RunFolder(tmp_path, CONFIG)
    with pytest.raises(OutputError, match="is a file"):
        RunFolder(tmp_path / "notes.txt", CONFIG)
    with pytest.raises(OutputError, match="cannot write the run here"):
        RunFolder(tmp_path / "notes.txt" / "run", CONFIG)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_killed_at_once_can_begin_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in (".lock", ".write-test-12", ".config.yaml.ab12.tmp"):
        (run / name).write_bytes(b"")
    RunFolder(run, CONFIG).close()
    (run / "config.yaml").unlink()
    (run / "checkpoints" / "pretrain-best.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="not empty"):
        RunFolder(run, CONFIG)


def test_what_a_kill_left_half_written_goes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunFolder(run, CONFIG).close()
    names = (".config.yaml.ab12.tmp", "checkpoints/.last.safetensors.ab12.tmp", ".write-test-12")
    for name in (*names, "notes.tmp"):
        (run / name).touch()
    RunFolder(run, CONFIG, resume=True, writes=False)
    assert all((run / name).exists() for name in names)
    RunFolder(run, CONFIG, resume=True)
    assert not any((run / name).exists() for name in names)
    assert (run / "notes.tmp").exists()


def test_one_process_writes_a_run(tmp_path: Path) -> None:
    """A lock is the file's, as it was opened: another opening here is like another process."""
    run = tmp_path / "run"
    folder = RunFolder(run, CONFIG)
    again = RunFolder(run, CONFIG, resume=True)  # this process knows its own
    with open(run / ".lock") as other:
        folder.close()
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        again.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OutputError, match="run: another process is writing this run; wait"):
            RunFolder(run, CONFIG, resume=True)
        RunFolder(run, CONFIG, resume=True, writes=False)  # the other processes of one run
        (run / "config.yaml").unlink()  # not yet written
        with pytest.raises(OutputError, match="run: another process is writing this run; wait"):
            RunFolder(run, CONFIG)


@pytest.mark.parametrize(
    ("run", "settings", "inside"),
    [
        (run_pretrain, PretrainRun, "pretrain.pretrain"),
        (run_metatune, MetatuneRun, "metatune.metatune"),
        (run_evaluate, EvaluateRun, "evaluate.Evaluation.evaluate"),
        (run_demo, DemoRun, "demo.pretrain"),
    ],
)
def test_a_run_that_fails_lets_go(
    run: Any, settings: Any, inside: str, backbone: str, tiny: DemoRun, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where its error, as in a notebook, outlives it."""
    ended: list[dict[str, int]] = []
    wandb = SimpleNamespace(finish=lambda **arguments: ended.append(arguments))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **arguments: wandb))
    config = settings(device="cpu", output=str(tmp_path / "run"), wandb="birds")
    for section in ("model", "evaluate"):
        if hasattr(config, section):
            setattr(config, section, getattr(tiny, section))
    if hasattr(config, "checkpoint"):
        config.checkpoint = backbone

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(f"dvla_fast.engine.{inside}", fail)
    with pytest.raises(RuntimeError, match="on purpose") as caught:
        run(config, quiet=True)
    with open(tmp_path / "run" / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert ended == [{"exit_code": 1}]
    assert caught.tb is not None  # and holds every variable of the run


def test_a_killed_run_lets_go(tmp_path: Path) -> None:
    program = (
        "import sys; from dvla_fast.engine.run_folder import RunFolder; "
        f"folder = RunFolder(sys.argv[1], {CONFIG!r}); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(OutputError, match="another process is writing"):
            RunFolder(tmp_path / "run", CONFIG, resume=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    RunFolder(tmp_path / "run", CONFIG, resume=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write the run here"):
        RunFolder(tmp_path / "run", CONFIG)
    tmp_path.chmod(0o700)


def test_resume_needs_a_run_with_the_same_settings(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no run to resume"):
        RunFolder(tmp_path / "run", CONFIG, resume=True)
    RunFolder(tmp_path / "run", CONFIG)
    RunFolder(tmp_path / "run", {**CONFIG, "resume": True}, resume=True)
    longer = {**CONFIG, "pretrain": {"epochs": 9}}
    with pytest.raises(OutputError, match=r"pretrain\.epochs: 3 -> 9.*begins anew, in another --o"):
        RunFolder(tmp_path / "run", longer, resume=True)
    with pytest.raises(OutputError, match=r"seed: 1 -> 2\); leave them out"):
        RunFolder(tmp_path / "run", {**CONFIG, "seed": 2}, resume=True)


def test_numbers_that_may_grow(tmp_path: Path) -> None:
    def resume(epochs: int, seed: int = 1) -> None:
        config = {**CONFIG, "seed": seed, "metatune": {"epochs": epochs}}
        RunFolder(tmp_path / "run", config, resume=True, grows=["metatune.epochs"])

    RunFolder(tmp_path / "run", {**CONFIG, "metatune": {"epochs": 3}})
    resume(5)
    record = tmp_path / "run" / "config.yaml"
    assert "metatune:\n  epochs: 5\n" in record.read_text()
    assert "pretrain:\n  epochs: 3\n" in record.read_text()
    resume(5)
    for settings, words in (((4,), r"metatune\.epochs: 5 -> 4"), ((6, 2), r"\(seed: 1 -> 2\)")):
        with pytest.raises(OutputError, match=words):
            resume(*settings)
    assert "metatune:\n  epochs: 5\n" in record.read_text()
    for edited in ("", "metatune:\n", "metatune: 5\n", "metatune: {epochs: five}\n"):  # by hand
        record.write_text(f"seed: 1\n{edited}")
        with pytest.raises(OutputError, match="cannot resume with other settings"):
            resume(6)


def test_settings_that_the_record_lacks(tmp_path: Path) -> None:
    """Those of a run that an earlier version began: they cannot be left out of the command."""
    RunFolder(tmp_path / "run", {**CONFIG, "metatune": {"lr": 0.1, "discount": 0.0}})
    record = tmp_path / "run" / "config.yaml"
    record.write_text(record.read_text().replace("  discount: 0.0\n", ""))
    with pytest.raises(OutputError) as caught:
        RunFolder(
            tmp_path / "run", {**CONFIG, "metatune": {"lr": 0.1, "discount": 0.0}}, resume=True
        )
    said = str(caught.value)
    assert "(metatune.discount: not recorded -> 0.0)" in said
    assert "another version began it, which did not record metatune.discount: continue" in said


def test_metrics_are_cut_to_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", CONFIG)
    for step in (1, 2, 3):
        folder.log("pretrain", step, loss=1.0 / step, parts=[1.0, 2.0])
    folder.log("metatune", 5, loss=0.5)
    with (folder.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "metat')  # what a kill in mid-write leaves
    folder.trim("pretrain", 2)
    assert [row["step"] for row in folder.rows("pretrain")] == [1, 2]
    assert [row["step"] for row in folder.rows("metatune")] == [5]
    folder.close()
    assert list((folder.path / "tensorboard").glob("events*"))


def test_a_full_disk_while_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    folder.log("stage", 1, loss=0.5)
    folder.close()
    os.symlink("/dev/full", tmp_path / "full")
    monkeypatch.setattr(folder, "_metrics", tmp_path / "full")
    with pytest.raises(OutputError, match=r"full: cannot write \(No space.*continue with --resume"):
        folder.log("stage", 2, loss=0.4)
    resumed = RunFolder(tmp_path / "run", {"seed": 0}, resume=True)
    assert [row["step"] for row in resumed.rows()] == [1]


class Broken:
    """A writer of figures whose disk is full, or whose host is gone."""

    def add_scalar(self, *_figure: object) -> None:
        raise OSError(28, "No space left on device")

    def log(self, _figures: object) -> None:
        raise ConnectionError("host is gone")


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", CONFIG)
    folder._writer = Broken()
    with pytest.raises(OutputError, match=r"run/tensorboard: cannot write \(No space left"):
        folder.log("pretrain", 1, loss=0.5)
    folder._writer, folder._wandb = False, Broken()
    with pytest.raises(
        OutputError, match=r"^Weights & Biases: cannot log \(host is gone\).*--wandb"
    ):
        folder.log("pretrain", 2, loss=0.5)
    assert [row["step"] for row in folder.rows()] == [1, 2]


def test_a_list_of_layers_is_no_curve(tmp_path: Path) -> None:
    """Layer 1 alone collapsed: a curve of the list's first entry would say that layer 0 did."""
    shown: dict[str, float] = {}

    class Writer:
        def add_scalar(self, name: str, value: float, _step: int) -> None:
            shown[name] = value

    folder = RunFolder(tmp_path / "run", CONFIG)
    folder._writer = Writer()
    folder.log("metatune", 1, collapsed=[1], alpha=[0.5, 0.01])
    assert shown == {"metatune/alpha_0": 0.5, "metatune/alpha_1": 0.01}
    assert folder.rows()[0]["collapsed"] == [1]
