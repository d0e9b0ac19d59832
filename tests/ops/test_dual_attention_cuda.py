"""dual_attention on CUDA tensors, through everything users call it by; its float32 arithmetic.

The kernels' own accuracy is in ``tests/kernels``; here they run behind the op: autograd, opcheck,
``torch.compile``, ``torch.func``, autocast, checkpointing and CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dvla_fast import reference
from dvla_fast.functional import dual_attention
from dvla_fast.ops import dual_attention_cuda

NAMES = ("query", "image_key", "image_value", "text_key", "text_value", "alpha")
# T, G, H, P, N, S, D: one image a text, a shared text, queries longer than one tile.
SHAPES = [(5, 1, 8, 9, 196, 9, 24), (2, 3, 8, 45, 49, 45, 48), (1, 2, 3, 300, 130, 70, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, masked: bool = False
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """(six leaves on the GPU, masks, gradient of the result)."""
    t, g, h, p, n, s, d = shape

    def by_token(outer: int, tokens: int) -> Tensor:
        return torch.randn(outer, tokens, h, d, device="cuda", dtype=dtype).transpose(1, 2)

    image, text = [by_token(t * g, n) for _ in range(2)], [by_token(t, s) for _ in range(2)]
    tensors = [by_token(t, p), *image, *text, torch.rand(t * g, h, device="cuda")]
    masks = {}
    if masked:
        masks = {
            "image_mask": torch.rand(t * g, n, device="cuda") < 0.6,
            "text_mask": torch.rand(t, s, device="cuda") < 0.6,
        }
        masks["image_mask"][0] = False
        masks["text_mask"][-1] = False
    return [x.requires_grad_() for x in tensors], masks, by_token(t * g, p)


def with_grads(function, leaves, masks, grad_out) -> list[Tensor]:
    out = function(*leaves, **masks)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def plain(leaves, masks, grad_out, dtype: torch.dtype) -> list[Tensor]:
    """Result and gradients by the reference in float64, or computed and rounded in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    scale = leaves[0].shape[-1] ** -0.5

    def attention(*tensors: Tensor, image_mask=None, text_mask=None) -> Tensor:
        return reference.dual_attention(*tensors, image_mask, text_mask, scale)

    return with_grads(attention, leaves, masks, grad_out)


def assert_close(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for name, mine, right in zip(("out", *NAMES), got, exact, strict=True):
        # Where a mask leaves nothing the gradient is 0, and has to be.
        largest = right.abs().max().clamp_min(torch.finfo(dtype).tiny)
        error = (mine.double() - right).abs().max() / largest
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> None:
    case = make(shape, dtype, masked)
    got = with_grads(dual_attention, *case)
    assert_close(got, plain(*case, torch.float64), dtype)
    assert all(mine.dtype == leaf.dtype for mine, leaf in zip(got[1:], case[0], strict=True))
    again = with_grads(dual_attention, *case)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "not deterministic"


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", range(6), ids=NAMES)
def test_one_gradient_alone(wanted: int) -> None:
    leaves, masks, grad_out = make(SHAPES[1], torch.float32)
    exact = plain(leaves, masks, grad_out, torch.float64)[1 + wanted]
    leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(leaves)]
    dual_attention(*leaves).backward(grad_out)
    got = leaves[wanted].grad
    assert got is not None
    assert (got - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "sliced"])
def test_strides(layout: str) -> None:
    leaves, masks, grad_out = make(SHAPES[1], torch.float32)

    def laid_out(x: Tensor) -> Tensor:
        if layout == "contiguous":
            return x.contiguous()
        if layout == "transposed":
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "expanded":  # over heads: equal keys would leave no gradient but rounding
            return x[:, :1].expand(x.shape)
        return torch.stack([x, x], -1)[..., 0]

    leaves = [*(laid_out(x.detach()) for x in leaves[:5]), leaves[5].detach()[:1, :1].expand(6, 8)]
    case = ([x.requires_grad_() for x in leaves], masks, laid_out(grad_out))
    assert_close(with_grads(dual_attention, *case), plain(*case, torch.float64), torch.float32)


@pytest.mark.gpu
def test_gradient_of_a_sum() -> None:
    leaves, _, _ = make(SHAPES[1], torch.float32)
    got = torch.autograd.grad(dual_attention(*leaves).sum(), leaves)
    exact = plain(leaves, {}, torch.ones(6, 8, 45, 48, device="cuda"), torch.float64)
    assert_close([exact[0], *got], exact, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, masked: bool) -> None:
    leaves, masks, grad_out = make((2, 2, 3, 5, 7, 4, 24), dtype, masked)
    both = [masks.get(name) for name in ("image_mask", "text_mask")]
    tensors = [x.detach() for x in leaves]
    forward = torch.ops.dvla_fast.dual_attention_forward.default
    torch.library.opcheck(forward, (*leaves, *both, 0.3, False))
    torch.library.opcheck(forward, (*tensors, *both, 0.3, True))
    saved = forward(*tensors, *both, 0.3, True)[1:]
    backward = torch.ops.dvla_fast.dual_attention_backward.default
    torch.library.opcheck(backward, (grad_out, *tensors, *both, *saved, 0.3))


@pytest.mark.gpu
def test_compile_without_recompiling_for_each_batch_size() -> None:
    torch.compiler.reset()
    compiled = torch.compile(dual_attention, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for images in (2, 3, 7):
            case = make((2, images, 3, 9, 20, 9, 24), torch.float32, masked=True)
            got = with_grads(compiled, *case)
            want = with_grads(dual_attention, *case)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_one_kernel_for_all_batch_sizes() -> None:
    """The launcher compiles again for what a kernel specialises, which a batch size is not."""
    from dvla_fast.kernels.dual_attention.forward import dual_attention_forward_kernel as kernel

    def compiled() -> int:
        return len(kernel.device_caches[torch.cuda.current_device()][0])

    def run(images: int) -> None:
        with_grads(dual_attention, *make((1, images, 3, 9, 20, 9, 24), torch.float16))

    run(5)
    before = compiled()
    for images in (4, 16, 33, 64):
        run(images)
    assert compiled() == before


@pytest.mark.gpu
def test_autocast_and_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    leaves, _, _ = make(SHAPES[1], torch.float32)

    def block(*tensors: Tensor) -> Tensor:
        *five, alpha = tensors
        return dual_attention(*(x @ torch.eye(48, device="cuda") for x in five), alpha)

    results = []
    for function in (block, lambda *x: checkpoint(block, *x, use_reentrant=False)):
        with torch.autocast("cuda", torch.bfloat16):
            out = function(*leaves)
        assert out.dtype == torch.bfloat16
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_torch_func_grad() -> None:
    leaves, _, grad_out = make(SHAPES[1], torch.float32)
    *five, alpha = (x.detach() for x in leaves)
    got = torch.func.grad(lambda a: (dual_attention(*five, a) * grad_out).sum())(alpha)
    want = with_grads(dual_attention, leaves, {}, grad_out)[-1]
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_double_backward_raises() -> None:
    leaves, _, _ = make(SHAPES[0], torch.float32)
    grads = torch.autograd.grad(dual_attention(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives|once_differentiable"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_graph_replay(shape: tuple[int, ...]) -> None:
    """Captured once, replayed on new numbers: forward and backward, no tuning, no stall."""
    leaves, _, grad_out = make(shape, torch.float16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        with_grads(dual_attention, leaves, {}, grad_out)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = with_grads(dual_attention, leaves, {}, grad_out)
    with torch.no_grad():
        for tensor in (*leaves, grad_out):
            tensor.copy_(torch.rand_like(tensor))
    graph.replay()
    want = with_grads(dual_attention, leaves, {}, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_float32_precision_changes_the_result() -> None:
    (leaves, masks, grad_out), results = make(SHAPES[1], torch.float32), {}
    exact = plain(leaves, masks, grad_out, torch.float64)
    try:
        for name in dual_attention_cuda.PRECISIONS:
            dual_attention_cuda.set_float32_precision(name)
            got = with_grads(dual_attention, leaves, masks, grad_out)
            results[name] = max(
                ((a.double() - b).abs().max() / b.abs().max()).item()
                for a, b in zip(got, exact, strict=True)
            )
    finally:
        dual_attention_cuda.set_float32_precision(None)
    assert results["ieee"] < 1e-5
    assert results["tf32x3"] < 1e-5
    assert 1e-5 < results["tf32"] < 1e-2


@pytest.fixture
def matmul_setting() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before
    dual_attention_cuda.set_float32_precision(None)


@pytest.mark.usefixtures("matmul_setting")
def test_float32_precision_follows_pytorch_unless_set() -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert dual_attention_cuda.float32_precision() == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert dual_attention_cuda.float32_precision() == "tf32"
    dual_attention_cuda.set_float32_precision("tf32x3")
    assert dual_attention_cuda.float32_precision() == "tf32x3"
    dual_attention_cuda.set_float32_precision(None)
    assert dual_attention_cuda.float32_precision() == "tf32"


def test_half_types_know_no_float32_precision() -> None:
    dual_attention_cuda.set_float32_precision("tf32")
    try:
        assert dual_attention_cuda._precision(torch.empty(0, dtype=torch.float16)) == "ieee"
        assert dual_attention_cuda._precision(torch.empty(0)) == "tf32"
    finally:
        dual_attention_cuda.set_float32_precision(None)


def test_unknown_float32_precision() -> None:
    with pytest.raises(ValueError, match="set_float32_precision: unknown 'half'"):
        dual_attention_cuda.set_float32_precision("half")
