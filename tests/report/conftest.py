"""One small run with everything in it, and one browser, for the tests of the report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla_fast.cli import main
from tests.report.browser import CHROMIUM, Browser


class _Balanced(HTMLParser):
    """Fails on a tag that is closed without having been opened."""

    VOID = ("meta", "link", "img", "br", "path", "circle", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The models here are tiny: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo run of a few seconds: both stages, evaluation, records and checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    settings = (
        *("--device=cpu", "--model.width=8", "--model.num_heads=4", "--model.hidden_dim=8"),
        *("--pretrain.epochs=2", "--pretrain.batch_size=128", "--pretrain.warmup_epochs=1"),
        *("--pretrain.validate_every=1", "--pretrain.validation_episodes=8"),
        *("--metatune.epochs=3", "--metatune.steps_per_epoch=2", "--metatune.episodes_per_step=2"),
        *("--metatune.query=3", "--metatune.validate_every=1", "--metatune.validation_episodes=4"),
        *("--evaluate.episodes=8", "--evaluate.query=4", f"--output={folder}"),
    )
    assert main(["demo", *settings]) == 0
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: install Debian's package chromium")
    with Browser() as found:
        yield found


@pytest.fixture
def copied(demo: Path, tmp_path: Path) -> Path:
    """The demo run, free to be damaged."""
    return Path(shutil.copytree(demo, tmp_path / "run"))


@pytest.fixture
def page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Write a report of runs and return its HTML; whatever is wrong with them, the status is 0."""

    def write(*runs: Path, options: tuple[str, ...] = ()) -> str:
        output = tmp_path / "report.html"
        arguments = ["report", *map(str, runs), f"--output={output}", *options]
        assert main([*arguments, "--overwrite"]) == 0
        assert str(output) in capsys.readouterr().out
        html = output.read_text(encoding="utf-8")
        checked = _Balanced()
        checked.feed(html)
        assert not checked.open
        return html

    return write
