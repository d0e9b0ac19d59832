"""gated_attention against its definition in float64: values, gradients, chunks, promises."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from attention_cases import assert_near, assert_same_for_any_thread_count
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.errors import BackendError
from dvla_fast.functional import gated_attention

CPP = pytest.param(
    "cpp",
    marks=pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem)),
)
BACKENDS = ["reference", CPP]
NAMES = (
    "query", "image_tokens", "kv_weight", "text_key", "text_value", "alpha", "out_weight",
)  # fmt: skip


class Shape(NamedTuple):
    """Text groups, images a group, heads, query tokens, image tokens, head width, model width."""

    groups: int
    images: int
    heads: int
    rows: int
    keys: int
    width: int
    model: int

    def __str__(self) -> str:
        return "T{}G{}H{}P{}N{}D{}C{}".format(*self)


# A chunk holds 768 KiB of keys and values; fewer than 16 chunks are made longer and taken in turn.
PROJECTED = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(3, 2, 2, 5, 7, 8, 24),  # everything in one chunk
    Shape(2, 3, 3, 17, 33, 24, 40),
    Shape(40, 1, 24, 17, 300, 4, 8),  # parallel chunks of whole groups, in uneven slots
    Shape(1, 37, 24, 9, 300, 4, 16),  # one group in parallel chunks
    Shape(3, 14, 24, 9, 300, 4, 5),  # several groups, each of several chunks
    Shape(1, 17, 64, 9, 250, 4, 12),  # one group in chunks of one image of many heads
    Shape(1, 3, 20, 9, 9000, 4, 24),  # images so long that threads share each
    Shape(2, 2, 8, 17, 33, 25, 200),  # products deeper and wider than one block of them
]
# Few queries beside the width of the tokens: the weights of keys and values are absorbed.
ABSORBED = [
    Shape(1, 1, 1, 1, 3, 4, 8),
    Shape(3, 2, 2, 3, 17, 8, 40),  # everything in one chunk
    Shape(80, 1, 2, 3, 300, 48, 64),  # parallel chunks of whole groups
    Shape(1, 80, 2, 3, 300, 48, 64),  # one group in parallel chunks
    Shape(3, 30, 2, 3, 300, 48, 64),  # several groups, each of several chunks
    Shape(1, 3, 2, 5, 9000, 40, 24),  # images so long that threads share each
    Shape(1, 2, 2, 3, 17, 8, 200),  # products deeper than one block of them
]
SHAPES = PROJECTED + ABSORBED
NO_TEXT = Shape(1, 25, 1, 0, 700, 48, 16)  # in parallel chunks
LONG = Shape(1, 37, 24, 9, 1000, 4, 16)  # too many keys and values to keep


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Results that were never written show as NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """The seven tensors, in the order of NAMES."""
    gen = torch.Generator().manual_seed(seed)
    t, g, h, p, n, d, c = shape

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64).to(dtype)

    def by_token() -> Tensor:
        return rand(t, p, h, d).transpose(1, 2)

    wide = torch.promote_types(dtype, torch.float32)
    alpha = torch.rand(t * g, h, generator=gen, dtype=wide)
    weights = rand(2 * h * d, c) / c**0.5, rand(c, h * d) / (h * d) ** 0.5
    return [by_token(), rand(t * g, n, c), weights[0], by_token(), by_token(), alpha, weights[1]]


def make_masks(shape: Shape, seed: int = 1) -> dict[str, Tensor]:
    """Random masks; the first image and the last text keep no token at all."""
    gen = torch.Generator().manual_seed(seed)
    image = torch.rand(shape.groups * shape.images, shape.keys, generator=gen) < 0.6
    text = torch.rand(shape.groups, shape.rows, generator=gen) < 0.6
    image[0], text[-1] = False, False
    return {"image_mask": image, "text_mask": text}


def make_grads(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 2) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    batch = shape.groups * shape.images
    sizes = (batch, shape.keys, shape.model), (batch, shape.rows, shape.model)
    return [torch.randn(size, generator=gen, dtype=torch.float64).to(dtype) for size in sizes]


def layer(
    query: Tensor, image_tokens: Tensor, kv_weight: Tensor, text_key: Tensor, text_value: Tensor,
    alpha: Tensor, out_weight: Tensor, image_mask: Tensor | None = None,
    text_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formulas in the dtype of the inputs, every image with a text of its own."""
    heads, width = query.shape[1], query.shape[3]
    batch, group = image_tokens.shape[0], image_tokens.shape[0] // query.shape[0]
    scale = width**-0.5 if scale is None else scale
    query, text_key, text_value = (
        x.repeat_interleave(group, 0) for x in (query, text_key, text_value)
    )
    if text_mask is not None:
        text_mask = text_mask.repeat_interleave(group, 0)
    tokens = image_tokens.to(query.dtype)
    key, value = (
        torch.einsum("bnc,hdc->bhnd", tokens, weight.unflatten(0, (heads, width)))
        for weight in kv_weight.chunk(2)
    )

    def attend(k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.einsum("bhpd,bhnd->bhpn", query, k) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        return torch.einsum("bhpn,bhnd->bhpd", scores.softmax(-1).nan_to_num(), v)

    gate = alpha.reshape(*alpha.shape, *[1] * (4 - alpha.dim())).to(query.dtype)
    mixed = gate * attend(key, value, image_mask)
    mixed = mixed + (1 - gate) * attend(text_key, text_value, text_mask)
    fused = torch.einsum("bhpd,chd->bpc", mixed, out_weight.unflatten(1, (heads, width)))
    keep = torch.ones(batch, query.shape[2]).bool() if text_mask is None else text_mask
    fused = fused.masked_fill(~keep.unsqueeze(-1), 0)
    mean = fused.sum(1, keepdim=True) / keep.sum(1).clamp_min(1)[:, None, None]
    return image_tokens + mean.to(image_tokens.dtype), fused


def with_grads(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], grads: list[Tensor],
    **options: object,
) -> dict[str, Tensor]:  # fmt: skip
    """Results and the seven gradients, by name."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = function(*leaves, **options)
    flowing = [grad.to(out.dtype) for grad, out in zip(grads, results)]
    found = torch.autograd.grad(results, leaves, flowing, allow_unused=True)
    named = {f"grad_{name}": grad for name, grad in zip(NAMES, found)}
    return {
        "updated": results[0].detach(),
        "fused": results[1].detach(),
        **{name: grad for name, grad in named.items() if grad is not None},
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_float64(shape: Shape, masked: bool, backend: str) -> None:
    tensors, grads = make(shape), make_grads(shape)
    masks = make_masks(shape) if masked else {}
    got = with_grads(gated_attention, tensors, grads, backend=backend, **masks)
    assert_near(got, with_grads(layer, tensors, grads, **masks), tolerance=1e-10)


def test_which_weights_are_absorbed() -> None:
    from dvla_fast.ops.gated_attention import _absorbs

    def absorbed(shape: Shape) -> bool:
        return _absorbs(shape.heads, shape.rows, shape.width, shape.keys, shape.model)

    assert not any(map(absorbed, [*PROJECTED, LONG]))
    assert all(map(absorbed, ABSORBED))
    # The method's shapes: the tokens of one class, and those of an episode's five.
    assert absorbed(Shape(1, 1, 8, 9, 196, 24, 192))
    assert absorbed(Shape(1, 1, 8, 9, 49, 48, 384))
    assert not absorbed(Shape(1, 1, 8, 45, 196, 24, 192))


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_keys_and_values_projected_again(masked: bool, backend: str) -> None:
    """Beyond 32 MiB they are not kept for the backward pass."""
    tensors, grads = make(LONG), make_grads(LONG)
    forward = torch.ops.dvla_fast.gated_attention_forward.default
    assert forward(*tensors, None, None, 0.3, True)[-1].numel() == 0
    masks = make_masks(LONG) if masked else {}
    got = with_grads(gated_attention, tensors, grads, backend=backend, **masks)
    assert_near(got, with_grads(layer, tensors, grads, **masks), tolerance=1e-10)


# Plain half types are slow on CPUs without instructions for them: one shape of each kind.
COMPARED = [
    *((shape, torch.float32) for shape in PROJECTED[1:] + ABSORBED[1:]),
    *(
        (shape, dtype)
        for shape in (*PROJECTED[1:4], *PROJECTED[7:], *ABSORBED[1:4], ABSORBED[6])
        for dtype in (torch.float16, torch.bfloat16)
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "dtype"), COMPARED, ids=str)
def test_error_at_most_twice_plain_pytorch(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    tensors, grads = make(shape, dtype), make_grads(shape, dtype)
    exact = with_grads(layer, [x.double() for x in tensors], [x.double() for x in grads])
    got = with_grads(gated_attention, tensors, grads, backend=backend)
    plain = with_grads(layer, [x.to(dtype) for x in tensors], grads)
    for name in exact:
        expected_dtype = torch.float32 if name == "grad_alpha" else dtype
        assert got[name].dtype == expected_dtype, name
        error = (got[name].double() - exact[name]).abs().max()
        peer = (plain[name].double() - exact[name]).abs().max()
        # A few roundings of the largest value: over few numbers the peer may be right by luck.
        roundings = 4.0 if dtype == torch.float32 else 1.0
        if dtype == torch.float32 and name == "grad_query" and shape.keys > 256:
            # Of keys in several blocks, the slopes carry the rounding of the saved output, times
            # what all keys have in common: as in FlashAttention, and not in plain attention.
            roundings = 16.0
        if dtype == torch.float32 and backend == "reference":
            # Sums over many tokens, whose order is the BLAS's own: on some machines one by one.
            tokens = shape.groups * shape.images * shape.keys
            roundings = 8.0 + (tokens**0.5 / 4 if name == "grad_kv_weight" else 0.0)
        floor = roundings * torch.finfo(dtype).eps * exact[name].abs().max()
        assert error <= 2 * peer + floor, f"{name}: error {error}, plain PyTorch {peer}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4], *ABSORBED[1:4]], ids=str)
def test_float32_tokens_pass_through_a_half_layer(shape: Shape, backend: str) -> None:
    """As under autocast: tokens and their gradient keep float32, and lose nothing on the way."""
    tensors, grads = make(shape, torch.bfloat16), make_grads(shape, torch.float32)
    tensors[1] = make(shape, torch.float32)[1]
    got = with_grads(gated_attention, tensors, grads, backend=backend)
    exact = with_grads(layer, [x.double() for x in tensors], [x.double() for x in grads])
    for name in ("updated", "grad_image_tokens"):
        assert got[name].dtype == torch.float32
        error = (got[name].double() - exact[name]).abs().max()
        assert error < 0.03 * exact[name].abs().max()
    assert got["fused"].dtype == torch.bfloat16
    none = torch.zeros_like(tensors[6])
    updated, _ = gated_attention(*tensors[:6], none, backend=backend)
    assert torch.equal(updated, tensors[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha_shape", [(), (6,), (6, 3)], ids=str)
def test_alpha_shapes(alpha_shape: tuple[int, ...], backend: str) -> None:
    shape = SHAPES[2]
    tensors = make(shape)
    tensors[5] = torch.rand(alpha_shape, generator=torch.Generator().manual_seed(3)).double()
    got = with_grads(gated_attention, tensors, make_grads(shape), backend=backend)
    assert got["grad_alpha"].shape == alpha_shape
    assert_near(got, with_grads(layer, tensors, make_grads(shape)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], ABSORBED[1]], ids=str)
@pytest.mark.parametrize("used", [0, 1], ids=["updated", "fused"])
def test_one_result_alone(used: int, shape: Shape, backend: str) -> None:
    """Only one result is used, and its gradient is an expanded one."""
    tensors = make(shape)
    gradients = []
    for function, options in ((gated_attention, {"backend": backend}), (layer, {})):
        leaves = [x.detach().requires_grad_() for x in tensors]
        found = torch.autograd.grad(function(*leaves, **options)[used].sum(), leaves)
        gradients.append(dict(zip(NAMES, found)))
    assert_near(*gradients, tolerance=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5], ABSORBED[1], ABSORBED[4]], ids=str)
def test_layouts(shape: Shape, backend: str) -> None:
    """Tensors and gradients of any strides."""
    tensors = make(shape)
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in tensors]
    strided[1] = tensors[1].transpose(0, 1).contiguous().transpose(0, 1)
    strided[2] = tensors[2].T.contiguous().T
    grads = make_grads(shape)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in grads]
    got = with_grads(gated_attention, strided, turned, backend=backend)
    assert_near(got, with_grads(layer, tensors, grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_are_not_read(backend: str) -> None:
    """What lies under the image mask changes no H, and NaN under it stays where it is."""
    shape = SHAPES[2]
    tensors, mask = make(shape), make_masks(shape)["image_mask"]
    _, want = gated_attention(*tensors, image_mask=mask, backend=backend)
    tensors[1] = tensors[1].masked_fill(~mask.unsqueeze(-1), 1e3 if backend == "reference" else 1e9)
    _, got = gated_attention(*tensors, image_mask=mask, backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [Shape(2, 0, 2, 3, 4, 8, 8), Shape(2, 2, 2, 3, 0, 8, 8), Shape(2, 2, 2, 0, 4, 8, 8), NO_TEXT],
    ids=str,
)
def test_empty_axes(shape: Shape, backend: str) -> None:
    tensors, grads = make(shape), make_grads(shape)
    got = with_grads(gated_attention, tensors, grads, backend=backend)
    if 0 in (shape.images, shape.rows):
        assert got["fused"].shape == (shape.groups * shape.images, shape.rows, shape.model)
        unchanged = {"updated": tensors[1], "grad_image_tokens": grads[0]}
        for name, value in got.items():
            assert torch.equal(value, unchanged.get(name, torch.zeros_like(value))), name
    else:
        assert_near(got, with_grads(layer, tensors, grads))


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("shape", [Shape(2, 2, 2, 3, 4, 2, 3), Shape(2, 2, 1, 2, 3, 4, 5)], ids=str)
def test_gradcheck(shape: Shape, backend: str) -> None:
    masks = make_masks(shape)
    masks["text_mask"][0] = True
    tensors = [x.requires_grad_() for x in make(shape)]
    assert torch.autograd.gradcheck(
        lambda *x: gated_attention(*x, backend=backend, **masks), tensors
    )


own_products = pytest.mark.skipif(_extension.capability == "default", reason="PyTorch's products")


@own_products
@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("shape", [*PROJECTED[3:], *ABSORBED[1:], LONG], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_count_changes_no_bit(dtype: torch.dtype, shape: Shape, backend: str) -> None:
    tensors, grads = make(shape, dtype), make_grads(shape, dtype)
    assert_same_for_any_thread_count(
        lambda: with_grads(gated_attention, tensors, grads, backend=backend)
    )


@own_products
@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("model", [5, 13, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_count_and_odd_strides(dtype: torch.dtype, model: int, backend: str) -> None:
    """Gradients as loss functions send them: one number for all, or columns first."""
    shape = Shape(1, 2, 2, 3, 9000, 4, model)
    tensors, (updated, fused) = make(shape, dtype), make_grads(shape, dtype)
    columns_first = updated.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for odd in (torch.ones((), dtype=dtype).expand_as(updated), columns_first):
        assert_same_for_any_thread_count(
            functools.partial(with_grads, gated_attention, tensors, [odd, fused], backend=backend)
        )


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("shape", [PROJECTED[2], PROJECTED[4], ABSORBED[2], LONG], ids=str)
def test_frozen_image_tokens(shape: Shape, backend: str) -> None:
    """Without a gradient of the tokens, which is then left out, the others are the same."""
    tensors, grads = make(shape, torch.float32), make_grads(shape, torch.float32)
    expected = with_grads(gated_attention, tensors, grads, backend=backend)
    leaves = [x.detach().requires_grad_(i != 1) for i, x in enumerate(tensors)]
    results = gated_attention(*leaves, backend=backend)
    asked = [x for x in leaves if x.requires_grad]
    names = [f"grad_{name}" for name in NAMES if name != "image_tokens"]
    for name, grad in zip(names, torch.autograd.grad(results, asked, grads)):
        assert torch.equal(grad, expected[name]), name
    # Neither where the tokens require one that is not asked for.
    leaves = [x.detach().requires_grad_() for x in tensors]
    (grad,) = torch.autograd.grad(gated_attention(*leaves, backend=backend), [leaves[2]], grads)
    assert torch.equal(grad, expected["grad_kv_weight"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [Shape(1, 5, 2, 6, 7, 8, 24), ABSORBED[6]], ids=str)
def test_one_text_partly_masked(shape: Shape, backend: str) -> None:
    tensors, grads = make(shape), make_grads(shape)
    mask = torch.arange(shape.rows).unsqueeze(0) < 2
    got = with_grads(gated_attention, tensors, grads, backend=backend, text_mask=mask)
    assert_near(got, with_grads(layer, tensors, grads, text_mask=mask))


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize(("name", "size"), [("kv_weight", (5, 40)), ("out_weight", (3, 72))])
def test_weights_of_wrong_size_given_to_the_op(name: str, size: tuple, backend: str) -> None:
    """The op itself, as an exported graph calls it, reads nothing beyond its tensors."""
    tensors = dict(zip(NAMES, make(Shape(2, 3, 3, 17, 33, 24, 40), torch.float32)))
    tensors[name] = torch.randn(size)
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        torch.ops.dvla_fast.gated_attention_forward(*tensors.values(), None, None, 0.2, False)


WRONG = [
    ("image_tokens", lambda x: x[:3], ValueError, "image_tokens: 3 images"),
    ("image_tokens", lambda x: x[0], ValueError, "image_tokens: expected 3 dimensions"),
    ("image_tokens", lambda x: x.half(), TypeError, "image_tokens: dtype"),
    ("kv_weight", lambda x: x[1:], ValueError, "kv_weight: shape"),
    ("kv_weight", lambda x: x.double(), TypeError, "kv_weight: dtype"),
    ("out_weight", lambda x: x[:, 1:], ValueError, "out_weight: shape"),
    ("text_key", lambda x: x[:, :, 1:], ValueError, "text_key: shape"),
    ("text_value", lambda x: x[:1], ValueError, "text_value: shape"),
    ("query", lambda x: x[0], ValueError, "query: expected 4 dimensions"),
    ("alpha", lambda x: x[:, :1], ValueError, "alpha: shape"),
    ("image_mask", lambda x: x.float(), TypeError, "image_mask: expected bool"),
    ("text_mask", lambda x: x[:, 1:], ValueError, "text_mask: shape"),
    ("image_tokens", lambda x: x.to("meta"), ValueError, "image_tokens: on meta"),
    ("out_weight", lambda x: x.to("meta"), ValueError, "out_weight: on meta"),
    ("scale", lambda _: math.nan, ValueError, "scale: expected a finite float32 number, got nan"),
    ("scale", lambda _: -math.inf, ValueError, "scale: .* got -inf"),
    ("scale", lambda _: 3.5e38, ValueError, "scale: "),
]


@pytest.mark.parametrize(("name", "spoil", "error", "message"), WRONG)
def test_wrong_inputs(name, spoil, error, message) -> None:
    shape = Shape(2, 2, 2, 3, 5, 8, 6)
    arguments = dict(zip(NAMES, make(shape, torch.float32))) | make_masks(shape)
    arguments[name] = spoil(arguments.get(name))
    with pytest.raises(error, match=message):
        gated_attention(**arguments)


def test_backend_that_cannot_run() -> None:
    with pytest.raises(BackendError, match="triton"):
        gated_attention(*make(SHAPES[1], torch.float32), backend="triton")


def test_composition_of_other_devices() -> None:
    """What CUDA runs, products around dual_attention, is the layer too."""
    from dvla_fast.ops.gated_attention import _composed

    shape = SHAPES[2]
    tensors, grads, masks = make(shape), make_grads(shape), make_masks(shape)
    scale = shape.width**-0.5
    got = with_grads(lambda *x: _composed(*x, *masks.values(), scale), tensors, grads)
    assert_near(got, with_grads(layer, tensors, grads, **masks))


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The variants that this machine would not choose compute the same, the policy's call too."""
    from dvla_fast import _build_info

    if capability == _extension.capability or capability not in _build_info.cpu_capabilities:
        pytest.skip("it is the one in use, or not built")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    files = [__file__, str(Path(__file__).with_name("test_gate_policy.py"))]
    done = subprocess.run(
        [*command, "-k", "cpp and float64", *files],
        env={**os.environ, "DVLA_FAST_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("backend", [*BACKENDS, "composed"])
@pytest.mark.parametrize("shape", [PROJECTED[2], ABSORBED[1]], ids=str)
def test_weights_gradients_past_nan_under_the_image_mask(shape: Shape, backend: str) -> None:
    from dvla_fast.ops.gated_attention import _composed

    def call(*tensors: Tensor, image_mask: Tensor) -> tuple[Tensor, Tensor]:
        if backend == "composed":
            return _composed(*tensors, image_mask, None, shape.width**-0.5)
        return gated_attention(*tensors, image_mask=image_mask, backend=backend)

    tensors, mask = make(shape), make_masks(shape)["image_mask"]
    grads = [torch.zeros(tensors[1].shape, dtype=torch.float64), make_grads(shape)[1]]
    clean = with_grads(call, tensors, grads, image_mask=mask)
    tensors[1] = tensors[1].masked_fill(~mask.unsqueeze(-1), math.nan)
    got = with_grads(call, tensors, grads, image_mask=mask)
    for name in got:
        if name != "updated":
            torch.testing.assert_close(got[name], clean[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", [208, 201])
def test_results_larger_than_a_cache_against_float64(model: int, backend: str) -> None:
    """They are written past the caches where rows are whole vectors, in float32 alone."""
    shape = Shape(2, 3, 1, 2, 1000, 2, model)
    tensors = make(shape, torch.float32)
    want = layer(*(x.double() for x in tensors))[0]
    got = gated_attention(*tensors, backend=backend)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
