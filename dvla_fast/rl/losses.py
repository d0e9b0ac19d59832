"""The loss of DVLA-RL: cross-entropy of the prototypes plus a policy loss for the gates.

L = L_sup + λ L_RL with, for the paper's REINFORCE, ∇L_RL = −E[(R − b) ∇ log π] − τ ∇H(π) (method
§3). Diagnostics stay on the device: nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvla_fast.arguments import expect_number, expect_tensor
from dvla_fast.nn.episode import EpisodeOutput, TextTokens
from dvla_fast.nn.episode_checks import check_labels
from dvla_fast.rl.baselines import normalise_advantage
from dvla_fast.rl.checks import expect_layers, expect_rewards, expect_scores
from dvla_fast.rl.diagnostics import advantage_figures, alpha_figures, gradient_figures
from dvla_fast.rl.objectives import (
    LARGEST_LOG_RATIO,
    OBJECTIVES,
    Decisions,
    Objective,
    Pathwise,
    Reinforce,
    probability_ratio,
)
from dvla_fast.rl.rewards import (
    RewardInputs,
    alignment_cosine,
    discounted_returns,
    episode_accuracy,
    weighted_rewards,
)

Baseline = Callable[..., Tensor]
"""Rewards (L, E), and the gates' states if it ``needs_states`` -> what broadcasts to rewards."""


class Reference(NamedTuple):
    """What a frozen reference gate says about the same episodes.

    Both are constants of the loss: a graph that they carry, say through the states that they were
    computed from, is not followed.
    """

    rewards: Tensor | None = None
    """(L, E): its rewards."""
    log_prob: Tensor | None = None
    """(L, E) or (L, E, n): its log-densities of the actions that were taken."""


class PolicyLoss(nn.Module):
    """λ Σ_layers mean_episodes −[surrogate + τ H − w_KL KL(π‖π_ref)], for any objective.

    Args:
        objective: what turns advantages into a surrogate; None: REINFORCE.
        entropy_weight: τ.
        weight: λ, the loss's weight beside the supervised one.
        normalise: make the advantages of each layer have mean 0 and standard deviation 1.
        discount: see :func:`dvla_fast.rl.discounted_returns`; 0: each layer its own reward.
        kl_weight: w_KL. The divergence is estimated at the actions taken by
            ρ(r − 1 − log r) ≥ 0, r = π_ref/π and ρ = π/π_old, as GRPO does where ρ = 1, its
            gradient by E[ρ(log π − log π_ref) ∇ log π]: r − 1 − log r has that of KL(π_ref‖π)
            instead, which fades far from the reference.
        value_weight: of the squared error of a baseline whose values carry a gradient.

    Raises:
        TypeError: ``objective`` is none, or a weight or the discount no number.
        ValueError: a weight or the discount out of its range, or an option the objective does not
            take.
    """

    def __init__(
        self,
        objective: Objective | None = None,
        entropy_weight: float = 0.2,
        weight: float = 0.1,
        *,
        normalise: bool = False,
        discount: float = 0.0,
        kl_weight: float = 0.0,
        value_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if objective is not None and not isinstance(objective, Objective):
            raise TypeError(_no_objective(objective))
        expect_number("discount", discount)
        if not 0.0 <= discount <= 1.0:
            raise ValueError(f"discount: expected a number in [0, 1], got {discount}")
        for name, value in (
            ("entropy_weight", entropy_weight),
            ("weight", weight),
            ("kl_weight", kl_weight),
            ("value_weight", value_weight),
        ):
            expect_number(name, value)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a finite number from 0, got {value}")
        self.objective = Reinforce() if objective is None else objective
        if normalise and not self.objective.takes_baseline:
            raise ValueError(f"normalise: {type(self.objective).__name__} has its own scale")
        if discount and not self.objective.takes_discount:
            raise ValueError(
                f"discount: {type(self.objective).__name__} compares whole sequences of gates by"
                f" the sum of their rewards, got {discount}; leave it 0"
            )
        self.entropy_weight = entropy_weight
        self.weight = weight
        self.normalise = normalise
        self.discount = discount
        self.kl_weight = kl_weight
        self.value_weight = value_weight

    def signal(self, rewards: Tensor, reference: Reference | None = None) -> Tensor:
        """Rewards (L, E) as the baseline sees them: discounted, minus the reference's."""
        theirs = None if reference is None else _constant(reference.rewards)
        if self.discount:
            rewards = discounted_returns(rewards, self.discount)
            theirs = None if theirs is None else discounted_returns(theirs, self.discount)
        return self.objective.signal(rewards, theirs)

    def forward(
        self,
        log_prob: Tensor,
        entropy: Tensor,
        rewards: Tensor,
        baseline: Baseline | Tensor | None = None,
        *,
        states: Sequence[Tensor] | None = None,
        old_log_prob: Tensor | None = None,
        reference: Reference | None = None,
        scores: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () and detached diagnostics.

        Args:
            log_prob: (L, E) of the actions taken; (L, E, n) for n decisions an episode, which
                share its reward.
            entropy: like ``log_prob``.
            rewards: (L, E); no gradient flows to them, but for a differentiable objective.
            baseline: a module such as :class:`EMABaseline`, called once with ``signal(rewards)``
                (and ``states``, if it ``needs_states``), which learns if its values carry a
                gradient; a tensor that broadcasts to ``rewards``, taken as it is; None: 0. Where
                several updates use the same draws, give a tensor, ``baseline(signal(rewards))``
                made before the first: a module takes the rewards in at every call, and has then
                seen the very actions that it is subtracted from. A value network's tensor learns
                by :meth:`value_loss`.
            states: what the gates decided from, one tensor a layer, for the baseline.
            old_log_prob: like ``log_prob``, under the policy that drew the actions; None: it is
                the same one.
            reference: what the objective or ``kl_weight`` compares with.
            scores: (L, E, O) or (L, E, n, O) of :meth:`dvla_fast.nn.GatePolicy.score`: adds
                :func:`dvla_fast.rl.gradient_figures`.

        Returns:
            The weighted loss; "policy_loss" () and, per layer (L,), "entropy", "reward",
            "baseline" and those of :func:`dvla_fast.rl.advantage_figures`; the objective's own;
            "value_error" and "kl_reference" (L,) where there are any.

        Raises:
            TypeError: something else than a tensor, rewards that are not floating, or a baseline
                or reference of another kind.
            ValueError: no episode, shapes that do not fit together, or something the objective
                lacks.
        """
        self._check(log_prob, entropy, rewards, old_log_prob, reference, baseline)
        if scores is not None:
            expect_scores("scores", scores, log_prob)
        if not self.objective.differentiable:
            rewards = rewards.detach()
        signal = self.signal(rewards, reference)
        given: Any = baseline
        if callable(baseline):
            more = (states,) if getattr(baseline, "needs_states", False) else ()
            given = baseline(signal.detach(), *more)
        level = torch.zeros_like(signal) if given is None else _like(signal, given.detach())
        advantage = self.objective.advantage(signal, level)
        if self.normalise:
            advantage = normalise_advantage(advantage)
        old = log_prob.detach() if old_log_prob is None else old_log_prob.detach()
        theirs = None if reference is None else _constant(reference.log_prob)
        decisions = Decisions(log_prob, old, advantage, theirs)
        surrogate, figures = self.objective(decisions)
        score = surrogate + self.entropy_weight * entropy
        if self.kl_weight and theirs is not None:
            divergence = _divergence(log_prob, theirs, old)
            score = score - self.kl_weight * divergence
            figures["kl_reference"] = divergence.detach().flatten(1).mean(1)
        loss = -self.weight * score.flatten(1).mean(1).sum()
        figures["policy_loss"] = loss.detach()
        if callable(baseline) and given.requires_grad:
            fit, error = self.value_loss(given, signal)
            loss = loss + fit
            figures["value_error"] = error
        figures.update(advantage_figures(advantage.detach()))
        if scores is not None and not isinstance(self.objective, Pathwise):
            figures.update(gradient_figures(self._coefficient(decisions), scores))
        figures.update(
            entropy=entropy.detach().flatten(1).mean(1),
            reward=rewards.detach().mean(1),
            baseline=level.mean(1),
        )
        return loss, figures

    if TYPE_CHECKING:
        __call__ = forward

    def value_loss(self, values: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted squared error that a value network learns from, and its parts (L,)."""
        error = (values - signal.detach()).square().mean(1)
        return self.value_weight * error.sum(), error.detach()

    def _coefficient(self, decisions: Decisions) -> Tensor:
        """∂ surrogate/∂ log π of every decision: a graph of a few small operations, no network."""
        with torch.enable_grad():
            leaf = decisions.log_prob.detach().requires_grad_()
            surrogate, _ = self.objective(decisions._replace(log_prob=leaf))
            (gradient,) = torch.autograd.grad(surrogate.sum(), leaf)
        return gradient

    def _check(
        self,
        log_prob: Tensor,
        entropy: Tensor,
        rewards: Tensor,
        old_log_prob: Tensor | None,
        reference: Reference | None,
        baseline: Any,
    ) -> None:
        expect_rewards(rewards)
        expect_layers("log_prob", log_prob, decisions=True)
        if reference is not None and not isinstance(reference, Reference):
            raise TypeError(f"reference: expected a Reference, got {type(reference).__name__}")
        if not (baseline is None or isinstance(baseline, Tensor) or callable(baseline)):
            raise TypeError(
                f"baseline: expected a module, a tensor or None, got {type(baseline).__name__}"
            )
        if log_prob.shape[:2] != rewards.shape:
            raise ValueError(
                f"rewards: shape {tuple(rewards.shape)} does not fit log_prob"
                f" {tuple(log_prob.shape)}"
            )
        expect_tensor("entropy", entropy)
        rewarded, theirs = (None, None) if reference is None else reference
        if rewarded is not None:
            expect_tensor("reference.rewards", rewarded)
        for name, tensor in (
            ("entropy", entropy),
            ("old_log_prob", old_log_prob),
            ("reference.log_prob", theirs),
        ):
            if tensor is None:
                continue
            expect_tensor(name, tensor)
            if tensor.shape != log_prob.shape:
                raise ValueError(
                    f"{name}: shape {tuple(tensor.shape)}, expected {tuple(log_prob.shape)}"
                )
        if self.kl_weight and theirs is None:
            raise ValueError("reference.log_prob: kl_weight needs a reference policy")
        if baseline is not None and not self.objective.takes_baseline:
            raise ValueError(
                f"baseline: {type(self.objective).__name__} takes none, for it compares draws of"
                " one state or differentiates the rewards"
            )

    def extra_repr(self) -> str:
        return f"entropy_weight={self.entropy_weight:g}, weight={self.weight:g}"


class ReinforceLoss(PolicyLoss):
    """REINFORCE with baseline and entropy bonus: λ Σ_layers mean_episodes −[(R − b) log π + τ H].

    Args:
        entropy_weight: τ.
        weight: λ, the loss's weight beside the supervised one.

    Raises:
        ValueError: a weight is negative or not finite.
    """

    def __init__(self, entropy_weight: float = 0.2, weight: float = 0.1) -> None:
        super().__init__(Reinforce(), entropy_weight, weight)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """As :class:`PolicyLoss`; the loss is among the figures as "reinforce" too."""
        loss, figures = super().forward(*args, **kwargs)
        return loss, {**figures, "reinforce": figures["policy_loss"]}


def _no_objective(given: object) -> str:
    by_name = isinstance(given, str) and given in OBJECTIVES
    hint = f"; build_objective({given!r}) makes one" if by_name else ""
    return f"objective: expected an Objective, got {type(given).__name__}{hint}"


def _like(signal: Tensor, baseline: Tensor) -> Tensor:
    try:
        return baseline.expand_as(signal)
    except RuntimeError:
        raise ValueError(
            f"baseline: shape {tuple(baseline.shape)} does not broadcast to the rewards'"
            f" {tuple(signal.shape)}"
        ) from None


def _constant(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _divergence(log_prob: Tensor, reference: Tensor, old: Tensor) -> Tensor:
    """KL(π‖π_ref) at actions drawn from π_old: never negative, with the score-function gradient."""
    change = (reference - log_prob).detach()
    ratio = probability_ratio(log_prob, old)  # 1 on policy
    value = ratio.detach() * (change.clamp(max=LARGEST_LOG_RATIO).exp() - 1 - change)
    slope = -change * ratio
    return value + (slope - slope.detach())


def alignment_loss(output: EpisodeOutput, query_labels: Tensor, text: TextTokens) -> Tensor:
    """Mean of 1 − cos(U·GAP(H), t*) over layers and images, ().

    A reward has no gradient, so this is what teaches U. GAP(H) is detached: only U learns.
    """
    labels = query_labels if output.aligned_labels is None else output.aligned_labels
    cosines = [alignment_cosine(t.aligned, text.class_embedding, labels) for t in output.layers]
    return 1.0 - torch.stack([cosine.mean() for cosine in cosines]).mean()


def total_loss(
    output: EpisodeOutput,
    query_labels: Tensor,
    text: TextTokens | None,
    reinforce: PolicyLoss,
    baseline: Baseline | Tensor | None = None,
    *,
    lambda_sim: float = 0.5,
    lambda_imp: float = 1.0,
    alignment_weight: float = 1.0,
    previous_accuracy: Tensor | None = None,
    rewards: Tensor | Mapping[str, float] | None = None,
    reference: Reference | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_sup + λ L_RL + the alignment loss that trains U alone.

    Args:
        output: of a :class:`dvla_fast.DVLA` call.
        query_labels: (E, Q) int64.
        text: the texts that the call was given; None: the loss is L_sup.
        reinforce: the policy loss; holds objective, λ and τ.
        baseline: see :class:`PolicyLoss`; it is given the gates' states if the output has them.
        lambda_sim: weight of the similarity reward.
        lambda_imp: weight of the accuracy-improvement reward.
        alignment_weight: weight of :func:`alignment_loss`.
        previous_accuracy: see :func:`dvla_fast.rl.layer_rewards`.
        rewards: weights by registered name, instead of ``lambda_sim`` and ``lambda_imp``; or the
            rewards themselves, (L, E).
        reference: see :class:`PolicyLoss`.
        scores: likewise.

    Returns:
        The loss (), and detached tensors: "supervised", "accuracy", "alignment", and per layer (L,)
        those of :func:`dvla_fast.rl.alpha_figures` and "reward_<name>" of each named reward, beside
        those of :class:`PolicyLoss`.

    Raises:
        TypeError, ValueError: labels that do not fit the logits, or weights that
            :func:`dvla_fast.rl.check_reward_weights` refuses; see :class:`PolicyLoss`.
    """
    check_labels("query_labels", query_labels, output.logits.shape[:2], output.logits.shape[2])
    supervised = F.cross_entropy(output.logits.flatten(0, 1), query_labels.flatten())
    figures = {
        "supervised": supervised.detach(),
        "accuracy": episode_accuracy(output.logits.detach(), query_labels).mean(),
    }
    if text is None or not output.layers:
        return supervised, figures
    if not isinstance(rewards, Tensor):
        inputs = RewardInputs(output, query_labels, text, previous_accuracy)
        gain = "improvement" if previous_accuracy is None else "episode_improvement"
        weights = {"similarity": lambda_sim, gain: lambda_imp} if rewards is None else rewards
        rewards, parts = weighted_rewards(weights, inputs)
        figures.update({f"reward_{name}": part.mean(1) for name, part in parts.items()})
    policy_loss, diagnostics = reinforce(
        torch.stack([trace.log_prob for trace in output.layers]),
        torch.stack([trace.entropy for trace in output.layers]),
        rewards,
        baseline,
        states=gate_states(output),
        reference=reference,
        scores=scores,
    )
    alignment = alignment_loss(output, query_labels, text)
    figures.update(diagnostics)
    figures["alignment"] = alignment.detach()
    figures.update(alpha_figures([trace.alpha for trace in output.layers]))
    return supervised + policy_loss + alignment_weight * alignment, figures


def gate_states(output: EpisodeOutput) -> list[Tensor] | None:
    """What each gate decided from, without gradient; None if the output does not hold it."""
    states = [trace.state.detach() for trace in output.layers if trace.state is not None]
    return states if states and len(states) == len(output.layers) else None
