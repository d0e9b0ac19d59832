"""The steps of meta-tuning: each plays a few episodes of base classes and updates what learns.

Supports sample a gate value per gated layer from the policy, queries replay it, and the loss is the
classifier's cross-entropy plus the policy loss of the gates: REINFORCE by default (paper, section
on reinforcement-learning gating), or what ``engine.gating`` is told. Figures stay on the device and
are read once per epoch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dvla_fast.data import EpisodeBatch, EpisodeSampler, FewShotData
from dvla_fast.data.augment import Draws
from dvla_fast.data.images import to_device_of
from dvla_fast.engine.alpha_gradients import AlphaGradients
from dvla_fast.engine.augmentation import Augmentation
from dvla_fast.engine.build import split_classes
from dvla_fast.engine.config import MetatuneConfig
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.divergence import DivergenceWatch
from dvla_fast.engine.execution import Execution
from dvla_fast.engine.gating import Episodes, GateTraining, Rollout
from dvla_fast.engine.prefixes import PrefixMaps
from dvla_fast.engine.state import TrainingState
from dvla_fast.nn import DVLA
from dvla_fast.rl import collapsed_layers, total_loss
from dvla_fast.semantics import EncodedTexts


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
        self.alpha_gradients: AlphaGradients | None = None
        if config.objective == "pathwise" and not execution.config.compile:  # hooks do not compile
            self.alpha_gradients = AlphaGradients(model.gates)
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
        episodes = self._episodes(number)  # in float32: half types would move pixels
        with self.execution.autocast():
            rollout, loss, figures = self._loss(episodes)
        self.execution.update(loss, self.optimizer, self.clip_norms)
        if self.alpha_gradients is not None:
            figures.update(self.alpha_gradients.figures())
        for _ in range(self.gates.epochs - 1):
            with self.execution.autocast():
                policy_loss, latest = self.gates.again(rollout)
            self.execution.update(policy_loss, self.optimizer, self.clip_norms)
            if "clip_fraction" in latest:  # of the last epoch: in the first one nothing is clipped
                figures["clip_fraction"] = latest["clip_fraction"]
        figures.update(self.gates.movement(rollout))
        count = rollout.rewards.shape[1]
        with torch.no_grad():
            alphas = torch.stack(
                [t.alpha.float().reshape(count, -1).mean(1) for t in rollout.output.layers]
            )
        return figures, alphas

    def _episodes(self, number: int) -> Episodes:
        turn, sampler = divmod(number, len(self.samplers))
        count = self.config.episodes_per_step
        batch = self.samplers[sampler].batch(turn * count, count)
        batch = EpisodeBatch(*(part[self.share] for part in batch))
        labels = [
            to_device_of(self.data.base.labels, part)
            for part in (batch.support_labels, batch.query_labels, self.positions[batch.classes])
        ]
        support_labels, query_labels, classes = labels
        return Episodes(
            self.images(batch.support),
            support_labels,
            self.images(batch.query),
            query_labels,
            self.texts.episodes(classes),
        )

    def _loss(self, episodes: Episodes) -> tuple[Rollout, Tensor, dict[str, Tensor]]:
        watching = (
            nullcontext() if self.alpha_gradients is None else self.alpha_gradients.watching()
        )
        with watching:
            rollout = self.gates.play(episodes, self.config.way, from_prefix=self.maps is not None)
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

    def __call__(
        self, state: TrainingState, advance: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Train; returns the epoch's figures and counts it in ``state``.

        Args:
            advance: called after each step.

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
            advance()
        row = totals.row(self.step.execution.processes)
        self.watch.check(row["loss"], totals.losses)
        state.epoch += 1
        if gates.stochastic:
            row["collapsed"] = collapsed_layers(
                row["alpha_mean"], row["entropy"], gates.discrete, row["alpha_edge"]
            )
            _warn_of_collapse(row, model, self._collapsed)
        return row


class _Totals:
    """Sums named device tensors over an epoch without a synchronisation.

    The accuracy of preferences is one of untied pairs, of which a step may have none: it counts by
    their share.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []  # of each step, to find the one that broke
        self.alphas: list[Tensor] = []
        self.count = 0

    def add(self, values: dict[str, Tensor], alphas: Tensor) -> None:
        for name, value in values.items():
            value = value.detach().double()
            if name == "preference_accuracy":
                untied = 1 - values["preference_ties"].double()
                value = torch.where(untied > 0, untied * value, 0.0)
            self.values[name] = self.values[name] + value if name in self.values else value
        self.losses.append(values["loss"])
        self.alphas.append(alphas.detach())
        self.count += 1

    def row(self, processes: Processes) -> dict[str, Any]:
        """Read everything: means of the figures, and mean and spread of alpha by layer."""
        row: dict[str, Any] = {
            name: (processes.mean(value) / self.count).tolist()
            for name, value in self.values.items()
        }
        if "preference_accuracy" in row:
            untied = 1 - row["preference_ties"]
            row["preference_accuracy"] = row["preference_accuracy"] / untied if untied else math.nan
        alphas = processes.gather(torch.cat(self.alphas, 1), dim=1)  # (L, episodes)
        row["alpha_mean"] = alphas.mean(1).tolist()
        row["alpha_std"] = alphas.std(1, unbiased=False).tolist()
        return row


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
            f" {row['alpha_mean'][layer]:.3f}, {row['alpha_edge'][layer]:.0%} of all near 0 or 1,"
            f" entropy {row['entropy'][layer]:.2f}): it draws the same gate every time and learns"
            " no more; raise --metatune.entropy_weight, or lower --metatune.lr or"
            " --metatune.reinforce_weight",
            RuntimeWarning,
            stacklevel=3,
        )
        warned.add(layer)
