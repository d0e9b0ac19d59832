"""gate_policy and gate_state against their definition in float64: values, gradients, promises."""

from __future__ import annotations

from typing import Any, NamedTuple

import mpmath
import pytest
import torch
from attention_cases import assert_near, assert_same_for_any_thread_count
from torch import Tensor
from torch.nn import functional as F

from dvla_fast import _extension
from dvla_fast.errors import BackendError
from dvla_fast.functional import gate_policy, gate_state

CPP = pytest.param(
    "cpp",
    marks=pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem)),
)
BACKENDS = ["reference", CPP]
NAMES = ("image", "text", "hidden_weight", "hidden_bias", "out_weight", "out_bias")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Case(NamedTuple):
    """Images, text groups, tokens of both, width, hidden units, and the options of pooling."""

    images: int
    groups: int
    keys: int
    rows: int
    width: int
    units: int
    per_decision: int = 1
    state_images: int | None = None

    def __str__(self) -> str:
        return "B{}T{}N{}P{}C{}K{}-{}-{}".format(*self)

    @property
    def decisions(self) -> int:
        return self.groups // self.per_decision if self.per_decision else self.images

    @property
    def options(self) -> dict[str, Any]:
        return {"groups_per_decision": self.per_decision, "state_images": self.state_images}


# Vectors hold 4 to 16 numbers, decisions go 4 and units 4 or 16 at a time, tokens in runs of 32.
# From 64 decisions on, the hidden layer is one product.
CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 1, 3, 2, 4, 5),
    Case(6, 3, 31, 5, 9, 17),
    Case(12, 6, 33, 5, 33, 34, per_decision=2, state_images=1),
    Case(12, 4, 70, 5, 16, 128, per_decision=0),
    Case(15, 5, 65, 5, 24, 15, per_decision=5, state_images=2),
    Case(40, 40, 7, 3, 31, 33),
    Case(64, 64, 1, 1, 17, 128),
    Case(130, 13, 3, 2, 12, 19, per_decision=0),
    Case(198, 66, 2, 3, 5, 50, state_images=2),
]


def make(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """The six tensors, in the order of NAMES."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64).to(dtype)

    image, text = (case.images, case.keys, case.width), (case.groups, case.rows, case.width)
    features = 2 * case.width + 1
    weights = rand(case.units, features) / features**0.5, rand(case.units)
    # The image tokens off centre, as residual streams are.
    last = rand(1, case.units) / case.units**0.5
    return [rand(*image) + 0.5, rand(*text), *weights, last, rand(1)]


def make_masks(case: Case) -> dict[str, Tensor]:
    """Random masks, not contiguous; the first image keeps no token."""
    gen = torch.Generator().manual_seed(1)
    image = (torch.rand(case.keys, case.images, generator=gen) < 0.6).T
    text = torch.rand(case.groups, case.rows, generator=gen) < 0.6
    image[0] = False
    return {"image_mask": image, "text_mask": text}


def definition(
    case: Case, image: Tensor, text: Tensor, first: Tensor, first_bias: Tensor, last: Tensor,
    last_bias: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """State and logits, one decision at a time."""

    def mean(tokens: Tensor, mask: Tensor | None, outer: list[int]) -> Tensor:
        rows = []
        for i in outer:
            kept = tokens[i] if mask is None else tokens[i][mask[i]]
            rows.append(kept.mean(0) if len(kept) else 0 * tokens[i].sum(0))
        return torch.stack(rows).mean(0)

    group = case.images // case.groups
    states = []
    for a in range(case.decisions):
        if case.per_decision == 0:
            images, texts = [a], [a // group]
        else:
            texts = list(range(a * case.per_decision, (a + 1) * case.per_decision))
            used = case.state_images or group
            images = [t * group + g for t in texts for g in range(used)]
        x, y = mean(image, image_mask, images), mean(text, text_mask, texts)
        norms = x.norm().clamp_min(1e-8) * y.norm().clamp_min(1e-8)
        states.append(torch.cat((x, y, ((x * y).sum() / norms).unsqueeze(0))))
    state = torch.stack(states)
    parts = [F.layer_norm(s, (case.width,)) for s in state[:, :-1].split(case.width, 1)]
    hidden = F.gelu(F.linear(torch.cat((*parts, state[:, -1:]), 1), first, first_bias))
    return state, F.linear(hidden, last, last_bias).squeeze(1)


def exact(case: Case, tensors: list[Tensor], action: Tensor, masks: dict[str, Tensor]):
    """State, log_prob and entropy of Beta(10 p, 10 (1 - p)) at the action, from lgamma."""
    state, logits = definition(case, *tensors, **masks)
    a, b = 10 * torch.sigmoid(logits), 10 * torch.sigmoid(-logits)
    norm = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    log_prob = (a - 1) * F.logsigmoid(action) + (b - 1) * F.logsigmoid(-action) - norm
    entropy = norm - (a - 1) * torch.digamma(a) - (b - 1) * torch.digamma(b)
    return state, log_prob, entropy + (a + b - 2) * torch.digamma(a + b)


def with_grads(results, leaves: list[Tensor]) -> dict[str, Tensor]:
    """The three results, and all gradients from given ones."""
    gen = torch.Generator().manual_seed(5)
    flowing = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x) for x in results]
    grads = torch.autograd.grad(results, leaves, flowing)
    named = dict(zip(("state", "log_prob", "entropy"), (x.detach() for x in results)))
    return named | {f"grad_{name}": grad for name, grad in zip(NAMES, grads)}


def run(case: Case, tensors: list[Tensor], action: Tensor, backend: str | None, **masks: Tensor):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = gate_policy(*leaves, 10.0, action_logit=action, backend=backend, **case.options, **masks)
    return with_grads((out.state, out.log_prob, out.entropy), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_float64(case: Case, masked: bool, backend: str) -> None:
    tensors, masks = make(case), make_masks(case) if masked else {}
    action = torch.linspace(-3, 4, case.decisions, dtype=torch.float64)
    leaves = [x.detach().requires_grad_() for x in tensors]
    want = with_grads(exact(case, leaves, action, masks), leaves)
    # torch.digamma's gradient, in `exact`, has nine digits; beta_policy's own tests go further.
    assert_near(run(case, tensors, action, backend, **masks), want, tolerance=1e-8)


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_error_at_most_twice_plain_pytorch(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Tokens in any dtype, the network in float32: as the composition, against float64."""
    tensors = [*make(case, dtype)[:2], *make(case, torch.float32)[2:]]
    action = torch.linspace(-3, 4, case.decisions)
    leaves = [x.double().requires_grad_() for x in tensors]
    want = with_grads(exact(case, leaves, action.double(), {}), leaves)
    got = run(case, tensors, action, backend)
    plain = run(case, tensors, action, "reference")
    for name, value in want.items():
        assert got[name].dtype == plain[name].dtype, name
        error = (got[name].double() - value).abs().max()
        peer = (plain[name].double() - value).abs().max()
        # A few roundings of the largest value: over few numbers the peer may be right by luck.
        floor = 8 * torch.finfo(got[name].dtype).eps * value.abs().max()
        assert error <= 2 * peer + floor, f"{name}: error {error}, plain PyTorch {peer}"


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_narrow_tokens(width: int, backend: str) -> None:
    """Several rows of weights fit a vector: what lies behind the last must not be touched."""
    case = Case(5, 5, 3, 2, width, 6)
    tensors, action = make(case), torch.linspace(-2, 2, 5, dtype=torch.float64)
    single = run(case, [x.float() for x in tensors], action.float(), backend)
    leaves = [x.requires_grad_() for x in tensors]
    expected = with_grads(exact(case, leaves, action, {}), leaves)
    for name, value in single.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_alone(case: Case, backend: str) -> None:
    image, text, *_ = make(case)
    leaves = [image.requires_grad_(), text.requires_grad_()]
    got = gate_state(*leaves, backend=backend, **case.options)
    want = definition(case, *leaves, *make(case)[2:])[0]
    torch.testing.assert_close(got, want)
    flowing = torch.randn(want.shape, generator=torch.Generator().manual_seed(3)).double()
    for mine, theirs in zip(*(torch.autograd.grad(x, leaves, flowing) for x in (got, want))):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("width", [33, 48, 95, 192, 325])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_means_of_any_width(dtype: torch.dtype, width: int, backend: str) -> None:
    """Columns are summed as many at a time as registers hold, then fewer, then what is left."""
    case = Case(3, 3, 40, 2, width, 1)
    image, text, *_ = make(case, dtype)
    rows = image.new_zeros(3, 40, width + 3)[..., 1:-2].copy_(image)  # aligned to nothing
    mask = make_masks(case)["image_mask"]
    for masks, kept in (({}, torch.ones_like(mask)), ({"image_mask": mask}, mask)):
        state = gate_state(rows, text, backend=backend, **masks)
        sums = (image.double() * kept.unsqueeze(-1)).sum(1)
        want = (sums / kept.sum(1, keepdim=True).clamp_min(1)).float()
        torch.testing.assert_close(state[:, :width], want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", [CPP])
def test_long_means_do_not_drift(backend: str) -> None:
    """100 000 tokens far from 0: the sum of runs keeps float32's digits."""
    gen = torch.Generator().manual_seed(0)
    image = torch.rand(1, 100_000, 3, generator=gen) + 100
    state = gate_state(image, torch.ones(1, 1, 3), backend=backend)
    want = [mpmath.fsum(map(float, column)) / 100_000 for column in image[0].T]
    for got, exactly in zip(state[0, :3], want):
        assert abs(float(got) - float(exactly)) < 1e-4


@pytest.mark.parametrize("backend", [CPP])
def test_a_norm_below_the_smallest_is_a_constant(backend: str) -> None:
    """The cosine divides by 1e-8 at least, which does not change with the tokens."""
    gen = torch.Generator().manual_seed(0)
    image, text = (torch.randn(1, 1, 5, generator=gen, dtype=torch.float64) for _ in range(2))
    leaves = [(image * 1e-9).requires_grad_(), text.requires_grad_()]
    cosine = gate_state(*leaves, backend=backend)[0, -1]
    x, y = (leaf.flatten() for leaf in leaves)
    want = x @ y / (x.norm().clamp_min(1e-8) * y.norm())
    torch.testing.assert_close(cosine, want)
    for got, grad in zip(*(torch.autograd.grad(value, leaves) for value in (cosine, want))):
        torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, 1e-20, 1e18], ids=str)
def test_hostile_values_stay_finite(value: float, backend: str) -> None:
    case = CASES[2]
    tensors = make(case, torch.float32)
    tensors[0] = torch.full_like(tensors[0], value)
    got = run(case, tensors, torch.zeros(case.decisions), backend)
    assert all(bool(x.isfinite().all()) for x in got.values())


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_count_changes_no_bit(dtype: torch.dtype, backend: str) -> None:
    case = Case(160, 80, 40, 9, 33, 70)
    tensors = make(case, dtype)
    assert_same_for_any_thread_count(
        lambda: run(case, tensors, torch.zeros(80), backend, **make_masks(case))
    )


@pytest.mark.parametrize("backend", [CPP])
def test_draws_are_those_of_beta_policy(backend: str) -> None:
    """The fused call draws the same α from the same generator state as the parts do."""
    case = CASES[4]
    tensors = make(case, torch.float32)
    drawn = [
        gate_policy(
            *tensors, 10.0, generator=torch.Generator().manual_seed(7), backend=choice,
            **case.options,
        )
        for choice in (backend, None)
    ]  # fmt: skip
    assert torch.equal(drawn[0].action_logit, drawn[1].action_logit)
    from dvla_fast import functional, reference

    logits = reference.state_logits(drawn[0].state, *tensors[2:]).squeeze(1)
    parts = functional.beta_policy(logits, 10.0, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn[0].action_logit, parts.action_logit)
    mean = gate_policy(*tensors, 10.0, deterministic=True, **case.options)
    torch.testing.assert_close(mean.action_logit, logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_results(backend: str) -> None:
    """log_prob alone, or a result that needs no gradient of the state."""
    case = CASES[2]
    leaves = [x.requires_grad_() for x in make(case)]
    action = torch.zeros(case.decisions, dtype=torch.float64)
    out = gate_policy(*leaves, 10.0, action_logit=action, backend=backend)
    assert not out.alpha.requires_grad
    assert not out.action_logit.requires_grad
    want = torch.autograd.grad(exact(case, leaves, action, {})[1].sum(), leaves)
    for mine, theirs in zip(torch.autograd.grad(out.log_prob.sum(), leaves), want):
        torch.testing.assert_close(mine, theirs)


OPCHECK_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("dtype", OPCHECK_DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[3], CASES[4]], ids=str)
@pytest.mark.parametrize("save", [False, True], ids=["alone", "saving"])
def test_opcheck(case: Case, save: bool, dtype: torch.dtype, backend: str) -> None:
    """Tokens of every dtype; the network of half tokens is float32."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [*make(case, dtype)[:2], *make(case, wide)[2:]]
    pooling = (*make_masks(case).values(), case.per_decision, case.state_images or 0)
    rest = (10.0, torch.zeros(case.decisions, dtype=wide), None, save)
    forward = torch.ops.dvla_fast.gate_policy_forward.default
    if not save:
        for weights in (tensors[2:], [None] * 4):
            leaves = [x if x is None else x.detach().requires_grad_() for x in weights]
            tokens = [x.detach().requires_grad_() for x in tensors[:2]]
            torch.library.opcheck(forward, (*tokens, *pooling, *leaves, *rest))
        return
    arguments = (*tensors[:2], *pooling, *tensors[2:], *rest)
    torch.library.opcheck(forward, arguments)
    *_, state, hidden, derivatives = forward(*arguments)
    grads = torch.randn(case.decisions, dtype=wide), None, torch.randn(state.shape, dtype=wide)
    backward = torch.ops.dvla_fast.gate_policy_backward.default
    saved = (tensors[2], tensors[4], state, hidden, derivatives)
    torch.library.opcheck(backward, (*grads, *tensors[:2], *pooling, *saved))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_fullgraph_for_every_batch(backend: str) -> None:
    engine = "inductor" if backend == "cpp" else "eager"
    compiled = torch.compile(gate_policy, fullgraph=True, dynamic=True, backend=engine)
    for images in (6, 8, 10):
        case = Case(images, 2, 5, 3, 8, 9)
        leaves = [x.requires_grad_() for x in make(case, torch.float32)]
        action, results = torch.zeros(2), []
        for function in (compiled, gate_policy):
            out = function(*leaves, 10.0, action_logit=action, backend=backend)
            results.append(with_grads((out.state, out.log_prob, out.entropy), leaves))
        assert_near(*results, tolerance=1e-4)
        if images > 6:
            torch.compiler.set_stance("fail_on_recompile")


@pytest.mark.parametrize("backend", [CPP])
def test_double_backward_raises(backend: str) -> None:
    leaves = [x.requires_grad_() for x in make(CASES[2])]
    out = gate_policy(*leaves, 10.0, deterministic=True, backend=backend)
    grads = torch.autograd.grad(out.log_prob.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_torch_func(backend: str | None) -> None:
    """Under torch.func the parts run, each with rules of its own."""
    image, *rest = make(CASES[2])

    def log_prob(image: Tensor) -> Tensor:
        out = gate_policy(image, *rest, 10.0, deterministic=True, backend=backend)
        return out.log_prob.sum() + gate_state(image, rest[0], backend=backend).square().sum()

    leaf = image.clone().requires_grad_()
    (want,) = torch.autograd.grad(log_prob(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(log_prob)(image), want)
    mapped = torch.func.vmap(log_prob)(torch.stack((image, 2 * image)))
    torch.testing.assert_close(mapped, torch.stack((log_prob(image), log_prob(2 * image))))


WRONG = [
    ("image_tokens", lambda x: x[0], ValueError, "image_tokens: shape"),
    ("image_tokens", lambda x: x[:5], ValueError, "image_tokens: 5 images"),
    ("image_tokens", lambda x: x[:, :0], ValueError, "image_tokens: shape .* no token"),
    ("image_tokens", lambda x: x.long(), TypeError, "image_tokens: expected a floating"),
    ("text_tokens", lambda x: x[..., 1:], ValueError, "text_tokens: width 8"),
    ("text_tokens", lambda x: x.double(), TypeError, "text_tokens: dtype"),
    ("text_tokens", lambda x: x.to("meta"), ValueError, "text_tokens: on meta"),
    ("hidden_weight", lambda x: x[:, 1:], ValueError, "hidden_weight: shape"),
    ("hidden_weight", lambda x: x[0], ValueError, "hidden_weight: shape"),
    ("hidden_bias", lambda x: x[1:], ValueError, "hidden_bias: shape"),
    ("out_weight", lambda x: x[0], ValueError, "out_weight: shape"),
    ("out_bias", lambda x: x[0], ValueError, "out_bias: shape"),
    ("out_bias", lambda x: x.long(), TypeError, "out_bias: expected a floating"),
    ("concentration", lambda _: -1.0, ValueError, "concentration"),
    ("groups_per_decision", lambda _: 2, ValueError, "groups_per_decision"),
    ("groups_per_decision", lambda _: -1, ValueError, "groups_per_decision"),
    ("state_images", lambda _: 3, ValueError, "state_images: expected 1 to 2, got 3"),
    ("image_mask", lambda _: torch.ones(6, 31), TypeError, "image_mask: expected bool"),
    ("text_mask", lambda _: torch.ones(3, 4).bool(), ValueError, "text_mask: shape"),
    ("action_logit", lambda _: torch.zeros(4), ValueError, "action_logit: shape"),
]


@pytest.mark.parametrize(("name", "spoil", "error", "message"), WRONG)
def test_wrong_inputs(name, spoil, error, message) -> None:
    names = ("image_tokens", "text_tokens", *NAMES[2:])
    arguments = dict(zip(names, make(CASES[2], torch.float32))) | {"concentration": 10.0}
    arguments[name] = spoil(arguments.get(name))
    with pytest.raises(error, match=message):
        gate_policy(**arguments)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_tensor_concentration_would_lose_its_gradient(shape: tuple, backend: str | None) -> None:
    tensors, kappa = make(CASES[2], torch.float32), torch.full(shape, 10.0, requires_grad=True)
    with pytest.raises(TypeError, match="concentration: expected a number, got a tensor"):
        gate_policy(*tensors, kappa, backend=backend)


def test_what_excludes_what() -> None:
    tensors = make(CASES[2], torch.float32)
    with pytest.raises(ValueError, match="exclude each other"):
        gate_policy(*tensors, 10.0, action_logit=torch.zeros(3), deterministic=True)
    with pytest.raises(ValueError, match="state_images: every image"):
        gate_policy(*tensors, 10.0, groups_per_decision=0, state_images=1)
    with pytest.raises(BackendError, match=r"'triton' .*: the inputs are not on a CUDA device"):
        gate_policy(*tensors, 10.0, backend="triton")
    with pytest.raises(BackendError, match=r"'triton' .*: the inputs are not on a CUDA device"):
        gate_state(torch.ones(1, 1, 5000), torch.ones(1, 1, 5000), backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_raises(backend: str) -> None:
    tensors = make(CASES[2], torch.float32)
    tensors[0][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits: NaN"):
        gate_policy(*tensors, 10.0, backend=backend)
