"""dual_attention against its definition in float64: values, gradients, layouts, masks, promises."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from attention_cases import (
    LAYOUTS,
    NAMES,
    Shape,
    assert_near,
    assert_same_for_any_thread_count,
    definition,
    grad_for,
    laid_out,
    make,
    make_masks,
    with_grads,
)

from dvla_fast import _extension
from dvla_fast.errors import BackendError
from dvla_fast.functional import dual_attention

CPP = pytest.param(
    "cpp",
    marks=pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem)),
)
BACKENDS = ["reference", CPP]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 1, 3, 1, 7, 5, 24),
    Shape(1, 5, 3, 9, 1, 9, 40),
    Shape(2, 3, 2, 45, 49, 45, 48),
    Shape(1, 7, 3, 20, 33, 1, 80),
    Shape(3, 2, 1, 17, 16, 31, 64),
    Shape(1, 1, 2, 130, 300, 150, 24),  # several panels of queries and blocks of keys
    Shape(1, 9, 1, 50, 140, 129, 3),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_float64(shape: Shape, masked: bool, backend: str) -> None:
    tensors, grad_out = make(shape), grad_for(shape)
    masks = dict(zip(("image_mask", "text_mask"), make_masks(shape))) if masked else {}
    got = with_grads(dual_attention, tensors, grad_out, backend=backend, **masks)
    assert_near(got, with_grads(definition, tensors, grad_out, **masks))


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_left_of_an_earlier_call(dtype: torch.dtype, backend: str) -> None:
    """Working memory is kept: what a wider problem left there pads no rows of a narrower one."""
    wide, narrow = Shape(1, 2, 2, 33, 70, 40, 64), Shape(1, 2, 2, 33, 70, 40, 33)
    tensors = [make(narrow, dtype, layout) for layout in ("contiguous", "transposed")]
    tensors[1] = tuple(b.copy_(a) for a, b in zip(*tensors))
    results = []
    for inputs in tensors:
        large = [x * 1e3 for x in make(wide, dtype)]
        with_grads(dual_attention, large, grad_for(wide, dtype), backend=backend)
        results.append(with_grads(dual_attention, inputs, grad_for(narrow, dtype), backend=backend))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout: str, dtype: torch.dtype, backend: str) -> None:
    """The same values in any layout give the same bits."""
    shape = Shape(2, 3, 3, 18, 37, 21, 24)
    tensors, grad_out = make(shape, dtype, layout), grad_for(shape, dtype)
    got = with_grads(dual_attention, tensors, grad_out, backend=backend)
    copies = [x.contiguous() for x in tensors]
    want = with_grads(dual_attention, copies, grad_out.contiguous(), backend=backend)
    assert_near(got, want, tolerance=0.0 if backend == "cpp" else 0.05)
    if dtype == torch.float64:
        assert_near(got, with_grads(definition, tensors, grad_out))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_error_at_most_twice_plain_pytorch(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    tensors, grad_out = make(shape, dtype), grad_for(shape, dtype)
    exact = with_grads(definition, [x.double() for x in tensors], grad_out.double())
    got = with_grads(dual_attention, tensors, grad_out, backend=backend)
    # Plain PyTorch keeps everything, the gate too, in the dtype of the query.
    plain = with_grads(definition, [x.to(dtype) for x in tensors], grad_out)
    for name in exact:
        expected_dtype = torch.float32 if name == "grad_alpha" else dtype
        assert got[name].dtype == expected_dtype, name
        error = (got[name].double() - exact[name]).abs().max()
        peer = (plain[name].double() - exact[name]).abs().max()
        # A few roundings of the largest value: over few numbers the peer may be right by luck.
        roundings = 4 if dtype == torch.float32 else 1
        floor = roundings * torch.finfo(dtype).eps * exact[name].abs().max()
        assert error <= 2 * peer + floor, f"{name}: error {error}, plain PyTorch {peer}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_weights_to_the_last_digits(backend: str) -> None:
    """Over two keys of scores 0 and x, the second's weight is e^x / (1 + e^x): exp itself."""
    x = torch.cat([torch.linspace(-87, 0, 5000), torch.tensor([-200.0, -1e30, -math.inf])])
    query = x.reshape(1, 1, -1, 1)
    keys = torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1)
    out = dual_attention(
        query, keys, keys, keys, keys, torch.tensor(0.25), scale=1.0, backend=backend
    )
    want = torch.sigmoid(x.double())
    error = (out.flatten().double() / want - 1).abs()[:5000]
    assert error.max() < 4 * torch.finfo(torch.float32).eps
    # 0 times -inf is NaN in the key's own score.
    assert out.flatten()[5000:-1].eq(0).all()
    assert out.flatten()[-1].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_gate_shut_or_open(gate: float, backend: str) -> None:
    """At alpha = 0 or 1 one path counts alone, and alpha's gradient is still their difference."""
    shape = Shape(2, 2, 3, 5, 11, 6, 24)
    *tensors, alpha = make(shape)
    tensors, grad_out = [*tensors, torch.full_like(alpha, gate)], grad_for(shape)
    got = with_grads(dual_attention, tensors, grad_out, backend=backend)
    assert_near(got, with_grads(definition, tensors, grad_out))
    dead = ("image_key", "image_value") if gate == 0 else ("text_key", "text_value")
    assert all(not got[f"grad_{name}"].any() for name in dead)
    assert got["grad_alpha"].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha_shape", [(), (6,), (6, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_alpha_shapes(alpha_shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    shape = Shape(2, 3, 3, 4, 9, 5, 24)
    *tensors, _ = make(shape)
    alpha = torch.rand(alpha_shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    got = with_grads(dual_attention, [*tensors, alpha], grad_for(shape), backend=backend)
    assert got["grad_alpha"].shape == alpha_shape
    assert got["grad_alpha"].dtype == dtype
    want = with_grads(definition, [*tensors, alpha.double()], grad_for(shape))
    assert_near(got, want, tolerance=1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(scale: float, backend: str) -> None:
    case = make(Shape(1, 2, 2, 6, 10, 6, 8)), grad_for(Shape(1, 2, 2, 6, 10, 6, 8))
    got = with_grads(dual_attention, *case, backend=backend, scale=scale)
    assert_near(got, with_grads(definition, *case, scale=scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_masked(backend: str) -> None:
    """No key anywhere: exactly 0 and no NaN, in values and gradients."""
    shape = Shape(2, 2, 2, 5, 7, 4, 24)
    masks = {"image_mask": torch.zeros(4, 7).bool(), "text_mask": torch.zeros(2, 4).bool()}
    got = with_grads(dual_attention, make(shape), grad_for(shape), backend=backend, **masks)
    assert not any(value.any() for value in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_are_not_read(backend: str) -> None:
    """What lies under a mask, NaN in the keys of the C++ path included, changes nothing."""
    shape = Shape(1, 3, 2, 5, 12, 6, 24)
    tensors = list(make(shape))
    image_mask = torch.ones(3, 12, dtype=torch.bool)
    image_mask[:, 5:] = False
    want = dual_attention(*tensors, image_mask=image_mask, backend=backend)
    tensors[1] = tensors[1].clone()
    tensors[1][:, :, 5:] = torch.nan if backend == "cpp" else 1e3
    got = dual_attention(*tensors, image_mask=image_mask, backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_key_that_no_query_sees(dtype: torch.dtype, backend: str) -> None:
    """Scores of minus infinity: the key has no weight, and other keys' gradients no NaN."""
    query, key, *rest = make(Shape(1, 1, 1, 3, 20, 3, 24), dtype)  # odd, which pairs fill up
    key[:, :, 5] = -math.inf
    leaves = [x.detach().requires_grad_() for x in (query.abs(), key, *rest)]
    out = dual_attention(*leaves, backend=backend)
    found = torch.autograd.grad(out, leaves[1:5], torch.ones_like(out))
    assert all(grad.isfinite().all() for grad in (out, *found))
    assert all((grad[:, :, 5] == 0).all() for grad in found[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_huge_scores(dtype: torch.dtype, backend: str) -> None:
    """Scores of ±10^4: a softmax that picks one key, finite everywhere."""
    shape = Shape(1, 2, 2, 33, 150, 40, 24)
    q, ik, *rest = make(shape, dtype)
    tensors = (q * 100, ik * 100, *rest)
    got = with_grads(dual_attention, tensors, grad_for(shape, dtype), backend=backend)
    assert all(torch.isfinite(value).all() for value in got.values())
    exact = definition(*[x.double() for x in tensors])
    # A score is known to about 1e4 * 2^-24, so are the weights.
    assert (got["out"].double() - exact).abs().max() < max(2e-2, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [150, 300])
@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scores_whose_roundings_are_large(
    dtype: torch.dtype, scale: float, keys: int, backend: str
) -> None:
    """Scores near ±10^11, whose roundings alone, as exponents, go beyond float32's range."""
    shape = Shape(1, 2, 2, 33, keys, 40, 24)
    q, ik, iv, tk, tv, alpha = make(shape, dtype)
    tensors = (q * 1e4, ik * 1e4, iv, tk * 1e4, tv, alpha)
    grad_out = grad_for(shape, dtype)
    got = with_grads(dual_attention, tensors, grad_out, scale=scale * 100, backend=backend)
    assert all(torch.isfinite(value).all() for value in got.values())
    exact = with_grads(definition, [x.double() for x in tensors], grad_out, scale=scale * 100)
    for name in ("out", "grad_image_value", "grad_text_value"):
        error = (got[name].double() - exact[name]).abs().max()
        assert error < 8 * torch.finfo(dtype).eps * exact[name].abs().max(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows(backend: str) -> None:
    q, ik, iv, tk, tv, alpha = make(Shape(1, 1, 1, 3, 20, 4, 24), torch.float32)
    spoilt = iv.clone()
    spoilt[0, 0, 7, 3] = torch.nan
    out = dual_attention(q, ik, spoilt, tk, tv, alpha, backend=backend)
    assert torch.isnan(out).all(dim=2).flatten().tolist() == [d == 3 for d in range(24)]
    assert torch.isnan(dual_attention(q, spoilt, iv, tk, tv, alpha, backend=backend)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [Shape(2, 2, 2, 3, 0, 4, 8), Shape(2, 2, 2, 3, 5, 0, 8), Shape(2, 2, 2, 0, 5, 4, 8)],
    ids=str,
)
def test_empty_axes(shape: Shape, backend: str) -> None:
    tensors, grad_out = make(shape), grad_for(shape)
    got = with_grads(dual_attention, tensors, grad_out, backend=backend)
    assert_near(got, with_grads(definition, tensors, grad_out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend: str) -> None:
    tensors = make(Shape(2, 0, 2, 3, 5, 4, 8))
    got = with_grads(dual_attention, tensors, torch.zeros(0, 2, 3, 8).double(), backend=backend)
    assert got["out"].shape == (0, 2, 3, 8)
    assert all(not value.any() for value in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    shape = Shape(2, 2, 2, 3, 5, 4, 3)
    image_mask, text_mask = make_masks(shape)
    text_mask[0] = True
    tensors = [x.contiguous().requires_grad_() for x in make(shape)]
    assert torch.autograd.gradcheck(
        lambda *x: dual_attention(*x, image_mask=image_mask, text_mask=text_mask, backend=backend),
        tensors,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_some_gradients(backend: str) -> None:
    *tensors, alpha = make(Shape(1, 2, 2, 3, 5, 4, 8))
    tensors[2] = tensors[2].detach().requires_grad_()
    dual_attention(*tensors, alpha, backend=backend).sum().backward()  # an expanded gradient too
    leaves = [x.detach().requires_grad_() for x in tensors]
    definition(*leaves, alpha).sum().backward()
    assert_near({"grad": tensors[2].grad}, {"grad": leaves[2].grad})


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_any_layout(backend: str) -> None:
    shape, gen = Shape(2, 2, 3, 18, 9, 5, 24), torch.Generator().manual_seed(5)
    for layout in ("contiguous", "strided", "transposed", "expanded"):
        grad_out = laid_out((4, 3, 18, 24), layout, torch.float64, gen)
        got = with_grads(dual_attention, make(shape), grad_out, backend=backend)
        want = with_grads(definition, make(shape), grad_out)
        assert_near(got, want)


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize(
    "shape", [Shape(1, 9, 2, 45, 140, 45, 24), Shape(5, 1, 8, 9, 49, 9, 48)], ids=str
)
def test_thread_count_changes_no_bit(shape: Shape, backend: str) -> None:
    tensors, grad_out = make(shape, torch.float32), grad_for(shape, torch.float32)
    assert_same_for_any_thread_count(
        lambda: with_grads(dual_attention, tensors, grad_out, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_text_for_all_is_the_text_expanded(backend: str) -> None:
    """G images sharing a text give what each gets with its own copy."""
    *tensors, alpha = make(Shape(1, 6, 3, 9, 20, 9, 24), torch.float32)
    q, ik, iv, tk, tv = tensors
    shared = dual_attention(q, ik, iv, tk, tv, alpha, backend=backend)
    q, tk, tv = (x.expand(6, -1, -1, -1) for x in (q, tk, tv))
    own = dual_attention(q, ik, iv, tk, tv, alpha, backend=backend)
    torch.testing.assert_close(shared, own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", [CPP])
def test_result_needs_no_transpose_copy(backend: str) -> None:
    leaves = [x.requires_grad_() for x in make(Shape(2, 2, 3, 5, 7, 4, 24), torch.float32)]
    out = dual_attention(*leaves, backend=backend)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    grads = torch.autograd.grad(out.sum(), leaves[:5])
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)


WRONG = [
    ("image_key", lambda x: x[:3], ValueError, "image_key: 3 images"),
    ("image_value", lambda x: x[:, :, 1:], ValueError, "image_value: shape"),
    ("text_key", lambda x: x[:1], ValueError, "text_key: shape"),
    ("text_value", lambda x: x[..., :4], ValueError, "text_value: shape"),
    ("query", lambda x: x[0], ValueError, "query: expected 4 dimensions"),
    ("query", lambda x: x.int(), TypeError, "dtype"),
    ("text_value", lambda x: x.half(), TypeError, "text_value: dtype"),
    ("alpha", lambda x: x[:, :1], ValueError, "alpha: shape"),
    ("alpha", lambda x: x > 0, TypeError, "alpha: expected a floating tensor"),
    ("image_mask", lambda x: x.float(), TypeError, "image_mask: expected bool"),
    ("image_mask", lambda x: x[:, 1:], ValueError, "image_mask: shape"),
    ("text_mask", lambda x: x[:1], ValueError, "text_mask: shape"),
    ("image_value", lambda x: x.to("meta"), ValueError, "image_value: on meta"),
    ("text_mask", lambda x: x.to("meta"), ValueError, "text_mask: on meta"),
    ("alpha", lambda x: 0.5, TypeError, "alpha: expected a tensor"),
    ("query", lambda x: x[:, :0], ValueError, "no head or no dimension"),
    ("scale", lambda _: math.nan, ValueError, "scale: expected a finite float32 number, got nan"),
    ("scale", lambda _: -math.inf, ValueError, "scale: .* got -inf"),
    ("scale", lambda _: 3.5e38, ValueError, "scale: "),
]


@pytest.mark.parametrize(("name", "spoil", "error", "message"), WRONG)
def test_wrong_inputs(name, spoil, error, message) -> None:
    shape = Shape(2, 2, 2, 3, 5, 4, 8)
    arguments = dict(zip(NAMES, make(shape, torch.float32)))
    arguments |= dict(zip(("image_mask", "text_mask"), make_masks(shape)))
    arguments[name] = spoil(arguments.get(name))
    with pytest.raises(error, match=message):
        dual_attention(**arguments)


def test_backend_that_cannot_run() -> None:
    tensors = make(Shape(1, 1, 1, 2, 2, 2, 8), torch.float32)
    with pytest.raises(BackendError, match="triton"):
        dual_attention(*tensors, backend="triton")
    with pytest.raises(ValueError, match="unknown backend"):
        dual_attention(*tensors, backend="fastest")


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The variants that this machine would not choose compute the same."""
    from dvla_fast import _build_info

    if capability == _extension.capability or capability not in _build_info.cpu_capabilities:
        pytest.skip("it is the one in use, or not built")
    chosen = "cpp and (float64 or twice or huge) and not (N1S or N33 or N16 or N140)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", chosen, __file__],
        env={**os.environ, "DVLA_FAST_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_past_nan_under_the_masks(backend: str) -> None:
    shape = Shape(2, 3, 2, 5, 7, 4, 8)
    masks = dict(zip(("image_mask", "text_mask"), make_masks(shape)))
    tensors = list(make(shape, torch.float32))
    for place, mask in ((1, "image_mask"), (2, "image_mask"), (3, "text_mask"), (4, "text_mask")):
        hidden = ~masks[mask][:, None, :, None]
        tensors[place] = tensors[place].masked_fill(hidden, float("nan"))
    leaves = [x.requires_grad_() for x in tensors]
    dual_attention(*leaves, **masks, backend=backend).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
