"""The policy's draws: their distribution against SciPy, and their random stream."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import logit
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.functional import beta_entropy, beta_policy, beta_sample

needs_extension = pytest.mark.skipif(
    _extension.problem is not None, reason="the C++ extension is not built"
)


def distribution(action: np.ndarray, x: float, kappa: float) -> np.ndarray:
    """P(draw <= action) in float64, from the logits: α itself is 0 or 1 in most of these cases.

    SciPy's function of α or of 1 - α, whichever is the smaller and holds the digits. Where that
    underflows: α^a / (a B(a, b)), the leading term of the series, whose next is e^-600 smaller.
    """
    a, b = kappa * scipy.special.expit(x), kappa * scipy.special.expit(-x)
    log_alpha, log_rest = -np.logaddexp(0.0, -action), -np.logaddexp(0.0, action)
    log_norm = scipy.special.betaln(a, b)
    lower, upper = np.exp(log_alpha), np.exp(log_rest)
    below = np.where(
        log_alpha > -600,
        scipy.stats.beta.cdf(lower, a, b),
        np.exp(np.minimum(a * log_alpha - np.log(a) - log_norm, 0.0)),
    )
    above = np.where(
        log_rest > -600,
        scipy.stats.beta.cdf(upper, b, a),
        np.exp(np.minimum(b * log_rest - np.log(b) - log_norm, 0.0)),
    )
    return np.where(action < 0, below, 1 - above)


def kolmogorov_distance(action: Tensor, x: float, kappa: float, points: int = 20_000) -> float:
    """An upper bound on sup |F_n - F|: exact at some order statistics, F_n's step added between."""
    n = len(action)
    rank = np.linspace(0, n - 1, points).round().astype(int)
    found = np.sort(action.double().numpy())[rank]
    exact = distribution(found, x, kappa)
    between = np.diff(rank).max() / n
    return float(
        max(np.abs(exact - rank / n).max(), np.abs(exact - (rank + 1) / n).max()) + between
    )


FULL_SIZE = 1_000_000
# Of sup |F_n - F| at that size, the value that chance exceeds once in 10 000 draws of a sample.
CRITICAL = math.sqrt(math.log(2 / 1e-4) / 2 / FULL_SIZE)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kappa", [1e-2, 1.0, 10.0, 1e3, 1e6])
@pytest.mark.parametrize("p", [1e-6, 1e-3, 0.01, 0.3, 0.5, 0.99, 1 - 1e-6])
def test_a_million_draws_follow_the_distribution(
    p: float, kappa: float, dtype: torch.dtype
) -> None:
    """Kolmogorov-Smirnov against SciPy.

    F is taken at the rounded logit that the op saw; a float32 draw is at most 1e-4 of the policy's
    standard deviation coarse here, 4e-5 in F.
    """
    x = torch.tensor(logit(p), dtype=dtype)
    generator = torch.Generator().manual_seed(11)
    _, action = beta_sample(x.expand(FULL_SIZE), kappa, generator=generator)
    assert kolmogorov_distance(action, float(x), kappa) < CRITICAL


@needs_extension
def test_the_distance_sees_a_shift_and_a_wrong_tail() -> None:
    """What the test above must refuse: half a percent of a deviation, and α rounded to float32."""
    x, kappa = logit(0.99), 10.0
    generator = torch.Generator().manual_seed(11)
    logits = torch.full((FULL_SIZE,), x, dtype=torch.float64)
    alpha, action = beta_sample(logits, kappa, generator=generator)
    assert kolmogorov_distance(action, x, kappa) < CRITICAL
    assert kolmogorov_distance(action + 0.005 * action.std(), x, kappa) > CRITICAL
    rounded = alpha.float().clamp(max=1 - 2**-24).double()
    assert kolmogorov_distance(torch.logit(rounded), x, kappa) > CRITICAL


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tails_are_not_cut_off(dtype: torch.dtype) -> None:
    """E[log p] of Beta(9.9, 0.1) is 9.29: rounding alpha to float32 would give about 7."""
    logits = torch.full((FULL_SIZE,), logit(0.99), dtype=dtype)
    out = beta_policy(logits, 10.0, generator=torch.Generator().manual_seed(2))
    expected = -float(beta_entropy(logits[:1], 10.0))
    assert expected == pytest.approx(9.29, abs=0.01)
    # The standard error of the mean is 0.009.
    assert float(out.log_prob.double().mean()) == pytest.approx(expected, abs=0.035)


@needs_extension
def test_draws_do_not_depend_on_threads_or_batch_split() -> None:
    logits = torch.randn(10_000)

    def draw(threads: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return beta_sample(logits, 0.7, generator=torch.Generator().manual_seed(3))[1]
        finally:
            torch.set_num_threads(before)

    assert torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), beta_sample(logits, 0.7)[1])


@needs_extension
def test_philox_gives_the_published_answers() -> None:
    """Known answers of Random123's philox4x32-10 (Salmon et al., SC 2011)."""
    from dvla_fast import _build_info

    ones = [0xFFFFFFFF] * 4
    assert _build_info.philox4x32([0] * 4, [0] * 2) == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip
    assert _build_info.philox4x32(ones, ones[:2]) == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip


def uniform(word: int, low: int) -> float:
    return word * 2**-32 + (low + 0.5) * 2**-64


def drawn(a: float, b: float, element: int, key: tuple[int, int]) -> float:
    """log G(a) - log G(b) by the method in csrc/beta/beta_math.h, from the element's own words."""
    from dvla_fast import _build_info

    seed, offset = (x & (2**64 - 1) for x in key)
    index = [element & 0xFFFFFFFF, element >> 32]

    def words(block: int) -> list[int]:
        counter = [*index, block, offset & 0xFFFFFFFF]
        return list(_build_info.philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32]))

    accepted: list[float | None] = [None, None]
    shapes = [(z + 1 if z < 1 else z) - 1 / 3 for z in (a, b)]
    attempt = 0
    while None in accepted:
        word, low = words(attempt), words(attempt | 0x40000000)
        radius = math.sqrt(-2 * math.log(uniform(word[0], low[0])))
        # A quarter of the circle in two bits, an angle around its middle in the others.
        turn = (word[1] % 2**30 + 2**29) % 2**30 - 2**29
        angle = math.tau * (word[1] // 2**30 / 4 + turn / 2**32)
        for i, (d, turned) in enumerate(zip(shapes, (math.cos(angle), math.sin(angle)))):
            t = radius * turned / math.sqrt(9 * d)
            if accepted[i] is None and t > -0.9999:
                limit = 3 * d * (math.log1p(t) - t + t**2 / 2 - t**3 / 3)
                if math.log(uniform(word[2 + i], low[2 + i])) < limit:
                    accepted[i] = math.log(d) + 3 * math.log1p(t)
        attempt += 1
    boost = words(0x80000000)
    for i, (z, sign) in enumerate(((a, 1), (b, -1))):
        accepted[i] *= sign
        if z < 1:
            accepted[i] += sign * math.log(uniform(boost[i], boost[2 + i])) / z
    return sum(accepted)


@needs_extension
@pytest.mark.parametrize("kappa", [0.3, 2.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_draw_follows_from_key_and_place_alone(dtype: torch.dtype, kappa: float) -> None:
    """Seed and offset, the place of the element and the attempt count up Philox, nothing else."""
    logits = torch.linspace(-2, 2, 600, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    key = torch.randint(2**63 - 1, (2,), generator=generator)
    generator.set_state(state)
    _, action = beta_sample(logits, kappa, generator=generator)
    p = torch.sigmoid(logits.double())
    expected = [
        drawn(kappa * float(x), kappa * (1 - float(x)), i, tuple(key.tolist()))
        for i, x in enumerate(p)
    ]
    want = torch.tensor(expected, dtype=torch.float64)
    error = (action.double() - want).abs() / (1 + want.abs())
    # A float32 draw has 32 of the random bits, and some proposals are at the edge of acceptance.
    assert error.quantile(0.99) < (1e-5 if dtype == torch.float32 else 1e-10)
