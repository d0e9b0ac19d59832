"""The direct call of dual attention gives what the operator gives, and leaves it the odd cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import LAYOUTS, Shape, grad_for, make, make_masks
from call_cases import ODD_SCALES, Dispatches, Functions, Named, Recorder, Wrapped
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dvla_fast import _extension
from dvla_fast.functional import dual_attention

pytestmark = pytest.mark.skipif(
    _extension.problem is not None, reason="the C++ extension is not built"
)

OP = torch.ops.dvla_fast.dual_attention_forward.default
SHAPE = Shape(2, 3, 2, 5, 7, 4, 8)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def direct(*tensors: Any, masks: tuple[Any, Any] = (None, None), scale: Any = None) -> Any:
    return _extension.calls.dual_attention(*tensors, *masks, scale, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("alpha_shape", [(), (6,), (6, 2)])
def test_same_bits_as_the_usual_way(
    dtype: torch.dtype,
    layout: str,
    masked: bool,
    alpha_shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = dict(zip(("image_mask", "text_mask"), make_masks(SHAPE), strict=True)) if masked else {}
    runs: list[bool] = []
    monkeypatch.setattr(_extension, "calls", Recorder(runs))
    results = []
    for backend in (None, "cpp"):
        *tensors, _ = make(SHAPE, dtype, layout)
        leaves = [*tensors, torch.rand(alpha_shape, generator=torch.Generator().manual_seed(4))]
        for leaf in leaves:
            leaf.requires_grad_()
        out = dual_attention(*leaves, **masks, scale=0.3, backend=backend)
        out.backward(grad_for(SHAPE, dtype))
        results.append((out, *(leaf.grad for leaf in leaves)))
    assert runs == [True]
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert got.stride() == want.stride()
        assert torch.equal(got, want)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any]) -> None:
    tensors = [x.requires_grad_() for x in make(SHAPE, torch.float32)]
    with context():
        out = direct(*tensors)
        want = dual_attention(*tensors, backend="cpp")
    assert not out.requires_grad
    assert out.is_inference() == (context is torch.inference_mode)
    assert torch.equal(out, want)


def with_argument(place: int, value: Any) -> tuple[Any, ...]:
    tensors: list[Any] = list(make(SHAPE, torch.float32))
    tensors[place] = value(tensors[place]) if callable(value) else value
    return tuple(tensors)


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize(
    "value",
    [
        None,
        0.5,
        lambda x: x.unsqueeze(0).unsqueeze(0).unsqueeze(0),
        lambda x: x[:, :0] if x.dim() == 4 else x[:0],
        lambda x: x[1:],
        lambda x: x[..., :-1],
        lambda x: x.long(),
        lambda x: x.to(torch.complex64),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
    ],
    ids=["none", "number", "rank", "empty", "batch", "width", "int", "complex", "meta", "sparse"],
)
def test_what_does_not_fit_is_left_to_python(place: int, value: Any) -> None:
    assert direct(*with_argument(place, value)) is None


@pytest.mark.parametrize("place", range(5))
def test_mixed_dtypes_are_left_to_python(place: int) -> None:
    assert direct(*with_argument(place, lambda x: x.double())) is None


@pytest.mark.parametrize(
    "masks",
    [
        (torch.ones(6, 7), None),
        (torch.ones(6, 6, dtype=torch.bool), None),
        (None, torch.ones(6, 4, dtype=torch.bool)),
        (None, torch.ones(2, 4, dtype=torch.bool, device="meta")),
        (True, None),
    ],
)
def test_masks_that_do_not_fit_are_left_to_python(masks: tuple[Any, Any]) -> None:
    tensors = make(SHAPE, torch.float32)
    assert direct(*tensors, masks=masks) is None
    assert direct(*tensors, masks=make_masks(SHAPE)) is not None


@pytest.mark.parametrize("scale", ODD_SCALES)
def test_odd_scales_are_left_to_python(scale: Any) -> None:
    assert direct(*make(SHAPE, torch.float32), scale=scale) is None


@pytest.mark.parametrize(
    "sizes", [(2, 0, 2, 5, 7, 4, 8), (2, 3, 2, 0, 7, 4, 8), (2, 3, 2, 5, 0, 0, 8)]
)
def test_empty_axes(sizes: tuple[int, ...]) -> None:
    shape = Shape(*sizes)
    tensors = make(shape, torch.float32)
    assert torch.equal(direct(*tensors), dual_attention(*tensors, backend="cpp"))


@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_modes_see_the_operator(mode: Callable[[], Any]) -> None:
    tensors = make(SHAPE, torch.float32)
    with mode() as active:
        dual_attention(*tensors)
        assert direct(*tensors) is None
    assert OP in active.seen
    assert direct(*tensors) is not None


def test_fake_tensors_and_transforms() -> None:
    tensors = make(SHAPE, torch.float32)
    with FakeTensorMode() as mode:
        assert isinstance(dual_attention(*map(mode.from_tensor, tensors)), FakeTensor)

    def inside(query: Tensor) -> Tensor:
        assert direct(query, *tensors[1:]) is None
        return dual_attention(query, *tensors[1:]).sum()

    assert bool(torch.func.grad(inside)(tensors[0]).isfinite().all())


@pytest.mark.parametrize("kind", [Named, Wrapped])
@pytest.mark.parametrize("place", range(6))
def test_subclasses_are_left_to_python(kind: type[Tensor], place: int) -> None:
    def wrap(x: Tensor) -> Tensor:
        return x.as_subclass(Named) if kind is Named else Wrapped(x)

    assert direct(*with_argument(place, wrap)) is None


def test_traces_and_compiled_graphs_hold_the_operator() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = make(SHAPE, torch.float32)
    graph = make_fx(lambda *x: dual_attention(*x))(*tensors)
    assert OP in {node.target for node in graph.graph.nodes}
    compiled = torch.compile(lambda *x: dual_attention(*x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*tensors), direct(*tensors))
