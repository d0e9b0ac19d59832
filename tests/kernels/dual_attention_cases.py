"""Cases and bounds of the kernel tests, on a GPU or interpreted (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dvla_fast.kernels import dual_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# Without a GPU these cases run all the same: test_dual_attention_interpreter.py interprets them.
NEEDS_GPU_OR_INTERPRETER = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]
)
gpu_only = pytest.mark.skipif(INTERPRETED, reason="means something on a GPU only")

# The interpreter's bfloat16 products are silently wrong.
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=gpu_only),
]


@dataclass
class Case:
    """Arguments of one call, and the float64 and same-dtype results to compare with."""

    query: Tensor
    image_key: Tensor
    image_value: Tensor
    text_key: Tensor
    text_value: Tensor
    alpha: Tensor
    grad_out: Tensor
    image_mask: Tensor | None = None
    text_mask: Tensor | None = None
    scale: float = 0.3

    def run(self, save: bool = True, **options: Any) -> tuple[Tensor, ...]:
        """The forward kernel's results."""
        return dual_attention.forward(
            self.query, self.image_key, self.image_value, self.text_key, self.text_value,
            self.alpha, self.image_mask, self.text_mask, self.scale, save, **options,
        )  # fmt: skip

    def gradients(self, **options: Any) -> tuple[Tensor, ...]:
        """The backward kernels' results, from what the forward kernel saves."""
        return dual_attention.backward(
            self.grad_out, self.query, self.image_key, self.image_value, self.text_key,
            self.text_value, self.alpha, self.image_mask, self.text_mask, *self.run()[1:],
            self.scale, **options,
        )  # fmt: skip

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The five results of the forward by matmul and softmax in ``dtype``, text expanded."""
        images = self.image_key.shape[0] // self.query.shape[0]
        q = self.query.to(dtype)
        image, image_lse = attend(
            q.repeat_interleave(images, 0), self.image_key, self.image_value, self.image_mask,
            self.scale, dtype,
        )  # fmt: skip
        text, text_lse = attend(
            q, self.text_key, self.text_value, self.text_mask, self.scale, dtype
        )
        gate = self.alpha.to(dtype)[:, :, None, None]
        out = gate * image + (1 - gate) * text.repeat_interleave(images, 0)
        return out, image, text, image_lse, text_lse

    def plain_gradients(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The six gradients by autograd through matmul and softmax in ``dtype``."""
        tensors = (
            self.query, self.image_key, self.image_value, self.text_key, self.text_value,
            self.alpha,
        )  # fmt: skip
        leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
        copy = Case(*leaves, self.grad_out, self.image_mask, self.text_mask, self.scale)
        return torch.autograd.grad(copy.plain(dtype)[0], leaves, self.grad_out.to(dtype))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Softmax attention in ``dtype`` and the log-sum-exp of its scores; 0 without a key."""
    k, v = k.to(dtype), v.to(dtype)
    if mask is None:
        score = q @ k.transpose(-2, -1) * scale
        return torch.softmax(score, -1) @ v, torch.logsumexp(score.detach().double(), -1)
    k, v = (x.masked_fill(~mask[:, None, :, None], 0) for x in (k, v))
    keep = mask[:, None, None, :]
    score = q @ k.transpose(-2, -1) * scale
    lse = torch.logsumexp(score.detach().double().masked_fill(~keep, float("-inf")), -1)
    # Not -inf: a row without a key would make its gradient NaN.
    weight = torch.softmax(score.masked_fill(~keep, torch.finfo(dtype).min), -1)
    return (weight * keep) @ v, lse


def poisoned(*shape: int, dtype: torch.dtype, order: str = "tokens") -> Tensor:
    """Normal numbers of ``shape`` (outer, H, L, D) inside a larger buffer of NaN.

    ``order`` is how they are stored: by "tokens" (outer, L, H, D), by "heads" (outer, H, L, D), by
    "dims" (outer, H, D, L), or "slices": every second row and column of a larger (outer, H, L, D).
    """
    outer, heads, length, dim = shape
    stored = {
        "tokens": (outer, length + 1, heads, dim + 8),
        "heads": (outer, heads, length + 3, dim),
        "dims": (outer, heads, dim, length + 5),
        "slices": (outer, heads, 2 * length, 2 * dim + 1),
    }[order]
    buffer = torch.full(stored, float("nan"), dtype=dtype, device=DEVICE)
    if order == "tokens":
        view = buffer[:, :length, :, :dim].transpose(1, 2)
    elif order == "heads":
        view = buffer[:, :, :length]
    elif order == "dims":
        view = buffer[..., :length].transpose(2, 3)
    else:
        view = buffer[:, :, ::2, : 2 * dim : 2]
    view.copy_(torch.randn(shape))
    assert view.shape == shape
    return view


def make(
    shape: tuple[int, ...], dtype: torch.dtype, orders: str | tuple[str, ...] = "tokens"
) -> Case:
    """A case of (T, G, H, P, N, S, D); `orders` of the five tensors, and last that of grad_out."""
    groups, images, heads, rows, image_keys, text_keys, dim = shape
    torch.manual_seed(sum(shape))
    batch = groups * images
    q, ik, iv, tk, tv, do = (orders,) * 6 if isinstance(orders, str) else orders
    return Case(
        poisoned(groups, heads, rows, dim, dtype=dtype, order=q),
        poisoned(batch, heads, image_keys, dim, dtype=dtype, order=ik),
        poisoned(batch, heads, image_keys, dim, dtype=dtype, order=iv),
        poisoned(groups, heads, text_keys, dim, dtype=dtype, order=tk),
        poisoned(groups, heads, text_keys, dim, dtype=dtype, order=tv),
        torch.rand(batch, heads, device=DEVICE),
        poisoned(batch, heads, rows, dim, dtype=dtype, order=do),
        scale=dim**-0.5,
    )


def mask_some(case: Case) -> None:
    """Random masks; the second image and the last group keep no key at all."""
    batch, image_keys = case.image_key.shape[0], case.image_key.shape[2]
    groups, text_keys = case.text_key.shape[0], case.text_key.shape[2]
    case.image_mask = torch.rand(batch, 2 * image_keys, device=DEVICE)[:, ::2] < 0.6
    case.text_mask = torch.rand(groups, text_keys, device=DEVICE) < 0.6
    case.image_mask[min(1, batch - 1)] = False
    case.text_mask[-1] = False


def poison_masked(case: Case) -> None:
    """NaN behind the masks."""
    for tensor, mask in (
        (case.image_key, case.image_mask),
        (case.image_value, case.image_mask),
        (case.text_key, case.text_mask),
        (case.text_value, case.text_mask),
    ):
        assert mask is not None
        tensor.masked_fill_(~mask[:, None, :, None], float("nan"))


def far_apart(view: Tensor, axis: int, stride: int) -> Tensor:
    """The same (3, 3, L, 24) numbers with `stride` elements between neighbours along an axis."""
    keys = view.shape[2]
    strides = [72, 24, 0, 1] if axis == 2 else [72 * keys, 24 * keys, 24, 1]
    strides[axis] = stride
    extent = sum((size - 1) * step for size, step in zip(view.shape, strides, strict=True)) + 1
    try:
        far = torch.empty(extent, dtype=view.dtype, device=DEVICE)  # only touched pages exist
    except RuntimeError as error:
        pytest.skip(f"cannot reserve the address space: {error}")
    return far.as_strided(view.shape, strides).copy_(view)


def assert_near(
    name: str, mine: Tensor, theirs: Tensor, exact: Tensor, slack: float, floor: float = 0.0
) -> None:
    """Error against float64 at most twice the peer's, plus `slack` roundings of the largest value.

    Or `floor`, if that is more. NaN is an error; equal infinities are none.
    """
    assert mine.shape == exact.shape, name
    if mine.numel() == 0:
        return
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    bound = 2 * (theirs.double() - exact).abs().nan_to_num(0).max().item()
    bound = max(bound + torch.finfo(mine.dtype).eps * largest * slack, floor)
    error = (mine.double() - exact).abs()
    error = torch.where(mine.double() == exact, 0.0, error).nan_to_num(float("inf"))
    worst = torch.unravel_index(error.argmax(), error.shape)
    index = tuple(int(i) for i in worst)
    assert error[index].item() <= bound, (
        f"{name}{list(index)}: {mine[index].item()} for {exact[index].item()}, bound {bound}"
    )


def slack_of(case: Case) -> float:
    """Units of rounding allowed beyond the peer's error: half of one for rounding the result.

    The interpreter also adds float32 products one by one, or as NumPy's BLAS does on the CPU at
    hand, where PyTorch's matmul keeps many partial sums: at D = 256 that alone is twice the peer's
    error.
    """
    if INTERPRETED and case.query.dtype == torch.float32:
        return max(6.0, case.query.shape[-1] / 32)
    return 0.5
