"""The CUDA backward's formulas, which are device-independent PyTorch, run on the CPU."""

from __future__ import annotations

import pytest
import torch

from dvla_fast import reference
from dvla_fast.ops.dual_attention_cuda import backward


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("images_per_group", [1, 3])
def test_backward_equals_autograd_of_the_reference(masked: bool, images_per_group: int) -> None:
    groups, heads, rows, keys, pixels, width = 2, 3, 5, 4, 7, 8
    batch = groups * images_per_group
    shapes = [
        (groups, heads, rows, width),
        *[(batch, heads, pixels, width)] * 2,
        *[(groups, heads, keys, width)] * 2,
    ]
    # Large scores: a masked one must not overflow on its way to being left out.
    tensors = [torch.randn(shape, dtype=torch.float64) * 15 for shape in shapes]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    alpha = torch.rand(batch, heads, dtype=torch.float64)
    alpha[0] = 1.0  # no division by 1 - alpha anywhere
    alpha.requires_grad_()
    image_mask = text_mask = None
    if masked:
        image_mask = torch.rand(batch, pixels) > 0.3
        image_mask[0] = False
        text_mask = torch.rand(groups, keys) > 0.3
        text_mask[1] = False
    scale = 0.4
    out = reference.dual_attention(*tensors, alpha, image_mask, text_mask, scale)
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, (*tensors, alpha), grad)

    query, image_key, image_value, text_key, text_value = (t.detach() for t in tensors)
    ones, zeros = torch.ones_like(alpha.detach()), torch.zeros_like(alpha.detach())
    paths = [
        reference.dual_attention(*(t.detach() for t in tensors), a, image_mask, text_mask, scale)
        for a in (ones, zeros)
    ]

    def log_sum_exp(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scores = q @ k.transpose(-2, -1) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        return scores.logsumexp(-1)

    got = backward(
        grad, query, image_key, image_value, text_key, text_value, alpha.detach(),
        image_mask, text_mask, paths[0], paths[1][::images_per_group],
        log_sum_exp(query.repeat_interleave(images_per_group, 0), image_key, image_mask),
        log_sum_exp(query, text_key, text_mask), scale,
    )  # fmt: skip
    for wanted, given in zip(want, got, strict=True):
        torch.testing.assert_close(given, wanted)
