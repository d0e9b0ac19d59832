"""Meta-tuning: gates, policy and backbone learn on episodes of the base classes.

Each step runs a few episodes at once: supports sample a gate value per gated layer from the
policy, queries replay it, and the loss is the classifier's cross-entropy plus the REINFORCE loss
of the gates (paper, section on reinforcement-learning gating). Figures stay on the device and are
read once per epoch. Nothing here sees a novel class.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.data.images import unit_range
from dvla_fast.engine.build import (
    backbone_spec,
    build_data,
    build_model,
    build_texts,
    check_finite,
    load_backbone,
    model_spec,
    pick_device,
    seed_everything,
    split_classes,
)
from dvla_fast.engine.config import (
    EvaluateConfig,
    MetatuneConfig,
    MetatuneRun,
    PretrainConfig,
    UsageError,
    to_dict,
)
from dvla_fast.engine.evaluate import LEARNED, gated_accuracies
from dvla_fast.engine.logging import Progress, RunFolder
from dvla_fast.engine.pretrain import augment, monitor_sampler
from dvla_fast.engine.state import TrainingState
from dvla_fast.nn import DVLA
from dvla_fast.rl import EMABaseline, ReinforceLoss, total_loss
from dvla_fast.semantics import EncodedTexts


def parameter_groups(model: DVLA, config: MetatuneConfig) -> list[dict[str, Any]]:
    """Split parameters: the backbone at its small rate, everything new at the full one."""
    backbone = list(model.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    new = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [
        {"params": new, "lr": config.lr},
        {"params": backbone, "lr": config.backbone_lr},
    ]


class _Totals:
    """Sums named device tensors over an epoch without a synchronisation."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.alphas: list[Tensor] = []
        self.count = 0

    def add(self, values: dict[str, Tensor], alphas: Tensor) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.values[name] = self.values[name] + value if name in self.values else value
        self.alphas.append(alphas.detach())
        self.count += 1

    def row(self) -> dict[str, Any]:
        """Read everything: means of the figures, and mean and spread of alpha by layer."""
        row = {name: (value / self.count).tolist() for name, value in self.values.items()}
        alphas = torch.cat(self.alphas, 1)  # (L, episodes)
        row["alpha_mean"] = alphas.mean(1).tolist()
        row["alpha_std"] = alphas.std(1, unbiased=False).tolist()
        return row


def metatune(
    config: MetatuneConfig,
    model: DVLA,
    spec: dict[str, Any],
    data: FewShotData,
    texts: EncodedTexts,
    folder: RunFolder,
    rng: np.random.Generator,
    seed: int,
    progress: Progress,
    augmentation: PretrainConfig | None = None,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Meta-tune a model whose backbone is pre-trained.

    Args:
        config: the recipe.
        model: on the device to train on; trained in place.
        spec: its description (``build.model_spec``).
        texts: encoded texts of ``data.class_names``.
        folder: run folder; its ``resume`` continues from the last epoch saved there.
        rng: the run's NumPy generator (saved with the checkpoint).
        seed: seed of the training and validation episodes.
        progress: display; the stage name is "meta-tune".
        augmentation: amounts for ``config.augment``.
        facts: more to note in the checkpoints.

    Returns:
        Path of the checkpoint that validated best on monitor episodes.

    Raises:
        TrainingError: the loss became NaN or infinite; the last good checkpoint stays.
    """
    device = data.base.images.device
    optimizer = torch.optim.AdamW(parameter_groups(model, config), weight_decay=config.weight_decay)
    baseline = EMABaseline(len(model.gated_layers), momentum=config.baseline_momentum).to(device)
    state = TrainingState(
        folder, "metatune", spec, {"model": model, "baseline": baseline}, optimizer, rng
    )
    state.facts = {"dataset": data.name, "seed": seed, **(facts or {})}
    if folder.resume:
        state.restore()
    step = _Step(config, model, data, texts, optimizer, baseline, augmentation, seed)
    monitor = monitor_sampler(data, config.way, config.shots[0], config.query, seed + 1)
    progress.begin("meta-tune", config.epochs, state.epoch)
    while state.epoch < config.epochs:
        _training_mode(model, config.freeze_norm)
        totals = _Totals()
        for _ in range(config.steps_per_epoch):
            totals.add(*_guarded(step, state.step, state.epoch + 1))
            state.step += 1
        row = totals.row()
        state.epoch += 1
        check_finite({"loss": row["loss"]}, "meta-tuning", f"epoch {state.epoch}")
        score = None
        if state.epoch % config.validate_every == 0 or state.epoch == config.epochs:
            score, alphas = _validate(model, data, texts, monitor, config.validation_episodes)
            row.update(monitor_accuracy=score, monitor_alpha=alphas)
        folder.log("metatune", state.epoch, **row)
        state.save(score)
        progress.advance()
        progress.note(_describe(row, state.epoch, config.epochs))
    return state.best_path


def _training_mode(model: DVLA, freeze_norm: bool) -> None:
    """Switch to training, optionally all but the backbone's BatchNorm layers.

    At a rate of 1e-6 the backbone's weights hardly move in meta-tuning, but running statistics
    would still drift to those of few-class episodes within tens of steps.
    """
    model.train()
    if freeze_norm:
        for module in model.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _guarded(step: _Step, number: int, epoch: int) -> tuple[dict[str, Tensor], Tensor]:
    """Take a step; the policy's own complaint about NaN becomes the run's."""
    try:
        return step(number)
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        check_finite({"features": math.nan}, "meta-tuning", f"epoch {epoch}")
        raise


class _Step:
    """One optimiser step on a few base-class episodes."""

    def __init__(
        self,
        config: MetatuneConfig,
        model: DVLA,
        data: FewShotData,
        texts: EncodedTexts,
        optimizer: torch.optim.Optimizer,
        baseline: EMABaseline,
        augmentation: PretrainConfig | None,
        seed: int,
    ) -> None:
        self.config, self.model, self.data, self.texts = config, model, data, texts
        self.optimizer, self.baseline, self.augmentation = optimizer, baseline, augmentation
        self.positions = split_classes(data, "base")
        self.samplers = [
            EpisodeSampler(data.base, config.way, shot, config.query, seed) for shot in config.shots
        ]
        self.reinforce = ReinforceLoss(
            entropy_weight=config.entropy_weight, weight=config.reinforce_weight
        )

    def images(self, index: Tensor) -> Tensor:
        """Gather and normalise images: index (E, n) -> (E, n, C, H, W)."""
        images = self.data.base.images[index.flatten()]
        if self.config.augment and self.augmentation is not None:
            images = augment(images, self.augmentation)
        return self.data.normalise(unit_range(images)).unflatten(0, index.shape)

    def __call__(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """Take step ``number`` of the run; returns figures and alphas (L, E), on the device."""
        config = self.config
        turn, sampler = divmod(number, len(self.samplers))
        count = config.episodes_per_step
        batch = self.samplers[sampler].batch(turn * count, count).to(self.positions.device)
        text = self.texts.episodes(self.positions[batch.classes])
        output = self.model(
            self.images(batch.support),
            batch.support_labels,
            self.images(batch.query),
            text,
            way=config.way,
        )
        loss, figures = total_loss(
            output,
            batch.query_labels,
            text,
            self.reinforce,
            self.baseline,
            lambda_sim=config.lambda_sim,
            lambda_imp=config.lambda_imp,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            alphas = torch.stack(
                [trace.alpha.float().reshape(count, -1).mean(1) for trace in output.layers]
            )
        return {**figures, "loss": loss.detach()}, alphas


def _validate(
    model: DVLA, data: FewShotData, texts: EncodedTexts, sampler: EpisodeSampler, episodes: int
) -> tuple[float, list[float]]:
    """Return the accuracy and the mean alpha by layer of the policy's mean on monitor episodes."""
    scores, alphas = gated_accuracies(
        model, data, texts, "monitor", sampler, EvaluateConfig(), episodes=episodes, fixed=False
    )
    return scores[LEARNED].mean().item(), alphas.mean(0).tolist()


def _describe(row: dict[str, Any], epoch: int, epochs: int) -> str:
    alphas = ", ".join(f"{alpha:.2f}" for alpha in row["alpha_mean"])
    text = f"epoch {epoch}/{epochs}  accuracy {row['accuracy']:.1%}  alpha {alphas}"
    if "monitor_accuracy" in row:
        text += f"  held-out {row['monitor_accuracy']:.1%}"
    return text


def run_metatune(config: MetatuneRun, *, quiet: bool = False) -> dict[str, Any]:
    """Do what ``dvla-fast metatune`` does; returns the summary that it writes."""
    if not config.checkpoint:
        raise UsageError(
            "metatune needs --checkpoint, the pretrain-best.safetensors of a `dvla-fast pretrain` "
            "run"
        )
    device = pick_device(config.device)
    data = build_data(config.data, device)
    texts, semantics = build_texts(config.semantics, data, device)
    spec = model_spec(
        config.model,
        backbone_spec(config.model, data.channels, data.image_size),
        config.semantics.dim,
    )
    rng = seed_everything(config.seed)
    model = build_model(spec)
    load_backbone(model, spec["backbone"], config.checkpoint)
    model.to(device)
    tuning = config.metatune
    for shot in tuning.shots:  # fail before the folder is made
        EpisodeSampler(data.base, tuning.way, shot, tuning.query, 0)
    folder = RunFolder(config.output, to_dict(config), resume=config.resume)
    with Progress({"meta-tune": 1.0}, enabled=not quiet) as progress:
        best = metatune(
            config.metatune,
            model,
            spec,
            data,
            texts,
            folder,
            rng,
            config.seed,
            progress,
            config.pretrain,
            {"semantics": semantics, "started_from": config.checkpoint},
        )
    rows = folder.rows("metatune")
    summary = {
        "command": "metatune",
        "dataset": data.name,
        "seed": config.seed,
        "epochs": config.metatune.epochs,
        "loss": rows[-1]["loss"],
        "monitor": data.monitor_kind,
        "monitor_accuracy": max(row.get("monitor_accuracy", -1.0) for row in rows),
        "checkpoint": str(best),
        "started_from": config.checkpoint,
        "semantics": semantics,
        "device": str(device),
        "torch": torch.__version__,
    }
    folder.write_summary(summary)
    folder.close()
    return summary
