"""dual_attention inside PyTorch: opcheck, compiled graphs, checkpointing, autocast, torch.func."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_cases import (
    NAMES,
    Shape,
    assert_near,
    definition,
    grad_for,
    make,
    make_masks,
    with_grads,
)
from test_dual_attention import BACKENDS, CPP, DTYPES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dvla_fast.functional import dual_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize(
    "wanted", [(), ("query",), ("image_key",), ("text_value",), ("alpha",), NAMES], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_forward(dtype: torch.dtype, wanted: tuple[str, ...], backend: str) -> None:
    """Whatever subset of the tensors requires grad."""
    shape = Shape(2, 2, 3, 5, 7, 4, 24)
    tensors = [
        x.detach().requires_grad_(name in wanted) for name, x in zip(NAMES, make(shape, dtype))
    ]
    forward = torch.ops.dvla_fast.dual_attention_forward.default
    torch.library.opcheck(forward, (*tensors, *make_masks(shape), 0.3, False))


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize(
    "shape", [Shape(2, 2, 3, 5, 7, 4, 24), Shape(2, 1, 1, 3, 5, 4, 8), Shape(1, 2, 1, 3, 260, 4, 8)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_saving_and_backward(dtype: torch.dtype, shape: Shape, backend: str) -> None:
    """Each of the sets of results that a backward may want saved."""
    inputs = (*make(shape, dtype), *make_masks(shape))
    forward = torch.ops.dvla_fast.dual_attention_forward.default
    torch.library.opcheck(forward, (*inputs, 0.3, True))
    saved = forward(*inputs, 0.3, True)[1:]
    backward = torch.ops.dvla_fast.dual_attention_backward.default
    torch.library.opcheck(backward, (grad_for(shape, dtype), *inputs, *saved, 0.3))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend: str) -> None:
    # Compiling every line of the reference would take a minute: its graph alone is checked.
    engine = "inductor" if backend == "cpp" else "eager"
    compiled = torch.compile(dual_attention, fullgraph=True, dynamic=True, backend=engine)
    for shape in (
        # Sizes that are equal here would be taken for one size.
        Shape(2, 3, 4, 9, 20, 9, 24),
        Shape(2, 4, 4, 9, 20, 9, 24),
        Shape(3, 25, 4, 9, 20, 9, 24),
    ):
        tensors, grad_out = make(shape, torch.float32), grad_for(shape, torch.float32)
        masks = dict(zip(("image_mask", "text_mask"), make_masks(shape)))
        got = with_grads(compiled, tensors, grad_out, backend=backend, **masks)
        want = with_grads(dual_attention, tensors, grad_out, backend=backend, **masks)
        assert_near(got, want, tolerance=1e-5)
        torch.compiler.set_stance("fail_on_recompile")  # one graph serves every number of images


@pytest.mark.usefixtures("fresh_compiler")
def test_scale_in_a_compiled_graph() -> None:
    tensors = make(Shape(2, 3, 2, 4, 5, 6, 8), torch.float32)
    compiled = torch.compile(dual_attention, fullgraph=True, backend="eager")
    for scale in (0.5, 0.25, 0.125):
        torch.testing.assert_close(
            compiled(*tensors, scale=scale), dual_attention(*tensors, scale=scale)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend: str) -> None:
    shape = Shape(2, 3, 2, 9, 20, 9, 24)
    case = make(shape, torch.float32), grad_for(shape, torch.float32)
    got = with_grads(
        partial(checkpoint, dual_attention, use_reentrant=False), *case, backend=backend
    )
    want = with_grads(dual_attention, *case, backend=backend)
    assert_near(got, want, tolerance=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    """Between projections under autocast: computes in bfloat16, weights get float32 gradients."""
    torch.manual_seed(0)
    project, image, text = torch.nn.Linear(72, 72), torch.randn(4, 20, 72), torch.randn(2, 9, 72)

    def split(x: Tensor) -> Tensor:
        return project(x).unflatten(-1, (3, 24)).transpose(1, 2)

    def run() -> tuple[Tensor, Tensor]:
        project.zero_grad()
        q, k = split(text), split(image)
        out = dual_attention(q, k, k, q, q, torch.tensor(0.3), backend=backend)
        out.float().square().mean().backward()
        return out, project.weight.grad

    exact, exact_grad = run()
    with torch.autocast("cpu", torch.bfloat16):
        out, grad = run()
    assert out.dtype == torch.bfloat16
    assert grad.dtype == torch.float32
    assert (out - exact).abs().max() < 0.03
    assert (grad - exact_grad).abs().max() < 0.03 * exact_grad.abs().max()


@pytest.mark.parametrize("backend", [CPP])
def test_double_backward_raises(backend: str) -> None:
    leaves = [x.requires_grad_() for x in make(Shape(1, 2, 1, 3, 5, 4, 8))]
    out = dual_attention(*leaves, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("backend", [CPP])
def test_second_derivative_by_torch_func_raises(backend: str) -> None:
    *tensors, alpha = make(Shape(1, 2, 2, 3, 5, 4, 8))
    gradient = torch.func.grad(lambda q: dual_attention(q, *tensors[1:], alpha).square().sum())
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.func.grad(lambda q: gradient(q).square().sum())(tensors[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_grad(backend: str) -> None:
    *tensors, alpha = make(Shape(1, 2, 2, 3, 5, 4, 8))
    gradient = torch.func.grad(lambda a: dual_attention(*tensors, a, backend=backend).sum())
    want = with_grads(definition, (*tensors, alpha), torch.ones(2, 2, 3, 8))["grad_alpha"]
    torch.testing.assert_close(gradient(alpha), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_nothing_on_the_way(backend: str) -> None:
    """Scores beyond float16's range, and float32 tensors that stay float32."""
    shape = Shape(1, 2, 2, 3, 50, 3, 24)
    tensors = [x.float() for x in make(shape, torch.float64)]
    halves = [(200 * x if i < 2 else x).half() for i, x in enumerate(tensors)]
    halves[3] = 200 * halves[3]
    plain = [dual_attention(*x, backend=backend) for x in (halves, tensors)]
    with torch.autocast("cpu", torch.float16):
        under = [dual_attention(*x, backend=backend) for x in (halves, tensors)]
    for got, want in zip(under, plain):
        assert bool(got.isfinite().all())
        assert torch.equal(got, want)
