"""gated_attention on CUDA tensors: there it is matrix products around the Triton attention.

Shapes, inputs and the definition, computed in float64 on the CPU, are those of
``test_gated_attention.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gated_attention import Shape, layer, make, make_grads, make_masks, with_grads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dvla_fast.functional import gated_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
SHAPES = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(5, 1, 8, 9, 196, 24, 192),  # a text an image
    Shape(2, 3, 8, 45, 49, 48, 384),
    Shape(1, 4, 3, 70, 130, 25, 40),
]
# Largest error allowed, as a share of the largest exact value.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def on_device(shape: Shape, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors, gradients of the results), values that bfloat16 holds exactly."""
    tensors = [x.to(torch.bfloat16).to(DEVICE, dtype) for x in make(shape)]
    tensors[5] = tensors[5].float()  # alpha
    return tensors, [x.to(torch.bfloat16).to(DEVICE, dtype) for x in make_grads(shape)]


def masks_on_device(shape: Shape) -> dict[str, Tensor]:
    return {name: mask.to(DEVICE) for name, mask in make_masks(shape).items()}


def exact(tensors: list[Tensor], grads: list[Tensor], **masks: Tensor) -> dict[str, Tensor]:
    """Results and gradients by the definition in float64 on the CPU."""
    tensors, grads = ([x.detach().cpu().double() for x in many] for many in (tensors, grads))
    return with_grads(layer, tensors, grads, **{name: x.cpu() for name, x in masks.items()})


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == want.keys()
    for name, right in want.items():
        # With one key each, the gradients of queries and keys are 0 but for rounding.
        largest = right.abs().max().clamp_min(1e-2)
        error = (got[name].cpu().double() - right).abs().max() / largest
        assert error < TOLERANCE[dtype], f"{name}: {error}"


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: Shape, dtype: torch.dtype, masked: bool) -> None:
    tensors, grads = on_device(shape, dtype)
    masks = masks_on_device(shape) if masked else {}
    got = with_grads(gated_attention, tensors, grads, **masks)
    assert got["updated"].dtype == got["fused"].dtype == dtype
    assert_close(got, exact(tensors, grads, **masks), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_tokens_beside_a_half_layer(dtype: torch.dtype) -> None:
    shape = SHAPES[2]
    tensors, grads = on_device(shape, dtype)
    tensors[1], grads[0] = tensors[1].float(), grads[0].float()
    got = with_grads(gated_attention, tensors, grads, **masks_on_device(shape))
    assert (got["updated"].dtype, got["fused"].dtype) == (torch.float32, dtype)
    assert_close(got, exact(tensors, grads, **masks_on_device(shape)), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Computes in the half type; tokens, and the gradients of all, stay float32."""
    tensors, grads = on_device(SHAPES[2], torch.float32)
    with torch.autocast(DEVICE, dtype):
        got = with_grads(gated_attention, tensors, grads)
    assert {x.dtype for name, x in got.items() if name != "fused"} == {torch.float32}
    assert got["fused"].dtype == dtype
    assert_close(got, exact(tensors, grads), dtype)


def test_nan_under_the_image_mask_reaches_no_weight() -> None:
    shape = SHAPES[2]
    (tensors, grads), masks = on_device(shape, torch.float32), masks_on_device(shape)
    grads[0].zero_()
    clean = with_grads(gated_attention, tensors, grads, **masks)
    tensors[1] = tensors[1].masked_fill(~masks["image_mask"].unsqueeze(-1), torch.nan)
    got = with_grads(gated_attention, tensors, grads, **masks)
    for name in got.keys() - {"updated"}:  # NaN in, NaN out
        torch.testing.assert_close(got[name], clean[name], msg=name)


def test_compile_without_recompiling_for_each_batch_size() -> None:
    torch.compiler.reset()
    compiled = torch.compile(gated_attention, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for images in (2, 3, 7):
            shape = Shape(2, images, 3, 9, 20, 24, 40)
            tensors, grads = on_device(shape, torch.float32)
            got = with_grads(compiled, tensors, grads, **masks_on_device(shape))
            assert_close(got, exact(tensors, grads, **masks_on_device(shape)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph_replay(dtype: torch.dtype) -> None:
    """Captured once, replayed on new numbers: forward and backward."""
    tensors, grads = on_device(SHAPES[1], dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with_grads(gated_attention, tensors, grads)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = with_grads(gated_attention, tensors, grads)
    for tensor in (*tensors, *grads):
        tensor.copy_(tensor.flip(0))
    graph.replay()
    assert_close(got, exact(tensors, grads), dtype)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of the calls of one op."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op, self.calls = op, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", ["dual_attention_forward", "dual_attention_backward"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_opcheck(dtype: torch.dtype, op: str) -> None:
    """Of the ops that it is on a GPU, with what it hands them: views of one stacked product."""
    shape = Shape(2, 2, 3, 5, 7, 24, 40)
    tensors, grads = on_device(shape, dtype)
    entry = getattr(torch.ops.dvla_fast, op).default
    with Recorder(entry) as recorder:
        with_grads(gated_attention, tensors, grads, **masks_on_device(shape))
    (arguments,) = recorder.calls
    torch.library.opcheck(entry, [x.detach() if isinstance(x, Tensor) else x for x in arguments])
