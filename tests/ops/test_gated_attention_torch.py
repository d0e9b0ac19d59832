"""gated_attention under torch.library, torch.compile, autocast and torch.func."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from test_dual_attention import assert_near
from test_gated_attention import (
    ABSORBED,
    BACKENDS,
    CPP,
    PROJECTED,
    SHAPES,
    Shape,
    layer,
    make,
    make_grads,
    make_masks,
    with_grads,
)
from torch import Tensor

from dvla_fast.functional import gated_attention

# Of the layer and of the image tokens.
DTYPES = [
    *((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    *((dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("save", [False, True], ids=["alone", "saving"])
@pytest.mark.parametrize(("dtype", "tokens"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", [PROJECTED[1], ABSORBED[1]], ids=str)
def test_opcheck(
    shape: Shape, dtype: torch.dtype, tokens: torch.dtype, save: bool, backend: str
) -> None:
    masks, tensors = make_masks(shape).values(), make(shape, dtype)
    tensors[1] = tensors[1].to(tokens)
    forward = torch.ops.dvla_fast.gated_attention_forward.default
    torch.library.opcheck(forward, (*tensors, *masks, 0.3, save))
    if save:
        saved = forward(*tensors, *masks, 0.3, True)[2:]
        backward = torch.ops.dvla_fast.gated_attention_backward.default
        updated, fused = make_grads(shape, tokens)[0], make_grads(shape, dtype)[1]
        for grads in ([updated, fused], [None, fused]):
            torch.library.opcheck(backward, (*grads, *tensors, *masks, *saved, 0.3))
        torch.library.opcheck(backward, (*grads, *tensors, *masks, *saved, 0.3, False))
    else:
        leaves = [x.detach().requires_grad_() for x in tensors]
        torch.library.opcheck(forward, (*leaves, *masks, 0.3, save))


@pytest.mark.parametrize("backend", [CPP])
def test_opcheck_where_keys_and_values_are_not_kept(backend: str) -> None:
    shape = Shape(1, 1, 1, 1, 120_000, 20, 1)
    forward = torch.ops.dvla_fast.gated_attention_forward.default
    arguments = (*make(shape), None, None, 0.3, True)
    torch.library.opcheck(forward, arguments, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend: str) -> None:
    torch.compiler.reset()
    engine = "inductor" if backend == "cpp" else "eager"
    compiled = torch.compile(gated_attention, fullgraph=True, dynamic=True, backend=engine)
    for shape in (Shape(2, 3, 2, 9, 20, 24, 32), Shape(2, 4, 2, 9, 20, 24, 32)):
        tensors, grads = make(shape, torch.float32), make_grads(shape, torch.float32)
        got = with_grads(compiled, tensors, grads, backend=backend, **make_masks(shape))
        want = with_grads(gated_attention, tensors, grads, backend=backend, **make_masks(shape))
        assert_near(got, want, tolerance=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
def test_autocast(shape: Shape, backend: str) -> None:
    """Computes in bfloat16, on every thread; tokens, and the gradients of all, stay float32."""
    tensors, grads = make(shape, torch.float32), make_grads(shape, torch.float32)
    exact = with_grads(gated_attention, tensors, grads, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_grads(gated_attention, tensors, grads, backend=backend)
    for name, value in got.items():
        assert value.dtype == (torch.bfloat16 if name == "fused" else torch.float32), name
        assert (value - exact[name]).abs().max() < 0.05 * exact[name].abs().max(), name


@pytest.mark.parametrize("backend", [CPP])
def test_kernel_ignores_the_autocast_of_its_caller(backend: str) -> None:
    """Below the cast of the public function, every chunk computes in the dtype it was given."""
    tensors = make(SHAPES[4], torch.float32)
    forward = torch.ops.dvla_fast.gated_attention_forward.default
    want = forward(*tensors, None, None, 0.3, False)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(forward(*tensors, None, None, 0.3, False)[1], want)


@pytest.mark.parametrize("backend", [CPP])
def test_double_backward_raises(backend: str) -> None:
    leaves = [x.requires_grad_() for x in make(SHAPES[1])]
    results = gated_attention(*leaves, backend=backend)
    grads = torch.autograd.grad(sum(x.square().sum() for x in results), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives|once_differentiable"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("backend", [CPP])
def test_second_derivative_by_torch_func_raises(backend: str) -> None:
    """By what the attention depends on; by the weight behind it, it is PyTorch's own and right."""
    tensors = make(SHAPES[1])

    def gradient_norm(index: int, backend: str, x: Tensor) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            arguments = [*tensors[:index], x, *tensors[index + 1 :]]
            return gated_attention(*arguments, backend=backend)[1].square().sum()

        return torch.func.grad(loss)(x).square().sum()

    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.func.grad(partial(gradient_norm, 2, backend))(tensors[2])
    second = [
        torch.func.grad(partial(gradient_norm, 6, choice))(tensors[6])
        for choice in (backend, "reference")
    ]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_grad(backend: str) -> None:
    shape = SHAPES[1]
    tensors = make(shape)

    def of_weight(weight: Tensor) -> Tensor:
        return gated_attention(*tensors[:6], weight, backend=backend)[1].sum()

    ones = [torch.zeros_like(make_grads(shape)[0]), torch.ones_like(make_grads(shape)[1])]
    want = with_grads(layer, tensors, ones)["grad_out_weight"]
    torch.testing.assert_close(torch.func.grad(of_weight)(tensors[6]), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend: str) -> None:
    """Per-example gradients of the weights, the mapped batch being another set of image tokens."""
    tensors = make(SHAPES[1])
    stacked = torch.stack((tensors[1], 2 * tensors[1]))

    def loss(weight: Tensor, image_tokens: Tensor) -> Tensor:
        arguments = [tensors[0], image_tokens, weight, *tensors[3:]]
        return gated_attention(*arguments, backend=backend)[1].square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(tensors[2], stacked)
    for each, image_tokens in zip(got, stacked):
        torch.testing.assert_close(each, torch.func.grad(loss)(tensors[2], image_tokens))


@pytest.mark.parametrize("backend", [CPP])
def test_the_backend_of_the_call_holds_under_torch_func(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of the process, which the attention inside would take."""
    tensors = make(SHAPES[1])

    def loss(weight: Tensor) -> Tensor:
        arguments = [*tensors[:2], weight, *tensors[3:]]
        return gated_attention(*arguments, backend=backend)[1].square().sum()

    want = torch.func.grad(loss)(tensors[2])
    monkeypatch.setattr("dvla_fast.backends._forced", "reference")
    monkeypatch.setattr("dvla_fast.reference.dual_attention", None)
    torch.testing.assert_close(torch.func.grad(loss)(tensors[2]), want)


@pytest.mark.parametrize("backend", [*BACKENDS, "composed"])
@pytest.mark.parametrize("shape", [PROJECTED[2], ABSORBED[1]], ids=str)
def test_gradients_past_nan_at_masked_text(shape: Shape, backend: str) -> None:
    from dvla_fast.ops.gated_attention import _composed

    def call(*tensors: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        if backend == "composed":
            return _composed(*tensors, None, text_mask, shape.width**-0.5)
        return gated_attention(*tensors, text_mask=text_mask, backend=backend)

    tensors, mask, grads = make(shape), make_masks(shape)["text_mask"], make_grads(shape)
    clean = with_grads(call, tensors, grads, text_mask=mask)
    for place in (0, 3, 4):  # query, text_key, text_value
        tensors[place] = tensors[place].masked_fill(~mask[:, None, :, None], math.nan)
    got = with_grads(call, tensors, grads, text_mask=mask)
    for name in got:
        torch.testing.assert_close(got[name], clean[name])
