"""What both directions of the gate's decision compute, and how they cut it into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..beta_math import like
from ..beta_policy import OPTIONS

TILE = 32_768  # bytes that a block of weights, or of rows, may take; registers hold two
MANY_DECISIONS = 256  # from here on there are programs enough for four decisions each
WARPS = 8


@triton.jit
def normalise(x, in_width, width):  # type: ignore[no-untyped-def]
    """Layer norm of rows [BLOCK_A, BLOCK_C], 0 beyond their width; 1/deviation in float64."""
    wide = x.to(tl.float64)
    centred = tl.where(in_width, wide - tl.sum(wide, 1)[:, None] / width, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + 1e-5)
    return (centred * factor[:, None]).to(x.dtype), factor


@triton.jit
def normalise_backward(grad, y, factor, in_width, width):  # type: ignore[no-untyped-def]
    """From the gradient of the normalised rows y that of what was normalised."""
    grad, wide = grad.to(tl.float64), y.to(tl.float64)
    mean = tl.sum(grad, 1) / width
    along = tl.sum(grad * wide, 1) / width
    result = factor[:, None] * (grad - mean[:, None] - along[:, None] * wide)
    return tl.where(in_width, result, 0.0).to(y.dtype)


@triton.jit
def cosine(x, y):  # type: ignore[no-untyped-def]
    """Cosine of rows in float64, and both norms, at least 1e-8."""
    x, y = x.to(tl.float64), y.to(tl.float64)
    xx = tl.sqrt(tl.sum(x * x, 1))
    yy = tl.sqrt(tl.sum(y * y, 1))
    x_norm = tl.maximum(xx, like(xx, 1e-8))
    y_norm = tl.maximum(yy, like(yy, 1e-8))
    return tl.sum(x * y, 1) / (x_norm * y_norm), x_norm, y_norm


@triton.jit
def gelu(x):  # type: ignore[no-untyped-def]
    """GELU(x) = x Φ(x) and its derivative Φ(x) + x φ(x)."""
    below = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    density = tl.exp(x * x * -0.5) * 0.3989422804014327
    return x * below, below + x * density


@triton.jit
def weights_of(hidden_weight, unit, units, channel, width, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of W₁: image part and text part [BLOCK_K, BLOCK_C], cosine part [BLOCK_K]."""
    row = hidden_weight + unit.to(tl.int64) * (2 * width + 1)  # [BLOCK_K]
    exists = unit < units
    keep = exists[:, None] & (channel < width)[None, :]
    image = tl.load(row[:, None] + channel[None, :], keep, other=0.0)
    text = tl.load(row[:, None] + width + channel[None, :], keep, other=0.0)
    return image, text, tl.load(row + 2 * width, exists, other=0.0)


@dataclass(frozen=True)
class Problem:
    """Sizes of a call; see ``csrc/policy/state.h``, which this follows.

    Attributes:
        images, groups: B and T.
        width: C.
        group: images of a text group.
        used: those of them that make the state, the first ones.
        members, texts: images and texts of a decision.
        decisions: A.
        element_size: of a number of the state.
    """

    images: int
    groups: int
    width: int
    group: int
    used: int
    members: int
    texts: int
    decisions: int
    element_size: int

    @property
    def share(self) -> int:
        """How many decisions read the same text."""
        return max(1, self.decisions // self.groups)

    def block_decisions(self) -> int:
        """Decisions of a program."""
        row = self.block_width() * self.element_size
        return 4 if self.decisions >= MANY_DECISIONS and row <= TILE // 8 else 1

    def block_width(self) -> int:
        """The width, padded to a power of two."""
        return max(16, triton.next_power_of_2(self.width))

    def block_of(self, count: int) -> int:
        """Rows, of `count`, that a program of decisions takes at a time."""
        row = self.block_decisions() * self.block_width() * self.element_size
        return min(max(1, TILE // row), triton.next_power_of_2(count))


def problem_of(
    image_tokens: Tensor, text_tokens: Tensor, groups_per_decision: int, state_images: int
) -> Problem:
    """The sizes that follow from the op's arguments."""
    images, groups = image_tokens.shape[0], text_tokens.shape[0]
    group = images // groups
    used = state_images or group
    single = groups_per_decision == 0
    return Problem(
        images=images,
        groups=groups,
        width=image_tokens.shape[2],
        group=group,
        used=used,
        members=1 if single else groups_per_decision * used,
        texts=1 if single else groups_per_decision,
        decisions=images if single else groups // groups_per_decision,
        element_size=state_dtype(image_tokens).itemsize,
    )


def mask_of(mask: Tensor | None) -> tuple[Any, ...]:
    """A mask and its strides as the kernels take them."""
    return (None, 0, 0) if mask is None else (mask, *mask.stride())


def state_dtype(image_tokens: Tensor) -> torch.dtype:
    """float64 for float64 tokens, else float32."""
    return torch.promote_types(image_tokens.dtype, torch.float32)


def options(warps: int = WARPS) -> dict[str, Any]:
    """Triton's own launch options."""
    return {**OPTIONS, "num_warps": warps}
