"""From configuration to networks, and from checkpoints: backbones, models, their descriptions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dvla_fast.engine.checkpoint import load_checkpoint, load_weights
from dvla_fast.engine.config import ModelConfig
from dvla_fast.engine.description import REMEDY
from dvla_fast.engine.settings import UsageError, differences
from dvla_fast.errors import CheckpointError, TrainingError
from dvla_fast.nn import DVLA, build_backbone

Module = TypeVar("Module", bound=nn.Module)
# Of ModelConfig: what describes the backbone and its start, and not the gates.
_BACKBONE_FIELDS = (
    "backbone", "width", "clip_model", "pretrained", "normalisation", "backbone_options",
)  # fmt: skip


def backbone_spec(config: ModelConfig, channels: int, image_size: int) -> dict[str, Any]:
    """Describe a backbone completely: ``build_backbone(**spec)`` builds it."""
    spec: dict[str, Any] = {"name": config.backbone, "image_size": image_size}
    if config.backbone == "clip":
        spec["architecture"] = config.clip_model
        if channels != 3:
            raise UsageError(f"the clip backbone takes 3 colours, the images have {channels}")
    elif channels != 3 or config.backbone in ("small", "resnet12"):
        spec["in_channels"] = channels
    if config.backbone == "small":
        spec["width"] = config.width
    taken = sorted(set(spec) & set(config.backbone_options))
    if taken:
        raise UsageError(f"--model.backbone_options: {', '.join(taken)} has its own option")
    return spec | config.backbone_options


def build_pretrain_model(
    spec: dict[str, Any], classes: int, drop_path: float = 0.0
) -> nn.ModuleDict:
    """Build ``{"backbone", "head"}``: the backbone and a linear classifier.

    Stochastic depth belongs to the training, not to the network: no checkpoint knows of it.
    """
    backbone = build_backbone_of({**spec, "drop_path_rate": drop_path} if drop_path else spec)
    head = nn.Linear(backbone.feature_dim, classes)
    return nn.ModuleDict({"backbone": backbone, "head": head})


def model_spec(config: ModelConfig, spec: dict[str, Any], text_dim: int) -> dict[str, Any]:
    """Describe a DVLA model completely: ``build_model`` builds it from this alone."""
    gate = asdict(config)
    for key in _BACKBONE_FIELDS:
        gate.pop(key)
    if config.policy != "fixed":
        gate.pop("fixed_alpha")
        if config.fixed_alpha != ModelConfig.fixed_alpha:
            warnings.warn(
                "model.fixed_alpha has no effect here: it belongs to policy fixed",
                UserWarning,
                stacklevel=2,
            )
    if not config.level_weights:
        gate.pop("level_weights")
    return {"backbone": spec, "text_dim": text_dim, **gate}


def build_model(spec: dict[str, Any], backbone: Any = None) -> DVLA:
    """Build the model that ``model_spec`` describes, around ``backbone`` if it is built already.

    Raises:
        UsageError: layers that the backbone does not have, heads that do not fit its width, ….
    """
    arguments = dict(spec)
    described = arguments.pop("backbone")
    if backbone is None:
        backbone = build_backbone_of(described)
    layers = arguments.pop("gated_layers") or None  # empty: the backbone's own choice
    try:
        return DVLA(backbone, layers, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"cannot build the model: {error}") from error


@contextlib.contextmanager
def described_by(path: str | Path) -> Iterator[None]:
    """While a model is built that a checkpoint describes: name the file where that fails.

    Raises:
        CheckpointError: this version cannot build the model.
    """
    try:
        yield
    except RuntimeError as error:  # ours, and torch's of sizes that cannot be
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: its entry model: {reason}; {REMEDY}") from error


def build_backbone_of(spec: dict[str, Any]) -> Any:
    """Build the backbone that ``backbone_spec`` describes.

    Raises:
        UsageError: arguments that it does not take, or that do not fit together.
    """
    arguments = dict(spec)
    name = arguments.pop("name")
    try:
        return build_backbone(name, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"cannot build the backbone {name!r}: {error}") from error


def fingerprint(spec: dict[str, Any]) -> str:
    """Return a short hash of a model description."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def load_backbone(
    model: DVLA, spec: dict[str, Any], path: str | Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the backbone of a pre-training (or meta-tuning) checkpoint into a model.

    Regularisation such as drop-path may differ from what the checkpoint was trained with.

    Returns:
        The checkpoint's tensors and its description.

    Raises:
        CheckpointError: unreadable, or of another backbone than ``spec`` describes.
    """
    tensors, info = load_checkpoint(path, ("pretrain", "metatune"))
    theirs, ours = (
        {key: value for key, value in item.items() if key not in model.backbone.regularisers}
        for item in (info["model"]["backbone"], spec)
    )
    changed = differences(theirs, ours)
    if changed:
        raise CheckpointError(
            f"{path}: of another model ({'; '.join(changed[:3])}); use the --model and --data "
            "settings that it was trained with"
        )
    load_weights(model.backbone, tensors, "model.backbone.", path)
    return tensors, info


def placed(module: Module, device: torch.device) -> Module:
    """Bring a model that will only predict to a device; on CPUs channels last, for convolutions.

    (Visformer-Tiny takes 7 % to 18 % less time so. On GPUs it has not been measured.)
    """
    module.to(device)
    return module.to(memory_format=torch.channels_last) if device.type == "cpu" else module


def check_weights(module: nn.Module, what: str) -> None:
    """Stop on broken weights before they meet an operation that cannot say where they come from.

    Raises:
        TrainingError: a parameter or buffer holds NaN or infinity.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TrainingError(
                f"{what}: the weights {name!r} hold NaN or infinity; use an earlier checkpoint, or "
                "train with a lower rate"
            )
