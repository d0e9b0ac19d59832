"""The direct call of the gated layer gives what the usual way gives, and leaves odd cases to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_cases import ODD_SCALES, Dispatches, Named, Recorder, Wrapped
from test_gated_attention import NAMES, Shape, make, make_grads, make_masks
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.functional import gated_attention
from dvla_fast.ops import gated_attention as module

pytestmark = pytest.mark.skipif(
    _extension.problem is not None, reason="the C++ extension is not built"
)

OP = torch.ops.dvla_fast.gated_attention_forward.default
SHAPE = Shape(2, 3, 2, 5, 7, 4, 8)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MASKS = list(make_masks(SHAPE).values())


def direct(
    *tensors: Any, masks: Any = (None, None), scale: Any = None, composed: bool = False
) -> Any:
    return _extension.calls.gated_attention(*tensors, *masks, scale, False, composed)


def with_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, alpha_shape: Any = (6, 2)
) -> list[Tensor]:
    """Both results, and the gradients of the seven tensors."""
    leaves = make(SHAPE, dtype)
    leaves[5] = torch.rand(alpha_shape, generator=torch.Generator().manual_seed(4))
    for leaf in leaves:
        leaf.requires_grad_()
    results = function(*leaves)
    grads = [g.to(x.dtype) for g, x in zip(make_grads(SHAPE), results, strict=True)]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("alpha_shape", [(), (6,), (6, 2)])
def test_same_bits_as_the_usual_way(
    dtype: torch.dtype,
    masked: bool,
    alpha_shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = make_masks(SHAPE) if masked else {}
    runs: list[bool] = []
    monkeypatch.setattr(_extension, "calls", Recorder(runs))
    got, want = (
        with_gradients(
            lambda *x, b=backend: gated_attention(*x, **masks, scale=0.3, backend=b),
            dtype,
            alpha_shape,
        )
        for backend in (None, "cpp")
    )
    assert runs == [True]
    assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", [(None, None), MASKS], ids=["whole", "masked"])
def test_the_composition_of_other_devices(dtype: torch.dtype, masks: Any) -> None:
    """The products around dual attention of CUDA, from C++ and from Python."""

    def from_python(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return module._composed(*tensors, *masks, 0.3)

    got = with_gradients(lambda *x: direct(*x, masks=masks, scale=0.3, composed=True), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # There the gate has the type of sums.
    want = with_gradients(lambda *x: from_python(*x[:5], x[5].to(wide), x[6]), dtype)
    assert_same_bits(got, want)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
def test_autocast(tokens: torch.dtype, composed: bool) -> None:
    tensors = make(SHAPE, torch.float32)
    tensors[1] = tensors[1].to(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        updated, fused = direct(*tensors, composed=composed)
        backend = "reference" if composed else "cpp"
        want = gated_attention(*tensors, backend=backend)
    assert updated.dtype == tokens
    assert fused.dtype == torch.bfloat16
    tolerance = 0.05 if composed else 0.0
    torch.testing.assert_close((updated, fused), want, rtol=tolerance, atol=tolerance)
    assert direct(*[x.double() for x in tensors]) is not None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any]) -> None:
    tensors = [x.requires_grad_() for x in make(SHAPE, torch.float32)]
    with context():
        results = direct(*tensors)
        want = gated_attention(*tensors, backend="cpp")
    for got, other in zip(results, want, strict=True):
        assert not got.requires_grad
        assert got.is_inference() == (context is torch.inference_mode)
        assert torch.equal(got, other)


def with_argument(place: int, value: Any) -> list[Any]:
    tensors: list[Any] = list(make(SHAPE, torch.float32))
    tensors[place] = value(tensors[place]) if callable(value) else value
    return tensors


@pytest.mark.parametrize("place", range(7), ids=NAMES)
@pytest.mark.parametrize(
    "value",
    [
        None,
        0.5,
        lambda x: x.unsqueeze(0).unsqueeze(0).unsqueeze(0),
        lambda x: x[:-1],
        lambda x: x[..., :-1],
        lambda x: x.long(),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.as_subclass(Named),
        lambda x: Wrapped(x),
    ],
    ids=["none", "number", "rank", "batch", "width", "int", "meta", "sparse", "named", "wrapped"],
)
def test_what_does_not_fit_is_left_to_python(place: int, value: Any) -> None:
    assert direct(*with_argument(place, value)) is None


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 6])
def test_mixed_dtypes_are_left_to_python(place: int) -> None:
    assert direct(*with_argument(place, lambda x: x.double())) is None


@pytest.mark.parametrize(
    "masks",
    [
        (torch.ones(6, 7), None),
        (torch.ones(6, 6, dtype=torch.bool), None),
        (None, torch.ones(6, 5, dtype=torch.bool)),
        (None, torch.ones(2, 5, dtype=torch.bool, device="meta")),
        (True, None),
    ],
)
def test_masks_that_do_not_fit_are_left_to_python(masks: tuple[Any, Any]) -> None:
    tensors = make(SHAPE, torch.float32)
    assert direct(*tensors, masks=masks) is None
    assert direct(*tensors, masks=MASKS) is not None


@pytest.mark.parametrize("scale", ODD_SCALES)
def test_odd_scales_are_left_to_python(scale: Any) -> None:
    assert direct(*make(SHAPE, torch.float32), scale=scale) is None


def test_modes_and_transforms_see_the_operator() -> None:
    tensors = make(SHAPE, torch.float32)
    with Dispatches() as active:
        gated_attention(*tensors)
        assert direct(*tensors) is None
    assert OP in active.seen

    def inside(query: Tensor) -> Tensor:
        assert direct(query, *tensors[1:]) is None
        return gated_attention(query, *tensors[1:])[1].sum()

    assert bool(torch.func.grad(inside)(tensors[0]).isfinite().all())
    assert direct(*tensors) is not None
