"""The gate's policy: draw α ~ Beta(κp, κ(1 − p)), its log-density and the entropy, in one call.

p = sigmoid(logits); κ is the concentration (DVLA-RL, policy of method §3). The action is
carried as its logit l = log(α/(1 − α)): α itself saturates near 0 and 1 in float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from dvla_fast import _extension, backends, reference
from dvla_fast.arguments import expect_generator, expect_number, expect_real, expect_tensor
from dvla_fast.ops import schemas
from dvla_fast.ops.first_order import first_order
from dvla_fast.ops.value_checks import require, setting, value_checks

_LARGEST_INT64 = 2**63 - 1
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


class BetaPolicyOutput(NamedTuple):
    """What one policy step yields; every tensor has the shape of the logits."""

    alpha: Tensor
    """The gate, sigmoid(action_logit); carries no gradient."""
    action_logit: Tensor
    """The exact action log(α/(1 − α)); carries no gradient."""
    log_prob: Tensor
    """Log-density of α under Beta(κp, κ(1 − p)), with respect to α."""
    entropy: Tensor
    """Differential entropy of the policy, in nats."""


# Without a name torch.export.save refuses it; there is no public way to give one.
_pytree._register_namedtuple(BetaPolicyOutput, serialized_type_name="dvla_fast.BetaPolicyOutput")


def beta_policy(
    logits: Tensor,
    concentration: float | Tensor,
    *,
    action_logit: Tensor | None = None,
    deterministic: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> BetaPolicyOutput:
    """Draws (or replays) the gate and returns it with its log-density and the policy's entropy.

    Args:
        logits: policy logits, any shape, p = sigmoid(logits). Half types are computed in float32,
            float64 stays float64.
        concentration: κ > 0, a number or a tensor that broadcasts to ``logits``.
        action_logit: evaluate this stored action, same shape as ``logits``, instead of drawing.
        deterministic: take the policy's mean p instead of drawing.
        generator: source of the random key; default PyTorch's global one, the only one that
            ``torch.compile`` traces and that activation checkpointing rewinds. The same generator
            state gives the same draws whatever the number of threads, and a CPU generator the same
            on a GPU (to float32 rounding; outside of CUDA graphs, which would repeat them).
        backend: ``"cpp"`` (compiled: CPU, and CUDA where built with nvcc), ``"triton"`` (CUDA) or
            ``"reference"``; default the first that can run. The reference draws from another
            random stream.

    Returns:
        BetaPolicyOutput; log_prob and entropy differentiate with respect to ``logits`` and a tensor
        ``concentration``, once.

    Raises:
        TypeError: ``logits`` is no floating tensor, ``action_logit`` no real one, ``concentration``
            neither a number nor a real tensor, or ``generator`` no generator.
        ValueError: shapes or devices do not fit; where values are checked (by default on the CPU,
            :func:`dvla_fast.functional.set_value_checks`), κ is not positive and finite or logits
            or actions hold NaN. Unchecked, the results of such elements are NaN.
    """
    usual = action_logit is None and not deterministic and backend is None
    if usual and _extension.runs_plainly():
        # In as few steps as it takes: for a few states they are most of the time.
        cuda = _extension.has_cuda or _extension.triton_available()
        out = _extension.calls.beta_policy(logits, concentration, generator, setting(), cuda)
        if out is not None:
            return BetaPolicyOutput(*out)
    expect_tensor("logits", logits)
    if logits.dtype not in _LARGEST:
        if not logits.is_floating_point():
            raise TypeError(f"logits: expected a floating tensor, got {logits.dtype}")
        logits = logits.float()
    kappa, value = _checked_concentration(concentration, logits)
    if action_logit is not None:
        if deterministic:
            raise ValueError("action_logit and deterministic=True exclude each other")
        expect_real("action_logit", action_logit)
        if action_logit.shape != logits.shape:
            raise ValueError(
                f"action_logit: shape {tuple(action_logit.shape)}, expected {tuple(logits.shape)}"
            )
        if action_logit.device != logits.device:
            raise ValueError(f"action_logit: on {action_logit.device}, logits on {logits.device}")
        action_logit = action_logit.detach().to(logits.dtype)
    device = logits.device
    chosen = _choose(device, backend)
    if chosen != "reference":
        key = None
        if action_logit is None and not deterministic:
            key = draw_key(device, generator)
        return _run(logits, kappa, value, action_logit, key, chosen)
    expect_generator(generator)
    full = torch.full((), value, dtype=logits.dtype, device=device)
    check_values(logits, full if kappa is None else kappa, action_logit)
    return BetaPolicyOutput(
        *reference.beta_policy(
            logits, full if kappa is None else kappa, action_logit, deterministic, generator
        )
    )


def beta_sample(
    logits: Tensor, concentration: float | Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draws only: (alpha, action_logit), shapes and errors as in :func:`beta_policy`."""
    with torch.no_grad():
        out = beta_policy(logits, concentration, generator=generator)
    return out.alpha, out.action_logit


def beta_log_prob(logits: Tensor, concentration: float | Tensor, action_logit: Tensor) -> Tensor:
    """Log-density of a stored action, shapes and errors as in :func:`beta_policy`."""
    expect_tensor("action_logit", action_logit)  # None would be one that is drawn
    return beta_policy(logits, concentration, action_logit=action_logit).log_prob


def beta_entropy(logits: Tensor, concentration: float | Tensor) -> Tensor:
    """Entropy of the policy, shapes and errors as in :func:`beta_policy`."""
    return beta_policy(logits, concentration, deterministic=True).entropy


def draw_key(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """(2,) int64: seed and offset of a counter-based stream, drawn by a torch op.

    Drawn from PyTorch's global generator, it is replayed by activation checkpointing and drawn
    afresh by each replay of a CUDA graph, with no hidden state in the op that reads it. The key
    alone decides the draws: a CPU generator gives a GPU those that it gives the CPU.
    """
    expect_generator(generator)
    source = device if generator is None else generator.device
    key = torch.randint(_LARGEST_INT64, (2,), device=source, generator=generator)
    return key if source == device else key.to(device, non_blocking=source.type == "cpu")


def _choose(device: torch.device, backend: str | None) -> str:
    candidates = (
        ("cpp", _extension.beta_problem(device)),
        ("triton", _extension.beta_triton_problem(device)),
        ("reference", None),
    )
    return backends.choose("beta_policy", candidates, backend)


def _run(
    logits: Tensor,
    kappa: Tensor | None,
    value: float,
    action: Tensor | None,
    key: Tensor | None,
    backend: str,
) -> BetaPolicyOutput:
    # Triton beside compiled CUDA kernels has names of its own, which only Python differentiates.
    kernels = "_triton" if backend == "triton" and _extension.has_cuda else ""
    inputs, check = (logits, kappa, value, action, key), value_checks(logits.device)
    if kernels or _extension.needs_python_autograd():
        return BetaPolicyOutput(*_BetaPolicy.apply(*inputs, kernels, check)[:4])
    return BetaPolicyOutput(*_FORWARD[kernels](*inputs, False, check)[:4])


_FORWARD = {
    "": torch.ops.dvla_fast.beta_policy_forward.default,
    "_triton": torch.ops.dvla_fast.beta_policy_forward_triton.default,
}
_BACKWARD = {
    "": torch.ops.dvla_fast.beta_policy_backward.default,
    "_triton": torch.ops.dvla_fast.beta_policy_backward_triton.default,
}


def _backward(
    kernels: str,
    _logits: Tensor,
    _kappa: Tensor | None,
    derivatives: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The backward op, taking too what its derivatives hang on: else a second one would be 0."""
    grads: tuple[Tensor, Tensor] = _BACKWARD[kernels](derivatives, grad_log_prob, grad_entropy)
    return grads


_BetaPolicyBackward = first_order(_backward, "beta_policy")


class _BetaPolicy(torch.autograd.Function):
    """The forward op yields the closed-form derivatives too; backward only scales them."""

    generate_vmap_rule = True  # from those of the ops, below

    @staticmethod
    def forward(
        logits: Tensor,
        kappa: Tensor | None,
        value: float,
        action: Tensor | None,
        key: Tensor | None,
        kernels: str,
        check: bool,
    ) -> tuple[Tensor, ...]:
        forward = _FORWARD[kernels]
        results: tuple[Tensor, ...] = forward(logits, kappa, value, action, key, True, check)
        return results

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        alpha, action_logit, _log_prob, _entropy, derivatives = output
        ctx.mark_non_differentiable(alpha, action_logit, derivatives)
        ctx.save_for_backward(*inputs[:2], derivatives)
        ctx.kappa_shape = None if inputs[1] is None else inputs[1].shape
        ctx.kernels = inputs[5]

    @staticmethod
    def backward(ctx, _alpha, _action, grad_log_prob, grad_entropy, _derivatives):  # type: ignore[no-untyped-def]
        grad_logits, grad_kappa = _BetaPolicyBackward.apply(
            ctx.kernels, *ctx.saved_tensors, grad_log_prob, grad_entropy
        )
        grad_kappa = None if ctx.kappa_shape is None else grad_kappa.sum_to_size(ctx.kappa_shape)
        return grad_logits, grad_kappa, None, None, None, None, None


def _forward_fake(logits, concentration, value, action_logit, key, save, check=False):  # type: ignore[no-untyped-def]
    def like() -> Tensor:
        return logits.new_empty(logits.shape)

    rows = 0 if not save else 2 if concentration is None else 4
    derivatives = logits.new_empty((rows, *logits.shape)) if rows else logits.new_empty(0)
    return like(), like(), like(), like(), derivatives


def _backward_fake(derivatives, grad_log_prob, grad_entropy):  # type: ignore[no-untyped-def]
    shape = derivatives.shape[1:]
    grad_kappa = derivatives.new_empty(shape if derivatives.shape[0] == 4 else 0)
    return derivatives.new_empty(shape), grad_kappa


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _forward_vmap(op, info, in_dims, logits, kappa, value, action, key, save, check=False):  # type: ignore[no-untyped-def]
    size, forward = info.batch_size, functools.partial(op, check=check)
    logits = _mapped_first(logits, in_dims[0], size)
    if kappa is not None:
        kappa = _mapped_first(kappa, in_dims[1], size)
        missing = logits.dim() - kappa.dim()  # broadcasts within an example
        kappa = kappa.reshape(size, *[1] * missing, *kappa.shape[1:])
    if action is not None:
        action = _mapped_first(action, in_dims[3], size)
    if key is None:
        results = forward(logits, kappa, value, action, None, save)
    else:  # a key draws by position in the example
        keys = _mapped_first(key, in_dims[4], size)
        kappas = [None] * size if kappa is None else list(kappa)
        each = [forward(x, k, value, None, seed, save) for x, k, seed in zip(logits, kappas, keys)]
        *elementwise, derivatives = zip(*each)
        results = (*map(torch.stack, elementwise), torch.stack(derivatives, 1 if save else 0))
    *elementwise, derivatives = results
    if not save:
        return (*elementwise, logits.new_empty(0)), (0, 0, 0, 0, None)
    return (*elementwise, derivatives), (0, 0, 0, 0, 1)


def _backward_vmap(backward, info, in_dims, derivatives, grad_log_prob, grad_entropy):  # type: ignore[no-untyped-def]
    size = info.batch_size
    derivatives = _mapped_first(derivatives, in_dims[0], size).movedim(0, 1)
    grads = (
        None if grad is None else _mapped_first(grad, dim, size)
        for grad, dim in zip((grad_log_prob, grad_entropy), in_dims[1:])
    )
    grad_logits, grad_kappa = backward(derivatives, *grads)
    return (grad_logits, grad_kappa), (0, 0 if derivatives.shape[0] == 4 else None)


for _kernels in _FORWARD:
    for _direction, _ops, _fake, _vmap in (
        ("forward", _FORWARD, _forward_fake, _forward_vmap),
        ("backward", _BACKWARD, _backward_fake, _backward_vmap),
    ):
        _op = f"dvla_fast::beta_policy_{_direction}{_kernels}"
        torch.library.register_fake(_op, _fake, lib=schemas.LIBRARY)
        _rule = functools.partial(_vmap, _ops[_kernels])
        torch.library.register_vmap(_op, _rule, lib=schemas.LIBRARY)


def _checked_concentration(
    concentration: float | Tensor, logits: Tensor
) -> tuple[Tensor | None, float]:
    """(tensor or None, number): the two forms the op takes."""
    value = number_or_none("concentration", concentration, _LARGEST[logits.dtype])
    if value is not None:
        if torch.compiler.is_compiling():  # a number is a constant of a graph, a tensor is not
            return logits.new_zeros(()) + value, 0.0
        return None, value
    assert isinstance(concentration, Tensor)
    if concentration.device != logits.device:
        raise ValueError(f"concentration: on {concentration.device}, logits on {logits.device}")
    try:
        fits = torch.broadcast_shapes(concentration.shape, logits.shape) == logits.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"concentration: shape {tuple(concentration.shape)} does not broadcast to logits'"
            f" {tuple(logits.shape)}"
        )
    return concentration.to(logits.dtype), 0.0


def number_or_none(name: str, concentration: float | Tensor, largest: float) -> float | None:
    """A concentration that is a number, in its range; None: it is a tensor, of real numbers."""
    if isinstance(concentration, Tensor):
        expect_real(name, concentration)
        return None
    expect_number(name, concentration, "a number or a tensor")
    value = float(concentration)
    if not 0.0 < value <= largest:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return value


def check_values(
    logits: Tensor, kappa: Tensor, action_logit: Tensor | None = None, prefix: str = ""
) -> None:
    """What the ops check on their way, for PyTorch's paths; a traced graph cannot raise.

    ``prefix``: of the names of logits and concentration.
    """
    if _extension.transforming() or not value_checks(logits.device):
        return
    require(~torch.isnan(logits), f"{prefix}logits: NaN found")
    if action_logit is not None:
        require(~torch.isnan(action_logit), "action_logit: NaN found")
    positive = (kappa > 0) & torch.isfinite(kappa)
    require(positive, f"{prefix}concentration: expected positive finite values")
