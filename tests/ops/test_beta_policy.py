"""The policy: densities against mpmath, and its behaviour inside PyTorch."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import mpmath
import pytest
import torch
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.errors import BackendError
from dvla_fast.functional import beta_entropy, beta_log_prob, beta_policy, beta_sample
from dvla_fast.ops.beta_policy import draw_key

MEANS = (1e-6, 1e-4, 0.01, 0.3, 0.5, 0.9, 1 - 1e-4, 1 - 1e-6)
CONCENTRATIONS = (1e-2, 0.1, 1.0, 7.9, 8.1, 10.0, 1e3, 1e4, 1e6)

needs_extension = pytest.mark.skipif(
    _extension.problem is not None, reason="the C++ extension is not built"
)
BACKENDS = [pytest.param("cpp", marks=needs_extension), "reference"]


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def exact(x: float, kappa: float, action: float) -> dict[str, mpmath.mpf]:
    """log_prob, entropy and their derivatives from the textbook formulas, in 50 digits."""
    with mpmath.workdps(50):
        x, kappa, action = mpmath.mpf(x), mpmath.mpf(kappa), mpmath.mpf(action)
        p, q = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
        a, b = kappa * p, kappa * q
        log_alpha = -mpmath.log1p(mpmath.exp(-action))
        log_rest = -mpmath.log1p(mpmath.exp(action))
        log_norm = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(kappa)
        psi_a, psi_b, psi_k = (mpmath.psi(0, z) for z in (a, b, kappa))
        tri_a, tri_b, tri_k = (mpmath.psi(1, z) for z in (a, b, kappa))
        return {
            "log_prob": (a - 1) * log_alpha + (b - 1) * log_rest - log_norm,
            "entropy": log_norm - (a - 1) * psi_a - (b - 1) * psi_b + (kappa - 2) * psi_k,
            "log_prob by logits": kappa * p * q * (log_alpha - log_rest - psi_a + psi_b),
            "entropy by logits": kappa * p * q * ((b - 1) * tri_b - (a - 1) * tri_a),
            "log_prob by kappa": p * (log_alpha - psi_a) + q * (log_rest - psi_b) + psi_k,
            "entropy by kappa": (-p * (a - 1) * tri_a - q * (b - 1) * tri_b + (kappa - 2) * tri_k),
        }


def measured(logits: Tensor, kappa: Tensor, action: Tensor, backend: str) -> dict[str, Tensor]:
    logits, kappa = logits.clone().requires_grad_(), kappa.clone().requires_grad_()
    out = beta_policy(logits, kappa, action_logit=action, backend=backend)
    result = {"log_prob": out.log_prob, "entropy": out.entropy}
    for name in ("log_prob", "entropy"):
        grads = torch.autograd.grad(result[name].sum(), (logits, kappa), retain_graph=True)
        result[f"{name} by logits"], result[f"{name} by kappa"] = grads
    return {name: value.detach() for name, value in result.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"),
    [(torch.float32, 2e-7, 2e-7), (torch.float64, 1e-12, 1e-13)],
    ids=["float32", "float64"],
)
def test_densities_and_gradients_equal_50_digit_values(
    backend: str, dtype: torch.dtype, relative: float, absolute: float
) -> None:
    # Both sides read the same rounded inputs, so only the op's own arithmetic is judged. The
    # reference uses torch's polygamma, which holds fewer digits in float64.
    if backend == "reference":
        relative = max(relative, 1e-8)
    grid = [(logit(p), k) for p in MEANS for k in CONCENTRATIONS]
    logits = torch.tensor([x for x, _ in grid], dtype=dtype)
    kappa = torch.tensor([k for _, k in grid], dtype=dtype)
    action = beta_sample(logits, kappa)[1]
    got = measured(logits, kappa, action, backend)
    for i, (x, k) in enumerate(grid):
        want = exact(float(logits[i]), float(kappa[i]), float(action[i]))
        for name, value in want.items():
            error = abs(float(got[name][i]) - value)
            bound = relative * abs(value) + absolute * max(1.0, math.sqrt(k))
            assert error <= bound, (name, f"logit {x:.3g}, kappa {k:g}", float(error), bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gate_that_is_nearly_shut_keeps_its_digits(dtype: torch.dtype, backend: str) -> None:
    action = torch.linspace(-80, 80, 161, dtype=dtype)
    alpha = beta_policy(torch.zeros_like(action), 2.0, action_logit=action, backend=backend).alpha
    want = torch.sigmoid(action.double())
    assert ((alpha - want).abs() <= 4 * torch.finfo(dtype).eps * want).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0,), (257,), (1030,)], ids=str)
def test_shapes_strides_and_ranges(shape: tuple[int, ...], backend: str) -> None:
    logits = torch.randn(*shape, 2)[..., 0]
    out = beta_policy(logits, 2.0, backend=backend)
    again = beta_policy(logits, 2.0, action_logit=out.action_logit, backend=backend)
    for value in (*out, *again):
        assert value.shape == logits.shape
        assert bool(torch.isfinite(value).all())
    torch.testing.assert_close(again.log_prob, out.log_prob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.alpha, torch.sigmoid(out.action_logit))


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_action_is_the_mean(backend: str) -> None:
    logits = torch.randn(5)
    out = beta_policy(logits, 3.0, deterministic=True, backend=backend)
    assert torch.equal(out.action_logit, logits)
    torch.testing.assert_close(out.alpha, torch.sigmoid(logits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_broadcast_concentration(backend: str) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    kappa = torch.rand(4, 1, dtype=torch.float64).add(0.5).requires_grad_()
    action = torch.randn(4, 3, dtype=torch.float64)

    def densities(logits: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
        out = beta_policy(logits, kappa, action_logit=action, backend=backend)
        return out.log_prob, out.entropy

    assert torch.autograd.gradcheck(densities, (logits, kappa))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_kappa", [False, True])
@pytest.mark.parametrize("mode", ["draw", "replay", "mean"])
def test_opcheck(mode: str, with_kappa: bool, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 3, dtype=dtype).t().requires_grad_()
    kappa = torch.full((3, 1), 2.0, dtype=dtype, requires_grad=True) if with_kappa else None
    action = torch.randn(3, 4, dtype=dtype) if mode == "replay" else None
    key = torch.tensor([1, 2]) if mode == "draw" else None
    op = torch.ops.dvla_fast.beta_policy_forward.default
    torch.library.opcheck(op, (logits, kappa, 2.0, action, key, False))
    detached = None if kappa is None else kappa.detach()
    torch.library.opcheck(op, (logits.detach(), detached, 2.0, action, key, True))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_kappa", [False, True])
@pytest.mark.parametrize("used", ["log_prob", "entropy", "both"])
def test_opcheck_backward(used: str, with_kappa: bool, dtype: torch.dtype) -> None:
    logits, ops = torch.randn(3, 4, dtype=dtype), torch.ops.dvla_fast
    kappa = torch.full((3, 1), 2.0, dtype=dtype) if with_kappa else None
    *_, derivatives = ops.beta_policy_forward.default(logits, kappa, 2.0, logits, None, True)
    log_prob, entropy = (
        torch.randn(3, 4, dtype=dtype) if used in (name, "both") else None
        for name in ("log_prob", "entropy")
    )
    torch.library.opcheck(ops.beta_policy_backward.default, (derivatives, log_prob, entropy))


@needs_extension
def test_compiles_without_graph_breaks() -> None:
    logits = torch.randn(8, requires_grad=True)
    action = torch.randn(8)

    def loss(logits: Tensor) -> Tensor:
        out = beta_policy(logits, 10.0, action_logit=action)
        return (out.log_prob + 0.2 * out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True)
    (want,) = torch.autograd.grad(loss(logits), logits)
    (got,) = torch.autograd.grad(compiled(logits), logits)
    torch.testing.assert_close(got, want)
    drawn = torch.compile(lambda x: beta_policy(x, 10.0).alpha, fullgraph=True)
    assert not torch.equal(drawn(logits), drawn(logits))  # each call draws afresh


@needs_extension
def test_torch_func_grad_equals_autograd() -> None:
    logits, action = torch.randn(5), torch.randn(5)

    def loss(logits: Tensor) -> Tensor:
        return beta_policy(logits, 10.0, action_logit=action).log_prob.sum()

    x = logits.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(logits), torch.autograd.grad(loss(x), x)[0])


@needs_extension
def test_checkpointing_replays_the_draw() -> None:
    from torch.utils.checkpoint import checkpoint

    logits = torch.randn(6, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return beta_policy(x, 10.0).log_prob.sum()

    torch.manual_seed(5)
    (want,) = torch.autograd.grad(loss(logits), logits)
    torch.manual_seed(5)
    got = torch.autograd.grad(checkpoint(loss, logits, use_reentrant=False), logits)[0]
    assert torch.equal(got, want)


@needs_extension
def test_second_derivative_raises() -> None:
    logits = torch.randn(3, requires_grad=True)
    entropy = beta_policy(logits, 10.0).entropy.sum()
    (grad,) = torch.autograd.grad(entropy, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()
    gradient = torch.func.grad(lambda x: beta_policy(x, 10.0, deterministic=True).entropy.sum())
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.func.grad(lambda x: gradient(x).square().sum())(logits.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_inputs_raise_before_work(backend: str) -> None:
    logits = torch.zeros(3)
    with pytest.raises(TypeError, match="logits: expected a floating tensor"):
        beta_policy(torch.zeros(3, dtype=torch.int64), 1.0, backend=backend)
    with pytest.raises(TypeError, match="action_logit: expected a tensor, got float"):
        beta_policy(torch.zeros(1), 10.0, action_logit=0.3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="logits: expected a tensor, got list"):
        beta_policy([0.0], 1.0, backend=backend)  # type: ignore[arg-type]
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="concentration"):
            beta_policy(logits, bad, backend=backend)
        with pytest.raises(ValueError, match="concentration"):
            beta_policy(logits, torch.tensor([1.0, 1.0, bad]), backend=backend)
    with pytest.raises(ValueError, match="does not broadcast"):
        beta_policy(logits, torch.ones(2), backend=backend)
    with pytest.raises(ValueError, match="NaN"):
        beta_policy(torch.tensor([0.0, math.nan]), 1.0, backend=backend)
    with pytest.raises(ValueError, match="action_logit: shape"):
        beta_policy(logits, 1.0, action_logit=torch.zeros(2), backend=backend)
    with pytest.raises(ValueError, match="exclude each other"):
        beta_policy(logits, 1.0, action_logit=logits, deterministic=True, backend=backend)
    with pytest.raises(
        BackendError, match="backend 'triton' cannot run here: the inputs are not on a CUDA"
    ):
        beta_policy(logits, 1.0, backend="triton")


def test_half_types_are_computed_in_float32() -> None:
    out = beta_policy(torch.zeros(3, dtype=torch.bfloat16), 1.0)
    assert {value.dtype for value in out} == {torch.float32}


@needs_extension
@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["global", "own"])
def test_the_short_way_of_the_usual_call(generator: torch.Generator | None) -> None:
    """A number for κ and nothing else given takes fewer steps, to the same draws and gradients."""
    results = []
    for concentration in (2.5, torch.tensor(2.5)):
        (generator or torch.default_generator).manual_seed(3)
        logits = torch.linspace(-4, 4, 7).requires_grad_()
        out = beta_policy(logits, concentration, generator=generator)
        (out.log_prob + 0.5 * out.entropy).sum().backward()
        results.append((*out, logits.grad))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="logits: NaN found"):
        beta_policy(torch.tensor([0.0, math.nan]), 2.5)
    for bad in (0.0, -1.0, math.inf, math.nan, 1e39):
        with pytest.raises(ValueError, match="concentration: expected a positive finite number"):
            beta_policy(torch.zeros(3), bad)
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator, got int"):
        beta_policy(torch.zeros(3), 2.5, generator=3)  # type: ignore[arg-type]


def test_parts_agree_with_the_whole() -> None:
    logits, action = torch.randn(4), torch.randn(4)
    out = beta_policy(logits, 2.0, action_logit=action)
    torch.testing.assert_close(beta_log_prob(logits, 2.0, action), out.log_prob)
    torch.testing.assert_close(beta_entropy(logits, 2.0), out.entropy)


def on_cuda() -> list[str]:
    """What implements the op's names on a GPU here, as suffixes of the op."""
    return ["", "_triton"] if _extension.has_cuda else [""]


@pytest.mark.gpu
@needs_extension
@pytest.mark.parametrize("kernels", on_cuda())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kappa", [0.1, 10.0, 1e4, None])
def test_cuda_draws_the_same_numbers_as_the_cpu(
    kappa: float | None, dtype: torch.dtype, kernels: str
) -> None:
    logits = torch.linspace(-6, 6, 4096, dtype=dtype)
    each = torch.logspace(-2, 6, 4096, dtype=dtype) if kappa is None else None
    key = torch.tensor([1234, 5678])
    arguments = (logits, each, kappa or 0.0, None, key)
    cpu = torch.ops.dvla_fast.beta_policy_forward.default(*arguments, True)
    on_gpu = (x.cuda() if isinstance(x, Tensor) else x for x in arguments)
    op = getattr(torch.ops.dvla_fast, f"beta_policy_forward{kernels}").default
    for want, got in zip(cpu, op(*on_gpu, True), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@needs_extension
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_gradients_on_cuda_are_those_on_the_cpu(backend: str) -> None:
    if backend == "cpp" and not _extension.has_cuda:
        pytest.skip("the extension was built without CUDA")
    logits, kappa = torch.randn(64, 5), torch.rand(64, 1) + 0.1
    action = beta_sample(logits, kappa)[1]
    want = measured(logits, kappa, action, "cpp")
    got = measured(logits.cuda(), kappa.cuda(), action.cuda(), backend)
    for name, value in want.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_cuda_graph_draws_afresh_and_compiles(backend: str) -> None:
    if backend == "cpp" and not _extension.has_cuda:
        pytest.skip("the extension was built without CUDA")
    logits = torch.zeros(100, device="cuda", requires_grad=True)

    def step(logits: Tensor) -> Tensor:
        out = beta_policy(logits, 10.0, backend=backend)
        torch.autograd.grad(out.log_prob.sum(), logits)
        return out.alpha

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(logits)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        alpha = step(logits)
    graph.replay()
    first = alpha.clone()
    graph.replay()
    assert not torch.equal(first, alpha)
    compiled = torch.compile(
        lambda x: beta_policy(x, 10.0, backend=backend).log_prob, fullgraph=True
    )
    (grad,) = torch.autograd.grad(compiled(logits).sum(), logits)
    assert bool(grad.isfinite().all())


@needs_extension
def test_the_second_names_behave_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their autograd, fakes and vmap rules, with the C++ op standing in for the Triton kernels."""
    from dvla_fast.ops import beta_policy as module

    ops, x, action = torch.ops.dvla_fast, torch.randn(6, 4), torch.randn(6, 4)

    def loss(logits: Tensor, backend: str = "triton") -> Tensor:
        out = module._run(logits, torch.tensor(3.0), 0.0, action[0], None, backend)
        return (out.log_prob + 0.2 * out.entropy).sum()

    monkeypatch.setattr(_extension, "has_cuda", True)
    with torch.library._scoped_library("dvla_fast", "IMPL") as library:
        library.impl("beta_policy_forward_triton", ops.beta_policy_forward.default, "CPU")
        library.impl("beta_policy_backward_triton", ops.beta_policy_backward.default, "CPU")
        each = torch.stack([torch.func.grad(loss)(row) for row in x])
        leaf = x[0].clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], each[0])
        torch.testing.assert_close(torch.autograd.grad(loss(leaf, "cpp"), leaf)[0], each[0])
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), each)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], each[0])
        arguments = (x, torch.ones(4), 0.0, action, None, True)
        torch.library.opcheck(ops.beta_policy_forward_triton.default, arguments)
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(
        "dvla_fast::beta_policy_forward_triton", "CPU"
    )


def test_which_kernels_serve_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from dvla_fast.ops import beta_policy as module

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(_extension, "has_cuda", True)
    assert module._choose(cuda, None) == "cpp"
    assert module._choose(cuda, "triton") == "triton"
    monkeypatch.setattr(_extension, "has_cuda", False)
    assert module._choose(cuda, None) == "triton"
    with pytest.raises(BackendError, match="built without CUDA"):
        module._choose(cuda, "cpp")
    monkeypatch.setattr(_extension, "_TRITON_PROBLEM", "Triton is not installed")
    assert module._choose(cuda, None) == "reference"


@pytest.mark.parametrize("compiled", [True, False])
def test_the_op_has_a_cuda_kernel_with_and_without_nvcc(compiled: bool) -> None:
    """Without the compiled kernels (here: none is loaded) Triton's take the op's own name."""
    if compiled and not _extension.has_cuda:
        pytest.skip("the extension was built without CUDA")
    code = (
        "import torch, dvla_fast.functional;"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print([has(f'dvla_fast::beta_policy_{d}{k}', 'CUDA')"
        " for d in ('forward', 'backward') for k in ('', '_triton')],"
        " 'beta_cuda.cu' in torch._C._dispatch_dump('dvla_fast::beta_policy_forward'))"
    )
    env = {**os.environ, "DVLA_FAST_BACKEND": "" if compiled else "reference"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split("] ") == ["[True, True, True, True", f"{compiled}\n"], done.stderr


@needs_extension
def test_a_concentration_beyond_the_test_of_proposals_ends() -> None:
    """Above 2e38 the acceptance test overflows; the draw is then the mean to float32."""
    logits = torch.tensor([-2.0, 0.0, 1.0])
    torch.testing.assert_close(beta_sample(logits, 3e38)[1], logits)
    with pytest.raises(ValueError, match="positive finite"):
        beta_policy(logits, 1e39)


def test_an_action_on_another_device_raises() -> None:
    with pytest.raises(ValueError, match="action_logit: on meta, logits on cpu"):
        beta_policy(torch.zeros(3), 1.0, action_logit=torch.zeros(3, device="meta"))


@needs_extension
def test_forward_mode_raises_instead_of_dropping_tangents() -> None:
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.zeros(3), torch.ones(3))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            beta_policy(dual, 1.0)


def test_a_cpu_generator_for_another_device() -> None:
    state = torch.Generator().manual_seed(3)
    assert draw_key(torch.device("meta"), state).device.type == "meta"
    drawn = draw_key(torch.device("cpu"), torch.Generator().manual_seed(3))
    again = draw_key(torch.device("cpu"), state.manual_seed(3))
    assert torch.equal(drawn, again)


@pytest.mark.gpu
@pytest.mark.parametrize("kappa", [10.0, None])  # the call from C++ takes numbers alone
def test_a_cpu_generator_draws_on_a_gpu_what_it_draws_on_the_cpu(kappa: float | None) -> None:
    logits = torch.linspace(-3, 3, 257)
    on = [logits, logits.cuda()]
    kappas = [torch.full_like(x, 10.0) if kappa is None else kappa for x in on]
    cpu, cuda = (
        beta_policy(x, k, generator=torch.Generator().manual_seed(7)) for x, k in zip(on, kappas)
    )
    for want, got in zip(cpu, cuda):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)
