"""Evaluation on paired episodes: visual prototypes, a fixed gate, and the learned gate.

All methods meet the same episodes, so their differences are taken episode by episode: the
spread of the episodes' difficulty cancels, and a difference of tenths of a point can be told
from chance. Intervals are 1.96 * s / sqrt(n), with s the standard deviation over the n episodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dvla_fast.data import EpisodeSampler, FewShotData, ImageSet
from dvla_fast.engine.build import (
    build_data,
    build_model,
    build_pretrain_model,
    build_texts,
    check_weights,
    pick_device,
    seed_everything,
    split_classes,
)
from dvla_fast.engine.checkpoint import load_checkpoint, load_weights
from dvla_fast.engine.config import (
    EvaluateConfig,
    EvaluateRun,
    SemanticsConfig,
    UsageError,
    to_dict,
)
from dvla_fast.engine.logging import Progress, RunFolder
from dvla_fast.errors import CheckpointError, TrainingError
from dvla_fast.nn import DVLA, prototype_logits
from dvla_fast.semantics import EncodedTexts

INTERVAL = "mean ± 1.96 * s / sqrt(n), s = sample standard deviation over the n episodes"

VISUAL, FIXED, LEARNED = "visual prototypes", "fixed gate", "learned gate"


def mean_interval(values: Tensor) -> tuple[float, float]:
    """Return the mean of values (n,) and the half width of its 95 % interval, 1.96 s / sqrt(n)."""
    values = values.double()
    if len(values) < 2:
        return values.mean().item(), math.inf
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))


def image_features(
    backbone: nn.Module, data: FewShotData, images: ImageSet, batch: int = 512
) -> Tensor:
    """Compute the visual features (N, d) of a whole image set once, in evaluation mode.

    Raises:
        TrainingError: a feature is NaN or infinite.
    """
    training = backbone.training
    backbone.eval()
    with torch.inference_mode():
        parts = [backbone(data.normalise(chunk)) for chunk in images.chunks(batch)]
    backbone.train(training)
    features = torch.cat(parts)
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite()).any(1).sum())
        raise TrainingError(
            f"{images.name}: features of {bad} of {len(features)} images are NaN or infinite; "
            "the weights are broken: use an earlier checkpoint, or train with a lower rate"
        )
    return features


@torch.inference_mode()
def visual_accuracies(
    features: Tensor,
    sampler: EpisodeSampler,
    episodes: int,
    temperature: float = 0.2,
    start: int = 0,
) -> Tensor:
    """Return each episode's accuracy (n,) with cosine prototypes of precomputed features."""
    results = []
    for first in range(start, start + episodes, 128):
        batch = sampler.batch(first, min(128, start + episodes - first)).to(features.device)
        logits = prototype_logits(
            features[batch.support],
            batch.support_labels,
            features[batch.query],
            sampler.way,
            temperature,
        )
        results.append(_accuracy(logits, batch.query_labels))
    return torch.cat(results)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean(-1)  # (E,)


@torch.inference_mode()
def gated_accuracies(
    model: DVLA,
    data: FewShotData,
    texts: EncodedTexts,
    split: str,
    sampler: EpisodeSampler,
    config: EvaluateConfig,
    progress: Progress | None = None,
    episodes: int | None = None,
    fixed: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """Evaluate the gated model with its learned policy's mean, and with a fixed gate.

    Returns:
        Accuracies (n,) by method, on the CPU, and the learned alphas (n, L).

    Raises:
        TrainingError: logits are NaN or infinite.
    """
    training = model.training
    model.eval()
    images = data.split(split)
    check_weights(model, images.name)
    # What comes before the first gate depends on no episode: once per image, not per episode.
    maps = torch.cat([model.prefix(data.normalise(x)) for x in images.chunks(512)])
    if not bool(maps.isfinite().all()):
        raise TrainingError(
            f"{images.name}: image features are NaN or infinite; check the images, or use an "
            "earlier checkpoint"
        )
    positions = split_classes(data, split)
    modes = {LEARNED: None, **({FIXED: config.fixed_alpha} if fixed else {})}
    scores: dict[str, list[Tensor]] = {name: [] for name in modes}
    alphas: list[Tensor] = []
    finite = torch.ones((), dtype=torch.bool, device=maps.device)
    total = episodes or config.episodes
    for first in range(0, total, config.batch_episodes):
        count = min(config.batch_episodes, total - first)
        batch = sampler.batch(first, count).to(maps.device)
        text = texts.episodes(positions[batch.classes])
        for name, alpha in modes.items():
            output = model(
                maps[batch.support],
                batch.support_labels,
                maps[batch.query],
                text,
                way=sampler.way,
                alpha=alpha,
                sample=False,
                from_prefix=True,
            )
            finite &= output.logits.isfinite().all()
            scores[name].append(_accuracy(output.logits, batch.query_labels))
            if alpha is None:
                alphas.append(torch.stack([_mean_alpha(t.alpha, count) for t in output.layers], 1))
        if progress is not None:
            progress.advance(count)
    model.train(training)
    if not bool(finite):
        raise TrainingError(
            f"{images.name}: the model's logits are NaN or infinite; the weights are broken: use "
            "an earlier checkpoint, or train with a lower rate"
        )
    return {name: torch.cat(parts).cpu() for name, parts in scores.items()}, torch.cat(alphas).cpu()


def _mean_alpha(alpha: Tensor, episodes: int) -> Tensor:
    return alpha.float().reshape(episodes, -1).mean(1)  # one per episode, whatever the scope


def compare(accuracies: Mapping[str, Tensor], reference: str) -> dict[str, Any]:
    """Summarise paired accuracies.

    Args:
        accuracies: method -> (n,) accuracies on the same episodes.
        reference: the method that the others are subtracted from.

    Returns:
        ``{"methods": {name: {accuracy, ci95}}, "paired": {"<reference> - <other>": {...}}}``.
    """
    methods, paired = {}, {}
    for name, values in accuracies.items():
        mean, half = mean_interval(values)
        methods[name] = {"accuracy": mean, "ci95": half}
        if name != reference:
            mean, half = mean_interval(accuracies[reference] - values)
            paired[f"{reference} - {name}"] = {"difference": mean, "ci95": half}
    return {"methods": methods, "paired": paired}


def evaluate_shot(
    model: DVLA | None,
    backbones: Mapping[str, nn.Module],
    data: FewShotData,
    texts: EncodedTexts | None,
    config: EvaluateConfig,
    shot: int,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate all methods on one list of episodes.

    Args:
        model: gated model; None for visual prototypes alone.
        backbones: name -> backbone to evaluate with visual prototypes.
        texts: encoded texts of all classes; needed with a model.
        shot: supports of a class.

    Returns:
        The result: settings, episode-list fingerprint, accuracy of the main method (learned gate,
        or else the first backbone), all methods and paired differences.
    """
    images = data.split(config.split)
    sampler = EpisodeSampler(images, config.way, shot, config.query, seed)
    accuracies: dict[str, Tensor] = {}
    for name, backbone in backbones.items():
        features = image_features(backbone, data, images)
        accuracies[name] = visual_accuracies(features, sampler, config.episodes).cpu()
    main = next(iter(accuracies), LEARNED)
    alpha: dict[str, Any] = {}
    if model is not None and texts is not None:
        gated, alphas = gated_accuracies(
            model, data, texts, config.split, sampler, config, progress
        )
        accuracies |= gated
        main = LEARNED
        alpha = {
            "mean": alphas.mean(0).tolist(),
            "std": alphas.std(0, unbiased=False).tolist(),
        }
    elif progress is not None:
        progress.advance(config.episodes)
    compared = compare(accuracies, main)
    return {
        "dataset": data.name,
        "split": config.split,
        "way": config.way,
        "shot": shot,
        "query": config.query,
        "episodes": config.episodes,
        "seed": seed,
        "episodes_sha256": sampler.fingerprint(config.episodes),
        "method": main,
        **compared["methods"][main],
        "interval": INTERVAL,
        **compared,
        "fixed_alpha": config.fixed_alpha,
        "alpha": alpha,
    }


def load_model(path: str, data: FewShotData) -> tuple[DVLA | None, nn.Module, dict[str, Any]]:
    """Rebuild the model of a checkpoint from its own description.

    Returns:
        (gated model or None for a pre-training checkpoint, backbone, description), on the
        data's device.

    Raises:
        CheckpointError: unreadable, foreign, or made for images of another size.
    """
    tensors, info = load_checkpoint(path, ("pretrain", "metatune"))
    spec = info["model"]["backbone"]
    shape = (spec.get("in_channels", data.channels), spec["image_size"])
    if shape != (data.channels, data.image_size):
        raise CheckpointError(
            f"{path}: made for images of {shape[0]} channel(s) and {shape[1]} pixels, but the "
            f"data set gives {data.channels} and {data.image_size}; set --data.image_size "
            f"{shape[1]}, or use another checkpoint"
        )
    device = data.base.device
    if info["kind"] == "pretrain":
        container = build_pretrain_model(spec, info["model"]["classes"])
        load_weights(container, tensors, "model.", path)
        return None, container["backbone"].to(device), info
    model = build_model(info["model"])
    load_weights(model, tensors, "model.", path)
    model.to(device)
    return model, model.backbone, info


def check_semantics(config: SemanticsConfig, info: dict[str, Any], path: str) -> None:
    """Check that texts are encoded as the checkpoint's gates learned to read them.

    Raises:
        CheckpointError: another encoder or vector length.
    """
    theirs = info.get("semantics", {})
    ours = {"encoder": config.encoder, "dim": config.dim}
    for key, value in ours.items():
        if key in theirs and theirs[key] != value:
            raise CheckpointError(
                f"{path}: its gates read texts with {key}={theirs[key]!r}, not {value!r}; set "
                f"--semantics.{key} {theirs[key]}"
            )


def run_evaluate(config: EvaluateRun, *, quiet: bool = False) -> dict[str, Any]:
    """Do what ``dvla-fast evaluate`` does; returns the summary that it writes."""
    from dvla_fast import __version__

    if not config.checkpoint:
        raise UsageError("evaluate needs --checkpoint, a .safetensors file of a run's checkpoints/")
    device = pick_device(config.device)
    data = build_data(config.data, device)
    model, backbone, info = load_model(config.checkpoint, data)
    texts, semantics = None, None
    if model is not None:
        check_semantics(config.semantics, info, config.checkpoint)
        texts, semantics = build_texts(config.semantics, data, device)
    settings = config.evaluate
    for shot in settings.shots:  # fail before the folder is made
        EpisodeSampler(data.split(settings.split), settings.way, shot, settings.query, 0)
    folder = RunFolder(config.output, to_dict(config), resume=config.resume)
    seed_everything(config.seed)
    folder.trim("evaluate", -1)  # an evaluation is short: it begins anew
    results = []
    with Progress({"evaluate": 1.0}, enabled=not quiet) as progress:
        progress.begin("evaluate", settings.episodes * len(settings.shots))
        for shot in settings.shots:
            result = evaluate_shot(
                model, {VISUAL: backbone}, data, texts, settings, shot, config.seed, progress
            )
            result |= {
                "checkpoint": config.checkpoint,
                "semantics": semantics,
                "device": str(device),
                "dvla_fast": __version__,
                "torch": torch.__version__,
            }
            folder.log("evaluate", shot, accuracy=result["accuracy"], ci95=result["ci95"])
            progress.note(
                f"{shot}-shot {result['accuracy']:.2%} ± {result['ci95']:.2%} ({result['method']})"
            )
            results.append(result)
    # The fields of the first shot stand at the top; all of them are in "results".
    summary = {"command": "evaluate", **results[0], "results": results}
    folder.write_summary(summary)
    folder.close()
    return summary
