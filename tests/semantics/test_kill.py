"""Builds that are killed, at any moment, and continued."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dvla_fast.semantics import build_encoder, load_bank
from dvla_fast.semantics.construct import Settings, construct_bank, journal_path
from dvla_fast.semantics.stages import ClassSource
from tests.semantics.loopback import Reply, serve
from tests.semantics.scripted import Scripted, bird, build_birds

CLASSES, CONCURRENCY = 10, 4
REQUESTS = 2 * CLASSES + 1  # one class needs a second answer


def content(path: Path) -> dict[str, Any]:
    """The bank, but for the day it was made."""
    loaded = load_bank(path).to_dict()
    del loaded["provenance"]["date"]
    return loaded


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The bank of a build that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole") / "birds.json"
    with serve(bird) as server:
        built = build_birds(server.url, str(path), CLASSES, CONCURRENCY)
    assert len(server.requests) == REQUESTS
    assert built.failures == {}
    return content(path)


@pytest.fixture(scope="module")
def start() -> Any:
    """Start a build in a process of its own, forked from one that has loaded everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.semantics.scripted", "openai", "openai.resources.chat"])
    return lambda *arguments: context.Process(target=build_birds, args=arguments, daemon=True)


@pytest.mark.parametrize("moment", range(1, REQUESTS), ids=lambda n: f"at-request-{n}")
def test_kill_loses_at_most_the_answers_under_way(
    moment: int, whole: dict[str, Any], start: Any, tmp_path: Path
) -> None:
    path, process = tmp_path / "birds.json", None

    def killing(request: dict[str, Any], number: int) -> Reply:
        if number == moment:
            assert process is not None
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        return bird(request, number)

    with serve(killing) as server:
        process = start(server.url, str(path), CLASSES, CONCURRENCY)
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        first = server.prompts()
    assert not path.exists()
    with serve(bird) as server:
        built = build_birds(server.url, str(path), CLASSES, CONCURRENCY)
        second = server.prompts()
    assert content(path) == whole
    asked = Counter(first) + Counter(second)
    assert len(asked) == REQUESTS
    twice = [prompt for prompt, times in asked.items() if times > 1]
    assert len(twice) <= CONCURRENCY
    assert built.reused >= len(first) - CONCURRENCY


def test_journal_cut_anywhere_continues(tmp_path: Path) -> None:
    """A torn line is what a kill leaves in the middle of a write."""
    classes = [ClassSource(f"bird {i}") for i in range(3)]
    encoder, settings = build_encoder("hashed-ngram", 64), Settings(top_k=2)
    path = tmp_path / "birds.json"
    construct_bank(classes, Scripted(), encoder, path, settings=settings)
    expected, journal = content(path), journal_path(path).read_bytes()
    lines = [len(line) for line in journal.splitlines(keepends=True)]
    for cut in sorted({*range(0, len(journal), len(journal) // 40), sum(lines[:3])}):
        path.unlink(missing_ok=True)
        journal_path(path).write_bytes(journal[:cut])
        model = Scripted()
        construct_bank(classes, model, encoder, path, settings=settings)
        assert content(path) == expected
        answered = sum(b'"answer"' in line for line in journal[:cut].splitlines(True)[:-1])
        last = journal[:cut].splitlines(True)[-1:]
        answered += sum(b'"answer"' in line and line.endswith(b"\n") for line in last)
        assert len(model.asked) == 6 - answered
        for line in journal_path(path).read_bytes().splitlines():
            json.loads(line)
