"""How the gates learn in meta-tuning: objective, baseline, rewards and reference by name.

The formulas are those of :mod:`dvla_fast.rl`; this module draws K gates for each episode, lets the
reference gate play the same episodes, takes further policy updates from stored actions, and
collects figures without a host synchronisation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dvla_fast.engine.config import MetatuneConfig
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.settings import UsageError
from dvla_fast.nn import DVLA, BetaPolicy, EpisodeOutput, GatePolicy, TextTokens, frozen_policy
from dvla_fast.rl import (
    EMABaseline,
    PolicyLoss,
    Reference,
    RewardInputs,
    ValueBaseline,
    build_baseline,
    build_objective,
    check_reward_weights,
    episode_accuracy,
    gate_states,
    weighted_rewards,
)


class Episodes(NamedTuple):
    """A step's episodes: images (E, n, C, H, W), labels (E, n), and their texts."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    text: TextTokens


class Rollout(NamedTuple):
    """What the gates did in a step, E·K episodes, and all that the policy loss reads."""

    output: EpisodeOutput
    query_labels: Tensor
    text: TextTokens
    rewards: Tensor
    """(L, E·K)."""
    reward_parts: dict[str, Tensor]
    reference: Reference
    level: Tensor | None
    """The baseline, (L, E·K) or (L, 1); carries a gradient if a network made it."""
    signal: Tensor
    """(L, E·K), what the baseline predicts."""
    before: list[Tensor]
    """Per layer (A, O): the policy's outputs when it drew; empty for one that draws nothing."""
    scores: Tensor | None
    """(L, E·K[, n], O)."""


# Settings that nothing but the policy loss reads, which is 0 where no gate is drawn.
_OF_POLICY_LOSS = (
    "baseline_momentum",
    "discount",
    "entropy_weight",
    "lambda_imp",
    "lambda_sim",
    "normalise_advantage",
    "reinforce_weight",
    "rewards",
    "value_weight",
)


def reward_weights(config: MetatuneConfig) -> dict[str, float]:
    """Weights of the rewards by name: those given, or the paper's two."""
    paper = {"similarity": config.lambda_sim, "improvement": config.lambda_imp}
    return dict(config.rewards) or paper


class GateTraining:
    """Objective, baseline, rewards and reference of a run, checked before work starts.

    Args:
        config: the recipe.
        model: whose gates learn; on its device.
        processes: who plays the other episodes of a step; None: nobody.

    Raises:
        UsageError: unknown names, values out of range, or settings that do not fit together.
    """

    def __init__(
        self, config: MetatuneConfig, model: DVLA, processes: Processes | None = None
    ) -> None:
        self.config, self.model = config, model
        self.processes = processes or Processes()
        self._gates: list[Any] = list(model.gates)
        try:
            self._build()
        except ValueError as error:
            raise UsageError(f"metatune: {error}") from error
        self.reference: nn.ModuleList | None = None
        device = next(model.parameters()).device
        # Mean accuracy of the step before, chance before the first; None: no reward reads it.
        self._previous: Tensor | None = None
        if "episode_improvement" in self.reward_weights:
            self._previous = torch.full((), 1.0 / config.way, device=device)
        if self.baseline is not None:
            self.baseline.to(device)
        for gate in self._gates:
            if isinstance(gate.policy, BetaPolicy):
                gate.policy.pathwise = config.objective == "pathwise"
            gate.policy.share = (self.processes.rank, self.processes.count)

    def _build(self) -> None:
        config = self.config
        name, given = config.objective, config.samples
        objective = build_objective(
            name,
            samples=given or 4,
            clip=config.clip,
            beta=config.preference_beta,
            through_loss=True,
        )
        self.samples = given or (4 if config.baseline == "leave-one-out" else objective.samples)
        if name == "dpo" and self.samples != 2:
            raise ValueError(f"samples: dpo compares pairs, got {given}; leave it 0")
        if not config.freeze_norm and (self.samples > 1 or name == "counterfactual"):
            raise ValueError(
                "freeze_norm: several passes over an episode would each move the BatchNorm"
                f" statistics; keep it true for {name} with {self.samples} sample(s)"
            )
        self.epochs = config.policy_epochs or objective.epochs
        if self.epochs > 1 and not objective.repeatable:
            raise ValueError(
                f"policy_epochs: {name} is exact for fresh draws only, got {self.epochs}; use ppo,"
                " grpo or dpo"
            )
        self.loss = PolicyLoss(
            objective,
            config.entropy_weight,
            config.reinforce_weight,
            normalise=config.normalise_advantage,
            discount=config.discount,
            kl_weight=config.kl_weight,
            value_weight=config.value_weight,
        )
        share = config.episodes_per_step // self.processes.count
        if config.normalise_advantage and share * self.samples < 2:
            of_each = " for each process" if self.processes.count > 1 else ""
            raise ValueError(f"normalise_advantage: needs two or more episodes a step{of_each}")
        self.reward_weights = reward_weights(config)
        check_reward_weights(self.reward_weights)
        self._build_baseline()
        self._check_policies()
        self._warn_of_idle_settings()

    def _warn_of_idle_settings(self) -> None:
        """Warn of changed settings that nothing in this recipe reads."""
        config, usual = self.config, MetatuneConfig()
        named = bool(config.rewards)
        fixed = self.needs_reference and config.reference == "fixed"
        reads = {
            "clip": (config.objective in ("ppo", "grpo"), "objective ppo or grpo"),
            "preference_beta": (config.objective == "dpo", "objective dpo"),
            "reference": (self.needs_reference, "objective counterfactual or dpo, or kl_weight"),
            "reference_alpha": (fixed, "a fixed reference gate"),
            "value_weight": (isinstance(self.baseline, ValueBaseline), "baseline value"),
            "baseline_momentum": (self._averages, "baseline ema"),
            "lambda_sim": (not named, "the paper's rewards, without metatune.rewards"),
            "lambda_imp": (not named, "the paper's rewards, without metatune.rewards"),
        }
        if not self.stochastic:
            drawn = "a policy that draws its gates, beta or categorical"
            reads |= dict.fromkeys(_OF_POLICY_LOSS, (False, drawn))
            reads["baseline"] = (config.baseline == "ema", drawn)  # which auto means, too
        for name, (used, reader) in reads.items():
            if not used and getattr(config, name) != getattr(usual, name):
                warnings.warn(
                    f"metatune.{name} has no effect here: it belongs to {reader}",
                    UserWarning,
                    stacklevel=2,
                )

    def _build_baseline(self) -> None:
        config, objective = self.config, self.loss.objective
        name = config.baseline
        if name == "auto":
            name = "ema" if objective.takes_baseline else "none"
        if name != "none" and not objective.takes_baseline:
            raise ValueError(
                f"baseline: {config.objective} takes none, got {name!r}; leave it auto"
            )
        if name == "leave-one-out" and self.samples < 2:
            raise ValueError(f"samples: leave-one-out needs at least 2, got {self.samples}")
        self.baseline = build_baseline(
            name,
            [gate.dim for gate in self._gates],
            momentum=config.baseline_momentum,
            samples=self.samples if name == "leave-one-out" else None,
        )

    def _check_policies(self) -> None:
        config, objective = self.config, self.loss.objective
        policies: list[GatePolicy] = [gate.policy for gate in self._gates]
        self.stochastic = all(policy.stochastic for policy in policies)
        self.discrete = self.stochastic and not all(isinstance(p, BetaPolicy) for p in policies)
        self.needs_density = objective.needs_reference_density or config.kl_weight > 0
        if not self.stochastic and (config.objective != "reinforce" or self.needs_density):
            raise ValueError(
                f"objective: {config.objective} needs a policy that draws its gates (beta or"
                f" categorical), not {type(policies[0]).__name__}"
            )
        if config.objective == "pathwise" and self.discrete:
            raise ValueError("objective: pathwise needs the beta policy: a choice has no gradient")
        self.needs_reference = self.needs_density or objective.needs_reference_rewards
        if self.needs_reference and config.reference == "fixed":
            if self.discrete:
                raise ValueError("reference: fixed needs the beta policy; choose epoch")
            frozen_policy(policies[0], config.reference_alpha)  # checks the value

    @property
    def _averages(self) -> bool:
        return isinstance(self.baseline, EMABaseline)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint must hold to continue, by prefix."""
        kept: dict[str, nn.Module] = {}
        if self.baseline is not None:
            kept["baseline"] = self.baseline
        if self._previous is not None:
            kept["history"] = nn.Module()
            kept["history"].register_buffer("accuracy", self._previous)
        return kept

    def begin_epoch(self) -> None:
        """Freeze the reference; of an epoch, since epochs are what a resumed run repeats whole."""
        if not self.needs_reference:
            return
        alpha = self.config.reference_alpha if self.config.reference == "fixed" else None
        self.reference = nn.ModuleList(frozen_policy(gate.policy, alpha) for gate in self._gates)

    def play(self, episodes: Episodes, way: int, *, from_prefix: bool = False) -> Rollout:
        """Run the episodes with K drawn gates each, and the reference on the same ones.

        Args:
            from_prefix: the episodes hold maps of ``DVLA.prefix`` instead of images.
        """
        images: tuple[Tensor, ...] = (episodes.support, episodes.query)
        objective = self.loss.objective
        if self.samples > 1 or objective.needs_reference_rewards:
            # What comes before the first gate is the same for all draws.
            if not from_prefix:
                images = tuple(_over_images(self.model.prefix, x) for x in images)
            from_prefix = True
        reference_rewards = None
        if objective.needs_reference_rewards:
            reference_rewards = self._reference_rewards(images, episodes, way)
            reference_rewards = reference_rewards.repeat_interleave(self.samples, 1)
        repeated = _repeat(episodes._replace(support=images[0], query=images[1]), self.samples)
        output = self.model(
            repeated.support,
            repeated.support_labels,
            repeated.query,
            repeated.text,
            way=way,
            from_prefix=from_prefix,
        )
        inputs = self._reward_inputs(output, repeated)
        rewards, parts = weighted_rewards(self.reward_weights, inputs)
        if self._previous is not None:
            accuracy = episode_accuracy(output.logits.detach(), repeated.query_labels)
            self._previous.copy_(self.processes.mean(accuracy.mean()))
        before, scores = self._scores(output)
        reference = Reference(reference_rewards, self._reference_log_prob(output))
        signal = self.loss.signal(rewards, reference)
        level = None
        if self.baseline is not None:
            states = (gate_states(output),) if getattr(self.baseline, "needs_states", False) else ()
            # A moving average follows the whole step; the others stay within an episode.
            seen = self.processes.gather(signal, 1) if self._averages else signal
            level = self.baseline(seen, *states)
        return Rollout(
            output, repeated.query_labels, repeated.text, rewards, parts, reference, level, signal,
            before, scores,
        )  # fmt: skip

    def extra_loss(self, rollout: Rollout) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What a value network learns from, and figures that the policy loss does not know."""
        figures = {f"reward_{name}": part.mean(1) for name, part in rollout.reward_parts.items()}
        if rollout.level is None or not rollout.level.requires_grad:
            return None, figures
        loss, figures["value_error"] = self.loss.value_loss(rollout.level, rollout.signal)
        return loss, figures

    def again(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss of the same draws under the policy as it is now: states are stored."""
        steps = []
        for gate, trace in zip(self._gates, rollout.output.layers):
            action = trace.action_logit
            step = gate.policy(_rows(trace.state), action_logit=action.flatten())
            steps.append((step.log_prob.view_as(action), step.entropy.view_as(action)))
        log_prob, entropy = (torch.stack(part) for part in zip(*steps))
        old = torch.stack([trace.log_prob for trace in rollout.output.layers])
        level = None if rollout.level is None else rollout.level.detach()
        return self.loss(
            log_prob,
            entropy,
            rollout.rewards,
            level,
            old_log_prob=old,
            reference=rollout.reference,
        )

    @torch.no_grad()
    def movement(self, rollout: Rollout) -> dict[str, Tensor]:
        """ "policy_kl" (L,): mean KL(π before ‖ π after) of the step over the states it met."""
        if not rollout.before:
            return {}
        moved = []
        for gate, trace, before in zip(self._gates, rollout.output.layers, rollout.before):
            after = gate.policy.outputs(_rows(trace.state))
            moved.append(gate.policy.divergence(before, after).mean())
        return {"policy_kl": torch.stack(moved)}

    @torch.no_grad()
    def _scores(self, output: EpisodeOutput) -> tuple[list[Tensor], Tensor | None]:
        if not self.stochastic:
            return [], None
        before, scores = [], []
        for gate, trace in zip(self._gates, output.layers):
            policy, action = gate.policy, trace.action_logit
            outputs = policy.outputs(_rows(trace.state))
            before.append(outputs)
            scores.append(policy.score(outputs, action.flatten()).view(*action.shape, -1))
        return before, torch.stack(scores)

    @torch.no_grad()
    def _reference_rewards(
        self, images: tuple[Tensor, ...], episodes: Episodes, way: int
    ) -> Tensor:
        """(L, E): the reference's mean gates decide in every layer, from what they led to."""
        with self._acting():
            output = self.model(
                images[0],
                episodes.support_labels,
                images[1],
                episodes.text,
                way=way,
                sample=False,
                from_prefix=True,
            )
        return weighted_rewards(self.reward_weights, self._reward_inputs(output, episodes))[0]

    def _reward_inputs(self, output: EpisodeOutput, episodes: Episodes) -> RewardInputs:
        previous = None if self._previous is None else self._previous.clone()
        return RewardInputs(output, episodes.query_labels, episodes.text, previous)

    @torch.no_grad()
    def _reference_log_prob(self, output: EpisodeOutput) -> Tensor | None:
        if not self.needs_density or self.reference is None:
            return None
        parts = []
        for policy, trace in zip(self.reference, output.layers):
            action = trace.action_logit
            step = policy(_rows(trace.state), action_logit=action.flatten())
            parts.append(step.log_prob.view_as(action))
        return torch.stack(parts)

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """The reference policies sit in the gates."""
        assert self.reference is not None, "begin_epoch was not called"
        learning = [gate.policy for gate in self._gates]
        try:
            for gate, policy in zip(self._gates, self.reference):
                gate.policy = policy
            yield
        finally:
            for gate, policy in zip(self._gates, learning):
                gate.policy = policy


def _rows(state: Tensor | None) -> Tensor:
    """(E, F) or (E, n, F) -> (A, F), without gradient."""
    assert state is not None
    return state.detach().flatten(0, -2)


def _over_images(function: Any, images: Tensor) -> Tensor:
    """Apply a function of (B, C, H, W) to (E, n, C, H, W)."""
    result: Tensor = function(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    return result


def _repeat(episodes: Episodes, samples: int) -> Episodes:
    """Every episode ``samples`` times, consecutively."""
    if samples == 1:
        return episodes
    text = episodes.text
    repeated = TextTokens(
        text.tokens.repeat_interleave(samples, 0),
        text.levels,
        text.class_embedding.repeat_interleave(samples, 0),
        None if text.mask is None else text.mask.repeat_interleave(samples, 0),
    )
    support, support_labels, query, query_labels = (
        x.repeat_interleave(samples, 0) for x in episodes[:4]
    )
    return Episodes(support, support_labels, query, query_labels, repeated)
