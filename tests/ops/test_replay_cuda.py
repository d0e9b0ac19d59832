"""Recorded launches on a GPU: the bits of the first call, from any stream and thread, in graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.functional import dual_attention, gate_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem)),
]


def attention_inputs() -> list[Tensor]:
    torch.manual_seed(0)
    sizes = (9, 196, 196, 9, 9)
    make = [torch.randn(5, n, 8, 24, device="cuda", dtype=torch.bfloat16) for n in sizes]
    return [*(x.transpose(1, 2) for x in make), torch.rand(5, device="cuda")]


def attention() -> list[Tensor]:
    """Output and gradients for five images with a text of their own, on fixed numbers."""
    leaves = [x.requires_grad_() for x in attention_inputs()]
    out = dual_attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def decision() -> list[Tensor]:
    """A decision and its gradients, likewise."""
    torch.manual_seed(0)
    shapes = ((5, 196, 192), (5, 9, 192), (128, 385), (128,), (1, 128), (1,))
    leaves = [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes]
    out = gate_policy(*leaves, 10.0)
    loss = out.log_prob.sum() + 0.2 * out.entropy.sum()
    return [x.detach() for x in out] + list(torch.autograd.grad(loss, leaves))


CALLS = [attention, decision]


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Nothing is recorded at first; after a call of this, Python's way raises."""
    from dvla_fast.kernels import dual_attention as attention_kernels
    from dvla_fast.kernels import gate_policy as policy_kernels

    def fail(*_args: object, **_options: object) -> None:
        raise AssertionError("a recorded call went through Python")

    def only_replays() -> None:
        for kernels in (attention_kernels, policy_kernels):
            monkeypatch.setattr(kernels, "forward", fail)
            monkeypatch.setattr(kernels, "backward", fail)

    _extension.calls.forget()
    yield only_replays
    _extension.calls.forget()


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("call", CALLS)
def test_the_same_bits(call: Callable[[], list[Tensor]], recorded: Callable[[], None]) -> None:
    want = call()
    assert _extension.calls.recordings() == 2
    recorded()
    for _ in range(3):
        assert_equal(call(), want)


@pytest.mark.parametrize("call", CALLS)
def test_on_another_stream(call: Callable[[], list[Tensor]], recorded: Callable[[], None]) -> None:
    want = call()
    recorded()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = call()
    stream.synchronize()
    assert_equal(got, want)


@pytest.mark.parametrize("call", CALLS)
def test_in_new_threads(call: Callable[[], list[Tensor]]) -> None:
    """The first call of a thread may find no context, and goes through Python."""
    want, results = call(), []
    threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()  # one after another: both seed PyTorch's global generator
    assert len(results) == 2
    for got in results:
        assert_equal(got, want)


def test_in_a_cuda_graph(recorded: Callable[[], None]) -> None:
    tensors = attention_inputs()
    want = dual_attention(*tensors)
    recorded()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = dual_attention(*tensors)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
