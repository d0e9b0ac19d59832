"""The direct call of the gate's decision gives what the operator gives, and leaves it odd cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_cases import Dispatches, Functions, Named, Recorder, Wrapped
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.functional import GatePolicyOutput, gate_policy

pytestmark = pytest.mark.skipif(
    _extension.problem is not None, reason="the C++ extension is not built"
)

OP = torch.ops.dvla_fast.gate_policy_forward.default
IMAGES, TEXTS, WIDTH, UNITS = 6, 2, 8, 4


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Image tokens, text tokens, the network's four weights."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    tokens = [rand(IMAGES, 5, WIDTH).to(dtype), rand(TEXTS, 3, WIDTH).to(dtype)]
    shapes = ((UNITS, 2 * WIDTH + 1), (UNITS,), (1, UNITS), (1,))
    return [*tokens, *(rand(*shape).to(wide) for shape in shapes)]


def direct(
    *tensors: Any,
    concentration: Any = 10.0,
    groups: Any = 1,
    used: Any = None,
    masks: tuple[Any, Any] = (None, None),
    draw: bool = True,
) -> Any:
    return _extension.calls.gate_policy(
        *tensors, concentration, groups, used, *masks, draw, None, None, False
    )


def some_masks() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(7)
    return torch.rand(IMAGES, 5, generator=gen) < 0.6, torch.rand(TEXTS, 3, generator=gen) < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", [(0, None), (1, None), (1, 2), (2, None)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_same_bits_and_draws_as_the_usual_way(
    dtype: torch.dtype,
    pooling: tuple[int, int | None],
    masked: bool,
    deterministic: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = some_masks() if masked else (None, None)
    runs: list[bool] = []
    monkeypatch.setattr(_extension, "calls", Recorder(runs))
    results = []
    for backend in (None, "cpp"):
        leaves = [x.requires_grad_() for x in make(dtype)]
        torch.manual_seed(3)
        out = gate_policy(
            *leaves, 10.0, groups_per_decision=pooling[0], state_images=pooling[1],
            image_mask=masks[0], text_mask=masks[1], deterministic=deterministic, backend=backend,
        )  # fmt: skip
        assert isinstance(out, GatePolicyOutput)
        (out.log_prob.sum() + 0.3 * out.entropy.sum() + out.state.square().sum()).backward()
        results.append((*out, *(leaf.grad for leaf in leaves), torch.get_rng_state()))
    assert runs == [True]
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_a_generator_of_ones_own() -> None:
    results = []
    for backend in (None, "cpp"):
        generator = torch.Generator().manual_seed(5)
        results.append(gate_policy(*make(), 10.0, generator=generator, backend=backend))
    assert torch.equal(results[0].alpha, results[1].alpha)
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator, got str"):
        gate_policy(*make(), 10.0, generator="seed")  # type: ignore[arg-type]


def with_argument(place: int, value: Any) -> list[Any]:
    tensors: list[Any] = make()
    tensors[place] = value(tensors[place]) if callable(value) else value
    return tensors


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize(
    "value",
    [
        None,
        0.5,
        lambda x: x.unsqueeze(0),
        lambda x: x[..., :0],
        lambda x: x[:0],
        lambda x: x.double(),
        lambda x: x.long(),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.as_subclass(Named),
        Wrapped,
    ],
    ids=["none", "number", "rank", "width", "empty", "double", "int", "meta", "sparse", "named",
         "wrapped"],
)  # fmt: skip
def test_what_does_not_fit_is_left_to_python(place: int, value: Any) -> None:
    before = torch.get_rng_state()
    assert direct(*with_argument(place, value)) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"concentration": 10},
        {"concentration": 0.0},
        {"concentration": float("nan")},
        {"concentration": 1e39},
        {"concentration": torch.tensor(10.0)},
        {"groups": -1},
        {"groups": 3},
        {"groups": 1.0},
        {"used": 0},
        {"used": 4},
        {"used": 2.0},
        {"groups": 0, "used": 1},
        {"masks": (torch.ones(IMAGES, 5), None)},
        {"masks": (torch.ones(IMAGES, 4, dtype=torch.bool), None)},
        {"masks": (None, torch.ones(TEXTS, 3, 1, dtype=torch.bool))},
        {"masks": (None, torch.ones(TEXTS, 3, dtype=torch.bool, device="meta"))},
    ],
    ids=str,
)
def test_odd_options_are_left_to_python(options: dict[str, Any]) -> None:
    assert direct(*make(), **options) is None
    assert direct(*make()) is not None


def test_nan_raises_the_operators_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        direct(*with_argument(5, lambda x: x * float("nan")))


@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_modes_see_the_operator(mode: Callable[[], Any]) -> None:
    tensors = make()
    with mode() as active:
        gate_policy(*tensors, 10.0)
        assert direct(*tensors) is None
    assert OP in active.seen


def test_transforms_and_compiled_graphs() -> None:
    tensors = make()

    def inside(x: Tensor) -> Tensor:
        assert direct(x, *tensors[1:]) is None
        return gate_policy(x, *tensors[1:], 10.0, deterministic=True).entropy.sum()

    assert bool(torch.func.grad(inside)(tensors[0]).isfinite().all())
    compiled = torch.compile(
        lambda *x: gate_policy(*x, 10.0, deterministic=True), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(*tensors).entropy, direct(*tensors, draw=False)[3])
