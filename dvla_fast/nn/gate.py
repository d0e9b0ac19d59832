"""RLAGate: the RL-gated attention of DVLA-RL as a drop-in module for any token-based backbone.

Text asks the image (cross-attention) and itself (self-attention) with one shared query; a policy
mixes the two answers by α; the mix goes back into the image stream (method §3, one gated layer).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from dvla_fast import _extension, functional, reference
from dvla_fast.arguments import expect_number, expect_tensor, expect_whole
from dvla_fast.nn.layers import is_plain, weight_of
from dvla_fast.nn.policy import PolicyStep, build_policy
from dvla_fast.ops.gate_policy import check_groups_and_masks
from dvla_fast.ops.value_checks import require, value_checks

ALPHA_SCOPES = ("episode", "image")


class GateOutput(NamedTuple):
    """What a gate returns. A = number of decisions: T text groups in scope "episode", else B."""

    image_tokens: Tensor
    """(B, N, dim): z plus the mean of H over the text tokens."""
    fused: Tensor
    """(B, P, dim): H, to be appended to the image tokens while the next block runs."""
    alpha: Tensor
    """(A,): the gate that was used; in the given shape's rows when ``alpha=`` was replayed."""
    action_logit: Tensor
    """(A,): the exact action, for ``action_logit=``."""
    log_prob: Tensor
    """(A,): log-density of the action; 0 for a replayed gate or a policy without chance."""
    entropy: Tensor
    """(A,): entropy of the policy; 0 for a replayed gate or a policy without chance."""
    state: Tensor
    """(A, 2·dim + 1): [GAP(H_v) ‖ GAP(H_t) ‖ cos(GAP(H_v), GAP(H_t))]."""


# Without a name torch.export.save refuses it; there is no public way to give one.
_pytree._register_namedtuple(GateOutput, serialized_type_name="dvla_fast.GateOutput")


class GateAttention(NamedTuple):
    """Where a gate looks: the softmax weights of both its paths, and how it mixes them.

    Weights are in the tokens' dtype, at least float32. Masked keys have weight 0, and so do the
    rows of masked text tokens; all other rows sum to 1, or to 0 where every key is masked.
    """

    image: Tensor
    """(B, H, P, N): attention of every text token over the image's tokens, head by head."""
    text: Tensor
    """(T, H, P, P): attention of every text token over its group's text tokens."""
    alpha: Tensor
    """(A,): the gate, the share of the image path; A as in :class:`GateOutput`."""


class RLAGate(nn.Module):
    """Gated mix of image-guided and text-guided attention, α drawn by a learned policy.

        Q = H_t W_q;  H = (α Attn(Q, z W_kᵛ, z W_vᵛ) + (1 − α) Attn(Q, H_t W_kᵗ, H_t W_vᵗ)) W_o;
        z ← z + mean over text tokens of H.

    H_t is the text projected to ``dim``. B images fall into T groups of consecutive images that
    share a text; everything that depends on text alone is computed once per group.

    Args:
        dim: width of the image tokens, a multiple of ``num_heads``.
        text_dim: width of the text tokens.
        num_heads: attention heads.
        concentration: κ of the Beta policy.
        hidden_dim: hidden width of the policy's network.
        alpha_scope: "episode": one decision per text group, its state pooled over the group's
            images; "image": one per image.
        policy: "beta" (paper), "categorical", "fixed", "static" or "mlp" (method §4).
        fixed_alpha: the gate of policy "fixed".
        device: where the parameters lie; None: PyTorch's default.
        dtype: of the parameters, a floating-point one; None: PyTorch's default.

    Raises:
        TypeError: a size is not a whole number, another option no number, or the dtype not one of
            floating-point numbers.
        ValueError: a size is not positive, does not divide, or a name is unknown.
    """

    def __init__(
        self,
        dim: int,
        text_dim: int = 512,
        num_heads: int = 8,
        *,
        concentration: float = 10.0,
        hidden_dim: int = 128,
        alpha_scope: str = "episode",
        policy: str = "beta",
        fixed_alpha: float = 0.5,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("text_dim", text_dim), ("num_heads", num_heads)):
            expect_whole(name, value)
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if dim % num_heads:
            raise ValueError(f"dim: {dim} is not a multiple of num_heads = {num_heads}")
        if alpha_scope not in ALPHA_SCOPES:
            raise ValueError(f"alpha_scope: unknown {alpha_scope!r}; expected {ALPHA_SCOPES}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype}")
        dim, text_dim, num_heads = int(dim), int(text_dim), int(num_heads)
        self.dim, self.text_dim, self.num_heads = dim, text_dim, num_heads
        self.alpha_scope = alpha_scope
        self.text_projection = nn.Linear(text_dim, dim)
        self.text_qkv = nn.Linear(dim, 3 * dim, bias=False)  # W_q, W_kᵗ, W_vᵗ
        self.image_kv = nn.Linear(dim, 2 * dim, bias=False)  # W_kᵛ, W_vᵛ
        self.out_projection = nn.Linear(dim, dim, bias=False)  # W_o
        self.policy = build_policy(
            policy,
            dim,
            hidden_dim=hidden_dim,
            concentration=concentration,
            fixed_alpha=fixed_alpha,
        )
        self._reset_projections()
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialise the whole gate anew, policy included, as after ``to_empty``."""
        self._reset_projections()
        self.policy.reset_parameters()

    def _reset_projections(self) -> None:
        """Xavier for each of the d × d maps apart: stacked, their fan-out would be overstated."""
        nn.init.xavier_uniform_(self.text_projection.weight)
        nn.init.zeros_(self.text_projection.bias)
        bound = math.sqrt(3.0 / self.dim)
        for stacked in (self.text_qkv, self.image_kv, self.out_projection):
            nn.init.uniform_(stacked.weight, -bound, bound)  # whole: parts of a shard are copies

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        alpha: Tensor | float | None = None,
        action_logit: Tensor | None = None,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        state_images: int | None = None,
        episodes: int | None = None,
    ) -> GateOutput:
        """Run the gate.

        Args:
            image_tokens: (B, N, dim), dtype of the weights; under autocast also float32 or its
                dtype.
            text_tokens: (T, P, text_dim), B a multiple of T; images i·B/T … see text group i.
            image_mask: (B, N) bool, True = a token; masked ones are attended by nothing.
            text_mask: (T, P) bool, likewise; H is 0 at masked places.
            alpha: replay these gates in [0, 1], of shape (), (T,) or (B,) (or (episodes,)), instead
                of asking the policy. Gradients flow to them if they require grad.
            action_logit: (A,), re-evaluate these stored actions: α as then, log_prob and entropy
                of the policy as it is now (PPO).
            sample: draw the action (True) or take the policy's mean (False); None: draw in
                training.
            generator: source of randomness on the inputs' device; None: PyTorch's global one.
                Activation checkpointing rewinds the global one alone: under it leave this None, or
                give ``action_logit``.
            state_images: scope "episode": only the first this many images of each text group make
                the state (the supports, when queries follow them in the same call).
            episodes: scope "episode": number of decisions A, a divisor of T; each covers T/A
                consecutive text groups. None: T.

        Raises:
            TypeError, ValueError: dtypes, shapes, devices or options do not fit together; where
                values are checked (:func:`dvla_fast.functional.set_value_checks`), a replayed gate
                outside [0, 1].
            RuntimeError: a checkpointed gate would draw other actions from ``generator`` when its
                forward is run again.
        """
        self._check(image_tokens, text_tokens, image_mask, text_mask)
        decisions = self._decisions(image_tokens, text_tokens, episodes, state_images)
        text_tokens = reference.without_masked(text_tokens, text_mask)
        texts = self.text_projection(text_tokens)  # [T, P, dim]
        groups = 0 if self.alpha_scope == "image" else text_tokens.shape[0] // decisions
        pooling: dict[str, Any] = {
            "groups_per_decision": groups,
            "state_images": state_images,
            "image_mask": image_mask,
            "text_mask": text_mask,
        }
        if alpha is None:
            _check_action(action_logit, decisions)
            draw = self.training if sample is None else sample
            if generator is not None and draw and action_logit is None:
                _check_first_run()
            step, state = self.policy.decide(
                image_tokens, texts, **pooling,
                action_logit=action_logit, sample=draw, generator=generator,
            )  # fmt: skip
        elif action_logit is not None:
            raise ValueError("alpha and action_logit exclude each other")
        else:
            state = functional.gate_state(image_tokens, texts, **pooling)
            step = _replayed(alpha, state, image_tokens.shape[0], text_tokens.shape[0])
        query, text_key, text_value = self._heads(self.text_qkv(texts), 3)
        gate = _spread(step.alpha, image_tokens.shape[0])
        masks: dict[str, Any] = {"image_mask": image_mask, "text_mask": text_mask}
        if _is_weight(self.image_kv) and _is_weight(self.out_projection):
            updated, fused = functional.gated_attention(
                query, image_tokens, self.image_kv.weight, text_key, text_value, gate,
                self.out_projection.weight, **masks,
            )  # fmt: skip
        else:
            image_key, image_value = self._heads(self.image_kv(image_tokens), 2)
            mixed = functional.dual_attention(
                query, image_key, image_value, text_key, text_value, gate, **masks
            )
            fused = self.out_projection(mixed.transpose(1, 2).flatten(2))
            updated, fused = reference.add_to_tokens(image_tokens, fused, text_mask)
        return GateOutput(
            updated, fused, step.alpha, step.action_logit, step.log_prob, step.entropy, state
        )

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def explain(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        alpha: Tensor | float | None = None,
        sample: bool | None = False,
        generator: torch.Generator | None = None,
        state_images: int | None = None,
        episodes: int | None = None,
    ) -> GateAttention:
        """Compute the attention that :meth:`forward` mixes and never stores, and α.

        Arguments are those of :meth:`forward` but ``action_logit`` (give ``alpha``); by default α
        is the policy's mean. The weights take B·H·P·N numbers of memory, which is what the fused
        forward avoids: ask for few images.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        out = self.forward(
            image_tokens, text_tokens, image_mask=image_mask, text_mask=text_mask, alpha=alpha,
            sample=sample, generator=generator, state_images=state_images, episodes=episodes,
        )  # fmt: skip
        text_tokens = reference.without_masked(text_tokens, text_mask)
        query, text_key, _ = self._heads(self.text_qkv(self.text_projection(text_tokens)), 3)
        key, _ = self._heads(self.image_kv(image_tokens), 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        query, text_key, key = query.to(wide), text_key.to(wide), key.to(wide)
        scale = query.shape[-1] ** -0.5
        per_group = image_tokens.shape[0] // text_tokens.shape[0]
        spread = query.repeat_interleave(per_group, 0)  # [B, H, P, D]
        image = reference.attention_weights(spread, key, image_mask, scale)
        text = reference.attention_weights(query, text_key, text_mask, scale)
        if text_mask is not None:
            rows = per_image(text_mask, image_tokens.shape[0])
            assert rows is not None
            image = image * rows[:, None, :, None]
            text = text * text_mask[:, None, :, None]
        return GateAttention(image, text, out.alpha)

    def _heads(self, stacked: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(X, L, parts·dim) -> parts views (X, H, L, D), no copy."""
        split = stacked.unflatten(-1, (parts, self.num_heads, -1))  # [X, L, parts, H, D]
        return split.permute(2, 0, 3, 1, 4).unbind()

    def _decisions(
        self, image_tokens: Tensor, text_tokens: Tensor, episodes: int | None, supports: int | None
    ) -> int:
        groups = text_tokens.shape[0]
        for name, value in (("episodes", episodes), ("state_images", supports)):
            if value is not None:
                expect_whole(name, value)
        if self.alpha_scope == "image":
            if episodes is not None or supports is not None:
                raise ValueError("episodes, state_images: only alpha_scope='episode' has them")
            return image_tokens.shape[0]
        if episodes is not None and (episodes < 1 or groups % episodes):
            raise ValueError(f"episodes: {groups} text groups do not fall into {episodes} evenly")
        per_group = image_tokens.shape[0] // groups
        if supports is not None and not 1 <= supports <= per_group:
            raise ValueError(f"state_images: expected 1 to {per_group}, got {supports}")
        return groups if episodes is None else episodes

    def _check(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
    ) -> None:
        weight = self._weight()
        device = weight.device
        if weight.is_meta and not is_plain(self.image_kv):  # offloaded: fetched when it is called
            device = getattr(image_tokens, "device", device)
        allowed: tuple[torch.dtype, ...] = (weight.dtype,)
        kind = device.type
        if kind != "meta" and weight.dtype != torch.float64 and torch.is_autocast_enabled(kind):
            allowed = (weight.dtype, torch.float32, torch.get_autocast_dtype(kind))
        for name, tensor, width in (
            ("image_tokens", image_tokens, self.dim),
            ("text_tokens", text_tokens, self.text_dim),
        ):
            expect_tensor(name, tensor)
            if tensor.dim() != 3 or tensor.shape[-1] != width:
                raise ValueError(
                    f"{name}: shape {tuple(tensor.shape)}, expected (batch, tokens, {width})"
                )
            if tensor.shape[1] == 0:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)} has no token")
            if tensor.dtype not in allowed:
                wanted = " or ".join(dict.fromkeys(map(str, allowed)))
                raise TypeError(f"{name}: dtype {tensor.dtype}, the gate takes {wanted}")
            if tensor.device != device:
                raise ValueError(f"{name}: on {tensor.device}, the gate is on {device}")
        check_groups_and_masks(image_tokens, text_tokens, image_mask, text_mask)

    def _weight(self) -> Tensor:
        """A tensor of the gate's dtype and device, also where layers were replaced."""
        layer = self.image_kv
        return layer.weight if type(layer) is nn.Linear else weight_of(self)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, text_dim={self.text_dim}, num_heads={self.num_heads},"
            f" alpha_scope={self.alpha_scope!r}"
        )


def _is_weight(layer: nn.Module) -> bool:
    return is_plain(layer) and layer.bias is None


def _check_first_run() -> None:
    """A forward inside a backward pass is activation checkpointing's second run of it."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "generator: activation checkpointing runs this gate again, and does not rewind a"
            " generator of one's own, so that other actions would be drawn; use PyTorch's global"
            " one (generator=None), or give action_logit"
        )


def _check_action(action_logit: Tensor | None, decisions: int) -> None:
    if action_logit is None:
        return
    expect_tensor("action_logit", action_logit)
    if tuple(action_logit.shape) != (decisions,):
        raise ValueError(
            f"action_logit: shape {tuple(action_logit.shape)}, expected ({decisions},)"
        )


def _replayed(alpha: Tensor | float, state: Tensor, images: int, groups: int) -> PolicyStep:
    """A given gate as a decision: nothing was drawn, so density and entropy are 0."""
    decisions = state.shape[0]
    if not isinstance(alpha, Tensor):
        expect_number("alpha", alpha, "a tensor or a number")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
        # A sum, for torch.full makes another graph of every number.
        alpha = torch.zeros((), dtype=state.dtype, device=state.device) + float(alpha)
    if not alpha.is_floating_point():
        raise TypeError(f"alpha: expected a floating tensor, got {alpha.dtype}")
    if alpha.device != state.device:
        raise ValueError(f"alpha: on {alpha.device}, the tokens are on {state.device}")
    allowed = ((), (decisions,), (groups,), (images,))
    if tuple(alpha.shape) not in allowed:
        raise ValueError(f"alpha: shape {tuple(alpha.shape)}, expected one of {set(allowed)}")
    if value_checks(alpha.device) and not _extension.transforming():
        require((alpha >= 0) & (alpha <= 1), "alpha: expected values in [0, 1]")
    alpha = alpha.to(state.dtype)
    if alpha.dim() == 0:
        alpha = alpha.expand(decisions)
    zero = torch.zeros_like(alpha, requires_grad=False)
    return PolicyStep(alpha, torch.logit(alpha.detach()), zero, zero)


def _spread(alpha: Tensor, images: int) -> Tensor:
    """(A,) -> (B,): every image gets the gate of its episode."""
    decisions = alpha.shape[0]
    return alpha.unsqueeze(1).expand(decisions, images // decisions).reshape(images)


def per_image(text_mask: Tensor | None, images: int) -> Tensor | None:
    """(T, P) -> (B, P): every image gets the mask of its text."""
    if text_mask is None:
        return None
    groups, tokens = text_mask.shape
    return text_mask.unsqueeze(1).expand(groups, images // groups, tokens).flatten(0, 1)
