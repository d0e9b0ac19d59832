"""Training Visformer-Tiny at 224 px on a GPU beside a plain PyTorch loop (``training_loops``).

A call is 2,048 images of pre-training (steps of 512: 256 images in two views, as the paper has it)
or 16 episodes of meta-tuning, files, caches and texts included, between two synchronisations. The
plain loop has as many data workers as the machine has cores (16 at most), in float32 and, with
channels last, in bfloat16. Both sides' losses of the same images are compared first.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator

import pytest
import torch

import dvla_fast
from benchmarks import training_loops as loops
from benchmarks.test_dual_attention_gpu import synchronised_clock
from dvla_fast.engine.config import ExecutionConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.benchmark(timer=synchronised_clock),
]

SIZE, PER_CLASS = 224, 32
IMAGES = 2048
AMOUNTS = {"pretraining": (IMAGES, "images"), "meta-tuning": (16, "episodes")}
RECIPE = dataclasses.replace(loops.RECIPE, batch_size=256)
WORKERS = min(16, os.cpu_count() or 1)
FLOAT32 = ExecutionConfig(channels_last=True)
BFLOAT16 = ExecutionConfig(precision="bfloat16", channels_last=True)
COMPILED = dataclasses.replace(BFLOAT16, compile=True)

Steps = Callable[[loops.Setting], Iterator[int]]


def ours(execution: ExecutionConfig) -> Steps:
    return lambda setting: loops.our_pretraining(setting, execution, IMAGES // RECIPE.views)


def plain_metatuning(texts: str, half: bool) -> Steps:
    def steps(setting: loops.Setting) -> Iterator[int]:
        encode = loops.text_tower(texts, setting.device, half)
        return loops.plain_metatuning(setting, encode, WORKERS, half)

    return steps


def plain_pretraining(half: bool) -> Steps:
    return lambda setting: loops.plain_pretraining(setting, WORKERS, half)


def our_metatuning(episodes: int) -> Steps:
    return lambda setting: loops.our_metatuning(setting, BFLOAT16, episodes)


# What matters most comes first, since a run can be cut off.
ROWS: dict[tuple[str, str], Steps] = {
    ("pretraining", "dvla_fast"): ours(BFLOAT16),
    ("pretraining", "plain loop bfloat16"): plain_pretraining(True),
    ("meta-tuning", "dvla_fast"): our_metatuning(1),
    ("meta-tuning", "plain loop bfloat16, texts kept"): plain_metatuning("none", True),
    ("meta-tuning", "plain loop bfloat16"): plain_metatuning("clip", True),
    ("meta-tuning", "dvla_fast, 4 a step"): our_metatuning(4),
    ("pretraining", "plain loop float32"): plain_pretraining(False),
    ("meta-tuning", "plain loop float32"): plain_metatuning("clip", False),
    ("pretraining", "dvla_fast float32"): ours(FLOAT32),
    ("pretraining", "dvla_fast compiled"): ours(COMPILED),
}
COMPILED_ROWS = [("pretraining", "dvla_fast compiled")]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> loops.Setting:
    made = loops.Setting(tmp_path_factory.mktemp("training"), SIZE, PER_CLASS, "cuda", RECIPE)
    loops.check(made)
    return made


def advance(steps: Iterator[int], amount: int) -> None:
    """Take steps until they have covered so many images or episodes."""
    while amount > 0:
        amount -= next(steps)


def time_steps(benchmark, setting: loops.Setting, stage: str, provider: str) -> None:
    amount, what = AMOUNTS[stage]
    benchmark.group = f"{stage} visformer_tiny {SIZE} px {amount} {what}"
    benchmark.name = provider
    if not provider.startswith("dvla_fast"):
        dvla_fast.set_backend("reference")
    try:
        steps = ROWS[stage, provider](setting)
        # The first two take what workers prepared in advance.
        benchmark.pedantic(lambda: advance(steps, amount), rounds=5, warmup_rounds=2)
    finally:
        dvla_fast.set_backend(None)


@pytest.mark.parametrize(("stage", "provider"), [row for row in ROWS if row not in COMPILED_ROWS])
def test_training(benchmark, setting: loops.Setting, stage: str, provider: str) -> None:
    time_steps(benchmark, setting, stage, provider)


@pytest.mark.parametrize(("stage", "provider"), COMPILED_ROWS)
def test_compiled(benchmark, setting: loops.Setting, stage: str, provider: str) -> None:
    time_steps(benchmark, setting, stage, provider)
