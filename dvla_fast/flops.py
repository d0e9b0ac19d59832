"""What the fused ops cost, for ``torch.utils.flop_counter.FlopCounterMode``."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from dvla_fast.ops import schemas  # noqa: F401 (defines the ops)

Shape = tuple[int, ...]


def register_flop_formulas() -> None:
    """Teach PyTorch's counter the ops of this library, which it otherwise takes for free.

    They count as the same matrix products in plain PyTorch do, with a text's own attention once for
    all images that share it: two operations for a multiply-add, softmax and pooling free, a
    backward pass twice its forward. What a kernel computes again to save memory, or saves by
    absorbing weights, does not count. May be called again. It imports Triton where that is
    installed, as PyTorch's counter does.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas: dict[str, Any] = {
        "dual_attention_forward": _dual_attention,
        "dual_attention_backward": _dual_attention_backward,
        "gated_attention_forward": _gated_attention,
        "gated_attention_backward": _gated_attention_backward,
        "gate_policy_forward": _gate_policy,
        "gate_policy_backward": _gate_policy_backward,
    }
    for name, formula in formulas.items():
        packets = [getattr(torch.ops.dvla_fast, name)]
        if not name.startswith("gated_attention"):
            packets.append(getattr(torch.ops.dvla_fast, f"{name}_triton"))
        for packet in packets:
            if packet not in flop_registry:
                register_flop_formula(packet)(formula)


def _dual_attention(
    query: Shape, image_key: Shape, _value: Shape, text_key: Shape, *_: Any, **__: Any
) -> int:
    """Scores and weighted values of every image's tokens and of every text's."""
    groups, heads, rows, width = query
    return 4 * heads * rows * width * (image_key[0] * image_key[2] + groups * text_key[2])


def _dual_attention_backward(_grad: Shape, *shapes: Any, **__: Any) -> int:
    return 2 * _dual_attention(*shapes)


def _layer(query: Shape, tokens: Shape, kv_weight: Shape, text_key: Shape) -> tuple[int, int]:
    """(Keys and values of the image, attention and the product behind it)."""
    _, heads, rows, width = query
    batch, keys, channels = tokens
    projected = 2 * batch * keys * prod(kv_weight)
    attention = _dual_attention(query, (batch, heads, keys, width), (), text_key)
    return projected, attention + 2 * batch * rows * heads * width * channels


def _gated_attention(
    query: Shape, tokens: Shape, kv_weight: Shape, text_key: Shape, *_: Any, **__: Any
) -> int:
    return sum(_layer(query, tokens, kv_weight, text_key))


def _gated_attention_backward(
    _updated: Any, _fused: Any, query: Shape, tokens: Shape, kv_weight: Shape, text_key: Shape,
    *rest: Any, **options: Any,
) -> int:  # fmt: skip
    projected, behind = _layer(query, tokens, kv_weight, text_key)
    wanted = rest[11] if len(rest) > 11 else options.get("tokens", True)
    return projected * (2 if wanted else 1) + 2 * behind


def _gate_policy(
    _i: Any, _t: Any, _im: Any, _tm: Any, _g: Any, _s: Any, hidden: Shape | None, _b: Any,
    out: Shape | None, *_: Any, out_shape: Any, **__: Any,
) -> int:  # fmt: skip
    if hidden is None or out is None:
        return 0
    products: int = 2 * out_shape[0][0] * (prod(hidden) + prod(out))
    return products


def _gate_policy_backward(*shapes: Any, **__: Any) -> int:
    hidden, out, state = shapes[9:12]
    if hidden is None or out is None:
        return 0
    products: int = 4 * state[0] * (prod(hidden) + prod(out))
    return products
