"""Where a training run begins: the weights of its backbone, and the statistics its images get."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dvla_fast.data import FewShotData
from dvla_fast.data.load import IMAGENET_STATISTICS
from dvla_fast.engine.checkpoint import load_weights
from dvla_fast.engine.config import ModelConfig
from dvla_fast.engine.models import build_backbone_of, load_backbone
from dvla_fast.engine.settings import UsageError, differences
from dvla_fast.engine.trained_classes import Stage, training_stages, unknown_stage
from dvla_fast.errors import CheckpointError
from dvla_fast.nn import DVLA, GatedBackbone, clip_statistics, has_small_stem

# The authors meta-tune and evaluate with ImageNet's, and on CIFAR-FS and FC100 with CIFAR's; SP
# (Semantic Prompt, their network's origin) has its own.
STATISTICS = {
    "imagenet": IMAGENET_STATISTICS,
    "cifar": ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)),
    "sp": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
}
NORMALISATIONS = ("auto", "data", "clip", *STATISTICS)


def published(path: str) -> bool:
    """Whether a checkpoint is not one of ours but a PyTorch file that others published."""
    return Path(path).suffix in (".pth", ".pt")


def with_statistics(data: FewShotData, mean: Sequence[float], std: Sequence[float]) -> FewShotData:
    """Return the data set with other channel statistics; no image is copied.

    Raises:
        UsageError: for images of another number of channels.
    """
    if len(mean) != data.channels:
        raise UsageError(
            f"{data.name}: images of {data.channels} channel(s), but the backbone's statistics are "
            f"for {len(mean)}; choose another --model.backbone or --model.normalisation data"
        )
    device = data.mean.device
    return replace(
        data, mean=torch.tensor(mean, device=device), std=torch.tensor(std, device=device)
    )


def normalise_for(data: FewShotData, config: ModelConfig, checkpoint: str = "") -> FewShotData:
    """Return the data set with the channel statistics that the backbone expects.

    ``auto`` means CLIP's for the clip backbone (those of its weights), the authors' for their
    files, and otherwise those of the base images.

    Raises:
        UsageError: statistics of another number of channels.
    """
    name = config.normalisation
    start = checkpoint or config.pretrained
    if name == "auto" and config.backbone == "clip":
        name = "clip"
    elif name == "auto" and config.backbone == "visformer_tiny" and published(start):
        name = _authors_statistics(start)
    if name == "clip":
        return with_statistics(data, *clip_statistics(config.clip_model, config.pretrained))
    return with_statistics(data, *STATISTICS[name]) if name in STATISTICS else data


def _authors_statistics(path: str) -> str:
    stem = Path(path).stem.lower()
    return "cifar" if "cifar" in stem or "fc100" in stem else "imagenet"


def published_visformer(path: str, data: FewShotData) -> tuple[nn.Module, dict[str, Any]]:
    """Build the backbone of an authors' ``.pth`` file for a data set's images.

    Returns:
        The backbone on the CPU, and a description as that of a pre-training checkpoint.

    Raises:
        CheckpointError: unreadable, or not of their network.
        UsageError: images of a size that their network does not take.
    """
    spec = {
        "name": "visformer_tiny", "image_size": data.image_size, "small_stem": has_small_stem(path),
    }  # fmt: skip
    backbone = build_backbone_of(spec)
    start = backbone.load_pretrained(path)
    mean, std = STATISTICS[_authors_statistics(path)]
    statistics = {"mean": list(mean), "std": list(std)}
    return backbone, {
        "kind": "pretrain", "model": {"backbone": spec}, "normalisation": statistics,
        "start": start,
    }  # fmt: skip


def trained_normalisation(data: FewShotData, info: Mapping[str, Any]) -> FewShotData:
    """Give the data set the channel statistics that a checkpoint was trained with.

    They matter across domains: a network expects its own base classes' statistics, whatever
    images it meets. Checkpoints written before these were noted leave the data as it is.
    """
    known = info.get("normalisation")
    return data if known is None else with_statistics(data, known["mean"], known["std"])


class Start(NamedTuple):
    """What a run began with.

    facts: of published weights, or the hash of a checkpoint, for the run's records; stages: of
    training that came before, as from ``trained_classes.training_stages``; gates: "continued" where
    those of a checkpoint learn on, else "new".
    """

    facts: dict[str, Any]
    stages: list[Stage]
    gates: str = "new"


def begin_metatuning(
    model: DVLA,
    spec: dict[str, Any],
    data: FewShotData,
    config: ModelConfig,
    checkpoint: str,
    semantics: Mapping[str, Any] | None = None,
) -> tuple[FewShotData, Start]:
    """Give a model its first weights: of a checkpoint, or published ones of its backbone.

    Args:
        model: the model, changed in place.
        spec: its description (``models.model_spec``).
        data: the data set.
        config: names the published weights, and the normalisation.
        checkpoint: of a run, or a ``.pth`` file of the authors; empty: ``config.pretrained``.
        semantics: description of its texts (``texts.build_texts``): the gates of a meta-tuned
            checkpoint learn on where they fit; None: all gates start anew.

    Returns:
        The data set with the statistics that go with the weights, and what the run began with.

    Raises:
        UsageError: neither a checkpoint nor published weights are named.
        CheckpointError: unreadable, of another backbone, or not of the model that it describes.

    Warns:
        UserWarning: the checkpoint has gates that do not fit.
    """
    if not checkpoint and not config.pretrained:
        raise UsageError(
            "metatune needs --checkpoint, the pretrain-best.safetensors of a `dvla-fast pretrain` "
            "run or a visformer-*.pth file of the method's authors; or, for CLIP, "
            "--model.backbone clip --model.pretrained TAG_OR_FILE"
        )
    data = normalise_for(data, config, checkpoint)
    others = [unknown_stage("published")]
    if not checkpoint:
        return data, Start(load_published(model.backbone, config.pretrained), others)
    if published(checkpoint):
        try:
            return data, Start(model.backbone.load_pretrained(checkpoint), others)
        except ValueError as error:  # none are published for this backbone
            raise CheckpointError(f"{checkpoint}: {error}") from error
    tensors, info = load_backbone(model, spec["backbone"], checkpoint)
    if config.normalisation == "auto":
        data = trained_normalisation(data, info)
    gates = "new"
    if semantics is not None and _gates_fit(model, spec, semantics, info, checkpoint):
        load_weights(model, tensors, "model.", checkpoint)
        gates = "continued"
    return data, Start({"sha256": info.get("tensors_sha256")}, training_stages(info), gates)


# Of a model's description: what the parameters of its gates depend on, or what they mean.
_GATE_SETTINGS = ("policy", "num_heads", "hidden_dim", "text_dim")


def _gates_fit(
    model: DVLA,
    spec: Mapping[str, Any],
    semantics: Mapping[str, Any],
    info: Mapping[str, Any],
    checkpoint: str,
) -> bool:
    """Whether a checkpoint, described by ``info``, has gates for a model; warns of unfit ones."""
    if info["kind"] != "metatune":
        return False
    layers = info["model"].get("gated_layers") or model.backbone.locations
    theirs = {key: info["model"].get(key) for key in _GATE_SETTINGS}
    theirs["gated_layers"] = [list(layer) for layer in layers]
    theirs["encoder"] = info.get("semantics", {}).get("encoder", semantics["encoder"])
    ours = {key: spec.get(key) for key in _GATE_SETTINGS}
    ours["gated_layers"] = [list(layer) for layer in model.gated_layers]
    ours["encoder"] = semantics["encoder"]
    changed = differences(theirs, ours)
    if changed:
        warnings.warn(
            f"{checkpoint}: its gates do not fit ({'; '.join(changed)}) and start anew; only its "
            "backbone is used",
            UserWarning,
            stacklevel=3,
        )
    return not changed


def load_published(backbone: nn.Module, source: str) -> dict[str, Any]:
    """Load published weights into a backbone.

    Raises:
        UsageError: none are published for this backbone.
        CheckpointError: no such weights, or of another backbone.
    """
    assert isinstance(backbone, GatedBackbone)
    try:
        return backbone.load_pretrained(source)
    except ValueError as error:
        raise UsageError(f"--model.pretrained: {error}") from error
