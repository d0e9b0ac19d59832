"""Gate policies: from the gate's state to a mixing weight α, with its log-density and entropy.

The Beta policy is DVLA-RL's; the others are the alternatives of method §4, behind one interface,
so that an ablation is a change of one word. Policies compute in at least float32 whatever the
autocast, since a log-density in half precision is noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

from dvla_fast import _extension, functional, reference
from dvla_fast.arguments import expect_number, expect_whole
from dvla_fast.nn.layers import is_plain, lookup, reset_parts, weight_of
from dvla_fast.ops.beta_special import unchecked_kl
from dvla_fast.ops.first_order import first_order_term
from dvla_fast.ops.gate_policy import fixed_concentration
from dvla_fast.ops.value_checks import require, value_checks

P = TypeVar("P", bound="GatePolicy")
_with_slope_of_draw = first_order_term("BetaPolicy.pathwise")


class PolicyStep(NamedTuple):
    """One decision per state row; every tensor (A,)."""

    alpha: Tensor
    """The gate in [0, 1]."""
    action_logit: Tensor
    """What ``action_logit=`` takes to re-evaluate this very action."""
    log_prob: Tensor
    """Log-density, or log-probability (categorical), of the action; 0 where nothing is drawn."""
    entropy: Tensor
    """Entropy of the policy in nats; 0 where nothing is drawn."""


_pytree._register_namedtuple(PolicyStep, serialized_type_name="dvla_fast.PolicyStep")


class GatePolicy(nn.Module):
    """Interface of the policies, and the network φ that most of them share.

    ``forward(state (A, 2·dim + 1), *, action_logit (A,) | None, sample, generator) -> PolicyStep``
    decides from a state; :meth:`decide`, which the gate calls, from the tokens that make it.
    """

    stochastic = False
    """Whether there is an action to draw, to score, and to re-evaluate."""
    reads_state = True
    """Whether the decision depends on the images and texts at all."""
    share = (0, 1)
    """(i, n): of n equal parts of a batch, this process decides part i. Random numbers are drawn
    for all, so that n processes with one seed draw what one would."""

    def forward(
        self,
        state: Tensor,
        *,
        action_logit: Tensor | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> PolicyStep:
        raise NotImplementedError

    def decide(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        *,
        groups_per_decision: int = 1,
        state_images: int | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        action_logit: Tensor | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[PolicyStep, Tensor]:
        """The decision on image_tokens (B, N, dim) and text_tokens (T, P, dim), and its state.

        The first options are those of :func:`dvla_fast.functional.gate_state`.
        """
        state = functional.gate_state(
            image_tokens, text_tokens, groups_per_decision=groups_per_decision,
            state_images=state_images, image_mask=image_mask, text_mask=text_mask,
        )  # fmt: skip
        step = self(state, action_logit=action_logit, sample=sample, generator=generator)
        return step, state

    def reset_parameters(self) -> None:
        """Initialise the policy anew."""
        reset_parts(self)

    def outputs(self, state: Tensor) -> Tensor:
        """What the policy's network says about states (A, 2·dim + 1): (A, O).

        O = 1, the logit of the mean, for the Beta policy; 3 logits for the categorical one.
        """
        raise NotImplementedError(f"{type(self).__name__} draws no action")

    def score(self, outputs: Tensor, action_logit: Tensor) -> Tensor:
        """∂ log π(action)/∂ outputs: outputs (A, O), action (A,) -> (A, O), without gradient."""
        raise NotImplementedError(f"{type(self).__name__} draws no action")

    def divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """KL(π ‖ π') in nats of two sets of outputs (A, O) -> (A,)."""
        raise NotImplementedError(f"{type(self).__name__} draws no action")

    def _refuse_action(self, action_logit: Tensor | None) -> None:
        if action_logit is not None:
            raise ValueError(
                f"action_logit: {type(self).__name__} draws no action to re-evaluate;"
                " replay its gates with alpha="
            )


class StateNetwork(nn.Module):
    """MLP over s = [GAP(H_v) ‖ GAP(H_t) ‖ cos]; starts at 0 for every state, i.e. p = 1/2.

    The formula is that of :func:`dvla_fast.functional.gate_policy`.
    """

    def __init__(self, dim: int, hidden_dim: int, out_features: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.hidden = nn.Linear(2 * dim + 1, hidden_dim)
        self.out = nn.Linear(hidden_dim, out_features)
        self._start_at_zero()

    def reset_parameters(self) -> None:
        """Initialise the network anew."""
        reset_parts(self)
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, state: Tensor) -> Tensor:
        """(A, 2·dim + 1) -> (A, out_features), float32 or, for float64 weights, float64."""
        if self.is_plain():
            return reference.state_logits(state, *self.weights())
        dtype = weight_of(self).dtype
        with reference.in_own_precision(state):
            wide = torch.promote_types(dtype, torch.float32)
            hidden = self.hidden(reference.normalised_state(state.to(wide)).to(dtype))
            logits: Tensor = self.out(F.gelu(hidden))
        return logits.to(wide)

    def is_plain(self) -> bool:
        """Whether both layers are as they were made: their weights say all."""
        return is_plain(self.hidden) and is_plain(self.out)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the hidden layer (K, 2·dim + 1), (K,), and of the last."""
        return self.hidden.weight, self.hidden.bias, self.out.weight, self.out.bias


class BetaPolicy(GatePolicy):
    """α ~ Beta(κp, κ(1 − p)), p = sigmoid(MLP(s)); the mean p when not sampling (method §3).

    No gradient flows through α: the network learns from log_prob and entropy alone. With the
    attribute ``pathwise`` set, a drawn α carries its implicit reparameterisation gradient
    (Figurnov et al., 2018), which is there to be compared with.
    """

    stochastic = True
    pathwise = False

    def __init__(self, dim: int, hidden_dim: int = 128, concentration: float = 10.0) -> None:
        super().__init__()
        self.concentration = fixed_concentration(concentration)
        self.network = StateNetwork(dim, hidden_dim)

    def forward(
        self,
        state: Tensor,
        *,
        action_logit: Tensor | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> PolicyStep:
        """See :class:`GatePolicy`."""
        logits = self.network(state).squeeze(-1)
        count, (part, parts) = logits.shape[0], self.share
        others = parts > 1 and sample and action_logit is None
        step = functional.beta_policy(
            F.pad(logits, (part * count, (parts - 1 - part) * count)) if others else logits,
            self.concentration,
            action_logit=action_logit,
            deterministic=action_logit is None and not sample,
            generator=generator,
        )
        if others:  # an element's random numbers go by its place: the others' logits do not matter
            step = type(step)(*(x[part * count : (part + 1) * count] for x in step))
        if self.pathwise and sample and action_logit is None:
            alpha, drawn = step.alpha, step.action_logit
            slope = functional.beta_implicit_derivatives(logits, self.concentration, drawn).logits
            # dα/dη = α(1 − α) dl/dη
            moved = _with_slope_of_draw(alpha, logits, alpha * (1 - alpha) * slope)
            return PolicyStep(moved, *step[1:])
        return PolicyStep(*step)

    def decide(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        *,
        action_logit: Tensor | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
        **pooling: Any,
    ) -> tuple[PolicyStep, Tensor]:
        """See :meth:`GatePolicy.decide`: here state, network and policy are one call."""
        drawn = sample and action_logit is None
        if (drawn and (self.pathwise or self.share[1] > 1)) or not self._is_plain():
            return super().decide(
                image_tokens, text_tokens, action_logit=action_logit, sample=sample,
                generator=generator, **pooling,
            )  # fmt: skip
        *step, state = functional.gate_policy(
            image_tokens,
            text_tokens,
            *self.network.weights(),
            self.concentration,
            action_logit=action_logit,
            deterministic=action_logit is None and not sample,
            generator=generator,
            **pooling,
        )
        return PolicyStep(*step), state

    def _is_plain(self) -> bool:
        """Whether the fused call decides as :meth:`forward` would."""
        return (
            type(self).forward is BetaPolicy.forward
            and is_plain(self, type(self))
            and is_plain(self.network, StateNetwork)
            and self.network.is_plain()
        )

    def outputs(self, state: Tensor) -> Tensor:
        """See :class:`GatePolicy`."""
        logits: Tensor = self.network(state)
        return logits

    @torch.no_grad()
    def score(self, outputs: Tensor, action_logit: Tensor) -> Tensor:
        """κp(1 − p)(l − ψ(κp) + ψ(κ(1 − p))) for the action's logit l."""
        logits = outputs.squeeze(-1).double().clamp(-300, 300)  # as the kernels
        kappa = self.concentration
        p, rest = torch.sigmoid(logits), torch.sigmoid(-logits)
        center = torch.digamma(kappa * p) - torch.digamma(kappa * rest)
        score = kappa * p * rest * (action_logit.double() - center)
        return score.to(outputs.dtype).unsqueeze(-1)

    def divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """See :class:`GatePolicy`."""
        first, second = (x.squeeze(-1).double().clamp(-300, 300) for x in (outputs, other))
        kappa = first.new_full((), self.concentration)
        # A figure of a step: where training broke, its loss says so.
        return unchecked_kl(first, kappa, second, kappa).to(outputs.dtype)

    def extra_repr(self) -> str:
        return f"concentration={self.concentration:g}"


class CategoricalPolicy(GatePolicy):
    """α in {1, 0, 1/2}: image only, text only, or both (what the authors' checkpoints hold).

    The most probable choice when not sampling. ``action_logit`` holds the index of the choice.
    """

    stochastic = True
    choices = (1.0, 0.0, 0.5)

    def __init__(self, dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.network = StateNetwork(dim, hidden_dim, len(self.choices))

    def forward(
        self,
        state: Tensor,
        *,
        action_logit: Tensor | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> PolicyStep:
        """See :class:`GatePolicy`."""
        log_probs = F.log_softmax(self.network(state), dim=-1)  # [A, 3]
        probs = log_probs.exp()
        if action_logit is not None:
            self._check_choices(action_logit, probs.shape[0])
            # Inside in any case: an index beyond would end the process of a GPU.
            index = action_logit.detach().long().clamp(0, len(self.choices) - 1)
        elif sample:
            # Inverse of the distribution function: one draw a row, and no host synchronisation.
            count, (part, parts) = probs.shape[0], self.share
            draw = torch.rand(
                count * parts, dtype=probs.dtype, device=probs.device, generator=generator
            )[part * count : (part + 1) * count]
            below = probs.detach().cumsum(-1)[:, :-1] <= draw.unsqueeze(-1)
            index = below.sum(-1)
        else:
            index = probs.argmax(-1)
        alpha = lookup(self.choices, index, probs.dtype)
        log_prob = log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        if action_logit is not None:
            log_prob = torch.where(index == action_logit, log_prob, math.nan)
        entropy = -(probs * log_probs).sum(-1)
        return PolicyStep(alpha, index.to(probs.dtype), log_prob, entropy)

    def _check_choices(self, action_logit: Tensor, decisions: int) -> None:
        if tuple(action_logit.shape) != (decisions,):
            raise ValueError(
                f"action_logit: shape {tuple(action_logit.shape)}, expected ({decisions},)"
            )
        if value_checks(action_logit.device) and not _extension.transforming():
            known = torch.zeros_like(action_logit, dtype=torch.bool)
            for choice in range(len(self.choices)):
                known = known | (action_logit == choice)
            last = len(self.choices) - 1
            require(known, f"action_logit: expected the indices of choices, 0 to {last}")

    def outputs(self, state: Tensor) -> Tensor:
        """See :class:`GatePolicy`."""
        logits: Tensor = self.network(state)
        return logits

    @torch.no_grad()
    def score(self, outputs: Tensor, action_logit: Tensor) -> Tensor:
        """The one-hot choice minus the probabilities."""
        chosen = F.one_hot(action_logit.long(), len(self.choices)).to(outputs.dtype)
        return chosen - torch.softmax(outputs, dim=-1)

    def divergence(self, outputs: Tensor, other: Tensor) -> Tensor:
        """See :class:`GatePolicy`."""
        first, second = F.log_softmax(outputs, dim=-1), F.log_softmax(other, dim=-1)
        return (first.exp() * (first - second)).sum(-1)


class FixedPolicy(GatePolicy):
    """A constant α: the paper's ablation, and the plainest baseline."""

    reads_state = False

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"fixed_alpha: expected a number in [0, 1], got {alpha}")
        self.alpha = float(alpha)

    def forward(
        self,
        state: Tensor,
        *,
        action_logit: Tensor | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> PolicyStep:
        """See :class:`GatePolicy`."""
        self._refuse_action(action_logit)
        dtype = torch.promote_types(state.dtype, torch.float32)
        alpha = torch.full(state.shape[:1], self.alpha, dtype=dtype, device=state.device)
        return _certain(torch.logit(alpha), alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class StaticPolicy(GatePolicy):
    """One learned α for every input, trained by the ordinary gradient through α."""

    reads_state = False

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        """See :class:`GatePolicy`: α = 1/2."""
        nn.init.zeros_(self.logit)

    def forward(
        self,
        state: Tensor,
        *,
        action_logit: Tensor | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> PolicyStep:
        """See :class:`GatePolicy`."""
        self._refuse_action(action_logit)
        logit = self.logit.to(torch.promote_types(self.logit.dtype, torch.float32))
        return _certain(logit.expand(state.shape[0]))


class MLPPolicy(GatePolicy):
    """α = sigmoid(MLP(s)), trained by the ordinary gradient through α: a gate without RL."""

    def __init__(self, dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.network = StateNetwork(dim, hidden_dim)

    def forward(
        self,
        state: Tensor,
        *,
        action_logit: Tensor | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> PolicyStep:
        """See :class:`GatePolicy`."""
        self._refuse_action(action_logit)
        return _certain(self.network(state).squeeze(-1))


def _certain(logit: Tensor, alpha: Tensor | None = None) -> PolicyStep:
    """A decision without chance: density and entropy do not apply, and are 0."""
    alpha = torch.sigmoid(logit) if alpha is None else alpha
    zero = torch.zeros_like(alpha, requires_grad=False)
    return PolicyStep(alpha, logit.detach(), zero, zero)


def frozen_policy(policy: P, alpha: float | None = None) -> P:
    """A copy of a policy that does not learn: the reference that others are compared with.

    Args:
        policy: of a gate; stays as it is.
        alpha: mean of the copy in every state, in (0, 1), with the concentration of ``policy``;
            None: the copy answers as ``policy`` does now.

    Raises:
        ValueError: ``alpha`` is out of range, or given for another policy than the Beta one.
    """
    frozen = copy.deepcopy(policy).requires_grad_(False).eval()
    if alpha is None:
        return frozen
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha: expected a number in (0, 1), got {alpha}")
    if not isinstance(frozen, BetaPolicy):
        raise ValueError(f"alpha: {type(policy).__name__} has no mean to set; only BetaPolicy has")
    frozen.network.out.weight.zero_()
    frozen.network.out.bias.fill_(math.log(alpha) - math.log1p(-alpha))
    return frozen


_POLICIES: dict[str, Callable[[int, int, float, float], GatePolicy]] = {
    "beta": lambda dim, hidden, kappa, _alpha: BetaPolicy(dim, hidden, kappa),
    "categorical": lambda dim, hidden, _kappa, _alpha: CategoricalPolicy(dim, hidden),
    "fixed": lambda _dim, _hidden, _kappa, alpha: FixedPolicy(alpha),
    "static": lambda _dim, _hidden, _kappa, _alpha: StaticPolicy(),
    "mlp": lambda dim, hidden, _kappa, _alpha: MLPPolicy(dim, hidden),
}

POLICIES = tuple(_POLICIES)


def build_policy(
    name: str,
    dim: int,
    *,
    hidden_dim: int = 128,
    concentration: float = 10.0,
    fixed_alpha: float = 0.5,
) -> GatePolicy:
    """The policy of that name for a gate of width ``dim``.

    Raises:
        TypeError: a parameter is no number.
        ValueError: unknown name, or a parameter out of its range.
    """
    if name not in POLICIES:
        raise ValueError(f"policy: unknown {name!r}; expected one of {POLICIES}")
    expect_whole("hidden_dim", hidden_dim)
    for option, value in (("concentration", concentration), ("fixed_alpha", fixed_alpha)):
        if not isinstance(value, Tensor):
            expect_number(option, value)
    if hidden_dim < 1:
        raise ValueError(f"hidden_dim: expected a positive number, got {hidden_dim}")
    return _POLICIES[name](dim, hidden_dim, concentration, fixed_alpha)
