"""Memory: freed is kept; validation keeps maps where there is room, and says the same without."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine import memory, metatune
from dvla_fast.engine.config import DemoRun
from dvla_fast.engine.models import backbone_spec, build_model, model_spec
from dvla_fast.engine.predict import EpisodePredictor
from dvla_fast.engine.texts import build_texts

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    assert 0 < memory.free_mib(torch.device("cpu")) <= total
    files = {
        "/proc/meminfo": ["MemTotal: 9000000 kB", "MemAvailable: 2048000 kB"],
        "/sys/fs/cgroup/memory.max": ["max"],
        "/sys/fs/cgroup/memory.current": [str(100 * 2**20)],
    }
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(path, []))
    assert memory.free_mib(torch.device("cpu")) == 2000
    files["/sys/fs/cgroup/memory.max"] = [str(600 * 2**20)]
    assert memory.free_mib(torch.device("cpu")) == 500
    files.clear()
    assert memory.free_mib(torch.device("cpu")) == total


FAULTS = """
import resource, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
{}
print([faults() for _ in range(24)][-1])
"""
KEEP = "from dvla_fast.engine.memory import keep_freed_memory; keep_freed_memory()"


def fresh_pages(environment: str = "", first: str = "") -> int:
    """Pages that a process asks for where it makes a tensor of 64 MiB once more.

    (Not for the second time: what lies in between can keep a freed block from fitting at first.)
    """
    given = dict(setting.split("=") for setting in environment.split())
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(first)],
        capture_output=True, text=True, check=True, env=os.environ | given,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_freed_memory_is_kept() -> None:
    """By the commands, and by what docs/api.md gives for other programs."""
    settings = re.search(r"^export (MALLOC_\S+ MALLOC_\S+)", DOCUMENT.read_text(), re.MULTILINE)
    assert settings is not None
    assert fresh_pages() >= 32  # of 2 MiB, or 16,384 of 4 KiB
    assert fresh_pages(settings[1]) < 16
    assert fresh_pages(first=KEEP) < 16


@pytest.mark.parametrize("scope", ["class", "episode", "candidate"])
def test_validation_without_room_for_maps(
    tiny: DemoRun, few_digits: FewShotData, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    made: list[EpisodePredictor] = []

    class Kept(EpisodePredictor):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    tiny.model.text_scope = scope
    torch.manual_seed(0)
    texts, semantics = build_texts(tiny.semantics, few_digits, torch.device("cpu"))
    backbone = backbone_spec(tiny.model, few_digits.channels, few_digits.image_size)
    model = build_model(model_spec(tiny.model, backbone, semantics["dim"]))
    sampler = EpisodeSampler(few_digits.monitor, 5, 1, 3, 0)
    monkeypatch.setattr(metatune, "EpisodePredictor", Kept)
    found = []
    for free in (1e6, 2000.0, 0.0):
        monkeypatch.setattr(metatune, "free_mib", lambda device, free=free: free)
        figures = metatune._validate(model, few_digits, texts, sampler, 6, 2, None)
        found.append((figures["monitor_accuracy"], figures["monitor_alpha"]))
    assert [predictor.cache_mib for predictor in made] == [8192, 250, 0]
    assert [predictor._keep_maps for predictor in made] == [True, True, False]
    assert len({accuracy for accuracy, _ in found}) == 1
    assert found[0][1] == pytest.approx(found[2][1], abs=1e-5)


@pytest.mark.parametrize(
    ("scope", "device", "way", "episodes"),
    [
        ("episode", "cpu", 5, 8),
        ("candidate", "cpu", 5, 5),  # 380 maps of 4 KiB an episode
        ("episode", "cuda", 20, 8),
        ("candidate", "cuda", 5, 8),
        ("candidate", "cuda", 10, 2),  # 1,510 maps an episode
        ("candidate", "cuda", 20, 1),
    ],
)
def test_episodes_of_a_pass(
    tiny: DemoRun, few_digits: FewShotData, scope: str, device: str, way: int, episodes: int
) -> None:
    tiny.model.text_scope = scope
    texts, semantics = build_texts(tiny.semantics, few_digits, torch.device("cpu"))
    backbone = backbone_spec(tiny.model, few_digits.channels, few_digits.image_size)
    model = build_model(model_spec(tiny.model, backbone, semantics["dim"]))
    predictor = EpisodePredictor(model, few_digits, texts, "novel")
    predictor._limit_maps()
    predictor.images = SimpleNamespace(device=torch.device(device))  # type: ignore[assignment]
    sampler: Any = SimpleNamespace(way=way, shot=1, query=15)
    assert predictor._fitting(sampler) == episodes
