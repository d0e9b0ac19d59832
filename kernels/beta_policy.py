"""The Beta policy on NVIDIA GPUs in Triton: a draw, its log-density and the entropy in one launch.

    p = sigmoid(logit)
    action = log G(κp) − log G(κ(1 − p)) with Gamma variates G; or the mean, logit; or given
    log_prob = log Beta(sigmoid(action); κp, κ(1 − p));  entropy of that Beta distribution

    logits       (n,)     float32 or float64, read contiguous, as is all that follows
    kappa        (n,)     the same dtype; one number in memory (step 0); or a float64 argument
    given        (n,)     actions, or None
    key          (2,)     int64 seed and offset of the random stream, or None: the mean
    alpha, action, log_prob, entropy   (n,)
    derivatives  (2, n)   of log_prob and entropy by the logit; (4, n): then by kappa

For a GPU whose extension was built without nvcc, the twin of ``csrc/beta/beta_cuda.cu``: the same
stream, the same operations (``beta_math.py``). A thread has one element, as there.
"""

from __future__ import annotations

import struct
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .beta_math import DRAWN, GIVEN, MEAN, beta_step
from .launching import Step, run

BLOCK = 128
# Fused multiply-adds are where the C++ code has them and nowhere else.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "sanitize_overflow": False}


@triton.jit(do_not_specialize=["kappa_bits", "kappa_step", "n"])
def beta_policy_kernel(  # type: ignore[no-untyped-def]
    logits, kappa, kappa_bits, kappa_step, given, key,
    alpha, action, log_prob, entropy, derivatives, n,
    HAS_KAPPA: tl.constexpr,
    MODE: tl.constexpr,
    SAVE: tl.constexpr,
    CHECK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: one program per BLOCK elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < n
    x = tl.load(logits + i, inside, other=0.0)
    if HAS_KAPPA:
        k = tl.load(kappa + i * kappa_step, inside, other=1.0).to(tl.float64)
    else:
        number = tl.cast(kappa_bits, tl.int64).to(tl.float64, bitcast=True)
        k = tl.full([BLOCK], 0.0, tl.float64) + number
    actions = x
    if MODE == GIVEN:
        actions = tl.load(given + i, inside, other=0.0)
    a, y, lp, h, lp_logit, h_logit, lp_kappa, h_kappa = beta_step(
        x, k, actions, key, i, inside, MODE, CHECK
    )
    tl.store(alpha + i, a, inside)
    tl.store(action + i, y, inside)
    tl.store(log_prob + i, lp, inside)
    tl.store(entropy + i, h, inside)
    if SAVE:
        rows = tl.cast(n, tl.int64)
        tl.store(derivatives + i, lp_logit, inside)
        tl.store(derivatives + rows + i, h_logit, inside)
        if HAS_KAPPA:
            tl.store(derivatives + 2 * rows + i, lp_kappa, inside)
            tl.store(derivatives + 3 * rows + i, h_kappa, inside)


@triton.jit(do_not_specialize=["log_prob_step", "entropy_step", "n"])
def beta_policy_backward_kernel(  # type: ignore[no-untyped-def]
    derivatives,  # (2 or 4, n)
    log_prob, log_prob_step,  # gradients that came in, or None; step 0: the same for all
    entropy, entropy_step,
    grad_logits, grad_kappa, n,
    HAS_KAPPA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: one program per BLOCK elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < n
    rows = tl.cast(n, tl.int64)
    by_log_prob = tl.zeros([BLOCK], derivatives.dtype.element_ty)
    by_entropy = by_log_prob
    if log_prob is not None:
        by_log_prob = tl.load(log_prob + i * log_prob_step, inside, other=0.0)
    if entropy is not None:
        by_entropy = tl.load(entropy + i * entropy_step, inside, other=0.0)
    first = tl.load(derivatives + i, inside, other=0.0)
    second = tl.load(derivatives + rows + i, inside, other=0.0)
    tl.store(grad_logits + i, tl.fma(first, by_log_prob, second * by_entropy), inside)
    if HAS_KAPPA:
        first = tl.load(derivatives + 2 * rows + i, inside, other=0.0)
        second = tl.load(derivatives + 3 * rows + i, inside, other=0.0)
        tl.store(grad_kappa + i, tl.fma(first, by_log_prob, second * by_entropy), inside)


def forward(
    logits: Tensor,
    concentration: Tensor | None,
    concentration_value: float,
    action_logit: Tensor | None,
    key: Tensor | None,
    save: bool,
    check: bool = False,
) -> tuple[Tensor, ...]:
    """One launch; arguments and results as the op's (``dvla_fast/ops/schemas.py``).

    Args:
        check: stop the device at NaN or a concentration that is not positive and finite; else the
            results of such elements are NaN.

    Returns:
        (alpha, action_logit, log_prob, entropy, derivatives), of the shape of ``logits``.
    """
    outputs = [logits.new_empty(logits.shape) for _ in range(4)]
    rows = 0 if not save else 2 if concentration is None else 4
    derivatives = logits.new_empty((rows, *logits.shape) if rows else 0)
    inputs = (logits, concentration, concentration_value, action_logit, key)
    run([forward_step(inputs, (*outputs, derivatives), save, check)], logits)
    return (*outputs, derivatives)


def forward_step(
    inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], save: bool, check: bool
) -> Step:
    """The launch, touching no data (meta tensors do); inputs in the order of :func:`forward`."""
    logits, concentration, number, action_logit, key = inputs
    kappa, step = one_or_all(concentration, logits)
    given = None if action_logit is None else action_logit.contiguous()
    n = logits.numel()
    arguments = (
        logits.contiguous(), kappa, bits_of(number), step, given, key,
        *outputs[:4], outputs[4] if save else None, n,
    )  # fmt: skip
    constants = {
        "HAS_KAPPA": kappa is not None,
        "MODE": mode_of(action_logit, key),
        "SAVE": save,
        "CHECK": check,
        "BLOCK": BLOCK,
        "debug": check,
        **OPTIONS,
    }
    return beta_policy_kernel, (triton.cdiv(n, BLOCK),), arguments, constants


def backward(
    derivatives: Tensor, grad_log_prob: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One launch: (grad_logits, grad_concentration), the second empty where there was a number."""
    shape, has_kappa = derivatives.shape[1:], derivatives.shape[0] == 4
    grad_logits = derivatives.new_empty(shape)
    grad_kappa = derivatives.new_empty(shape if has_kappa else 0)
    inputs = (derivatives, grad_log_prob, grad_entropy)
    run([backward_step(inputs, (grad_logits, grad_kappa))], derivatives)
    return grad_logits, grad_kappa


def backward_step(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> Step:
    """The launch; inputs in the order of :func:`backward`."""
    derivatives, *grads = inputs
    incoming = [x for grad in grads for x in one_or_all(grad, outputs[0])]
    n = outputs[0].numel()
    arguments = (derivatives.contiguous(), *incoming, *outputs, n)
    constants = {"HAS_KAPPA": derivatives.shape[0] == 4, "BLOCK": BLOCK, **OPTIONS}
    return beta_policy_backward_kernel, (triton.cdiv(n, BLOCK),), arguments, constants


def one_or_all(tensor: Tensor | None, like: Tensor) -> tuple[Tensor | None, int]:
    """A tensor that broadcasts to ``like``, and its step: 0 for a single number, never copied.

    The gradient of a sum arrives as one number expanded.
    """
    if tensor is None:
        return None, 0
    if tensor.numel() == 1 or not any(tensor.stride()):
        return tensor, 0
    return tensor.expand(like.shape).contiguous(), 1


def mode_of(action_logit: Tensor | None, key: Tensor | None) -> int:
    """How the action comes about: a stored one is evaluated, else a key draws."""
    if action_logit is not None:
        return int(GIVEN.value)
    return int(MEAN.value if key is None else DRAWN.value)


def bits_of(number: float) -> int:
    """A float64 as an integer argument: Triton rounds Python floats to float32."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
