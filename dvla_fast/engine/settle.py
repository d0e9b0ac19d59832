"""What is settled about a run's settings before work starts: absolute paths, the image size.

A run's record names its files from the root, so that it can be continued from any folder.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from dvla_fast.data import is_cache, split_list_names
from dvla_fast.data.cache_index import read_index
from dvla_fast.data.shapes import KINDS
from dvla_fast.engine.config import DataConfig, PretrainConfig
from dvla_fast.engine.settings import UsageError, from_mapping, to_dict
from dvla_fast.semantics import bundled_banks

T = TypeVar("T")

MADE_SIZES = {"digits": 16, **dict.fromkeys(KINDS, 32)}  # the package's own data sets
_PLACES = (
    "checkpoint", "checkpoints", "compare", "data.dataset", "data.splits", "semantics.bank",
    "semantics.encoder", "model.pretrained", "evaluate.construct", "language_model.answers",
    "language_model.model", "construct.candidates_prompt", "construct.description_prompt",
    "construct.encoder",
)  # fmt: skip


def settle(config: T) -> T:
    """Return a run's settings with absolute paths and the size of its images.

    Raises:
        UsageError: the images' size is not given and not known, or warm-up never ends.
        DataError: a cache's index is damaged.

    Warns:
        UserWarning: settings that seldom are what was meant.
    """
    settled: Any = from_mapping(type(config), absolute_paths(to_dict(config)))
    settled.data = sized(settled.data)
    if hasattr(settled, "pretrain"):
        _check_pretraining(settled.pretrain, settled.data)
    result: T = settled
    return result


def sized(config: DataConfig) -> DataConfig:
    """Return the settings with an image size: the one given, a cache's own, or a made data set's.

    Raises:
        UsageError: neither given nor known.
        DataError: a cache's index is damaged.
    """
    if config.image_size:
        return config
    if config.dataset in MADE_SIZES:
        return replace(config, image_size=MADE_SIZES[config.dataset])
    if is_cache(config.dataset):
        return replace(config, image_size=read_index(config.dataset)["image_size"])
    if os.path.exists(config.dataset):
        raise UsageError(
            f"data.image_size: {config.dataset} holds images of any size; give the side in pixels "
            "that training uses, e.g. --data.image_size 84, or an earlier run's settings: --config "
            "RUN/config.yaml"
        )
    return replace(config, image_size=1)  # loading it says that there is no such folder


def absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with the relative paths that exist made absolute.

    Names that mean something by themselves (bundled banks, split lists, tags of published weights)
    stay as they are.
    """
    names = {*MADE_SIZES, *bundled_banks(), *split_list_names()}
    changed = {key: dict(x) if isinstance(x, Mapping) else x for key, x in values.items()}
    for place in _PLACES:
        section, _, key = place.rpartition(".")
        holder: Any = changed.get(section) if section else changed
        if not isinstance(holder, dict):
            continue
        value = holder.get(key)
        if isinstance(value, list):
            holder[key] = [_absolute(item, names) for item in value]
        elif isinstance(value, str) and key == "encoder":
            holder[key] = _absolute_encoder(value)
        elif key == "model" and holder.get("backend") != "transformers":
            continue  # a name that a server knows
        elif isinstance(value, str):
            holder[key] = _absolute(value, names)
    return changed


def _absolute(text: Any, names: set[str]) -> Any:
    if not isinstance(text, str) or not text or text in names or not os.path.exists(text):
        return text
    return os.path.abspath(text)


def _absolute_encoder(name: str) -> str:
    """transformers:FOLDER, open_clip:local-dir:FOLDER, open_clip:MODEL/FILE."""
    family, _, rest = name.partition(":")
    if family == "transformers":
        return f"{family}:{_absolute(rest, set())}"
    if rest.startswith("local-dir:"):
        return f"{family}:local-dir:{_absolute(rest.removeprefix('local-dir:'), set())}"
    model, _, weights = rest.partition("/")
    return f"{family}:{model}/{_absolute(weights, set())}" if weights else name


def size_line(given: Any, settled: Any) -> str:
    """Say the size that the images of a made data set got without being asked for; else "".

    Args:
        given, settled: a run's settings before and after :func:`settle`.
    """
    data = getattr(settled, "data", None)
    if data is None or given.data.image_size or data.dataset not in MADE_SIZES:
        return ""
    return f"{data.dataset}: images of {data.image_size} pixels (--data.image_size)"


def check_warmup(config: PretrainConfig) -> None:
    """Raise UsageError where warm-up has no end."""
    if config.warmup_epochs >= config.epochs:
        raise UsageError(
            f"pretrain.warmup_epochs: {config.warmup_epochs} of {config.epochs} epoch(s) would be "
            "warm-up, so the rate would never reach pretrain.lr; give fewer: "
            f"--pretrain.warmup_epochs {config.epochs // 8}"
        )


def _check_pretraining(config: PretrainConfig, data: DataConfig) -> None:
    """Refuse warm-up without an end, and warn of what is allowed and seldom meant."""
    check_warmup(config)
    if config.quarter_turns and data.dataset not in MADE_SIZES:
        warnings.warn(
            "pretrain.quarter_turns is on, a default for the digits: each class turned by 90 and "
            "270 degrees is learned as two more; --pretrain.quarter_turns false leaves it out, as "
            "the published recipes for photographs do",
            stacklevel=3,
        )
