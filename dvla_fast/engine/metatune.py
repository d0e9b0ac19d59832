"""Meta-tuning: gates, policy and backbone learn on episodes of the base classes.

Each step runs a few episodes at once: supports sample a gate value per gated layer from the
policy, queries replay it, and the loss is the classifier's cross-entropy plus the policy loss of
the gates: REINFORCE by default (paper, section on reinforcement-learning gating), or what
``engine.gating`` is told. Figures stay on the device and are read once per epoch. Nothing here sees
a novel class.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dvla_fast.data import EpisodeBatch, EpisodeSampler, FewShotData
from dvla_fast.data.augment import Draws
from dvla_fast.data.images import to_device_of
from dvla_fast.engine.augmentation import Augmentation
from dvla_fast.engine.build import (
    backbone_spec,
    build_data,
    build_model,
    build_texts,
    model_spec,
    normalisation,
    seed_everything,
    split_classes,
    without_test_split,
)
from dvla_fast.engine.config import MetatuneConfig, MetatuneRun
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.divergence import DivergenceWatch
from dvla_fast.engine.execution import Execution
from dvla_fast.engine.gating import Episodes, GateTraining, Rollout
from dvla_fast.engine.logging import Progress, RunFolder, open_folder
from dvla_fast.engine.memory import free_mib
from dvla_fast.engine.monitor import (
    monitor_episodes,
    monitor_sampler,
    scored,
    validation_facts,
)
from dvla_fast.engine.predict import LEARNED, EpisodePredictor
from dvla_fast.engine.prefixes import PrefixMaps, check_constant_prefix
from dvla_fast.engine.settings import to_dict
from dvla_fast.engine.starting import begin_metatuning, continue_gates
from dvla_fast.engine.state import TrainingState
from dvla_fast.engine.trained_classes import (
    require_untrained,
    training_stage,
    unknown_stage,
)
from dvla_fast.nn import DVLA
from dvla_fast.rl import collapsed_layers, total_loss
from dvla_fast.semantics import EncodedTexts

_MAPS_MIB = 8192  # the default of evaluate.cache_mib


def parameter_groups(
    model: DVLA, config: MetatuneConfig, baseline: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Split parameters: the backbone at its small rate, everything new at the full one."""
    backbone = list(model.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    new = [parameter for parameter in model.parameters() if id(parameter) not in known]
    if baseline is not None:
        new += baseline.parameters()
    return [
        {"params": new, "lr": config.lr},
        {"params": backbone, "lr": config.backbone_lr},
    ]


class _Totals:
    """Sums named device tensors over an epoch without a synchronisation."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []  # of each step, to find the one that broke
        self.alphas: list[Tensor] = []
        self.count = 0

    def add(self, values: dict[str, Tensor], alphas: Tensor) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.values[name] = self.values[name] + value if name in self.values else value
        self.losses.append(values["loss"])
        self.alphas.append(alphas.detach())
        self.count += 1

    def row(self, processes: Processes) -> dict[str, Any]:
        """Read everything: means of the figures, and mean and spread of alpha by layer."""
        row = {
            name: (processes.mean(value) / self.count).tolist()
            for name, value in self.values.items()
        }
        alphas = processes.gather(torch.cat(self.alphas, 1), dim=1)  # (L, episodes)
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
    facts: dict[str, Any] | None = None,
    execution: Execution | None = None,
    prefixes: PrefixMaps | None = None,
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
        facts: more to note in the checkpoints; ``training`` has the stages before this one
            (``trained_classes.training_stages``), which else are not known.
        execution: precision, compilation, processes; None: float32 in one process.
        prefixes: maps before the first gate, computed once for the whole run, of a frozen backbone
            without augmentation.

    Returns:
        Path of the checkpoint that validated best on monitor episodes.

    Raises:
        TrainingError: loss, features or weights became NaN or infinite, or a step overflowed; the
            last good checkpoint stays.
        UsageError: settings of the gates' learning that do not fit together.

    Warns:
        RuntimeWarning: a gate's policy has collapsed; once a layer.
    """
    if prefixes is not None:
        check_constant_prefix(config)
    data = without_test_split(data)
    model.backbone.requires_grad_(config.backbone_lr > 0)  # frozen: no gradients are computed
    execution = execution or Execution()
    execution.prepare(model)
    gates = GateTraining(config, model, execution.processes)
    state = _state(config, model, spec, data, gates, folder, rng, {"seed": seed, **(facts or {})})
    if folder.resume:
        state.restore()
    step = Step(config, model, data, texts, state.optimizer, gates, execution, seed, prefixes)
    rates = {"metatune.lr": config.lr, "metatune.backbone_lr": config.backbone_lr}
    watch = DivergenceWatch("meta-tuning", state, rates)
    epoch = Epoch(step, watch)
    progress.begin("meta-tune", config.epochs, state.epoch)
    numbers = monitor_episodes(data, config.way, config.shots[0], config.query)
    monitor = monitor_sampler(data, numbers, seed + 1, progress)
    while state.epoch < config.epochs:
        row = epoch(state)
        score = None
        if state.epoch % config.validate_every == 0 or state.epoch == config.epochs:
            with execution.eager(), watch.after("validation"):
                accuracies, alphas = _validate(
                    model,
                    data,
                    texts,
                    monitor,
                    config.validation_episodes,
                    execution.processes.count,
                    prefixes,
                )
            score, half = scored(accuracies)
            row.update(monitor_accuracy=score, monitor_ci95=half, monitor_alpha=alphas)
        folder.log("metatune", state.epoch, **row)
        with watch.after("saving"):
            state.save(score)
        progress.advance()
        progress.note(_describe(row, state.epoch, config.epochs, numbers))
    return state.best_path


def _state(
    config: MetatuneConfig,
    model: DVLA,
    spec: dict[str, Any],
    data: FewShotData,
    gates: GateTraining,
    folder: RunFolder,
    rng: np.random.Generator,
    facts: dict[str, Any],
) -> TrainingState:
    """Begin the state of the stage, with its optimiser and what its checkpoints say of it."""
    groups = parameter_groups(model, config, gates.baseline)
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    state = TrainingState(
        folder, "metatune", spec, {"model": model, **gates.modules}, optimizer, rng
    )
    earlier = facts.get("training", [unknown_stage("before")])
    state.facts = {
        "dataset": data.name,
        "normalisation": normalisation(data),
        **facts,
        "training": [*earlier, training_stage("metatune", data)],
    }
    return state


def _training_mode(model: DVLA, freeze_norm: bool) -> None:
    """Switch to training, optionally all but the backbone's BatchNorm layers.

    At a rate of 1e-6 the backbone's weights hardly move in meta-tuning, but running statistics
    would still drift to those of few-class episodes within tens of steps.
    """
    model.train()
    if not any(parameter.requires_grad for parameter in model.backbone.parameters()):
        model.backbone.eval()  # frozen: neither its statistics move nor does it drop anything
    elif freeze_norm:
        for module in model.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _warn_of_collapse(row: dict[str, Any], model: DVLA, warned: set[int]) -> None:
    for layer in set(row["collapsed"]) - warned:
        stage, block = model.gated_layers[layer]
        warnings.warn(
            f"the policy at stage {stage}, block {block} has collapsed (mean alpha"
            f" {row['alpha_mean'][layer]:.3f}, entropy {row['entropy'][layer]:.2f}): it draws the"
            " same gate every time and learns no more; raise --metatune.entropy_weight, or lower"
            " --metatune.lr or --metatune.reinforce_weight",
            RuntimeWarning,
            stacklevel=3,
        )
        warned.add(layer)


class Step:
    """One optimiser step on a few base-class episodes."""

    def __init__(
        self,
        config: MetatuneConfig,
        model: DVLA,
        data: FewShotData,
        texts: EncodedTexts,
        optimizer: torch.optim.Optimizer,
        gates: GateTraining,
        execution: Execution,
        seed: int,
        prefixes: PrefixMaps | None = None,
    ) -> None:
        self.maps = None if prefixes is None else prefixes.of(model, "base")
        self.config, self.model, self.data, self.texts = config, model, data, texts
        self.optimizer, self.gates, self.execution = optimizer, gates, execution
        self.augmentation = Augmentation(config.augment, data)
        self.positions = split_classes(data, "base").cpu()
        self.samplers = [
            EpisodeSampler(data.base, config.way, shot, config.query, seed) for shot in config.shots
        ]
        self.share = execution.processes.share(
            config.episodes_per_step, "metatune.episodes_per_step"
        )
        baseline = [] if gates.baseline is None else list(gates.baseline.parameters())
        self.clip_norms = [
            (list(model.parameters()), config.clip_norm),
            (baseline, config.clip_norm),
        ]

    def images(self, index: Tensor) -> Tensor:
        """Gather, augment and normalise images: index (E, n) on the CPU -> (E, n, C, H, W).

        With maps of the prefix, theirs are gathered instead.
        """
        if self.maps is not None:
            return self.maps[to_device_of(self.maps, index)]
        count = index.numel()
        first = self.share.start * index.shape[1]
        draws = Draws(count, first, count * self.execution.processes.count)
        images = self.augmentation(self.data.base.gather(index.flatten()), draws)
        return self.execution.images(images).unflatten(0, index.shape)

    def __call__(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """Take step ``number`` of the run; returns figures and alphas (L, E), on the device."""
        with self.execution.autocast():
            rollout, loss, figures = self._loss(number)
        self.execution.update(loss, self.optimizer, self.clip_norms)
        for _ in range(self.gates.epochs - 1):
            with self.execution.autocast():
                policy_loss, latest = self.gates.again(rollout)
            self.execution.update(policy_loss, self.optimizer, self.clip_norms)
            if "clip_fraction" in latest:  # of the last epoch: in the first one nothing is clipped
                figures["clip_fraction"] = latest["clip_fraction"]
        figures.update(self.gates.movement(rollout))
        episodes = rollout.rewards.shape[1]
        with torch.no_grad():
            alphas = torch.stack(
                [t.alpha.float().reshape(episodes, -1).mean(1) for t in rollout.output.layers]
            )
        return figures, alphas

    def _loss(self, number: int) -> tuple[Rollout, Tensor, dict[str, Tensor]]:
        config = self.config
        turn, sampler = divmod(number, len(self.samplers))
        count = config.episodes_per_step
        batch = self.samplers[sampler].batch(turn * count, count)
        batch = EpisodeBatch(*(part[self.share] for part in batch))
        labels = [
            to_device_of(self.data.base.labels, part)
            for part in (batch.support_labels, batch.query_labels, self.positions[batch.classes])
        ]
        support_labels, query_labels, classes = labels
        rollout = self.gates.play(
            Episodes(
                self.images(batch.support),
                support_labels,
                self.images(batch.query),
                query_labels,
                self.texts.episodes(classes),
            ),
            config.way,
            from_prefix=self.maps is not None,
        )
        loss, figures = total_loss(
            rollout.output,
            rollout.query_labels,
            rollout.text,
            self.gates.loss,
            None if rollout.level is None else rollout.level.detach(),
            rewards=rollout.rewards,
            reference=rollout.reference,
            scores=rollout.scores,
        )
        extra, more = self.gates.extra_loss(rollout)
        figures = {**figures, **more, "loss": loss.detach()}
        return rollout, loss if extra is None else loss + extra, figures


class Epoch:
    """The steps of an epoch, and what they were like.

    Args:
        step: takes one of them.
        watch: of the stage.
    """

    def __init__(self, step: Step, watch: DivergenceWatch) -> None:
        self.step, self.watch = step, watch
        self._collapsed: set[int] = set()  # layers that were warned of

    def __call__(self, state: TrainingState) -> dict[str, Any]:
        """Train; returns the epoch's figures and counts it in ``state``.

        Raises:
            TrainingError: training diverged.

        Warns:
            RuntimeWarning: a gate's policy has collapsed; once a layer.
        """
        model, gates = self.step.model, self.step.gates
        _training_mode(model, self.step.config.freeze_norm)
        gates.begin_epoch()
        totals = _Totals()
        for _ in range(self.step.config.steps_per_epoch):
            with self.watch.training():
                totals.add(*self.step(state.step))
            state.step += 1
        row = totals.row(self.step.execution.processes)
        self.watch.check({"loss": row["loss"]}, totals.losses)
        state.epoch += 1
        if gates.stochastic:
            row["collapsed"] = collapsed_layers(row["alpha_mean"], row["entropy"], gates.discrete)
            _warn_of_collapse(row, model, self._collapsed)
        return row


def _validate(
    model: DVLA,
    data: FewShotData,
    texts: EncodedTexts,
    sampler: EpisodeSampler,
    episodes: int,
    processes: int = 1,
    prefixes: PrefixMaps | None = None,
) -> tuple[Tensor, list[float]]:
    """Return the accuracies (n,) of monitor episodes and the mean alpha by layer of the policy's
    mean on them.

    Training's own memory stays where it is: the feature maps kept here take at most a quarter of
    what is free beside it, over all processes.
    """
    most = min(_MAPS_MIB, free_mib(data.monitor.device) / (4 * processes))
    maps = None if prefixes is None else prefixes.of(model, "monitor")
    predictor = EpisodePredictor(model, data, texts, "monitor", cache_mib=most, maps=maps)
    found = predictor.predict(sampler, episodes)[LEARNED]
    assert found.alphas is not None
    return found.accuracies, found.alphas.mean(0).tolist()


def _describe(row: dict[str, Any], epoch: int, epochs: int, numbers: dict[str, Any]) -> str:
    alphas = ", ".join(f"{alpha:.2f}" for alpha in row["alpha_mean"])
    text = f"epoch {epoch}/{epochs}  accuracy {row['accuracy']:.1%}  alpha {alphas}"
    if "monitor_accuracy" in row:
        episodes = f"{numbers['way']}-way {numbers['shot']}-shot"
        text += f"  held-out {episodes} {row['monitor_accuracy']:.1%}"
    return text


def run_metatune(config: MetatuneRun, *, quiet: bool = False) -> dict[str, Any]:
    """Do what ``dvla-fast metatune`` does; returns the summary that it writes."""
    processes = Processes(config.device)
    execution = Execution(config.execution, processes)
    data = build_data(config.data, processes.device, training=True)
    texts, semantics = build_texts(config.semantics, data, processes.device)
    spec = model_spec(
        config.model,
        backbone_spec(config.model, data.channels, data.image_size),
        semantics["dim"],
    )
    rng = seed_everything(config.seed)
    model = build_model(spec)
    data, start = begin_metatuning(model, spec["backbone"], data, config.model, config.checkpoint)
    gates = continue_gates(model, spec, semantics, config.checkpoint)
    model.to(processes.device)
    started = config.checkpoint or config.model.pretrained
    # Before any training: a checkpoint is selected by the one and evaluated on the other.
    classes = {
        split: require_untrained({started: start.stages}, data, split)
        for split in ("monitor", "novel")
    }
    _check_recipe(config.metatune, model, data, processes)
    # The rates are constant: a run that goes on for longer is the one that was longer at once.
    folder = open_folder(
        config.output, to_dict(config), processes, config.resume, config.wandb, ("metatune.epochs",)
    )
    facts = {"semantics": semantics, "started_from": started, "gates": gates}
    noted = {**facts, "start": start.facts, "training": start.stages}
    with Progress({"meta-tune": 1.0}, enabled=not quiet and processes.main) as progress:
        if gates == "continued":
            progress.note(f"the gates of {config.checkpoint} learn on")
        best = metatune(
            config.metatune, model, spec, data, texts, folder, rng, config.seed, progress, noted,
            execution,
        )  # fmt: skip
    processes.wait()
    summary = {
        **_summary(config, data, folder, processes),
        **facts,
        "checkpoint": str(best),
        "gated_layers": [list(layer) for layer in model.gated_layers],
        "leaks": {"classes": classes},
    }
    folder.write_summary(summary)
    folder.close()
    return summary


def _check_recipe(
    config: MetatuneConfig, model: DVLA, data: FewShotData, processes: Processes
) -> None:
    """Find settings that cannot train before a folder is made (DataError, UsageError)."""
    for shot in config.shots:
        EpisodeSampler(data.base, config.way, shot, config.query, 0)
    GateTraining(config, model, processes)
    Augmentation(config.augment, data)
    processes.share(config.episodes_per_step, "metatune.episodes_per_step")


def _summary(
    config: MetatuneRun, data: FewShotData, folder: RunFolder, processes: Processes
) -> dict[str, Any]:
    """What the run was, and how its validations went."""
    tuning, rows = config.metatune, folder.rows("metatune")
    numbers = monitor_episodes(data, tuning.way, tuning.shots[0], tuning.query)
    return {
        "command": "metatune",
        "dataset": data.name,
        "seed": config.seed,
        "epochs": tuning.epochs,
        "loss": rows[-1]["loss"],
        "monitor": data.monitor_kind,
        **validation_facts(rows, "monitor_accuracy", numbers, tuning.validation_episodes),
        "device": str(processes.device),
        "processes": processes.count,
        "precision": config.execution.precision,
        "torch": torch.__version__,
    }
