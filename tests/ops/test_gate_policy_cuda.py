"""gate_policy and gate_state on a GPU: gradients, launches, PyTorch's modes."""

from __future__ import annotations

import pytest
import torch
from test_gate_policy import CASES, Case, definition, exact, make, make_masks, run, with_grads
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.functional import gate_policy, gate_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem)),
    pytest.mark.usefixtures("poisoned_memory"),
]


def launches(call) -> int:
    """How many kernels, copies and fills a call puts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    torch.utils.deterministic.fill_uninitialized_memory = False  # poisoned_memory's fills
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profiler.events())


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_float64(case: Case, masked: bool) -> None:
    tensors = [x.cuda() for x in make(case)]
    masks = {k: v.cuda() for k, v in make_masks(case).items()} if masked else {}
    action = torch.linspace(-3, 4, case.decisions, dtype=torch.float64, device="cuda")
    leaves = [x.detach().requires_grad_() for x in tensors]
    want = with_grads(exact(case, leaves, action, masks), leaves)
    got = run(case, tensors, action, "triton", **masks)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[2:5], ids=str)
def test_error_at_most_twice_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    tensors = [*make(case, dtype)[:2], *make(case, torch.float32)[2:]]
    tensors = [x.cuda() for x in tensors]
    action = torch.linspace(-3, 4, case.decisions, device="cuda")
    leaves = [x.double().requires_grad_() for x in tensors]
    want = with_grads(exact(case, leaves, action.double(), {}), leaves)
    got = run(case, tensors, action, None)
    plain = run(case, tensors, action, "reference")
    for name, value in want.items():
        error = (got[name].double() - value).abs().max()
        peer = (plain[name].double() - value).abs().max()
        floor = 8 * torch.finfo(got[name].dtype).eps * value.abs().max()
        assert error <= 2 * peer + floor, f"{name}: error {error}, plain PyTorch {peer}"


@pytest.mark.parametrize("case", CASES[1:5], ids=str)
def test_three_launches_forward_two_backward(case: Case) -> None:
    tensors = [x.cuda().requires_grad_() for x in make(case, torch.float32)]

    def forward() -> Tensor:
        return gate_policy(*tensors, 10.0, **case.options).log_prob

    assert launches(forward) <= 3
    log_prob = forward()
    grad = torch.ones_like(log_prob)
    weights = tensors[2:]  # those of tokens are views of a row until something fills them
    back = launches(lambda: torch.autograd.grad(log_prob, weights, grad, retain_graph=True))
    assert back <= 2


@pytest.mark.parametrize("case", [CASES[3], CASES[4]], ids=str)
def test_same_key_same_decision_as_on_the_cpu(case: Case) -> None:
    tensors, key = make(case, torch.float32), torch.tensor([1234, 5678])
    pooling = (None, None, case.per_decision, case.state_images or 0)
    op = torch.ops.dvla_fast.gate_policy_forward.default
    want = op(*tensors[:2], *pooling, *tensors[2:], 10.0, None, key, True)
    moved = [x.cuda() for x in tensors]
    got = op(*moved[:2], *pooling, *moved[2:], 10.0, None, key.cuda(), True)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-5, atol=2e-5)


def test_no_bit_depends_on_the_run() -> None:
    case = Case(160, 80, 40, 9, 33, 70)
    tensors = [x.cuda() for x in make(case, torch.float32)]
    masks = {k: v.cuda() for k, v in make_masks(case).items()}
    first, *others = (
        run(case, tensors, torch.zeros(80, device="cuda"), None, **masks) for _ in "abc"
    )
    for other in others:
        for name, value in other.items():
            assert torch.equal(value, first[name]), name


def test_the_state_alone() -> None:
    case = CASES[3]
    image, text, *rest = (x.cuda() for x in make(case))
    got = gate_state(image, text, backend="triton", **case.options)
    torch.testing.assert_close(got, definition(case, image, text, *rest)[0])


@pytest.mark.parametrize("save", [False, True], ids=["alone", "saving"])
def test_opcheck(save: bool) -> None:
    case = CASES[3]
    tensors = [x.cuda() for x in make(case, torch.float32)]
    masks = [x.cuda() for x in make_masks(case).values()]
    if not save:
        tensors = [x.requires_grad_() for x in tensors]
    pooling = (*masks, case.per_decision, case.state_images or 0)
    action = torch.zeros(case.decisions, device="cuda")
    op = torch.ops.dvla_fast.gate_policy_forward.default
    torch.library.opcheck(op, (*tensors[:2], *pooling, *tensors[2:], 10.0, action, None, save))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_captured_and_transformed() -> None:
    case = Case(6, 2, 5, 3, 8, 9)
    tensors = [x.cuda().requires_grad_() for x in make(case, torch.float32)]
    action = torch.zeros(2, device="cuda")

    def loss(*tensors: Tensor) -> Tensor:
        return gate_policy(*tensors, 10.0, action_logit=action).log_prob.sum()

    want = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True)
    for mine, theirs in zip(torch.autograd.grad(compiled(*tensors), tensors), want):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    functional = torch.func.grad(loss)(*(x.detach() for x in tensors))  # the composition
    torch.testing.assert_close(functional, want[0], rtol=1e-4, atol=1e-5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gate_policy(*tensors, 10.0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        alpha = gate_policy(*tensors, 10.0).alpha
    graph.replay()
    first = alpha.clone()
    graph.replay()
    assert not torch.equal(first, alpha)  # a replay draws afresh


def test_a_generator_on_the_gpu_draws_for_a_cpu() -> None:
    """By the direct call, and by Python, which is left a number that is no Python float."""
    tensors = make(CASES[2], torch.float32)
    draws = []
    for kappa in (10.0, 10):
        generator = torch.Generator("cuda").manual_seed(3)
        draws.append(gate_policy(*tensors, kappa, generator=generator).action_logit)
    assert torch.equal(*draws)
