"""Inputs for the tests of dual attention, and what the results should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("query", "image_key", "image_value", "text_key", "text_value", "alpha")
LAYOUTS = ["by token", "contiguous", "strided", "transposed", "expanded"]


class Shape(NamedTuple):
    """Text groups, images a group, heads, query tokens, image tokens, text tokens, head width."""

    groups: int
    images: int
    heads: int
    rows: int
    keys: int
    text: int
    width: int

    def __str__(self) -> str:
        return "T{}G{}H{}P{}N{}S{}D{}".format(*self)


def laid_out(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, gen: torch.Generator
) -> Tensor:
    """Random (outer, heads, tokens, width) in one of the memory layouts callers have."""
    outer, heads, tokens, width = shape

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64).to(dtype)

    if layout == "by token":
        return rand(outer, tokens, heads, width).transpose(1, 2)
    if layout == "strided":
        return rand(outer, heads, 2 * tokens, 3 * width)[:, :, 1::2, ::3]
    if layout == "transposed":
        return rand(outer, width, heads, tokens).permute(0, 2, 3, 1)
    if layout == "expanded":
        return rand(1, heads, tokens, width).expand(shape)
    return rand(*shape)


def make(
    shape: Shape, dtype: torch.dtype = torch.float64, layout: str = "by token", seed: int = 0
) -> tuple[Tensor, ...]:
    """query, image_key, image_value, text_key, text_value, alpha (B, H)."""
    gen = torch.Generator().manual_seed(seed)
    t, g, h, p, n, s, d = shape
    image, text = (t * g, h, n, d), (t, h, s, d)
    tensors = [laid_out(x, layout, dtype, gen) for x in ((t, h, p, d), image, image, text, text)]
    wide = torch.promote_types(dtype, torch.float32)
    return *tensors, torch.rand(t * g, h, generator=gen, dtype=wide)


def make_masks(shape: Shape, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random masks; the first image and the last text keep no key at all."""
    gen = torch.Generator().manual_seed(seed)
    image = torch.rand(shape.groups * shape.images, shape.keys, generator=gen) < 0.6
    text = torch.rand(shape.groups, shape.text, generator=gen) < 0.6
    image[0], text[-1] = False, False
    return image, text


def definition(
    q: Tensor, ik: Tensor, iv: Tensor, tk: Tensor, tv: Tensor, alpha: Tensor,
    image_mask: Tensor | None = None, text_mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The formula, one image and head at a time; masked keys are cut out."""
    batch, heads, _, width = ik.shape
    group = batch // q.shape[0] if batch else 1
    scale = width**-0.5 if scale is None else scale
    alpha = (alpha.unsqueeze(1) if alpha.dim() == 1 else alpha).expand(batch, heads)

    def path(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        if keep is not None:
            key, value = key[keep], value[keep]
        return torch.softmax(query @ key.T * scale, dim=-1) @ value

    rows = []
    for b in range(batch):
        t = b // group
        for h in range(heads):
            image = path(q[t, h], ik[b, h], iv[b, h], None if image_mask is None else image_mask[b])
            text = path(q[t, h], tk[t, h], tv[t, h], None if text_mask is None else text_mask[t])
            rows.append(alpha[b, h] * image + (1 - alpha[b, h]) * text)
    return torch.stack(rows).unflatten(0, (batch, heads))


def with_grads(function, tensors, grad_out, **options) -> dict[str, Tensor]:
    """Result and the six gradients, by name."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype), allow_unused=True)
    named = {f"grad_{k}": g for k, g in zip(NAMES, grads)}
    return {"out": out.detach(), **{k: g for k, g in named.items() if g is not None}}


def grad_for(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    batch = shape.groups * shape.images
    return laid_out((batch, shape.heads, shape.rows, shape.width), "by token", dtype, gen)


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).abs() / (1 + want[name].abs())
        if error.numel() == 0:
            continue
        worst = error.nan_to_num(torch.inf).argmax()
        index = [int(i) for i in torch.unravel_index(worst, error.shape)]
        assert error[tuple(index)] <= tolerance, f"{name}{index}: error {error[tuple(index)]}"


def assert_same_for_any_thread_count(compute: Callable[[], dict[str, Tensor]]) -> None:
    """Require equal bits of every named result with 1, 2 and 5 threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name
