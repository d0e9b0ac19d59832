"""Pre-training: the backbone and a linear classifier learn the base classes by cross-entropy.

Recipe of method §6 at a small scale: AdamW, linear warm-up then a cosine schedule, label
smoothing, light augmentation in batches on the device. Selection uses only monitor images
(validation classes, or held-out images of the base classes), never the novel classes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.data.augment import random_affine
from dvla_fast.data.images import unit_range
from dvla_fast.engine.build import (
    backbone_spec,
    build_data,
    build_pretrain_model,
    check_finite,
    normalisation,
    pick_device,
    seed_everything,
    without_test_split,
)
from dvla_fast.engine.config import PretrainConfig, PretrainRun, to_dict
from dvla_fast.engine.logging import Progress, RunFolder
from dvla_fast.engine.predict import image_features, predict_visual
from dvla_fast.engine.starting import load_published, normalise_for
from dvla_fast.engine.state import TrainingState


def learning_rate(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the rate of a step: linear from ``warmup_lr``, then a cosine down to zero.

    A pure function of the step: resuming needs no scheduler state.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    total = max(config.epochs * steps_per_epoch, warmup + 1)
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def monitor_sampler(data: FewShotData, way: int, shot: int, query: int, seed: int) -> Any:
    """Return a sampler over the monitor images, with way and query lowered to what they allow."""
    counts = torch.bincount(data.monitor.labels)
    way = min(way, len(data.monitor.class_names))
    query = max(1, min(query, int(counts.min()) - shot))
    return EpisodeSampler(data.monitor, way, shot, query, seed)


def augment(images: torch.Tensor, config: PretrainConfig) -> torch.Tensor:
    """Apply the configured augmentation to stored images; returns float images in [0, 1]."""
    # Digits have a black background, which zeros continue; photographs are mirrored outwards.
    padding = "zeros" if images.shape[1] == 1 else "reflection"
    return random_affine(
        unit_range(images),
        shift=config.shift,
        rotate=config.rotate,
        scale=config.scale,
        flip=config.flip,
        padding=padding,
    )


def turn_classes(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Turn each image by 0, 90 or 270 degrees at random; a turned class is a class of its own.

    Three times as many classes from the same images: with few base classes, features otherwise
    keep only what tells those few apart (after Gidaris et al. 2019, "Boosting Few-Shot Visual
    Learning with Self-Supervision"). The half turn is left out: it would make nines, a novel
    digit, out of sixes.

    Args:
        images: (B, C, S, S).
        labels: (B,) int64 in [0, classes).

    Returns:
        Images, and labels in [0, 3 * classes).
    """
    turn = torch.randint(0, 3, labels.shape).to(labels.device)  # CPU stream, saved with the run
    turned = torch.stack([images, images.rot90(1, (2, 3)), images.rot90(3, (2, 3))])
    rows = torch.arange(len(labels), device=labels.device)
    return turned[turn, rows], labels + classes * turn


def pretrain(
    config: PretrainConfig,
    data: FewShotData,
    spec: dict[str, Any],
    folder: RunFolder,
    rng: np.random.Generator,
    seed: int,
    progress: Progress,
    pretrained: str = "",
) -> Path:
    """Pre-train a backbone.

    Args:
        config: the recipe.
        data: the data set, on the device to train on.
        spec: backbone description (``build.backbone_spec``).
        folder: run folder; its ``resume`` continues from the last epoch saved there.
        rng: the run's NumPy generator (image order).
        seed: seed of the validation episodes.
        progress: display; the stage name is "pre-train".
        pretrained: published weights to start from (``ModelConfig.pretrained``).

    Returns:
        Path of the checkpoint that validated best.

    Raises:
        TrainingError: the loss became NaN or infinite; the last good checkpoint stays.
    """
    data = without_test_split(data)
    base = data.base
    outputs = len(base.class_names) * (3 if config.quarter_turns else 1)
    model = build_pretrain_model(spec, outputs)
    if pretrained and not folder.resume:
        load_published(model["backbone"], pretrained)
    model.to(base.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    described = {"backbone": spec, "classes": outputs}
    state = TrainingState(folder, "pretrain", described, {"model": model}, optimizer, rng)
    state.facts = {
        "dataset": data.name,
        "classes": list(base.class_names),
        "normalisation": normalisation(data),
        "seed": seed,
    }
    if folder.resume:
        state.restore()
    sampler = monitor_sampler(data, 5, 1, 15, seed)
    progress.begin("pre-train", config.epochs, state.epoch)
    while state.epoch < config.epochs:
        row = _train_epoch(model, optimizer, data, config, state)
        state.epoch += 1
        check_finite(row, "pre-training", f"epoch {state.epoch}")
        score = None
        if state.epoch % config.validate_every == 0 or state.epoch == config.epochs:
            score, held_out = _validate(model, data, sampler, config.validation_episodes)
            row.update(monitor_episode_accuracy=score, monitor_accuracy=held_out)
        folder.log("pretrain", state.epoch, **row)
        state.save(score)
        progress.advance()
        progress.note(_describe(row, state.epoch, config.epochs))
    return state.best_path


def _train_epoch(
    model: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    data: FewShotData,
    config: PretrainConfig,
    state: TrainingState,
) -> dict[str, float]:
    model.train()
    base = data.base
    order = torch.from_numpy(state.rng.permutation(len(base))).to(base.labels.device)
    batches = [batch for batch in order.split(config.batch_size) if len(batch) > 1]
    totals = torch.zeros(2, device=base.labels.device)
    for index in batches:
        rate = learning_rate(config, state.step, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        images = data.normalise(augment(base.gather(index), config))
        labels = base.labels[index]
        if config.quarter_turns:
            images, labels = turn_classes(images, labels, len(base.class_names))
        logits = model["head"](model["backbone"](images))
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        state.step += 1
        correct = (logits.detach().argmax(1) == labels).float().mean()
        totals += torch.stack([loss.detach(), correct])
    loss_mean, accuracy = (totals / len(batches)).tolist()  # the one synchronisation of the epoch
    return {"loss": loss_mean, "accuracy": accuracy, "lr": rate}


def _validate(
    model: nn.ModuleDict, data: FewShotData, sampler: EpisodeSampler, episodes: int
) -> tuple[float, float]:
    """Return the 1-shot episode accuracy on monitor images, and their plain accuracy or -1."""
    features = image_features(model["backbone"], data, data.monitor)
    score = predict_visual(features, sampler, episodes).accuracies.mean().item()
    if data.monitor.class_names != data.base.class_names:
        return score, -1.0
    with torch.inference_mode():
        logits = model["head"](features)[:, : len(data.base.class_names)]  # upright classes
        correct = (logits.argmax(1) == data.monitor.labels).float().mean()
    return score, correct.item()


def _describe(row: dict[str, float], epoch: int, epochs: int) -> str:
    text = f"epoch {epoch}/{epochs}  loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}"
    if "monitor_episode_accuracy" in row:
        text += f"  held-out 1-shot {row['monitor_episode_accuracy']:.1%}"
    return text


def run_pretrain(config: PretrainRun, *, quiet: bool = False) -> dict[str, Any]:
    """Do what ``dvla-fast pretrain`` does; returns the summary that it writes."""
    device = pick_device(config.device)
    data = normalise_for(build_data(config.data, device, training=True), config.model)
    spec = backbone_spec(config.model, data.channels, data.image_size)
    build_pretrain_model(spec, 1)  # settings that fit no model fail before the folder is made
    folder = RunFolder(config.output, to_dict(config), resume=config.resume)
    rng = seed_everything(config.seed)
    with Progress({"pre-train": 1.0}, enabled=not quiet) as progress:
        best = pretrain(
            config.pretrain, data, spec, folder, rng, config.seed, progress, config.model.pretrained
        )
    rows = folder.rows("pretrain")
    validated = [row for row in rows if "monitor_episode_accuracy" in row]
    summary = {
        "command": "pretrain",
        "dataset": data.name,
        "seed": config.seed,
        "epochs": config.pretrain.epochs,
        "loss": rows[-1]["loss"],
        "monitor": data.monitor_kind,
        "monitor_episode_accuracy": max(row["monitor_episode_accuracy"] for row in validated),
        "checkpoint": str(best),
        "device": str(device),
        "torch": torch.__version__,
    }
    folder.write_summary(summary)
    folder.close()
    return summary
