"""The Beta policy's mathematics as Triton device functions: the twin of ``csrc/beta/beta_math.h``.

Formulas, their derivation and the layout of the random stream are written there. Every operation
here is the one there, in the same order, with the same explicit fused multiply-adds, so that a
kernel compiled with ``enable_fp_fusion=False`` rounds as the C++ code does and takes the same
proposals. All arguments are blocks; densities are in float64, draws in the dtype of the logits.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .beta_series import (
    acceptance_series,
    atanh_series,
    cos_series,
    delta_series,
    epsilon_series,
    exp_series,
    sin_series,
    trigamma_series,
)

HALF_LOG_2_PI = tl.constexpr(0.91893853320467274178)
# The numbers of elementary.h: of float64, then of float32.
LN_2_HIGH = tl.constexpr(float.fromhex("0x1.62e42fefa39efp-1"))
LN_2_LOW = tl.constexpr(float.fromhex("0x1.abc9e3b39803fp-56"))
SMALLEST = tl.constexpr(float.fromhex("0x1p-1022"))
LARGEST = tl.constexpr(float.fromhex("0x1.fffffffffffffp1023"))
LN_2_HIGH_32 = tl.constexpr(float.fromhex("0x1.62e43p-1"))
LN_2_LOW_32 = tl.constexpr(float.fromhex("-0x1.05c61p-29"))
SMALLEST_32 = tl.constexpr(float.fromhex("0x1p-126"))
LARGEST_32 = tl.constexpr(float.fromhex("0x1.fffffep127"))
ANGLE_STEP = tl.constexpr(math.pi / 2**33)
WORD_STEP = tl.constexpr(2.0**-32)
LOW_WORD_STEP = tl.constexpr(2.0**-64)
# Blocks of an element's random stream: attempts count up from 0, these open further streams.
LOW_BITS = tl.constexpr(0x40000000)
BOOST_BLOCK = tl.constexpr(0x80000000)
MOST_ATTEMPTS = tl.constexpr(64)
# How the action comes about.
MEAN = tl.constexpr(0)
GIVEN = tl.constexpr(1)
DRAWN = tl.constexpr(2)


# ---- Elementary functions (elementary.h)


@triton.jit
def like(x, value: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.full(x.shape, value, x.dtype)


@triton.jit
def divide(a, b):  # type: ignore[no-untyped-def]
    """Correctly rounded; Triton's own float32 division is not."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(x):  # type: ignore[no-untyped-def]
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _twice_atanh(s):  # type: ignore[no-untyped-def]
    z = s * s
    return tl.fma(s * z, atanh_series(z), s + s)


@triton.jit
def _log_of(u, offset):  # type: ignore[no-untyped-def]
    """log u, where u = 1 + offset is known beside the offset."""
    if u.dtype == tl.float64:
        bits = u.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE6A09E667F3BCD) >> 52  # of sqrt(1/2)
        m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    else:
        bits = u.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) >> 23
        m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    k = exponent.to(u.dtype)
    top = tl.where(exponent == 0, offset, m - 1.0)
    series = _twice_atanh(divide(top, top + 2.0))
    if u.dtype == tl.float64:
        small = tl.fma(k, like(k, LN_2_LOW), series)
        return tl.fma(k, like(k, LN_2_HIGH), small)
    else:
        small = tl.fma(k, like(k, LN_2_LOW_32), series)
        return tl.fma(k, like(k, LN_2_HIGH_32), small)


@triton.jit
def log(x):  # type: ignore[no-untyped-def]
    """log x for positive finite x; below the smallest normal number, of that number."""
    if x.dtype == tl.float64:
        u = tl.maximum(x, SMALLEST)
    else:
        u = tl.maximum(x, SMALLEST_32)
    return _log_of(u, u - 1.0)


@triton.jit
def _log1p(t):  # type: ignore[no-untyped-def]
    return _log_of(t + 1.0, t)


@triton.jit
def _exp_parts(x):  # type: ignore[no-untyped-def]
    """exp(x) = scale + scale · less_one."""
    bounded = tl.maximum(x, -708.0)
    rounder = like(x, 6755399441055744.0)  # 1.5 · 2⁵²: rounds to an integer, left in the low bits
    shifted = tl.fma(bounded, like(x, 1.4426950408889634), rounder)
    k = shifted - rounder
    r = tl.fma(k, like(x, -LN_2_HIGH), bounded)
    r = tl.fma(k, like(x, -LN_2_LOW), r)
    scale = ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
    return scale, tl.fma(r * r, exp_series(r), r)


@triton.jit
def _exp(x):  # type: ignore[no-untyped-def]
    scale, less_one = _exp_parts(x)
    return tl.fma(scale, less_one, scale)


@triton.jit
def _softplus_parts(e):  # type: ignore[no-untyped-def]
    """For e in [0, 1]: log(1 + e) and 1/(1 + e)."""
    halved = e > 0.41421356237309503
    u = e + 1.0
    top = tl.where(halved, e - 1.0, e)
    bottom = tl.where(halved, e + 3.0, e + 2.0)
    shared = 1.0 / (u * bottom)
    series = _twice_atanh(top * (shared * u))
    doubled = (series + LN_2_LOW) + LN_2_HIGH
    return tl.where(halved, doubled, series), shared * bottom


@triton.jit
def _uniform_angle(word, LIKE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosine and sine of the angle that 32 random bits make."""
    theta = (word << 2).to(tl.int32, bitcast=True).to(LIKE)
    theta = theta * ANGLE_STEP
    z = theta * theta
    c = tl.fma(cos_series(z), z, like(z, 1.0))
    s = tl.fma(sin_series(z) * z, theta, theta)
    quadrant = word >> 30
    odd = (quadrant & 1) != 0
    x = tl.where(odd, s, c)
    y = tl.where(odd, c, s)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    return x, tl.where((quadrant & 2) != 0, -y, y)


# ---- Densities (beta_math.h)


@triton.jit
def _multiply(value, first, half_second, factor):  # type: ignore[no-untyped-def]
    """A product, its first and half its second derivative, after one more factor."""
    half_second = tl.fma(half_second, factor, first)
    return value * factor, tl.fma(first, factor, value), half_second


@triton.jit
def _remainders(z, log_z):  # type: ignore[no-untyped-def]
    """delta(z) + log P, P, epsilon(z), tau(z), psi'(z)."""
    small = z < 8.0
    x = tl.where(small, z, 1.0)
    u = x * (x + 7.0)
    slope = tl.fma(x, like(x, 2.0), like(x, 7.0))
    value, first, half_second = _multiply(u, like(u, 1.0), like(u, 0.0), u + 6.0)
    value, first, half_second = _multiply(value, first, half_second, u + 10.0)
    value, first, half_second = _multiply(value, first, half_second, u + 12.0)
    half_second = tl.fma(half_second * slope, slope, first)
    first = first * slope
    y = tl.where(small, z + 8.0, z)
    shared = 1.0 / (y * value)
    r = shared * value
    per_product = shared * y
    z2 = r * r

    d = r * delta_series(z2)
    e = -tl.fma(epsilon_series(z2), z2, 0.5 * r)
    t = tl.fma(trigamma_series(z2), z2, 0.5 * r)
    tau_large = t - r - t * r

    log_y = log(y)
    harmonic = first * per_product
    squares = tl.fma(harmonic, harmonic, -2.0 * half_second * per_product)
    rise = (y - 0.5) * log_y - (x - 0.5) * log_z - 8.0
    trigamma_y = tl.fma(r, t, r)
    trigamma = tl.where(small, trigamma_y + squares, trigamma_y)
    tau = tl.where(small, tl.fma(z - 1.0, trigamma, like(z, -1.0)), tau_large)
    epsilon = tl.where(small, e - harmonic + (log_y - log_z), e)
    return tl.where(small, d + rise, d), tl.where(small, value, 1.0), epsilon, tau, trigamma


@triton.jit
def _make_policy(raw_logit):  # type: ignore[no-untyped-def]
    """logit, p, q, log p, log q."""
    logit = tl.minimum(tl.maximum(raw_logit, -300.0), 300.0)
    e = _exp(-tl.abs(logit))
    soft, larger = _softplus_parts(e)
    smaller = e * larger
    up = logit >= 0.0
    p = tl.where(up, larger, smaller)
    q = tl.where(up, smaller, larger)
    return logit, p, q, tl.minimum(logit, 0.0) - soft, -tl.maximum(logit, 0.0) - soft


@triton.jit
def _match_exact(p, q, d):  # type: ignore[no-untyped-def]
    p_is_smaller = p <= q
    grows = tl.where(p_is_smaller, d, -d) > 600.0
    by_p = p_is_smaller != grows
    side = tl.where(by_p, p, q)
    other = tl.where(by_p, q, p)
    x = tl.where(by_p, d, -d)
    scale, less_one = _exp_parts(x)
    u = tl.fma(side, tl.fma(scale, less_one, scale), other)
    return side * x - _log_of(u, side * tl.fma(scale, less_one, scale - 1.0))


@triton.jit
def _policy_step(logit, p, q, log_p, log_q, kappa, log_kappa, action, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """alpha, log_prob, entropy; their derivatives by the logit, then by kappa."""
    k_plus, k_product, k_epsilon, k_tau, k_trigamma = _remainders(kappa, log_kappa)
    a = kappa * p
    b = kappa * q
    a_plus, a_product, a_epsilon, a_tau, _ = _remainders(a, log_kappa + log_p)
    b_plus, b_product, b_epsilon, b_tau, _ = _remainders(b, log_kappa + log_q)
    remainder = a_plus + b_plus - (k_plus - log(k_product)) - log(a_product * b_product)

    d = action - logit
    magnitude = tl.abs(action)
    tail = _exp(-magnitude)
    soft, larger = _softplus_parts(tail)
    if EXACT:
        match = _match_exact(p, q, d)
    else:  # two logarithms at hand are subtracted: costs digits that float32 does not hold
        match = p * (tl.minimum(action, 0.0) - soft - log_p) - q * (
            tl.maximum(action, 0.0) + soft + log_q
        )
    minus_log_spread = magnitude + 2.0 * soft
    log_pq = log_p + log_q

    alpha = tl.where(action >= 0.0, larger, tail * larger)
    log_prob = (
        kappa * match + minus_log_spread + 0.5 * (log_kappa + log_pq) - HALF_LOG_2_PI - remainder
    )
    entropy = 0.5 * (log_pq - log_kappa) + HALF_LOG_2_PI + remainder
    entropy = entropy - (a - 1.0) * a_epsilon - (b - 1.0) * b_epsilon + (kappa - 2.0) * k_epsilon
    slope = kappa * p * q
    log_prob_by_logit = slope * (d - (a_epsilon - b_epsilon))
    entropy_by_logit = slope * (b_tau - a_tau)
    log_prob_by_kappa = match - p * a_epsilon - q * b_epsilon + k_epsilon
    entropy_by_kappa = k_tau - p * a_tau - q * b_tau - k_trigamma
    return (
        alpha, log_prob, entropy,
        log_prob_by_logit, entropy_by_logit, log_prob_by_kappa, entropy_by_kappa,
    )  # fmt: skip


# ---- Sampling (beta_math.h)


@triton.jit
def _gamma_shape(z):  # type: ignore[no-untyped-def]
    d = tl.where(z < 1.0, z + 1.0, z) - 0.3333333333333333
    return d, divide(like(d, 1.0), sqrt(d * 9.0))


@triton.jit
def _acceptance_margin(t, log1p_t, d, log_u):  # type: ignore[no-untyped-def]
    t2 = t * t
    series = -t2 * t2 * acceptance_series(t)
    direct = log1p_t - t + t2 * (0.5 - t * 0.3333333333333333)
    return d * 3.0 * tl.where(tl.abs(t) < 0.3, series, direct) - log_u


@triton.jit
def _uniform_of(word, low, LIKE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number in (0, 1]; float64 takes 32 further random bits."""
    if tl.float64 == LIKE:
        coarse = word.to(tl.float64) * WORD_STEP
        fine = low.to(tl.float64) + 0.5
        return tl.fma(fine, like(fine, LOW_WORD_STEP), coarse)
    else:
        return (word.to(tl.float32) + 0.5) * WORD_STEP


@triton.jit
def _draw(seed, offset, element, block):  # type: ignore[no-untyped-def]
    """Four words of an element's block: Philox4x32-10 at (element, block, offset)."""
    low = (element & 0xFFFFFFFF).to(tl.uint32)
    high = (element >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, block, offset)


@triton.jit
def _propose(seed, offset, element, attempt, d_a, c_a, d_b, c_b):  # type: ignore[no-untyped-def]
    """log(1 + t) and the acceptance margin of a proposal, for each of the two Gammas."""
    w0, w1, w2, w3 = _draw(seed, offset, element, attempt)
    if d_a.dtype == tl.float64:
        low0, _, low2, low3 = _draw(seed, offset, element, attempt | LOW_BITS)
    else:
        low0, low2, low3 = w0, w2, w3  # not looked at
    minus_log = tl.maximum(-log(_uniform_of(w0, low0, d_a.dtype)), 0.0)
    radius = sqrt(minus_log * 2.0)
    cos, sin = _uniform_angle(w1, d_a.dtype)
    t_a = c_a * radius * cos
    t_b = c_b * radius * sin
    lowest = like(t_a, -0.9999)  # the cube of a negative number is no Gamma
    k_a = tl.maximum(t_a, lowest)
    k_b = tl.maximum(t_b, lowest)
    log1p_a = _log1p(k_a)
    log1p_b = _log1p(k_b)
    margin_a = _acceptance_margin(k_a, log1p_a, d_a, log(_uniform_of(w2, low2, d_a.dtype)))
    margin_b = _acceptance_margin(k_b, log1p_b, d_b, log(_uniform_of(w3, low3, d_a.dtype)))
    accept_a = (margin_a > 0.0) & (t_a > lowest)
    accept_b = (margin_b > 0.0) & (t_b > lowest)
    return log1p_a, log1p_b, accept_a, accept_b


@triton.jit
def _log_boost(z, word, low):  # type: ignore[no-untyped-def]
    log_u = log(_uniform_of(word, low, z.dtype))
    if z.dtype == tl.float64:
        boost = log_u / tl.maximum(z, SMALLEST)
        bounded = tl.maximum(boost, -LARGEST / 4)
    else:
        boost = tl.div_rn(log_u, tl.maximum(z, SMALLEST_32))
        bounded = tl.maximum(boost, -LARGEST_32 / 4)
    return tl.where(z < 1.0, bounded, 0.0)


@triton.jit
def _sample(seed, offset, element, a, b, wanted):  # type: ignore[no-untyped-def]
    """The action log G(a) - log G(b), where wanted; the dtype of a and b."""
    d_a, c_a = _gamma_shape(a)
    d_b, c_b = _gamma_shape(b)
    log1p_a = like(a, 0.0)
    log1p_b = like(a, 0.0)
    open_a = wanted
    open_b = wanted
    attempt = 0
    # A refused proposal is made again for the whole block; who has one already keeps it.
    while (attempt < MOST_ATTEMPTS) & (tl.max((open_a | open_b).to(tl.int32), 0) > 0):
        made_a, made_b, accept_a, accept_b = _propose(
            seed, offset, element, attempt, d_a, c_a, d_b, c_b
        )
        log1p_a = tl.where(open_a & accept_a, made_a, log1p_a)
        log1p_b = tl.where(open_b & accept_b, made_b, log1p_b)
        open_a = open_a & ~accept_a
        open_b = open_b & ~accept_b
        attempt += 1
    w0, w1, w2, w3 = _draw(seed, offset, element, BOOST_BLOCK)
    boost = _log_boost(a, w0, w2) - _log_boost(b, w1, w3)
    action = log(divide(d_a, d_b)) + (log1p_a - log1p_b) * 3.0
    return tl.where((a < 1.0) | (b < 1.0), action + boost, action)


# ---- The whole step


@triton.jit
def _largest(LIKE: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.float64 == LIKE:
        return tl.full([1], LARGEST, tl.float64)
    else:
        return tl.full([1], LARGEST_32, tl.float64)


@triton.jit
def _saturate(x, valid, LIKE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x as a finite number of that dtype; NaN where x is NaN or not valid."""
    largest = _largest(LIKE)
    bounded = tl.minimum(tl.maximum(x, -largest), largest)
    return tl.where(valid & (x == x), bounded, float("nan")).to(LIKE)


@triton.jit
def beta_step(logits, kappa, given, key, element, inside, MODE: tl.constexpr, CHECK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One policy step of a block.

    logits [BLOCK] float32 or float64; kappa [BLOCK] float64; given [BLOCK], the actions of MODE
    GIVEN, else unused; key: pointer to seed and offset, for MODE DRAWN; element [BLOCK] int64: the
    position in the random stream; inside [BLOCK]: which elements exist. CHECK: an invalid value
    stops the kernel (it must be compiled with debug=True for that), else its results are NaN.
    Returns alpha, action, log_prob, entropy, then derivatives as _policy_step, like logits.
    """
    LIKE: tl.constexpr = logits.dtype
    good_logit = logits == logits
    good_kappa = (kappa > 0.0) & (kappa <= _largest(LIKE))
    if CHECK:
        tl.device_assert(good_logit, "dvla_fast: logits: NaN found", mask=inside)
        tl.device_assert(
            good_kappa, "dvla_fast: concentration: expected positive finite values", mask=inside
        )
    valid = good_logit & good_kappa
    log_kappa = log(kappa)
    logit, p, q, log_p, log_q = _make_policy(logits.to(tl.float64))
    if MODE == DRAWN:
        seed = tl.load(key)
        offset = (tl.load(key + 1) & 0xFFFFFFFF).to(tl.uint32)
        a = (kappa * p).to(LIKE)
        b = (kappa * q).to(LIKE)
        action = _sample(seed, offset, element, a, b, inside & valid)
        action = tl.where(valid, action, float("nan")).to(LIKE)
    elif MODE == GIVEN:
        if CHECK:
            tl.device_assert(given == given, "dvla_fast: action_logit: NaN found", mask=inside)
        valid = valid & (given == given)
        action = _saturate(given.to(tl.float64), valid, LIKE)
    else:
        action = tl.where(valid, logit, float("nan")).to(LIKE)
    alpha, log_prob, entropy, lp_logit, h_logit, lp_kappa, h_kappa = _policy_step(
        logit, p, q, log_p, log_q, kappa, log_kappa, action.to(tl.float64), tl.float64 == LIKE
    )
    return (
        _saturate(alpha, valid, LIKE), action,
        _saturate(log_prob, valid, LIKE), _saturate(entropy, valid, LIKE),
        _saturate(lp_logit, valid, LIKE), _saturate(h_logit, valid, LIKE),
        _saturate(lp_kappa, valid, LIKE), _saturate(h_kappa, valid, LIKE),
    )  # fmt: skip
