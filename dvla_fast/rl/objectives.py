"""Objectives of the policy: how advantages turn into something to maximise.

Each is a small module behind one interface (:class:`Objective`), chosen by name. ``advantage`` says
how good the actions were, ``forward`` returns a surrogate of the shape of ``log_prob`` whose mean
is maximised. Draws of one state are consecutive along E, in groups of ``samples``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvla_fast.arguments import expect_number, expect_whole

LARGEST_LOG_RATIO = 20.0  # exp(20) is far outside every clip range, and finite
_EPSILON = 1e-4


class Decisions(NamedTuple):
    """What an objective reads: L gated layers, E episodes, n decisions an episode and layer."""

    log_prob: Tensor
    """(L, E) or (L, E, n), of the actions taken, under the policy that learns."""
    old_log_prob: Tensor
    """The same under the policy that drew them, without gradient."""
    advantage: Tensor
    """(L, E), without gradient (but for the pathwise objective)."""
    reference_log_prob: Tensor | None = None
    """Like ``log_prob``, under a frozen reference policy, without gradient."""


class Objective(nn.Module):
    """Base class and interface.

    Attributes:
        samples: draws K of one state that are compared with each other; 1: none are.
        epochs: usual number of updates from the same draws.
        repeatable: whether more than one update from the same draws makes sense.
        takes_baseline: whether a baseline is subtracted; else it must be None.
        takes_discount: whether a gate may be credited with rewards of later ones; else 0.
        needs_reference_rewards: whether a reference gate's rewards on the same episodes are read.
        needs_reference_density: whether a reference policy's log-densities are.
        differentiable: whether rewards must carry a gradient.
    """

    samples = 1
    epochs = 1
    repeatable = False
    takes_baseline = True
    takes_discount = True
    needs_reference_rewards = False
    needs_reference_density = False
    differentiable = False

    def signal(self, rewards: Tensor, reference_rewards: Tensor | None = None) -> Tensor:
        """What a baseline predicts and is subtracted from: (L, E)."""
        return rewards

    def advantage(self, signal: Tensor, level: Tensor) -> Tensor:
        """Signal and baseline, (L, E) each -> (L, E)."""
        return signal - level

    def forward(self, decisions: Decisions) -> tuple[Tensor, dict[str, Tensor]]:
        """Surrogate to maximise, shaped as ``log_prob``, and detached figures to log."""
        raise NotImplementedError


class Reinforce(Objective):
    """A log π: the score-function gradient (Williams, 1992); the paper's objective."""

    def forward(self, decisions: Decisions) -> tuple[Tensor, dict[str, Tensor]]:
        return _spread(decisions) * decisions.log_prob, {}


class ClippedSurrogate(Objective):
    """min(ρA, clip(ρ, 1 − ε, 1 + ε)A), ρ = π/π_old (PPO; Schulman et al., 2017, equation 7).

    At the first update ρ = 1, and the gradient is REINFORCE's. Evaluate later ones from the stored
    action *logits*: log α of a saturated float32 α would make ρ wrong. ρ is held to e^±20, and its
    gradient is that ρ times ∇ log π there too: a bad action that became e^20 times likelier is
    still pushed back.

    Args:
        clip: ε.

    Raises:
        TypeError: ε is no number.
        ValueError: ε outside (0, 1).
    """

    epochs = 4
    repeatable = True

    def __init__(self, clip: float = 0.2) -> None:
        super().__init__()
        expect_number("clip", clip)
        if not 0.0 < clip < 1.0:
            raise ValueError(f"clip: expected a number in (0, 1), got {clip}")
        self.clip = float(clip)

    def forward(self, decisions: Decisions) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = probability_ratio(decisions.log_prob, decisions.old_log_prob)
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        advantage = _spread(decisions)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        outside = (ratio.detach() - 1).abs() > self.clip
        return surrogate, {"clip_fraction": outside.float().flatten(1).mean(1)}

    def extra_repr(self) -> str:
        return f"clip={self.clip:g}"


class GroupRelative(ClippedSurrogate):
    """The clipped surrogate with A = (R − mean)/(std + 1e-4) over K draws of one state.

    GRPO (Shao et al., *DeepSeekMath*, 2024, section 4.1). Its penalty on the divergence from a
    reference policy is ``kl_weight`` of :class:`dvla_fast.rl.PolicyLoss`. Dividing by the group's
    spread is not unbiased: states whose rewards differ little weigh as much as others.

    Args:
        samples: K.
        clip: ε.

    Raises:
        TypeError: K is no whole number, or ε no number.
        ValueError: fewer than two samples, or ε outside (0, 1).
    """

    takes_baseline = False

    def __init__(self, samples: int = 4, clip: float = 0.2) -> None:
        super().__init__(clip)
        expect_whole("samples", samples)
        if samples < 2:
            raise ValueError(f"samples: expected at least 2, got {samples}")
        self.samples = samples

    def advantage(self, signal: Tensor, level: Tensor) -> Tensor:
        groups = _groups(signal, self.samples)
        spread = groups.std(-1, unbiased=False, keepdim=True)
        return ((groups - groups.mean(-1, keepdim=True)) / (spread + _EPSILON)).flatten(-2)


class Counterfactual(Reinforce):
    """REINFORCE with A = R − R0 − b, R0 the reward of a frozen reference gate on the same episode.

    R0 holds what the episode itself is worth, whatever the gate does; it depends on no sampled
    action, so the gradient stays unbiased (a paired baseline; compare the counterfactual baseline
    of Foerster et al., 2018, which averages over the policy's own actions instead). b then predicts
    R − R0.
    """

    needs_reference_rewards = True

    def signal(self, rewards: Tensor, reference_rewards: Tensor | None = None) -> Tensor:
        if reference_rewards is None:
            raise ValueError("reference_rewards: the counterfactual objective needs them")
        if reference_rewards.shape != rewards.shape:
            raise ValueError(
                f"reference_rewards: shape {tuple(reference_rewards.shape)}, expected"
                f" {tuple(rewards.shape)}"
            )
        return rewards - reference_rewards


class PreferencePairs(Objective):
    """log σ(β(Δ_w − Δ_l)), Δ = log π − log π_ref: of two draws the better one is preferred.

    DPO (Rafailov et al., 2023, equation 7), online. The two draws start from one episode; Δ is
    summed over its gates, and the one with the larger summed reward wins, since only the first
    gate's state is the same for both (with one gate this is two draws of one state). Ties teach
    nothing. The optimum is π_ref·exp(R/β)/Z only for preferences drawn by the Bradley–Terry model;
    with these noiseless ones the gap grows until the draws say otherwise, so β and the entropy
    weight decide how far. "preference_accuracy" is the share of untied pairs whose better draw Δ
    prefers, NaN where every pair ties, and "preference_ties" the share of ties.

    Args:
        beta: β.

    Raises:
        TypeError: β is no number.
        ValueError: β is not positive.
    """

    samples = 2
    takes_baseline = False
    takes_discount = False  # returns would count later rewards more than once
    needs_reference_density = True
    repeatable = True

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        expect_number("beta", beta)
        if not 0.0 < beta < float("inf"):
            raise ValueError(f"beta: expected a positive finite number, got {beta}")
        self.beta = float(beta)

    def forward(self, decisions: Decisions) -> tuple[Tensor, dict[str, Tensor]]:
        log_prob, reference = decisions.log_prob, decisions.reference_log_prob
        if reference is None:
            raise ValueError("reference_log_prob: preference pairs need a reference policy")
        change = (log_prob - reference).unsqueeze(-1).flatten(2).sum(2)
        change = _groups(change.sum(0), 2)  # [E/2, 2], summed over the gates of an episode
        gap = change[:, 0] - change[:, 1]
        reward = _groups(decisions.advantage.sum(0), 2)
        sign = torch.sign(reward[:, 0] - reward[:, 1])
        value = torch.where(sign == 0, 0.0, F.logsigmoid(self.beta * sign * gap))
        # Every decision carries its pair's value, shared out so that the sum over layers is the
        # mean over pairs.
        shape = log_prob.shape + (1,) * (3 - log_prob.dim())
        shared = value.repeat_interleave(2).view(1, -1, 1).expand(shape) / log_prob.shape[0]
        right = ((sign * gap.detach() > 0) & (sign != 0)).float().sum()
        figures = {
            "preference_accuracy": right / (sign != 0).float().sum(),
            "preference_ties": (sign == 0).float().mean(),
        }
        return shared.reshape(log_prob.shape), figures

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}"


class Pathwise(Objective):
    """Rewards themselves, differentiated through α (Figurnov et al., 2018): for comparison.

    Needs draws that carry the implicit gradient: ``BetaPolicy.pathwise``, or
    :meth:`dvla_fast.distributions.MeanConcentrationBeta.rsample`.

    Args:
        through_loss: another term of the loss carries the gradient through α, as the supervised
            loss does in meta-tuning; the surrogate is then 0, and rewards are only logged.
    """

    takes_baseline = False
    differentiable = True

    def __init__(self, through_loss: bool = False) -> None:
        super().__init__()
        self.through_loss = through_loss
        self.differentiable = not through_loss

    def forward(self, decisions: Decisions) -> tuple[Tensor, dict[str, Tensor]]:
        if self.through_loss:
            return torch.zeros_like(decisions.log_prob), {}
        if not decisions.advantage.requires_grad:
            raise ValueError("rewards: the pathwise objective needs rewards with a gradient")
        return _spread(decisions).expand_as(decisions.log_prob), {}


def probability_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """ρ = π/π_old held to e^±20, with the gradient ρ∇ log π of that ρ, beyond the limits too."""
    change = log_prob - old_log_prob
    held = change.detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return (held + (change - change.detach())).exp()


def _groups(x: Tensor, samples: int) -> Tensor:
    """(…, E) -> (…, E/K, K)."""
    if x.shape[-1] % samples:
        raise ValueError(f"rewards: {x.shape[-1]} episodes do not make groups of {samples}")
    return x.unflatten(-1, (-1, samples))


def _spread(decisions: Decisions) -> Tensor:
    """Advantages as log_prob has its decisions: those of an episode share its advantage."""
    advantage = decisions.advantage
    return advantage if decisions.log_prob.dim() == 2 else advantage.unsqueeze(-1)


OBJECTIVES = ("reinforce", "ppo", "grpo", "counterfactual", "dpo", "pathwise")


def build_objective(
    name: str,
    *,
    samples: int = 4,
    clip: float = 0.2,
    beta: float = 0.1,
    through_loss: bool = False,
) -> Objective:
    """The objective of that name; parameters that it does not have are ignored.

    Args:
        name: one of ``OBJECTIVES``.
        samples: K of "grpo".
        clip: ε of "ppo" and "grpo".
        beta: β of "dpo".
        through_loss: of "pathwise".

    Raises:
        ValueError: unknown name, or a parameter out of its range.
    """
    if name == "reinforce":
        return Reinforce()
    if name == "ppo":
        return ClippedSurrogate(clip)
    if name == "grpo":
        return GroupRelative(samples, clip)
    if name == "counterfactual":
        return Counterfactual()
    if name == "dpo":
        return PreferencePairs(beta)
    if name == "pathwise":
        return Pathwise(through_loss)
    raise ValueError(f"objective: unknown {name!r}; expected one of {', '.join(OBJECTIVES)}")
