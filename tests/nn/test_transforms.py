"""The gate and the model under compile, autocast, checkpointing, copying, and export."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dvla_fast import functional
from dvla_fast.distributions import MeanConcentrationBeta
from dvla_fast.nn import DVLA, BetaPolicy, GatePolicy, RLAGate, TextTokens
from dvla_fast.nn.dvla import TEXT_SCOPES
from dvla_fast.nn.policy import POLICIES, StateNetwork
from dvla_fast.rl import ReinforceLoss, total_loss

from .conftest import TEXT_DIM, make_episodes, make_text

MakeGate = Callable[..., RLAGate]
MakeModel = Callable[..., DVLA]


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 5, 16), torch.randn(2, 4, TEXT_DIM)


def same(mine: tuple, theirs: tuple, **tolerance: float) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("policy", POLICIES)
def test_compiles_whole_in_evaluation(make_gate: MakeGate, inputs: tuple, policy: str) -> None:
    gate = make_gate(policy=policy).eval()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    same(compiled(*inputs), gate(*inputs))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("scope", ["episode", "image"])
def test_compiles_whole_with_masks_gradients_and_replay(
    make_gate: MakeGate, inputs: tuple, scope: str
) -> None:
    gate = make_gate(alpha_scope=scope)
    backend = "inductor" if scope == "episode" else "aot_eager"
    compiled = torch.compile(gate, fullgraph=True, backend=backend)
    options = {
        "image_mask": torch.rand(6, 5) < 0.8,
        "text_mask": torch.tensor([[True] * 4, [True] * 3 + [False]]),
        "action_logit": torch.randn(2 if scope == "episode" else 6),
    }
    grads = []
    for function in (gate, compiled):
        gate.zero_grad()
        out = function(*inputs, **options)
        (out.image_tokens.square().sum() + out.log_prob.sum() + out.entropy.sum()).backward()
        grads.append([p.grad.clone() for p in gate.parameters()])
    same(compiled(*inputs, **options), gate(*inputs, **options), rtol=1e-4, atol=1e-5)
    same(tuple(grads[1]), tuple(grads[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_gate_samples_afresh(make_gate: MakeGate, inputs: tuple) -> None:
    gate = make_gate()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(*inputs).alpha, compiled(*inputs).alpha)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_gate_serves_every_batch_size(make_gate: MakeGate) -> None:
    """The second size makes sizes symbols; from then on nothing is compiled, backward included."""
    gate = make_gate()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    for batch in (6, 9, 12, 75):
        if batch > 9:
            torch.compiler.set_stance("fail_on_recompile")
        tokens, text = torch.randn(batch, 5, 16), torch.randn(3, 4, TEXT_DIM)
        out = compiled(tokens, text, alpha=0.3)
        same((out.image_tokens,), (gate(tokens, text, alpha=0.3).image_tokens,))
        out.image_tokens.square().sum().backward()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_model_compiles_whole(make_model: MakeModel, text_scope: str) -> None:
    model = make_model(text_scope=text_scope).eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    text = make_text(2, 3, masked=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mine = compiled(support, labels, query, text, way=3)
    theirs = model(support, labels, query, text, way=3)
    torch.testing.assert_close(mine.logits, theirs.logits)
    torch.testing.assert_close(mine.layers[1].alpha, theirs.layers[1].alpha)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(make_gate: MakeGate, inputs: tuple, dtype: torch.dtype) -> None:
    gate = make_gate()
    with torch.autocast("cpu", dtype):
        out = gate(*inputs, alpha=0.4)
        drawn = gate(*inputs)
        gate(inputs[0].to(dtype), inputs[1])
    assert out.image_tokens.dtype == torch.float32
    assert out.fused.dtype == dtype
    for value in (drawn.alpha, drawn.log_prob, drawn.entropy, drawn.state):
        assert value.dtype == torch.float32
    wide = gate(*inputs, alpha=0.4)
    assert (out.image_tokens - wide.image_tokens).abs().max() < 0.05
    drawn.image_tokens.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in gate.parameters())


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_gate_under_autocast_of_the_other_half_type(
    make_gate: MakeGate, inputs: tuple, weights: torch.dtype
) -> None:
    """Tokens keep their dtype and lose no digit that their own type has."""
    computed = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[weights]
    gate = make_gate()
    wide = gate(*inputs, alpha=0.4)
    gate = gate.to(weights)
    image, text = (x.to(weights).requires_grad_() for x in inputs)
    for given in ((image, text), (image.detach().float(), text)):
        with torch.autocast("cpu", computed):
            out = gate(*given, alpha=0.4)
            seen = gate.explain(*given, alpha=0.4)
        assert (out.image_tokens.dtype, out.fused.dtype) == (given[0].dtype, computed)
        assert (out.image_tokens.float() - wide.image_tokens).abs().max() < 0.05
        assert seen.image.isfinite().all()
    with torch.autocast("cpu", computed):
        gate(image, text).image_tokens.float().sum().backward()
    assert image.grad is not None
    assert image.grad.dtype == weights
    with pytest.raises(TypeError, match="image_tokens: dtype"):
        gate(inputs[0].to(computed), text)


def test_model_under_autocast(make_model: MakeModel) -> None:
    model = make_model()
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(support, labels, query, make_text(2, 3, masked=True), way=3)
    assert output.logits.dtype == torch.float32
    assert output.layers[0].log_prob.dtype == torch.float32
    output.logits.sum().backward()


def test_half_precision_gate(make_gate: MakeGate, inputs: tuple) -> None:
    gate = make_gate().bfloat16()
    out = gate(*(x.bfloat16() for x in inputs))
    assert out.image_tokens.dtype == torch.bfloat16
    assert out.log_prob.dtype == torch.float32


def test_activation_checkpointing_redraws_the_same_action(
    make_gate: MakeGate, inputs: tuple
) -> None:
    gate = make_gate()
    grads, alphas = [], []
    for wrapped in (False, True):
        gate.zero_grad()
        torch.manual_seed(3)
        out = checkpoint(gate, *inputs, use_reentrant=False) if wrapped else gate(*inputs)
        (out.image_tokens.square().sum() + out.log_prob.sum()).backward()
        grads.append(tuple(p.grad.clone() for p in gate.parameters()))
        alphas.append(out.alpha)
    assert torch.equal(*alphas)
    same(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_a_generator_of_ones_own(
    make_gate: MakeGate, inputs: tuple, reentrant: bool
) -> None:
    """The second run would draw another action and differentiate that: it raises instead."""
    gate = make_gate()
    images = inputs[0].requires_grad_()

    def run(**options: object) -> None:
        out = checkpoint(
            lambda x: gate(x, *inputs[1:], **options).image_tokens, images, use_reentrant=reentrant
        )
        out.square().sum().backward()

    with pytest.raises(RuntimeError, match="generator: activation checkpointing"):
        run(generator=torch.Generator().manual_seed(1))
    run(generator=torch.Generator(), action_logit=torch.zeros(len(inputs[1])))
    run(generator=torch.Generator(), sample=False)
    out = gate(*inputs, generator=torch.Generator())
    out.image_tokens.sum().backward()


def test_deepcopy_is_equal_and_apart(make_gate: MakeGate, inputs: tuple) -> None:
    gate = make_gate().eval()
    twin = copy.deepcopy(gate)
    same(twin(*inputs), gate(*inputs))
    with torch.no_grad():
        twin.out_projection.weight.zero_()
    assert gate.out_projection.weight.any()


@pytest.mark.parametrize("policy", POLICIES)
def test_state_dict_round_trip(make_gate: MakeGate, inputs: tuple, policy: str) -> None:
    gate = make_gate(policy=policy).eval()
    buffer = io.BytesIO()
    torch.save(gate.state_dict(), buffer)
    buffer.seek(0)
    other = make_gate(policy=policy).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    same(other(*inputs), gate(*inputs))


def test_model_state_dict_and_pickle(make_model: MakeModel) -> None:
    model, other = make_model().eval(), make_model().eval()
    other.load_state_dict(model.state_dict())
    support, labels, query, _ = make_episodes(1, 2, 1, 2)
    text = make_text(1, 2)
    expected = model(support, labels, query, text, way=2).logits
    for twin in (other, pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(support, labels, query, text, way=2).logits, expected)


def test_export_in_evaluation(make_gate: MakeGate, inputs: tuple) -> None:
    gate = make_gate().eval()
    program = torch.export.export(gate, inputs)
    same(tuple(program.module()(*inputs)), gate(*inputs))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    same(tuple(torch.export.load(file).module()(*inputs)), gate(*inputs))


@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_a_model_exported_and_saved(make_model: MakeModel, text_scope: str) -> None:
    model = make_model(text_scope=text_scope).eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 1)
    given = (support, labels, query, make_text(2, 3, masked=True))
    program = torch.export.export(model, given, {"way": 3})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    found = torch.export.load(file).module()(*given, way=3)
    expected = model(*given, way=3)
    same((found.logits,), (expected.logits,))
    same(found.layers[0][1:], expected.layers[0][1:])


@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_a_model_exported_for_any_number_of_episodes(
    make_model: MakeModel, text_scope: str
) -> None:
    model = make_model(text_scope=text_scope).eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    free = {0: torch.export.Dim.DYNAMIC}
    shapes = {
        "support": free,
        "support_labels": free,
        "query": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},
        "text": TextTokens(free, None, free, None),  # type: ignore[arg-type]
        "way": None,
    }
    given = (support, labels, query, make_text(2, 3))
    program = torch.export.export(model, given, {"way": 3}, dynamic_shapes=shapes)
    support, labels, query, _ = make_episodes(3, 3, 1, 4)
    given = (support, labels, query, make_text(3, 3))
    same((program.module()(*given, way=3).logits,), (model(*given, way=3).logits,))


@pytest.mark.parametrize("scope", ["image", "episode"])
def test_export_with_a_free_batch(make_gate: MakeGate, scope: str) -> None:
    """A text for every image, or one for all."""
    gate = make_gate(alpha_scope=scope).eval()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}

    def example(images: int) -> tuple[Tensor, Tensor]:
        texts = images if scope == "image" else 1
        return torch.randn(images, 5, 16), torch.randn(texts, 4, TEXT_DIM)

    shapes = {"image_tokens": batch, "text_tokens": batch if scope == "image" else None}
    program = torch.export.export(gate, example(6), dynamic_shapes=shapes)
    other = example(9)
    same(tuple(program.module()(*other)), gate(*other))


@pytest.mark.parametrize(("dim", "tokens"), [(192, 196), (384, 49)])
@pytest.mark.parametrize("free", ["images", "image tokens", "text tokens"])
def test_export_at_the_sizes_of_the_method(dim: int, tokens: int, free: str) -> None:
    """Where what a backward pass would keep depends on the sizes, which an export must not."""
    gate = RLAGate(dim, TEXT_DIM, 8).eval()
    size = torch.export.Dim("size", min=2, max=2048)
    shapes = {
        "images": {"image_tokens": {0: size}, "text_tokens": None},
        "image tokens": {"image_tokens": {1: size}, "text_tokens": None},
        "text tokens": {"image_tokens": None, "text_tokens": {1: size}},
    }[free]
    example = torch.randn(80, tokens, dim), torch.randn(1, 45, TEXT_DIM)
    program = torch.export.export(gate, example, dynamic_shapes=shapes)
    other = {
        "images": (torch.randn(2, tokens, dim), example[1]),
        "image tokens": (torch.randn(80, 3, dim), example[1]),
        "text tokens": (example[0], torch.randn(1, 2, TEXT_DIM)),
    }[free]
    same(tuple(program.module()(*other)), gate(*other))


@pytest.mark.usefixtures("fresh_compiler")
def test_numbers_for_alpha_and_kappa_are_no_constants_of_a_graph(make_gate: MakeGate) -> None:
    """The second number makes it a symbol; from then on nothing is compiled."""
    gate = torch.compile(make_gate(), fullgraph=True, backend="aot_eager")
    policy = torch.compile(functional.beta_log_prob, fullgraph=True, backend="aot_eager")
    density = torch.compile(
        lambda kappa, at: MeanConcentrationBeta(logits=logits, concentration=kappa).log_prob(at),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    inputs = torch.randn(6, 5, 16), torch.randn(2, 4, TEXT_DIM)
    logits, action = torch.randn(2, 7).unbind()
    for number in range(12):
        if number > 1:
            torch.compiler.set_stance("fail_on_recompile")
        alpha, kappa = 0.05 + number / 16, 0.3 * 2**number
        assert gate(*inputs, alpha=alpha).alpha.tolist() == [pytest.approx(alpha)] * 2
        want = functional.beta_log_prob(logits, kappa, action)
        same((policy(logits, kappa, action),), (want,))
        same((density(kappa, torch.sigmoid(action)),), (want,), rtol=1e-5, atol=1e-5)


class Parts(nn.Module):
    """A policy's outputs as a program's own."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = BetaPolicy(3, 4)

    def forward(self, logits: Tensor, image: Tensor, text: Tensor) -> tuple:
        weights = [weight.detach() for weight in self.policy.network.weights()]
        step = functional.gate_policy(image, text, *weights, 10.0, deterministic=True)
        drawn = functional.beta_policy(logits, 10.0, deterministic=True)
        return drawn, step, self.policy(step.state, sample=False)


def test_the_policys_outputs_exported_and_saved() -> None:
    given = torch.randn(5), torch.randn(2, 4, 3), torch.randn(1, 2, 3)
    parts, file = Parts().eval(), io.BytesIO()
    torch.export.save(torch.export.export(parts, given), file)
    file.seek(0)
    found, expected = torch.export.load(file).module()(*given), parts(*given)
    for mine, theirs in zip(found, expected):
        assert type(mine) is type(theirs)
        same(mine, theirs)


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_distributed_data_parallel(make_model: MakeModel, text_scope: str) -> None:
    model = make_model(text_scope=text_scope)
    twin = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    support, labels, query, query_labels = make_episodes(2, 3, 1, 2)
    text = make_text(2, 3)
    for module in (wrapped, twin):
        for _ in range(2):  # a second step fails if a parameter went unused in the first
            module.zero_grad()
            torch.manual_seed(4)
            output = module(support, labels, query, text, way=3)
            loss, _ = total_loss(output, query_labels, text, ReinforceLoss())
            loss.backward()
    same(tuple(p.grad for p in model.parameters()), tuple(p.grad for p in twin.parameters()))


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("unit", [DVLA, RLAGate, GatePolicy, StateNetwork, nn.Linear])
def test_fully_sharded(make_model: MakeModel, unit: type[nn.Module]) -> None:
    """Weights that are sharded are whole only inside the forward of their unit."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = make_model()
    twin = copy.deepcopy(model)
    for module in [
        part for part in model.modules() if isinstance(part, unit) and part is not model
    ]:
        fsdp.fully_shard(module, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    support, labels, query, query_labels = make_episodes(2, 3, 1, 2)
    text = make_text(2, 3)
    for module in (model, twin):
        torch.manual_seed(4)
        output = module(support, labels, query, text, way=3)
        total_loss(output, query_labels, text, ReinforceLoss())[0].backward()
    got = tuple(p.grad.full_tensor() for p in model.parameters())
    torch.testing.assert_close(got, tuple(p.grad for p in twin.parameters()))


def test_inside_somebody_elses_sequential(make_gate: MakeGate, inputs: tuple) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = make_gate()
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
            out = self.gate(tokens, text)
            riding = torch.cat((out.image_tokens, out.fused), dim=1)
            return self.layer(riding)[:, : tokens.shape[1]]

    result = Block()(*inputs)
    assert result.shape == inputs[0].shape
    result.sum().backward()


def test_to_another_dtype_and_device(make_gate: MakeGate) -> None:
    gate = make_gate().to("meta")
    out = gate.text_projection(torch.empty(2, 4, TEXT_DIM, device="meta"))
    assert out.shape == (2, 4, 16)
    wide = make_gate().double()(
        torch.randn(2, 3, 16).double(), torch.randn(1, 2, TEXT_DIM).double()
    )
    assert wide.alpha.dtype == torch.float64
