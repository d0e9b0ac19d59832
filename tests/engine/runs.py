"""Evaluation folders made without a model, with predictions of a chosen accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dvla_fast.engine.records import EpisodeRecord

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox"]


def write_evaluation(
    folder: Path, right: float, seed: int = 0, shot: int = 1, checkpoints: int = 1, **changes: Any
) -> Path:
    """Write what ``dvla-fast evaluate`` leaves, 200 5-way episodes of six classes.

    Args:
        right: share of queries that are answered right; those that are do not depend on the share,
            so that two runs of one seed are paired.
        changes: keys of the result to replace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = torch.Generator().manual_seed(seed)
    episodes, way, query = 200, 5, 6
    classes = torch.stack(
        [torch.randperm(len(CLASSES), generator=stream)[:way] for _ in range(episodes)]
    )
    labels = torch.arange(way).repeat_interleave(query).expand(episodes, -1).contiguous()
    luck = torch.rand(checkpoints, *labels.shape, generator=stream)
    hardness = 0.3 * torch.rand(episodes, 1, generator=stream)
    answers = torch.where(luck < right + hardness - 0.15, labels, (labels + 1) % way)
    record = EpisodeRecord(
        classes,
        labels,
        {"learned gate": answers, "visual prototypes": (labels + 1).remainder(way).unsqueeze(0)},
        torch.rand(checkpoints, episodes, 2, generator=stream),
    )
    record.write(folder / f"episodes-{shot}shot.npz")
    accuracy = record.accuracies("learned gate").mean().item()
    result = {
        "dataset": "animals", "split": "novel", "split_sha256": "s", "way": way, "shot": shot,
        "query": query, "episodes": episodes, "episodes_sha256": f"list {seed}", "seed": seed,
        "method": "learned gate", "accuracy": accuracy, "ci95": 0.01,
        "methods": {
            "learned gate": {"accuracy": accuracy, "ci95": 0.01},
            "visual prototypes": {"accuracy": 0.0, "ci95": 0.0},
        },
        "paired": {
            "learned gate - visual prototypes": {
                "difference": accuracy, "ci95": 0.01, "p_value": 0.001,
            }
        },
        "fixed_alpha": 0.5, "alpha": {"mean": [0.5, 0.5], "std": [0.1, 0.1]},
        "gated_layers": [[2, 1], [3, 0]], "checkpoint": f"{folder.name}.safetensors", **changes,
    }  # fmt: skip
    summary = {"command": "evaluate", **result, "results": [result]}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "confusion-1shot.json").write_text(json.dumps({"classes": CLASSES}))
    (folder / "config.yaml").write_text("seed: 0\nevaluate:\n  shots: [1]\n")
    return folder
