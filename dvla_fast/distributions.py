"""The gate's policy as a ``torch.distributions.Distribution``, for code that speaks that interface.

Beta(κp, κ(1 − p)) by its mean p and concentration κ, over the ops of
:mod:`dvla_fast.functional`. ``torch.distributions.Beta`` in float32 saturates near 0 and 1 and
loses digits at large κ; this one carries the logit of the sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta, Distribution, constraints, register_kl
from torch.distributions.utils import broadcast_all

from dvla_fast import _extension, functional
from dvla_fast.arguments import expect_number, expect_real
from dvla_fast.ops.beta_special import beta_cdf, beta_implicit_derivatives, beta_kl
from dvla_fast.ops.first_order import first_order_term

_with_slope_of_density = first_order_term(
    "MeanConcentrationBeta.log_prob", "; torch.distributions.Beta has them"
)
_KNOWN_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)  # to broadcast_all; no NumPy scalar
_with_slope_of_draw = first_order_term("MeanConcentrationBeta.rsample")


class MeanConcentrationBeta(Distribution):
    """Beta distribution of a gate α in (0, 1), parametrised by mean and concentration.

    Parameters are brought to one dtype as PyTorch's operations are, at least float32.

    Args:
        logits: log(p/(1 − p)) of the mean, any shape; give this or ``mean``.
        mean: p in (0, 1).
        concentration: κ > 0, broadcasts with the other.
        validate_args: check parameters and values (default: PyTorch's global setting).

    Raises:
        TypeError: a parameter is neither a number nor a tensor, or complex.
        ValueError: not exactly one of ``logits`` and ``mean`` is given, or a parameter is invalid.
    """

    arg_constraints = {  # noqa: RUF012  (the name and form torch.distributions prescribes)
        "logits": constraints.real,
        "concentration": constraints.positive,
    }
    support = constraints.unit_interval
    has_rsample = True

    def __init__(
        self,
        *,
        logits: Tensor | float | None = None,
        mean: Tensor | float | None = None,
        concentration: Tensor | float = 10.0,
        validate_args: bool | None = None,
    ) -> None:
        if mean is not None and logits is None:
            given, self.concentration = _broadcast("mean", mean, concentration)
            checked = self._validate_args if validate_args is None else validate_args
            if checked and not bool(((given > 0) & (given < 1)).all()):
                raise ValueError("mean: expected values strictly between 0 and 1")
            self.logits = torch.logit(given)
        elif logits is not None and mean is None:
            self.logits, self.concentration = _broadcast("logits", logits, concentration)
        else:
            raise ValueError("give exactly one of logits and mean")
        super().__init__(self.logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MeanConcentrationBeta:
        new: MeanConcentrationBeta = self._get_checked_instance(MeanConcentrationBeta, _instance)
        new.logits = self.logits.expand(batch_shape)
        new.concentration = self.concentration.expand(batch_shape)
        super(MeanConcentrationBeta, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logits)

    @property
    def concentration1(self) -> Tensor:
        """a = κp, under the name that torch's Beta has for it."""
        return self._shapes()[0]

    @property
    def concentration0(self) -> Tensor:
        """b = κ(1 − p), likewise."""
        return self._shapes()[1]

    @property
    def mode(self) -> Tensor:
        """(a − 1)/(a + b − 2), or the end where the density is highest: 0 for a ≤ 1 < b.

        NaN where both shapes are 1 or less: highest at both ends, or flat.
        """
        a, b = self._shapes()
        above_a, above_b = (a - 1).clamp(min=0), (b - 1).clamp(min=0)
        return above_a / (above_a + above_b)  # 0/0 where neither exceeds 1

    @property
    def variance(self) -> Tensor:
        return torch.sigmoid(self.logits) * torch.sigmoid(-self.logits) / (self.concentration + 1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """α inside (0, 1), shape ``sample_shape + batch_shape``; rounded: see ``sample_logit``."""
        alpha = torch.sigmoid(self.sample_logit(sample_shape))
        return _inside(alpha)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """:meth:`sample` with the implicit reparameterisation gradient (Figurnov et al., 2018).

        First-order gradients with respect to ``logits`` (or ``mean``) and ``concentration``; see
        :func:`dvla_fast.functional.beta_implicit_derivatives`. A second derivative raises.
        """
        drawn = self.sample_logit(sample_shape)
        slopes = beta_implicit_derivatives(self.logits, self.concentration, drawn)
        moved = drawn
        for parameter, slope in zip((self.logits, self.concentration), slopes):
            spread = parameter.to(drawn.dtype).expand(drawn.shape)
            moved = _with_slope_of_draw(moved, spread, slope.to(drawn.dtype))
        return _inside(torch.sigmoid(moved))

    def sample_logit(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """The exact sample log(α/(1 − α)), shape ``sample_shape + batch_shape``."""
        shape = self._extended_shape(sample_shape)
        logits, kappa = self.logits.expand(shape), self.concentration.expand(shape)
        return functional.beta_sample(logits.detach(), kappa.detach())[1]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at α; 0 and 1 count as their nearest neighbours.

        First-order gradients with respect to ``value`` and the parameters; a second derivative
        raises, as it does for :meth:`entropy`, and so does forward mode, under torch.func with the
        reference backend too. ``torch.distributions.Beta`` has them.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self.log_prob_logit(self._logit_of(value))

    def log_prob_logit(self, logit: Tensor) -> Tensor:
        """Log-density (with respect to α) at the sample with this logit."""
        logit, logits, kappa = torch.broadcast_tensors(logit, self.logits, self.concentration)
        density = functional.beta_log_prob(logits, kappa, logit)
        # torch.func hides whether a level further out differentiates by the value.
        if not (logit.requires_grad or _extension.functorch_active()):
            return density
        a, b = self._shapes()
        # With its graph: a derivative of this gradient, by whatever it hangs on, meets the error.
        slope = (a - 1) * torch.sigmoid(-logit) - (b - 1) * torch.sigmoid(logit)
        return _with_slope_of_density(density, logit, slope)

    def entropy(self) -> Tensor:
        return functional.beta_entropy(self.logits, self.concentration)

    def cdf(self, value: Tensor) -> Tensor:
        """P(α ≤ value), without gradient; see :func:`dvla_fast.functional.beta_cdf`."""
        if self._validate_args:
            self._validate_sample(value)
        inside = beta_cdf(self.logits, self.concentration, self._logit_of(value))
        inside = torch.where(value <= 0, torch.zeros_like(inside), inside)
        return torch.where(value >= 1, torch.ones_like(inside), inside)

    def icdf(self, value: Tensor) -> Tensor:
        raise NotImplementedError(
            "MeanConcentrationBeta.icdf: use scipy.stats.beta.ppf with a = concentration1,"
            " b = concentration0"
        )

    def _logit_of(self, value: Tensor) -> Tensor:
        """The logit of α, moved off 0 and 1, which may be whole numbers."""
        expect_real("value", value)
        if not value.is_floating_point():
            value = value.to(self.logits.dtype)
        return torch.logit(_inside(value))

    def _shapes(self) -> tuple[Tensor, Tensor]:
        kappa = self.concentration
        return kappa * torch.sigmoid(self.logits), kappa * torch.sigmoid(-self.logits)


def _broadcast(name: str, first: Tensor | float, second: Tensor | float) -> tuple[Tensor, Tensor]:
    """The parameter of that name and κ as tensors of one shape and dtype, which the ops compute in.

    At least float32: a number beside half tensors keeps its digits so, and a large κ does not
    become infinite.
    """
    for which, x in ((name, first), ("concentration", second)):
        if isinstance(x, Tensor):
            expect_real(which, x)
        else:
            expect_number(which, x, "a number or a tensor")
    # As torch.result_type, which a graph cannot ask: a tensor of no dimension widens no other one.
    tensors = [x for x in (first, second) if isinstance(x, Tensor)]
    dtype = torch.float32
    for x in [x for x in tensors if x.dim()] or tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    first, second = (
        x.to(dtype) if isinstance(x, Tensor) else x if isinstance(x, _KNOWN_NUMBERS) else float(x)
        for x in (first, second)
    )
    if isinstance(first, Tensor) and not isinstance(second, Tensor):
        second = first.new_zeros(()) + second  # where broadcast_all would make a graph's constant
    a, b = broadcast_all(first, second)
    return a, b


def _inside(alpha: Tensor) -> Tensor:
    """α moved off 0 and 1, where rounding may have put it, as torch's Beta does."""
    info = torch.finfo(alpha.dtype)
    return alpha.clamp(info.tiny, 1 - info.eps / 2)


@register_kl(MeanConcentrationBeta, MeanConcentrationBeta)
def _kl(p: MeanConcentrationBeta, q: MeanConcentrationBeta) -> Tensor:
    return beta_kl(p.logits, p.concentration, q.logits, q.concentration)


@register_kl(MeanConcentrationBeta, Beta)
def _kl_to_beta(p: MeanConcentrationBeta, q: Beta) -> Tensor:
    return beta_kl(p.logits, p.concentration, *_mean_and_concentration(q))


@register_kl(Beta, MeanConcentrationBeta)
def _kl_from_beta(p: Beta, q: MeanConcentrationBeta) -> Tensor:
    return beta_kl(*_mean_and_concentration(p), q.logits, q.concentration)


def _mean_and_concentration(beta: Beta) -> tuple[Tensor, Tensor]:
    a, b = beta.concentration1, beta.concentration0
    return torch.log(a) - torch.log(b), a + b
