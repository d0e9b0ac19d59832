"""Pre-training: the backbone and a linear classifier learn the base classes by cross-entropy.

Recipe of method §6: AdamW, linear warm-up then a cosine schedule, label smoothing, mixup and
cutmix, augmentation in batches on the device. The defaults are a small recipe for digits; configs/
holds the published ones. Selection uses only monitor images (validation classes, or held-out images
of the base classes), never the novel classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.data.augment import Draws
from dvla_fast.data.images import to_device_of
from dvla_fast.engine.augmentation import Augmentation, build_mixer
from dvla_fast.engine.build import (
    build_data,
    normalisation,
    seed_everything,
    without_test_split,
)
from dvla_fast.engine.config import PretrainConfig, PretrainRun
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.divergence import DivergenceWatch
from dvla_fast.engine.execution import Execution, adamw
from dvla_fast.engine.inputs import run_inputs
from dvla_fast.engine.models import (
    backbone_spec,
    build_model,
    build_pretrain_model,
    model_spec,
)
from dvla_fast.engine.monitor import monitor_episodes, monitor_sampler, monitor_word, scored
from dvla_fast.engine.next_steps import keep_settings_files
from dvla_fast.engine.predict import image_features, predict_visual
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.run_folder import open_folder
from dvla_fast.engine.settings import UsageError, checked, to_dict
from dvla_fast.engine.settle import check_warmup
from dvla_fast.engine.stages import StageRun, Validation, run_epochs, training_summary
from dvla_fast.engine.starting import load_published, normalise_for
from dvla_fast.engine.state import TrainingState
from dvla_fast.engine.trained_classes import training_stage, unknown_stage


def learning_rate(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the rate of a step: linear from ``warmup_lr``, then a cosine down to zero.

    A pure function of the step: resuming needs no scheduler state.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    total = max(config.epochs * steps_per_epoch, warmup + 1)
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# What pre-training validates on (way, shot, query), and the figure that selects checkpoints.
_VALIDATION, _SELECTS = (5, 1, 15), "monitor_episode_accuracy"


def turn_classes(
    images: Tensor, labels: Tensor, classes: int, draws: Draws | None = None
) -> tuple[Tensor, Tensor]:
    """Turn each image by 0, 90 or 270 degrees at random; a turned class is a class of its own.

    Three times as many classes from the same images: with few base classes, features otherwise
    keep only what tells those few apart (after Gidaris et al. 2019, "Boosting Few-Shot Visual
    Learning with Self-Supervision"). The half turn is left out: it would make nines, a novel
    digit, out of sixes.

    Args:
        images: (B, C, S, S).
        labels: (B,) int64 in [0, classes).
        draws: random numbers of the images.

    Returns:
        Images, and labels in [0, 3 * classes).
    """
    turn = to_device_of(labels, (draws or Draws(len(labels))).integers(3))
    turned = torch.stack([images, images.rot90(1, (2, 3)), images.rot90(3, (2, 3))])
    rows = torch.arange(len(labels), device=labels.device)
    return turned[turn, rows], labels + classes * turn


def pretrain(
    config: PretrainConfig,
    data: FewShotData,
    spec: dict[str, Any],
    run: StageRun,
    pretrained: str = "",
) -> Path:
    """Pre-train a backbone.

    Args:
        config: the recipe.
        data: the data set, on the device to train on.
        spec: backbone description (``models.backbone_spec``).
        run: folder, random numbers, display, execution; the display's stage is "pre-train".
        pretrained: published weights to start from (``ModelConfig.pretrained``).

    Returns:
        Path of the checkpoint that validated best.

    Raises:
        TrainingError: loss, features or weights became NaN or infinite; the
            last good checkpoint stays.
        UsageError: settings that do not fit together.
    """
    data = without_test_split(data)
    outputs = len(data.base.class_names) * (3 if config.quarter_turns else 1)
    model = build_pretrain_model(spec, outputs, config.drop_path)
    model.to(data.base.device)
    run.execution.prepare(model["backbone"])
    described = {"backbone": spec, "classes": outputs}
    state = _state(config, model, described, data, run, bool(pretrained))
    restored = run.folder.resume and state.restore()
    if pretrained and not restored:  # a run stopped before its first checkpoint starts again
        load_published(model["backbone"], pretrained)
    epoch = Epoch(config, model, data, state.optimizer, run.execution, outputs)
    watch = DivergenceWatch("pre-training", state, {"pretrain.lr": config.lr})
    images = _images_an_epoch(config, data, run.execution.processes)
    run.progress.begin("pre-train", config.epochs * images, state.epoch * images)
    numbers = monitor_episodes(data, *_VALIDATION)
    sampler = monitor_sampler(data, numbers, run.seed, run.progress)

    def train(state: TrainingState) -> dict[str, Any]:
        with watch.training():
            row = epoch(state, run.progress.advance)
        watch.check(row["loss"], epoch.losses)
        state.epoch += 1
        return row

    def validate() -> dict[str, Any]:
        return _validate(model, data, sampler, config.validation_episodes)

    validation = Validation(_SELECTS, numbers, validate, monitor_word(data))
    return run_epochs(config, run, watch, train, validation, _describe)


def _state(
    config: PretrainConfig,
    model: nn.ModuleDict,
    spec: dict[str, Any],
    data: FewShotData,
    run: StageRun,
    published: bool,
) -> TrainingState:
    """Begin the state of the stage, with its optimiser and what its checkpoints say of it."""
    optimizer = adamw(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    earlier = [unknown_stage("published")] if published else []
    facts = {
        "dataset": data.name,
        "split_list": data.split_list,
        "classes": list(data.base.class_names),
        "normalisation": normalisation(data),
        "inputs": run_inputs(data),
        "seed": run.seed,
        "training": [*earlier, training_stage("pretrain", data, config)],
    }
    modules = {"model": model}
    return TrainingState(run.folder, "pretrain", spec, modules, optimizer, run.rng, facts)


def check_pretraining(config: PretrainConfig, data: FewShotData, processes: Processes) -> None:
    """Find settings that cannot train before a folder is made.

    Raises:
        UsageError: warm-up without an end, or batches too small or of unequal shares.
        DataError: too few images to validate on.
        MissingDependencyError: augmentation that needs torchvision, without it.
    """
    check_warmup(config)
    monitor_episodes(data, *_VALIDATION)
    Augmentation(config.augment, data)
    build_mixer(config, 2)
    processes.share(config.batch_size, "pretrain.batch_size")
    images, smallest = min(config.batch_size, len(data.base)), 2 * processes.count
    if images < smallest:
        raise UsageError(
            f"pretrain.batch_size: a step of {images} image(s) leaves BatchNorm nothing to compare;"
            f" give at least {smallest}"
        )


def _images_an_epoch(config: PretrainConfig, data: FewShotData, processes: Processes) -> int:
    """The base images, less a last batch that BatchNorm leaves out."""
    rest = len(data.base) % config.batch_size
    return len(data.base) - (rest if rest < 2 * processes.count else 0)


class Epoch:
    """One pass over the base images.

    Attributes:
        losses: of the last pass, one for each step, on the device.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: nn.ModuleDict,
        data: FewShotData,
        optimizer: torch.optim.Optimizer,
        execution: Execution,
        outputs: int,
    ) -> None:
        self.config, self.model, self.data = config, model, data
        self.optimizer, self.execution = optimizer, execution
        self.augmentation = Augmentation(config.augment, data)
        self.mixer = build_mixer(config, outputs)
        self.parameters = list(model.parameters())
        self.losses: list[Tensor] = []

    def __call__(
        self, state: TrainingState, advance: Callable[[int], None] = lambda images: None
    ) -> dict[str, float]:
        """Train; returns the epoch's mean loss and accuracy, and its last learning rate.

        Args:
            advance: called with the images of each step.
        """
        self.model.train()
        config, base, processes = self.config, self.data.base, self.execution.processes
        order = torch.from_numpy(state.rng.permutation(len(base)))
        smallest = 2 * processes.count  # BatchNorm needs two images
        batches = [x for x in order.split(config.batch_size) if len(x) >= smallest]
        totals = torch.zeros(2, device=base.device)
        self.losses = []
        for index in batches:
            rate = learning_rate(config, state.step, len(batches))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            # The last batch may not divide evenly: it gives up what is left over.
            share = processes.share(len(index) // processes.count * processes.count, "batch")
            images, labels = self._views(index[share], len(index), share)
            hard = labels
            if self.mixer is not None:
                images, labels = self.mixer(images, labels)
            with self.execution.autocast():
                logits = self.model["head"](self.model["backbone"](self.execution.images(images)))
                loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            self.execution.update(loss, self.optimizer, [(self.parameters, config.clip_norm)])
            state.step += 1
            correct = (logits.detach().argmax(1) == hard).float().mean()
            self.losses.append(loss.detach().float())
            totals += torch.stack([self.losses[-1], correct])
            advance(len(index))
        # The one synchronisation of the epoch.
        loss_mean, accuracy = (processes.mean(totals) / len(batches)).tolist()
        return {"loss": loss_mean, "accuracy": accuracy, "lr": rate}

    def _views(self, index: Tensor, total: int, share: slice) -> tuple[Tensor, Tensor]:
        """Augmented images (views * n, C, H, W) and labels of this process's part of a batch."""
        base = self.data.base
        stored, labels = base.gather(index), base.labels[to_device_of(base.labels, index)]
        views = []
        for _ in range(self.config.views):
            draws = Draws(len(index), share.start, total)
            images, seen = self.augmentation(stored, draws), labels
            if self.config.quarter_turns:
                images, seen = turn_classes(images, seen, len(base.class_names), draws)
            views.append((images, seen))
        if len(views) == 1:
            return views[0]
        return torch.cat([view[0] for view in views]), torch.cat([view[1] for view in views])


def _validate(
    model: nn.ModuleDict, data: FewShotData, sampler: EpisodeSampler, episodes: int
) -> dict[str, Any]:
    """Return the accuracy of episodes of monitor images, and the plain accuracy on these.

    The plain one is left out for validation classes, which the classifier does not know.
    """
    features = image_features(model["backbone"], data, data.monitor)
    score, half = scored(predict_visual(features, sampler, episodes).accuracies)
    figures = {"monitor_ci95": half, _SELECTS: score}
    if data.monitor.class_names == data.base.class_names:
        with torch.inference_mode():
            logits = model["head"](features)[:, : len(data.base.class_names)]  # upright classes
            right = (logits.argmax(1) == data.monitor.labels).float().mean()
        figures["monitor_accuracy"] = right.item()
    return figures


def _describe(row: Mapping[str, Any]) -> str:
    return f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}"


def run_pretrain(
    config: PretrainRun, *, quiet: bool = False, files: Sequence[str] = ()
) -> dict[str, Any]:
    """Do what ``dvla-fast pretrain`` does; returns the summary that it writes.

    Args:
        files: the settings files that it was given, for the command that follows.
    """
    config = checked(config)
    processes = Processes(config.device)
    execution = Execution(config.execution, processes)
    shown = not quiet and processes.main
    data = build_data(config.data, processes.device, training=True, quiet=not shown)
    data = normalise_for(data, config.model)
    spec = backbone_spec(config.model, data.channels, data.image_size)
    # Settings that fit no model or no batch fail before the folder is made.
    backbone = build_pretrain_model(spec, 1, config.pretrain.drop_path)["backbone"]
    build_model(model_spec(config.model, spec, text_dim=1), backbone)  # for the stage that follows
    check_pretraining(config.pretrain, data, processes)
    if config.model.pretrained:
        load_published(build_pretrain_model(spec, 1)["backbone"], config.model.pretrained)
    folder = open_folder(config.output, to_dict(config), processes, config.resume, config.wandb)
    with folder:
        keep_settings_files(folder, files)
        rng = seed_everything(config.seed)
        with Progress({"pre-train": 1.0}, enabled=shown) as progress:
            run = StageRun(folder, rng, config.seed, progress, execution)
            best = pretrain(config.pretrain, data, spec, run, config.model.pretrained)
        processes.wait()
        numbers = monitor_episodes(data, *_VALIDATION)
        summary = {
            **training_summary(config, data, folder, processes, _SELECTS, numbers),
            "checkpoint": str(best),
        }
        folder.write_summary(summary)
    return summary
