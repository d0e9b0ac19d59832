"""Models and checkpoints without training, and evaluation folders without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dvla_fast.data import load_digits
from dvla_fast.engine.checkpoint import load_checkpoint, save_checkpoint
from dvla_fast.engine.config import ModelConfig
from dvla_fast.engine.models import backbone_spec, build_model, model_spec
from dvla_fast.engine.records import EpisodeRecord
from dvla_fast.nn import DVLA

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox"]


def small_spec(text_dim: int, **options: Any) -> dict[str, Any]:
    """Describe a small model for the digits; ``options`` are those of ``ModelConfig``."""
    config = ModelConfig(width=8, num_heads=4, hidden_dim=8, **options)
    return model_spec(config, backbone_spec(config, 1, 16), text_dim)


def random_model(spec: dict[str, Any], seed: int = 0) -> DVLA:
    """A model whose policies have left their starting point, so that states matter."""
    torch.manual_seed(seed)
    model = build_model(spec)
    for gate in model.gates:
        for parameter in gate.policy.parameters():  # type: ignore[union-attr]
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_tuned(
    path: Path, text_dim: int, seed: int = 0, texts: Any = None, **options: Any
) -> Path:
    """Write a meta-tuned checkpoint of :func:`random_model`, as if the digits were learned.

    Args:
        texts: what the checkpoint says of its texts, beside encoder and length.
    """
    spec, data = small_spec(text_dim, **options), load_digits()
    weights = random_model(spec, seed).state_dict()
    info = {
        "kind": "metatune", "model": spec, "dataset": "digits", "seed": seed,
        "normalisation": {"mean": data.mean.tolist(), "std": data.std.tolist()},
        "semantics": {"encoder": "hashed-ngram", "dim": text_dim, **(texts or {})},
    }  # fmt: skip
    save_checkpoint(path, {f"model.{name}": value for name, value in weights.items()}, info)
    return path


def another_training(checkpoint: str, path: Path) -> Path:
    """Write a checkpoint with noise on its weights, as another seed would give."""
    tensors, info = load_checkpoint(checkpoint)
    torch.manual_seed(0)
    noisy = {k: x + 0.3 * torch.randn_like(x) if x.dim() > 1 else x for k, x in tensors.items()}
    save_checkpoint(path, noisy, info)
    return path


def evaluate_arguments(checkpoint: str | Path, output: Path, *more: str) -> list[str]:
    """Arguments of ``dvla-fast evaluate`` on 30 1-shot episodes."""
    return [
        *("evaluate", f"--checkpoint={checkpoint}", f"--output={output}", "--device=cpu"),
        *("--evaluate.episodes=30", "--evaluate.query=5", "--evaluate.shots=[1]", *more),
    ]


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
        "dataset": "animals", "split": "novel", "split_sha256": "s", "images_sha256": "i",
        "way": way, "shot": shot,
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
