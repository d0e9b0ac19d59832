"""Whether checkpoints are trainings of one recipe, each once: only then their mean says something.

Seeds, and how long each was trained, may differ. What else a recipe is made of is compared as far
as checkpoints record it: data set and its classes, channel statistics, model, texts, and the
settings of every stage of the training.
"""

from __future__ import annotations

import filecmp
import hashlib
import inspect
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dvla_fast.engine.config import EvaluateRun
from dvla_fast.engine.settings import UsageError, differences
from dvla_fast.engine.trained_texts import COMPARED
from dvla_fast.errors import CheckpointError
from dvla_fast.nn import DVLA
from dvla_fast.nn.level_weights import default_level_weights

_OF_ALL = ("kind", "dataset", "normalisation")  # what every description says, if with None
_FREE = ("epochs", "validate_every", "validation_episodes")  # settings that may differ


def checkpoint_paths(config: EvaluateRun) -> list[str]:
    """The checkpoints to evaluate, each once (UsageError otherwise)."""
    if not config.checkpoint:
        raise UsageError("evaluate needs --checkpoint, a .safetensors file of a run's checkpoints/")
    paths = [config.checkpoint, *config.checkpoints]
    trainings = {training_of(path) for path in paths}
    copied = any(
        os.path.isfile(a) and os.path.isfile(b) and filecmp.cmp(a, b, shallow=False)
        for a, b in itertools.combinations(paths, 2)
    )
    if copied or len(trainings) < len(paths):
        raise UsageError(
            "evaluate: the same training twice in --checkpoint and --checkpoints, which would "
            "look like training without any spread; name one checkpoint of each"
        )
    return paths


def training_of(path: str) -> str:
    """Name the training of a checkpoint: the best and the last epoch of one stage are one."""
    return re.sub(r"-(best|last)\.safetensors$", "", os.path.realpath(path))


def check_one_recipe(
    paths: Sequence[str], models: Sequence[DVLA | None], infos: Sequence[Mapping[str, Any]]
) -> None:
    """Check that checkpoints can be averaged.

    Args:
        paths: of the checkpoints; models and infos: what ``load_model`` returns of each.

    Raises:
        CheckpointError: one is of another recipe than the first, with what differs.
    """
    recipes = [recipe_of(model, info) for model, info in zip(models, infos)]
    for path, recipe in zip(paths[1:], recipes[1:]):
        changed = recipe_differences(recipes[0], recipe)
        if changed:
            raise CheckpointError(
                f"{path}: of another recipe than {paths[0]} ({'; '.join(changed[:4])}); average "
                "checkpoints of one recipe, and evaluate others in runs of their own (--compare "
                "puts two runs side by side)"
            )


def recipe_of(model: DVLA | None, info: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoints of a recipe have in common, as JSON holds it.

    Args:
        model: the gated model, if there is one; info: the checkpoint's description.
    """
    spec = dict(info.get("model", {}))
    if model is not None:  # the backbone's own choice and the same one in words are one recipe
        for name, setting in inspect.signature(DVLA).parameters.items():
            if setting.default not in (inspect.Parameter.empty, None):
                spec.setdefault(name, setting.default)
        layers = model.gated_layers
        weights = default_level_weights(layers, model.backbone.deep_from)
        spec["gated_layers"] = [list(layer) for layer in layers]
        spec.setdefault("level_weights", [list(pair) for pair in weights])
    return {
        **{key: info.get(key) for key in _OF_ALL},
        "pretrained": os.path.basename((info.get("start") or {}).get("pretrained", "")),
        "model": spec,
        "semantics": _texts(info.get("semantics") or {}),
        "training": [_stage(stage) for stage in info.get("training") or []],
    }


def started_from(info: Mapping[str, Any]) -> str | None:
    """The checkpoint that meta-tuning started from; None: of a pre-trained one, or not told.

    By its hash; published weights by their name.
    """
    start = info.get("start") or {}
    origin: str | None = start.get("sha256") or start.get("pretrained")
    return origin if info.get("kind") == "metatune" else None


def _texts(described: Mapping[str, Any]) -> dict[str, Any]:
    """What decides about texts, of their description."""
    keys = ["encoder", *COMPARED]
    if described.get("parts") in ("name", "description"):  # the same whatever is selected beside
        keys = [key for key in keys if key not in ("top_k", "template")]
    return {key: described[key] for key in keys if key in described}


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage of training was, as far as it is known."""
    settings = stage.get("settings") or {}
    known = {key: value for key, value in settings.items() if key not in _FREE}
    known["stage"] = stage["stage"]
    if stage["classes"] is not None:
        digest = hashlib.sha256(json.dumps(sorted(stage["classes"])).encode()).hexdigest()
        known["classes"] = f"{len(stage['classes'])}, {digest[:8]}"
    return known


def recipe_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Name what two recipes do otherwise; texts and training that one does not tell are no
    difference.
    """
    always = (*_OF_ALL, "pretrained", "model")
    found = differences({k: first[k] for k in always}, {k: second[k] for k in always})
    found += _differences_told(first["semantics"], second["semantics"], "semantics.")
    stages = [[stage["stage"] for stage in recipe["training"]] for recipe in (first, second)]
    if all(stages) and stages[0] != stages[1]:
        return [*found, f"training: {', '.join(stages[0])} -> {', '.join(stages[1])}"]
    for one, other in zip(first["training"], second["training"]):
        found += _differences_told(one, other, f"{one['stage']}.")
    return found


def result_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Name what two evaluations do otherwise: recipe, texts that the gates read, fixed gate.

    Args:
        first, second: results that tell their recipe.
    """
    found = recipe_differences(first["recipe"], second["recipe"])
    return found + _differences_told(_evaluated(first), _evaluated(second), "evaluated with ")


def _evaluated(result: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation chose beside the checkpoint."""
    texts = _texts(result.get("semantics") or {})
    return texts | {key: result[key] for key in ("fixed_alpha",) if key in result}


def _differences_told(
    first: Mapping[str, Any], second: Mapping[str, Any], prefix: str
) -> list[str]:
    """The differences in what both descriptions tell."""
    both = first.keys() & second.keys()
    return differences({k: first[k] for k in both}, {k: second[k] for k in both}, prefix)
