"""The gate's decision: pooled state, policy network and Beta policy, in one call.

    s = [mean of image tokens ‖ mean of text tokens ‖ their cosine]
    logit = w₂·GELU(W₁ [norm(image mean) ‖ norm(text mean) ‖ cosine] + b₁) + b₂
    α ~ Beta(κp, κ(1 − p)), p = sigmoid(logit)

(DVLA-RL, state and policy of method §3; the norms are layer norms without weights.) One C++ call
does it on the CPU; on a GPU two Triton kernels and the draw of a key do, and two kernels backward.
Elsewhere, and under torch.func, it is a composition of PyTorch operations around
:func:`dvla_fast.functional.beta_policy`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from dvla_fast import _extension, backends, reference
from dvla_fast.arguments import expect_number, expect_real, expect_tensor, expect_whole
from dvla_fast.ops import schemas
from dvla_fast.ops.beta_policy import beta_policy, draw_key
from dvla_fast.ops.value_checks import setting, value_checks

_LARGEST = torch.finfo(torch.float32).max


class GatePolicyOutput(NamedTuple):
    """A decision for each of A states."""

    alpha: Tensor
    """(A,): the gate, sigmoid(action_logit); carries no gradient."""
    action_logit: Tensor
    """(A,): the exact action log(α/(1 − α)); carries no gradient."""
    log_prob: Tensor
    """(A,): log-density of α under the policy."""
    entropy: Tensor
    """(A,): differential entropy of the policy, in nats."""
    state: Tensor
    """(A, 2·C + 1)."""


_pytree._register_namedtuple(GatePolicyOutput, serialized_type_name="dvla_fast.GatePolicyOutput")


def gate_state(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    groups_per_decision: int = 1,
    state_images: int | None = None,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pools the tokens of each decision into the policy's state.

    B images of N tokens in T text groups of P tokens, all C wide. The tokens of an image are
    averaged first, then the images of a decision: an image counts alike whatever its number of
    unmasked tokens, and so does a text.

    Args:
        image_tokens: (B, N, C), a floating dtype.
        text_tokens: (T, P, C), a floating dtype; float64 if and only if ``image_tokens`` is.
        groups_per_decision: how many consecutive text groups share a decision, a divisor of T, so
            A = T / groups_per_decision; 0: every image has its own decision, A = B.
        state_images: only the first this many images of each text group make the state; None: all.
        image_mask: (B, N) bool, True = a token.
        text_mask: (T, P) bool, True = a token.
        backend: ``"cpp"`` (CPU), ``"triton"`` (CUDA) or ``"reference"``; default the best for the
            inputs.

    Returns:
        (A, 2·C + 1), float32, or float64 for float64 tokens.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or numbers do not fit together.
        BackendError: the backend asked for cannot run with these inputs.
    """
    _check(image_tokens, text_tokens, groups_per_decision, state_images, image_mask, text_mask)
    pooling = (image_mask, text_mask, groups_per_decision, state_images or 0)
    if not _in_one_call(image_tokens, backend):
        return reference.gate_state(image_tokens, text_tokens, *pooling)
    forward = torch.ops.dvla_fast.gate_policy_forward.default
    weights = (None,) * 4
    state: Tensor = forward(
        image_tokens, text_tokens, *pooling, *weights, 1.0, None, None, False
    )[4]  # fmt: skip
    return state


def gate_policy(
    image_tokens: Tensor,
    text_tokens: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    concentration: float,
    *,
    groups_per_decision: int = 1,
    state_images: int | None = None,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    action_logit: Tensor | None = None,
    deterministic: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> GatePolicyOutput:
    """Decides on α for every state: :func:`gate_state`, the network, ``beta_policy``.

    Args:
        image_tokens: see :func:`gate_state`, as are the options up to ``text_mask``.
        text_tokens: see :func:`gate_state`.
        hidden_weight: (K, 2·C + 1), any floating dtype, like the three that follow; computed in
            the state's.
        hidden_bias: (K,).
        out_weight: (1, K).
        out_bias: (1,).
        concentration: κ > 0, a number; in a compiled graph a constant of it: each value makes a
            graph of its own. For a learned one, or one that changes there, compose
            :func:`gate_state`, a network and :func:`dvla_fast.functional.beta_policy`, which
            differentiates by it.
        action_logit: (A,), evaluate these stored actions instead of drawing.
        deterministic: take the policy's mean instead of drawing.
        generator: see :func:`dvla_fast.functional.beta_policy`.
        backend: ``"cpp"`` (CPU), ``"triton"`` (CUDA) or ``"reference"``; default the best for the
            inputs.

    Returns:
        GatePolicyOutput. log_prob, entropy and state differentiate, once, with respect to tokens
        and weights.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or numbers do not fit together; where values
            are checked (:func:`dvla_fast.functional.set_value_checks`), logits or actions hold NaN.
        BackendError: the backend asked for cannot run with these inputs.
    """
    if action_logit is None and backend is None and _extension.runs_plainly():
        # With as little of Python as it takes: it would cost more than a decision on few images.
        out = _extension.calls.gate_policy(
            image_tokens, text_tokens, hidden_weight, hidden_bias, out_weight, out_bias,
            concentration, groups_per_decision, state_images, image_mask, text_mask,
            not deterministic, generator, setting(), _extension.triton_available(),
        )  # fmt: skip
        if out is not None:
            return GatePolicyOutput(*out)
    _check(image_tokens, text_tokens, groups_per_decision, state_images, image_mask, text_mask)
    _check_weights(image_tokens, hidden_weight, hidden_bias, out_weight, out_bias)
    kappa = fixed_concentration(concentration)
    decisions = _decisions(image_tokens, text_tokens, groups_per_decision)
    _check_action(action_logit, deterministic, decisions, image_tokens.device)
    pooling = (image_mask, text_mask, groups_per_decision, state_images or 0)
    wide = torch.float64 if image_tokens.dtype == torch.float64 else torch.float32
    weights = [
        x if x.dtype == wide else x.to(wide)
        for x in (hidden_weight, hidden_bias, out_weight, out_bias)
    ]
    if not _in_one_call(image_tokens, backend):
        state = reference.gate_state(image_tokens, text_tokens, *pooling)
        logits = reference.state_logits(state, *weights).squeeze(-1)
        step = beta_policy(
            logits, kappa, action_logit=action_logit, deterministic=deterministic,
            generator=generator, backend=backend,
        )  # fmt: skip
        return GatePolicyOutput(*step, state)
    key = None
    if action_logit is not None:
        action_logit = action_logit.detach().to(wide)
    elif not deterministic:
        key = draw_key(image_tokens.device, generator)
    results = torch.ops.dvla_fast.gate_policy_forward.default(
        image_tokens, text_tokens, *pooling, *weights, kappa,
        action_logit, key, False, value_checks(image_tokens.device),
    )  # fmt: skip
    return GatePolicyOutput(*results[:5])


def _in_one_call(image_tokens: Tensor, backend: str | None) -> bool:
    """Whether the op runs. torch.func transforms what PyTorch's own operations compose."""
    if backend is None and image_tokens.is_cpu and _extension.runs_plainly():
        return True
    if backend is None and _extension.needs_python_autograd():
        return False
    device, width = image_tokens.device, image_tokens.shape[2]
    compiled = _extension.problem if device.type == "cpu" else f"no kernel for {device.type}"
    candidates = (
        ("cpp", compiled),
        ("triton", _extension.gate_triton_problem(device, width)),
        ("reference", None),
    )
    chosen = backends.choose("gate_policy", candidates, backend)
    return chosen != "reference" and not _extension.functorch_active()


def _decisions(image_tokens: Tensor, text_tokens: Tensor, groups_per_decision: int) -> int:
    if groups_per_decision == 0:
        return image_tokens.shape[0]
    return text_tokens.shape[0] // groups_per_decision


@torch.library.register_fake("dvla_fast::gate_policy_forward", lib=schemas.LIBRARY)
def _forward_fake(  # type: ignore[no-untyped-def]
    image_tokens, text_tokens, image_mask, text_mask, groups_per_decision, state_images,
    hidden_weight, hidden_bias, out_weight, out_bias, concentration, action_logit, key, save,
    check=False,
):  # fmt: skip
    decisions = _decisions(image_tokens, text_tokens, groups_per_decision)
    wide = torch.promote_types(image_tokens.dtype, torch.float32)

    def empty(*size: int) -> Tensor:
        return image_tokens.new_empty(size, dtype=wide)

    state = empty(decisions, 2 * image_tokens.shape[2] + 1)
    if hidden_weight is None:
        return *(empty(0) for _ in range(4)), state, empty(0), empty(0)
    hidden = empty(decisions, hidden_weight.shape[0]) if save else empty(0)
    derivatives = empty(2, decisions) if save else empty(0)
    return *(empty(decisions) for _ in range(4)), state, hidden, derivatives


@torch.library.register_fake("dvla_fast::gate_policy_backward", lib=schemas.LIBRARY)
def _backward_fake(  # type: ignore[no-untyped-def]
    grad_log_prob, grad_entropy, grad_state, image_tokens, text_tokens, image_mask, text_mask,
    groups_per_decision, state_images, hidden_weight, out_weight, state, hidden, derivatives,
):  # fmt: skip
    images, _, width = image_tokens.shape
    tokens = state.new_empty(images, width), state.new_empty(text_tokens.shape[0], width)
    if hidden_weight is None:
        return *tokens, *(state.new_empty(0) for _ in range(4))
    units = hidden_weight.shape[0]
    sizes = ((units, 2 * width + 1), (units,), (1, units), (1,))
    return *tokens, *(state.new_empty(size) for size in sizes)


def _check(
    image_tokens: Tensor,
    text_tokens: Tensor,
    groups_per_decision: int,
    state_images: int | None,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
) -> None:
    for name, tensor in (("image_tokens", image_tokens), ("text_tokens", text_tokens)):
        expect_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}, expected (outer, tokens, width)"
            )
        if tensor.shape[1] == 0:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} has no token")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise TypeError(
                f"{name}: expected a floating tensor of at least 16 bits, got {tensor.dtype}"
            )
    images, groups = image_tokens.shape[0], text_tokens.shape[0]
    if text_tokens.shape[2] != image_tokens.shape[2]:
        raise ValueError(
            f"text_tokens: width {text_tokens.shape[2]}, image_tokens have {image_tokens.shape[2]}"
        )
    if (image_tokens.dtype == torch.float64) != (text_tokens.dtype == torch.float64):
        raise TypeError(
            f"text_tokens: dtype {text_tokens.dtype} does not go with {image_tokens.dtype}"
        )
    check_groups_and_masks(image_tokens, text_tokens, image_mask, text_mask)
    expect_whole("groups_per_decision", groups_per_decision)
    if groups_per_decision < 0 or (groups_per_decision and groups % groups_per_decision):
        raise ValueError(
            f"groups_per_decision: {groups} text groups do not fall into runs of"
            f" {groups_per_decision}"
        )
    if state_images is not None:
        expect_whole("state_images", state_images)
        if groups_per_decision == 0:
            raise ValueError("state_images: every image has its own decision")
        if not 1 <= state_images <= images // groups:
            raise ValueError(f"state_images: expected 1 to {images // groups}, got {state_images}")
    _check_device("text_tokens", text_tokens, image_tokens)


def check_groups_and_masks(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
) -> None:
    """The images fall into text groups, and masks (outer, tokens) fit the tokens they belong to."""
    images, groups = image_tokens.shape[0], text_tokens.shape[0]
    if images == 0 or groups == 0:
        empty, tokens = ("text", text_tokens) if images else ("image", image_tokens)
        raise ValueError(f"{empty}_tokens: shape {tuple(tokens.shape)} leaves nothing to decide on")
    if images % groups:
        raise ValueError(
            f"image_tokens: {images} images do not fall into {groups} text groups evenly"
        )
    for name, mask, tokens in (
        ("image_mask", image_mask, image_tokens),
        ("text_mask", text_mask, text_tokens),
    ):
        if mask is None:
            continue
        expect_tensor(name, mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: expected bool (True = a token), got {mask.dtype}")
        if mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"{name}: shape {tuple(mask.shape)}, expected {tuple(tokens.shape[:2])}"
            )
        _check_device(name, mask, tokens)


def _check_weights(
    image_tokens: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
) -> None:
    expect_tensor("hidden_weight", hidden_weight)
    if hidden_weight.dim() != 2 or hidden_weight.shape[0] == 0:
        raise ValueError(f"hidden_weight: shape {tuple(hidden_weight.shape)}, expected (K, 2C + 1)")
    units, features = hidden_weight.shape[0], 2 * image_tokens.shape[2] + 1
    for name, tensor, shape in (
        ("hidden_weight", hidden_weight, (units, features)),
        ("hidden_bias", hidden_bias, (units,)),
        ("out_weight", out_weight, (1, units)),
        ("out_bias", out_bias, (1,)),
    ):
        expect_tensor(name, tensor)
        if tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {tensor.dtype}")
        _check_device(name, tensor, image_tokens)


def fixed_concentration(concentration: float) -> float:
    """A concentration that is a constant: positive, and finite in float32.

    A tensor is refused: read as a number, it would lose its gradient.
    """
    if isinstance(concentration, Tensor):
        raise TypeError(
            f"concentration: expected a number, got a tensor of shape {tuple(concentration.shape)};"
            " compose functional.gate_state and functional.beta_policy for a learned one"
        )
    expect_number("concentration", concentration)
    kappa = float(concentration)
    if not 0.0 < kappa <= _LARGEST:
        raise ValueError(f"concentration: expected a positive finite number, got {kappa}")
    return kappa


def _check_action(
    action_logit: Tensor | None, deterministic: bool, decisions: int, device: torch.device
) -> None:
    if action_logit is None:
        return
    if deterministic:
        raise ValueError("action_logit and deterministic=True exclude each other")
    expect_real("action_logit", action_logit)
    if action_logit.shape != (decisions,):
        raise ValueError(
            f"action_logit: shape {tuple(action_logit.shape)}, expected ({decisions},)"
        )
    if action_logit.device != device:
        raise ValueError(f"action_logit: on {action_logit.device}, the tokens are on {device}")


def _check_device(name: str, tensor: Tensor, tokens: Tensor) -> None:
    if tensor.device != tokens.device:
        raise ValueError(f"{name}: on {tensor.device}, the tokens are on {tokens.device}")
