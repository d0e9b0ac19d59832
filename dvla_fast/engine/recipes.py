"""Whether checkpoints are trainings of one recipe, each once: only then their mean says something.

Seeds, and how long each was trained, may differ. What else a recipe is made of is compared as far
as checkpoints record it: stage, data set, channel statistics, model, and the texts.
"""

from __future__ import annotations

import filecmp
import inspect
import itertools
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
    texts = [info.get("semantics") or {} for info in infos]
    # what one does not say is passed over
    told = [key for key in ("encoder", *COMPARED) if all(key in own for own in texts)]
    recipes = [_recipe(model, info, told) for model, info in zip(models, infos)]
    for path, recipe in zip(paths[1:], recipes[1:]):
        changed = differences(recipes[0], recipe)
        if changed:
            raise CheckpointError(
                f"{path}: of another recipe than {paths[0]} ({'; '.join(changed[:4])}); average "
                "checkpoints of one recipe, and evaluate others in runs of their own (--compare "
                "puts two runs side by side)"
            )


def _recipe(model: DVLA | None, info: Mapping[str, Any], told: Sequence[str]) -> dict[str, Any]:
    """What the checkpoints of a recipe have in common; ``told``: the text settings to compare."""
    spec, texts = dict(info.get("model", {})), info.get("semantics") or {}
    if model is not None:  # the backbone's own choice and the same one in words are one recipe
        for name, setting in inspect.signature(DVLA).parameters.items():
            if setting.default not in (inspect.Parameter.empty, None):
                spec.setdefault(name, setting.default)
        layers = model.gated_layers
        weights = default_level_weights(layers, model.backbone.deep_from)
        spec["gated_layers"] = [list(layer) for layer in layers]
        spec.setdefault("level_weights", [list(pair) for pair in weights])
    if texts.get("parts") in ("name", "description"):  # the same whatever is selected beside them
        told = [key for key in told if key not in ("top_k", "template")]
    return {
        **{key: info.get(key) for key in ("kind", "dataset", "normalisation")},
        "model": spec,
        "semantics": {key: texts[key] for key in told},
    }
