"""Training beside a plain PyTorch loop on a CPU, images and episodes per second.

    python -m benchmarks.training --image-size 84

What the two sides do: ``benchmarks.training_loops``. Of the plain loop's data workers the best of 0
and 2 is reported for pre-training; ``--texts none`` leaves the text tower out. First, both compute
the loss of one batch without augmentation, and the two must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dvla_fast
from benchmarks.training_loops import (
    Setting,
    check,
    our_metatuning,
    our_pretraining,
    plain_metatuning,
    plain_pretraining,
    text_tower,
)
from dvla_fast.engine.config import ExecutionConfig
from dvla_fast.engine.memory import keep_freed_memory

FEWEST, EPISODES = 3, (1, 4)  # timed steps of a row, and episodes of a step
EXECUTIONS = {
    "dvla_fast float32": ExecutionConfig(channels_last=True),
    "dvla_fast bfloat16": ExecutionConfig(precision="bfloat16", channels_last=True),
}


def rate(steps: Iterator[int], seconds: float, warm_up: int = 1) -> float:
    """Median images or episodes per second over ``seconds`` of steps."""
    for _ in range(warm_up):
        next(steps)
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < FEWEST:
        start = time.perf_counter()
        count = next(steps)
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def measure(setting: Setting, stage: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Rates of one stage by provider."""
    rates: dict[str, float] = {}
    if stage == "pretrain":
        for workers in (0, 2):
            # One step takes what the workers prepared in advance: several warm-up steps empty that.
            steps = plain_pretraining(setting, workers)
            rates[f"plain loop, {workers} workers"] = rate(
                steps, arguments.seconds, 1 + 2 * workers
            )
        for name, execution in EXECUTIONS.items():
            rates[name] = rate(our_pretraining(setting, execution), arguments.seconds)
        return rates
    encode = text_tower(arguments.texts, setting.device)
    dvla_fast.set_backend("reference")
    try:
        rates["plain loop"] = rate(plain_metatuning(setting, encode), arguments.seconds)
        if encode is not None:
            kept = plain_metatuning(setting, None)
            rates["plain loop, texts kept"] = rate(kept, arguments.seconds)
    finally:
        dvla_fast.set_backend(None)
    for name, execution in EXECUTIONS.items():
        for episodes in EPISODES:
            steps = our_metatuning(setting, execution, episodes)
            rates[f"{name}, {episodes} a step"] = rate(steps, arguments.seconds)
    return rates


def main(given: list[str] | None = None) -> None:
    """Print one JSON line of settings and one per stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--image-size", type=int, default=84)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row")
    parser.add_argument("--texts", default="clip", choices=("clip", "none"))
    parser.add_argument(
        "--malloc", default="keeps", choices=("keeps", "returns"), help="what malloc does"
    )
    parser.add_argument("--stage", action="append", choices=("pretrain", "metatune"))
    arguments = parser.parse_args(given)
    if arguments.malloc == "keeps":  # both sides, as the commands do
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), arguments.image_size)
        difference = check(setting)
        print(json.dumps({**vars(arguments), "threads": torch.get_num_threads(),
                          "loss_difference": difference}), flush=True)  # fmt: skip
        for stage in arguments.stage or ("pretrain", "metatune"):
            rates = measure(setting, stage, arguments)
            peer = max(value for name, value in rates.items() if name.startswith("plain loop"))
            row: dict[str, Any] = {"stage": stage}
            for name, value in rates.items():
                row[name] = {"per_second": round(value, 2), "ratio": round(value / peer, 2)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
