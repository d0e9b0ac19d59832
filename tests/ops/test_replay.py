"""A recorded launch is the one that Triton would make, with the addresses of the call at hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.ops import replay

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(_extension.problem is not None, reason="the C++ extension is not built"),
    pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA"),
]

from attention_cases import Shape, grad_for, make, make_masks  # noqa: E402
from fake_gpu import FakeGPU, Launch, fake_gpu, on_gpu  # noqa: E402

FEW = Shape(2, 1, 2, 9, 20, 9, 24)
SHARED = Shape(1, 40, 8, 9, 20, 9, 24)  # several programs a group: two launches and their sums
LONG = Shape(1, 1, 2, 300, 40, 300, 32)  # more rows than a tile of the backward


@pytest.fixture
def gpu() -> Iterator[FakeGPU]:
    with fake_gpu() as gpu:
        yield gpu


def attention(
    shape: Shape, dtype: torch.dtype = torch.float16, masked: bool = False, save: bool = True
) -> tuple[Any, ...]:
    """New arguments of the forward."""
    masks = make_masks(shape) if masked else (None, None)
    return *make(shape, dtype), *(x if x is None else x.clone() for x in masks), 0.2, save


def attention_backward(shape: Shape, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the backward that follows a call of the forward."""
    _, *saved = on_gpu("dual_attention_forward", *arguments)
    grad = grad_for(shape, arguments[0].dtype)
    return grad, *arguments[:8], *saved, arguments[8]


def policy(
    images: int = 6, save: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """New arguments of the gate's decision: two texts, 32 channels, 16 hidden units."""
    tokens = torch.randn(images, 5, 32, dtype=dtype), torch.randn(2, 4, 32, dtype=dtype)
    weights = torch.randn(16, 65), torch.randn(16), torch.randn(1, 16), torch.randn(1)
    return *tokens, None, None, 1, 0, *weights, 10.0, None, torch.randint(9, (2,)), save, False


def policy_backward(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    results = on_gpu("gate_policy_forward", *arguments)
    grads = torch.randn(2), torch.randn(2), None
    weights = arguments[6], arguments[8]
    return *grads, *arguments[:6], *weights, *results[4:]


def described(
    launches: Sequence[Launch], arguments: tuple[Any, ...], results: Sequence[Tensor]
) -> list[tuple[Any, ...]]:
    """Launches with what each address stands for in place of the address."""
    names: dict[int, str] = {0: "null"}
    for kind, tensors in (("argument", arguments), ("result", results)):
        for index, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor) and tensor.numel():
                names[tensor.data_ptr()] = f"{kind} {index}"
    described, scratch = [], 0
    for launch in launches:
        values: list[str | bytes] = []
        for kind, value in zip(launch.types, launch.values, strict=True):
            address = int.from_bytes(value, "little")
            if kind[0] == "*" and address not in names:
                names[address] = f"scratch {scratch}"
                scratch += 1
            values.append(names[address] if kind[0] == "*" else value)
        described.append((*launch[:4], launch.types, tuple(values)))
    return described


CASES = {
    "forward": ("dual_attention_forward", lambda: attention(FEW)),
    "forward, float32": ("dual_attention_forward", lambda: attention(FEW, torch.float32)),
    "forward, masks": ("dual_attention_forward", lambda: attention(FEW, masked=True)),
    "forward, nothing saved": ("dual_attention_forward", lambda: attention(FEW, save=False)),
    "backward": ("dual_attention_backward", lambda: attention_backward(FEW, attention(FEW))),
    "backward, masks": (
        "dual_attention_backward",
        lambda: attention_backward(FEW, attention(FEW, masked=True)),
    ),
    "backward, runs": (
        "dual_attention_backward",
        lambda: attention_backward(SHARED, attention(SHARED)),
    ),
    "decision": ("gate_policy_forward", policy),
    "decision, nothing saved": ("gate_policy_forward", lambda: policy(save=False)),
    "decision, bfloat16": ("gate_policy_forward", lambda: policy(dtype=torch.bfloat16)),
    "decision, backward": ("gate_policy_backward", lambda: policy_backward(policy())),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_launches_with_other_addresses(case: str, gpu: FakeGPU) -> None:
    op, arguments_of = CASES[case]
    first, second = arguments_of(), arguments_of()
    gpu.reset()
    recorded = on_gpu(op, *first)
    assert gpu.by_triton
    assert not gpu.by_replay
    want = described(gpu.by_triton, first, recorded)
    gpu.by_triton.clear()
    replayed = on_gpu(op, *second)
    assert not gpu.by_triton
    assert described(gpu.by_replay, second, replayed) == want
    for ours, theirs in zip(replayed, recorded, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (
            theirs.shape,
            theirs.stride(),
            theirs.dtype,
        )


def test_a_view_into_scratch_memory_keeps_its_offset(gpu: FakeGPU) -> None:
    for _ in range(2):
        on_gpu("gate_policy_forward", *policy())
    means, text_means = (int.from_bytes(x, "little") for x in gpu.by_replay[1].values[:2])
    assert text_means - means == 6 * 32 * 4  # six images before the texts


def replays(gpu: FakeGPU, op: str, *arguments: Any) -> bool:
    """Whether the call needed nothing of Python."""
    gpu.reset()
    on_gpu(op, *arguments)
    assert bool(gpu.by_triton) != bool(gpu.by_replay)
    return bool(gpu.by_replay)


def with_one(arguments: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return *arguments[:place], value, *arguments[place + 1 :]


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers and strides, off by one element from a multiple of 16 bytes."""
    memory = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size() + 1)
    other = memory.to(tensor.dtype)[1:].as_strided(tensor.shape, tensor.stride())
    return other.copy_(tensor)


@pytest.mark.parametrize(
    "changed",
    [
        lambda a: attention(FEW._replace(keys=21)),
        lambda a: attention(FEW._replace(rows=8)),
        lambda a: attention(FEW, torch.bfloat16),
        lambda a: attention(FEW, masked=True),
        lambda a: with_one(a, 8, 0.25),
        lambda a: with_one(a, 9, False),
        lambda a: with_one(a, 0, a[0].contiguous()),
        lambda a: with_one(a, 1, shifted(a[1])),
        lambda a: with_one(a, 5, a[5][:, :1].expand(2, 2)),
    ],
    ids=["keys", "rows", "dtype", "masks", "scale", "save", "strides", "alignment", "alpha"],
)
def test_another_call_is_not_taken_for_it(changed: Any, gpu: FakeGPU) -> None:
    arguments = attention(FEW)
    other = changed(arguments)
    assert not replays(gpu, "dual_attention_forward", *arguments)
    assert not replays(gpu, "dual_attention_forward", *other)
    assert replays(gpu, "dual_attention_forward", *arguments)
    assert replays(gpu, "dual_attention_forward", *other)


def test_inputs_that_are_one_tensor(gpu: FakeGPU) -> None:
    """Their launches would be taken for those of a call whose inputs differ, and read one twice."""
    arguments = attention(Shape(2, 1, 2, 9, 9, 9, 24))
    q, k, *_ = arguments
    one = with_one(arguments, 2, k)  # K is V
    more = with_one(with_one(one, 3, q), 4, q)  # and the text's K and V are Q
    for first in (one, more, arguments):
        assert not replays(gpu, "dual_attention_forward", *first)
        assert replays(gpu, "dual_attention_forward", *first)
    sent = [int.from_bytes(value, "little") for value in gpu.by_replay[0].values[:5]]
    assert sent == [x.data_ptr() for x in arguments[:5]]
    backward = policy_backward(policy())
    both = with_one(backward, 1, backward[0])  # (log_prob + entropy).sum().backward()
    assert not replays(gpu, "gate_policy_backward", *both)
    assert not replays(gpu, "gate_policy_backward", *backward)


def test_precision_of_float32_products(gpu: FakeGPU) -> None:
    from dvla_fast.ops.dual_attention_cuda import set_float32_precision

    arguments = attention(FEW, torch.float32)
    assert not replays(gpu, "dual_attention_forward", *arguments)
    torch.set_float32_matmul_precision("high")
    try:
        assert not replays(gpu, "dual_attention_forward", *arguments)
        assert replays(gpu, "dual_attention_forward", *arguments)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert replays(gpu, "dual_attention_forward", *arguments)
    set_float32_precision("tf32x3")
    try:
        assert not replays(gpu, "dual_attention_forward", *arguments)
    finally:
        set_float32_precision(None)
    assert not replays(gpu, "dual_attention_forward", *arguments)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_precision_set_while_a_call_runs(
    direction: str, gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread: between the launches, of the old one, and their record."""
    from dvla_fast.kernels import dual_attention as kernels
    from dvla_fast.ops.dual_attention_cuda import set_float32_precision

    op, arguments = "dual_attention_forward", attention(FEW, torch.float32)
    if direction == "backward":
        op, arguments = "dual_attention_backward", attention_backward(FEW, arguments)
    kernel = getattr(kernels, direction)

    def interrupted(*args: Any, recorder: Any, **options: Any) -> Any:
        def late(*launched: Any) -> None:
            set_float32_precision("tf32")
            recorder(*launched)

        return kernel(*args, recorder=late, **options)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(kernels, direction, interrupted)
            assert not replays(gpu, op, *arguments)
        assert not replays(gpu, op, *arguments)
        assert replays(gpu, op, *arguments)
    finally:
        set_float32_precision(None)


def test_what_needs_more_than_launches_is_not_recorded(gpu: FakeGPU) -> None:
    arguments = attention_backward(LONG, attention(LONG))
    for _ in range(2):  # by row block, α has a sum behind the launches
        assert not replays(gpu, "dual_attention_backward", *arguments)
    arguments = attention_backward(FEW, attention(FEW))
    spread = with_one(arguments, 11, arguments[11].transpose(1, 2).contiguous().transpose(1, 2))
    for _ in range(2):  # what was saved went through other hands, and is copied
        assert not replays(gpu, "dual_attention_backward", *spread)
    arguments = policy_backward(policy())
    for _ in range(2):  # gradients of weights that are zeros
        assert not replays(
            gpu, "gate_policy_backward", None, None, torch.randn(2, 65), *arguments[3:]
        )


def test_nothing_to_launch(gpu: FakeGPU) -> None:
    arguments = attention(FEW._replace(rows=0))
    for _ in range(2):
        on_gpu("dual_attention_forward", *arguments)
    assert not gpu.by_triton
    assert _extension.calls.recordings() == 0


def test_a_thread_without_a_context_goes_the_usual_way(gpu: FakeGPU) -> None:
    arguments = attention(FEW)
    assert not replays(gpu, "dual_attention_forward", *arguments)
    gpu.reset()
    gpu.has_context = False
    on_gpu("dual_attention_forward", *arguments)
    assert gpu.by_triton
    assert not gpu.by_replay


def test_a_launch_that_fails_raises(gpu: FakeGPU) -> None:
    arguments = attention(FEW)
    on_gpu("dual_attention_forward", *arguments)
    gpu.status = 700
    with pytest.raises(
        RuntimeError, match="dual_attention_forward failed with CUDA driver error 700"
    ):
        on_gpu("dual_attention_forward", *arguments)


def test_errors_of_the_kernels_in_python_arrive(gpu: FakeGPU) -> None:
    with pytest.raises(ValueError, match="head dimension 300"):
        on_gpu("dual_attention_forward", *attention(FEW._replace(width=300)))


def test_many_kinds_of_calls_and_threads(gpu: FakeGPU) -> None:
    calls = [attention(FEW._replace(keys=keys)) for keys in (17, 18, 19)]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for arguments in calls * 20:
                out = on_gpu("dual_attention_forward", *arguments)[0]
                assert out.shape == (2, 2, 9, 24)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        _extension.calls.forget()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(gpu.by_triton) + len(gpu.by_replay) == 4 * 60


@pytest.mark.parametrize(
    ("unusual", "plain"),
    [
        ({}, True),
        ({"num_ctas": 2}, False),
        ({"shared": 300_000}, False),
        ({"launch_pdl": True}, False),
        ({"global_scratch_size": 64}, False),
    ],
)
def test_what_a_launch_of_ones_own_cannot_be_is_not_recorded(unusual: dict, plain: bool) -> None:
    metadata = {"num_ctas": 1, "shared": 1024, "launch_pdl": False, "global_scratch_size": 0}
    assert replay._is_plain(SimpleNamespace(**{**metadata, **unusual})) is plain
