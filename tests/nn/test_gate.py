"""RLAGate against method §3 written out, its options, and its errors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import dvla_fast
from dvla_fast.nn import GateOutput, RLAGate
from dvla_fast.nn.policy import POLICIES

from .conftest import TEXT_DIM

MakeGate = Callable[..., RLAGate]


def method_section_3(
    gate: RLAGate, z: Tensor, text: Tensor, alpha: Tensor, image_mask: Tensor, text_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas one image at a time, from the gate's weights: (z', H, state per image)."""
    heads, dim = gate.num_heads, gate.dim
    w_q, w_kt, w_vt = gate.text_qkv.weight.split(dim)
    w_kv, w_vv = gate.image_kv.weight.split(dim)
    per_group = z.shape[0] // text.shape[0]
    updated, mixed, states = [], [], []
    for i in range(z.shape[0]):
        keep_i, keep_t = image_mask[i], text_mask[i // per_group]
        h_t = text[i // per_group] @ gate.text_projection.weight.T + gate.text_projection.bias
        h_v = z[i]

        def split(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], heads, -1)  # [L, heads, head_dim]

        def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
            scores = torch.einsum("phc,lhc->hpl", q, k) / q.shape[-1] ** 0.5
            weights = scores[:, :, keep].softmax(-1)
            return torch.einsum("hpl,lhc->phc", weights, v[keep]).flatten(1)

        q = split(h_t @ w_q.T)
        image = attend(q, split(h_v @ w_kv.T), split(h_v @ w_vv.T), keep_i)
        inner = attend(q, split(h_t @ w_kt.T), split(h_t @ w_vt.T), keep_t)
        h = (alpha[i] * image + (1 - alpha[i]) * inner) @ gate.out_projection.weight.T
        h = h * keep_t.unsqueeze(1)
        updated.append(h_v + h[keep_t].mean(0))
        mixed.append(h)
        a, b = h_v[keep_i].mean(0), h_t[keep_t].mean(0)
        states.append(torch.cat((a, b, (a @ b / (a.norm() * b.norm())).reshape(1))))
    return torch.stack(updated), torch.stack(mixed), torch.stack(states)


def masks(images: int, n: int, groups: int, p: int) -> tuple[Tensor, Tensor]:
    image_mask = torch.rand(images, n) < 0.7
    text_mask = torch.rand(groups, p) < 0.7
    image_mask[:, 0] = text_mask[:, 0] = True
    return image_mask, text_mask


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    ("groups", "per_group", "n", "p"), [(1, 1, 1, 1), (2, 3, 7, 5), (3, 1, 4, 9)]
)
def test_gate_is_the_method_in_float64(
    make_gate: MakeGate, groups: int, per_group: int, n: int, p: int, masked: bool
) -> None:
    gate = make_gate(alpha_scope="image").double()
    images = groups * per_group
    z = torch.randn(images, n, 16, dtype=torch.float64)
    text = torch.randn(groups, p, TEXT_DIM, dtype=torch.float64)
    image_mask = torch.ones(images, n, dtype=torch.bool)
    text_mask = torch.ones(groups, p, dtype=torch.bool)
    given: dict[str, Tensor] = {}
    if masked:
        image_mask, text_mask = masks(images, n, groups, p)
        given = {"image_mask": image_mask, "text_mask": text_mask}
    out = gate(z, text, sample=True, **given)
    expected = method_section_3(gate, z, text, out.alpha, image_mask, text_mask)
    for got, wanted in zip((out.image_tokens, out.fused, out.state), expected):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert ((out.alpha > 0) & (out.alpha < 1)).all()


def test_gradients_are_those_of_the_method(make_gate: MakeGate) -> None:
    gate = make_gate(policy="fixed", fixed_alpha=0.3).double()
    text = torch.randn(2, 3, TEXT_DIM, dtype=torch.float64)
    z = torch.randn(4, 5, 16, dtype=torch.float64, requires_grad=True)
    ones = (torch.ones(4, 5, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool))
    parameters = [p for _, p in sorted(gate.named_parameters())]
    out = gate(z, text)
    loss = out.image_tokens.square().sum() + out.fused.sin().sum()
    got = torch.autograd.grad(loss, [z, *parameters])
    tokens, fused, _ = method_section_3(gate, z, text, torch.full((4,), 0.3, dtype=z.dtype), *ones)
    loss = tokens.square().sum() + fused.sin().sum()
    for mine, theirs in zip(got, torch.autograd.grad(loss, [z, *parameters])):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_shapes_of_the_public_contract() -> None:
    gate = dvla_fast.RLAGate(384)
    out = gate(torch.randn(6, 49, 384), torch.randn(2, 9, 512))
    assert isinstance(out, GateOutput)
    assert out.image_tokens.shape == (6, 49, 384)
    assert out.fused.shape == (6, 9, 384)
    for value in (out.alpha, out.action_logit, out.log_prob, out.entropy):
        assert value.shape == (2,)
    assert out.state.shape == (2, 769)


@pytest.mark.parametrize("scope", ["episode", "image"])
def test_policy_starts_at_one_half(scope: str) -> None:
    gate = RLAGate(16, TEXT_DIM, 2, alpha_scope=scope).eval()
    out = gate(3 * torch.randn(6, 5, 16), torch.randn(2, 4, TEXT_DIM))
    assert out.alpha.tolist() == [0.5] * (2 if scope == "episode" else 6)


def test_episode_state_pools_the_images_of_the_group(make_gate: MakeGate) -> None:
    z, text = torch.randn(6, 5, 16), torch.randn(2, 4, TEXT_DIM)
    shared = make_gate().eval()
    out = shared(z, text)
    torch.testing.assert_close(out.state[1, :16], z[3:].mean((0, 1)))
    # With supports first, images behind them change nothing about the decision.
    other = z.clone()
    other.view(2, 3, 5, 16)[:, 2] = 7.0
    first = shared(z, text, state_images=2)
    torch.testing.assert_close(first.alpha, shared(other, text, state_images=2).alpha)
    assert not torch.allclose(out.alpha, shared(other, text).alpha)
    # Several text groups can share one decision.
    joint = shared(z, text, episodes=1)
    assert joint.alpha.shape == (1,)
    torch.testing.assert_close(joint.state[0, :32], out.state[:, :32].mean(0))


@pytest.mark.parametrize("shape", [(), (2,), (6,)], ids=["scalar", "groups", "images"])
def test_replayed_gates(make_gate: MakeGate, shape: tuple[int, ...]) -> None:
    gate = make_gate()
    z, text = torch.randn(6, 5, 16), torch.randn(2, 4, TEXT_DIM)
    alpha = torch.rand(shape, requires_grad=True)
    out = gate(z, text, alpha=alpha)
    assert out.alpha.requires_grad
    assert not out.action_logit.requires_grad
    per_image = alpha.expand(6) if shape == () else alpha.repeat_interleave(6 // alpha.numel())
    expected = gate(z, text, alpha=per_image)
    torch.testing.assert_close(out.image_tokens, expected.image_tokens)
    one_by_one = [
        gate(z[i : i + 1], text[i // 3 : i // 3 + 1], alpha=per_image[i]) for i in range(6)
    ]
    torch.testing.assert_close(
        out.fused, torch.cat([o.fused for o in one_by_one]), rtol=1e-5, atol=1e-6
    )
    assert not out.log_prob.any()
    assert not out.entropy.any()


def test_replaying_a_number_and_the_own_decision(make_gate: MakeGate) -> None:
    gate = make_gate()
    z, text = torch.randn(6, 5, 16), torch.randn(2, 4, TEXT_DIM)
    torch.testing.assert_close(
        gate(z, text, alpha=0.25).fused, gate(z, text, alpha=torch.tensor(0.25)).fused
    )
    drawn = gate(z, text, sample=True)
    torch.testing.assert_close(gate(z, text, alpha=drawn.alpha).fused, drawn.fused)


@pytest.mark.parametrize("policy", ["beta", "categorical"])
def test_stored_actions_are_re_evaluated(make_gate: MakeGate, policy: str) -> None:
    gate = make_gate(policy=policy, alpha_scope="image")
    z, text = torch.randn(6, 5, 16), torch.randn(2, 4, TEXT_DIM)
    drawn = gate(z, text, sample=True)
    again = gate(z, text, action_logit=drawn.action_logit)
    for name in ("alpha", "log_prob", "entropy", "fused", "action_logit"):
        torch.testing.assert_close(getattr(again, name), getattr(drawn, name))
    with torch.no_grad():
        for parameter in gate.policy.parameters():
            parameter.add_(0.5)
    moved = gate(z, text, action_logit=drawn.action_logit)
    torch.testing.assert_close(moved.alpha, drawn.alpha)
    assert not torch.allclose(moved.log_prob, drawn.log_prob)


def test_sampling_follows_mode_and_generator(make_gate: MakeGate) -> None:
    gate = make_gate(alpha_scope="image")
    z, text = torch.randn(6, 5, 16), torch.randn(2, 4, TEXT_DIM)

    def draw(**options: object) -> Tensor:
        return gate(z, text, **options).alpha

    assert not torch.equal(draw(), draw())
    one = draw(generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, draw(generator=torch.Generator().manual_seed(5)))
    gate.eval()
    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(sample=True), draw(sample=True))
    assert torch.equal(draw(sample=False), draw())


@pytest.mark.parametrize("policy", POLICIES)
def test_gradient_reaches_alpha_only_where_it_should(make_gate: MakeGate, policy: str) -> None:
    gate = make_gate(policy=policy)
    out = gate(torch.randn(4, 5, 16), torch.randn(2, 3, TEXT_DIM))
    out.image_tokens.square().sum().backward()
    touched = any(
        p.grad is not None and bool(p.grad.abs().sum() > 0) for p in gate.policy.parameters()
    )
    assert touched == (policy in ("static", "mlp"))
    assert out.alpha.requires_grad == touched


def test_nothing_attended_leaves_the_image_alone(make_gate: MakeGate) -> None:
    gate = make_gate()
    z, text = torch.randn(4, 5, 16), torch.randn(2, 3, TEXT_DIM)
    text_mask = torch.tensor([[False] * 3, [True] * 3])
    out = gate(z, text, text_mask=text_mask)
    torch.testing.assert_close(out.image_tokens[:2], z[:2])
    assert not out.fused[:2].any()
    assert all(value.isfinite().all() for value in out)


def test_text_work_is_done_once_per_group(make_gate: MakeGate) -> None:
    gate = make_gate()
    rows: list[int] = []
    gate.text_qkv.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[0]))
    gate(torch.randn(12, 5, 16), torch.randn(2, 4, TEXT_DIM))
    assert rows == [2]


def test_meta_device() -> None:
    """Shapes without data, as large models are planned."""
    with torch.device("meta"):
        out = RLAGate(16, TEXT_DIM, 2)(*_tokens())
    assert out.image_tokens.shape == (4, 5, 16)
    assert out.fused.device.type == "meta"


class LowRank(torch.nn.Module):
    """A linear layer with a low-rank correction, as LoRA libraries put it in a layer's place."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class LowRankWithWeight(LowRank):
    """One that shows its layer's weight, which alone is not what it computes."""

    @property
    def weight(self) -> Tensor:
        return self.layer.weight


@pytest.mark.parametrize("kind", [LowRank, LowRankWithWeight])
@pytest.mark.parametrize("name", ["image_kv", "out_projection"])
def test_replaced_layers_count(make_gate: MakeGate, name: str, kind: type[LowRank]) -> None:
    """What stands in the place of a layer is called; its own weight alone would say otherwise."""
    gate, (z, text) = make_gate(), _tokens()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    layer = getattr(gate, name)
    adapted = kind(layer)
    setattr(gate, name, adapted)
    got = gate(z, text, text_mask=mask, alpha=0.3)
    setattr(gate, name, layer)
    layer.weight.data += adapted.up.weight @ adapted.down.weight
    expected = gate(z, text, text_mask=mask, alpha=0.3)
    torch.testing.assert_close(got.image_tokens, expected.image_tokens)
    torch.testing.assert_close(got.fused, expected.fused)


@pytest.mark.parametrize("name", ["hidden", "out"])
@pytest.mark.parametrize("policy", ["beta", "categorical"])
def test_replaced_layers_of_the_policy_count(make_gate: MakeGate, name: str, policy: str) -> None:
    gate, (z, text) = make_gate(policy=policy), _tokens()
    network = gate.policy.network
    torch.nn.init.normal_(network.out.weight)
    layer = getattr(network, name)
    calls: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _m, _a, out: calls.append(out))
    hooked = gate(z, text, sample=False)
    hook.remove()
    assert len(calls) == 1
    plain = gate(z, text, action_logit=hooked.action_logit)
    torch.testing.assert_close(hooked.log_prob, plain.log_prob)
    adapted = LowRank(layer)
    setattr(network, name, adapted)
    got = gate(z, text, action_logit=hooked.action_logit)
    setattr(network, name, layer)
    layer.weight.data += adapted.up.weight @ adapted.down.weight
    expected = gate(z, text, action_logit=hooked.action_logit)
    torch.testing.assert_close(got.log_prob, expected.log_prob)
    assert not torch.allclose(got.log_prob, plain.log_prob)


def test_quantised_layers_are_called(make_gate: MakeGate) -> None:
    """All linear layers of a gate in int8: nothing of them is a float32 weight any more."""
    gate, (z, text) = make_gate().eval(), _tokens()
    expected = gate(z, text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about its own quantisation
        small = torch.ao.quantization.quantize_dynamic(gate, {torch.nn.Linear})
    got = small(z, text)
    assert isinstance(small.image_kv, torch.ao.nn.quantized.dynamic.Linear)
    torch.testing.assert_close(got.image_tokens, expected.image_tokens, atol=0.2, rtol=0.05)
    torch.testing.assert_close(got.alpha, expected.alpha, atol=0.05, rtol=0.0)


def test_dtypes_under_autocast(make_gate: MakeGate) -> None:
    gate, (z, text) = make_gate(), _tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for image in (z, z.bfloat16()):
            for words in (text, text.bfloat16()):
                assert gate(image, words, alpha=0.5).image_tokens.dtype == image.dtype
        for image, words, name in ((z.half(), text, "image"), (z.double(), text, "image"),
                                   (z, text.double(), "text")):  # fmt: skip
            with pytest.raises(TypeError, match=f"{name}_tokens: dtype"):
                gate(image, words)


@pytest.mark.parametrize("name", ["image_kv", "out_projection"])
def test_hooks_run(make_gate: MakeGate, name: str) -> None:
    gate, (z, text) = make_gate(), _tokens()
    expected = gate(z, text, alpha=0.3)
    shapes: list[torch.Size] = []
    hook = getattr(gate, name).register_forward_hook(lambda _m, _a, out: shapes.append(out.shape))
    got = gate(z, text, alpha=0.3)
    assert shapes == [{"image_kv": (*z.shape[:2], 32), "out_projection": got.fused.shape}[name]]
    torch.testing.assert_close(got.image_tokens, expected.image_tokens)
    hook.remove()
    assert torch.equal(gate(z, text, alpha=0.3).image_tokens, expected.image_tokens)
    assert len(shapes) == 1


@pytest.mark.parametrize("name", ["image_kv", "out_projection", "policy.network.out"])
def test_replaced_forwards_run(make_gate: MakeGate, name: str) -> None:
    """Of the instance, as accelerate puts them in: the layer's type and hooks say nothing."""
    gate, (z, text) = make_gate(), _tokens()
    expected = gate(z, text, sample=False)
    layer, calls = gate.get_submodule(name), []
    forward = layer.forward

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return forward(x)

    layer.forward = counted  # type: ignore[method-assign]
    got = gate(z, text, sample=False)
    assert len(calls) == 1
    torch.testing.assert_close(got.image_tokens, expected.image_tokens)


@pytest.mark.parametrize("policy", POLICIES)
def test_offloaded_gates_run(make_gate: MakeGate, policy: str) -> None:
    """accelerate leaves weights on the meta device and fetches them when a layer is called."""
    accelerate = pytest.importorskip("accelerate")
    gate, (z, text) = make_gate(policy=policy).eval(), _tokens()
    expected = gate(z, text)
    accelerate.cpu_offload(gate)
    assert gate.image_kv.weight.is_meta
    for got, wanted in zip(gate(z, text), expected):
        torch.testing.assert_close(got, wanted)
    assert gate.explain(z, text).image.shape == (4, 2, 3, 5)
    with pytest.raises(ValueError, match="text_tokens: on meta"):
        gate(z, text.to("meta"))


def test_numbers_of_numpy_are_numbers(make_gate: MakeGate) -> None:
    gate, (z, text) = make_gate(), _tokens()
    got = gate(z, text, alpha=np.float32(0.25))
    assert torch.equal(got.fused, gate(z, text, alpha=0.25).fused)
    assert gate(z, text, episodes=np.int64(1), state_images=np.int64(2)).alpha.shape == (1,)


def _tokens(images: int = 4, groups: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(images, 5, 16), torch.randn(groups, 3, TEXT_DIM)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"image_tokens: shape \(4, 5, 8\)", lambda z, t: ((z[..., :8], t), {})),
        (ValueError, "image_tokens: shape", lambda z, t: ((z[0], t), {})),
        (ValueError, "text_tokens: shape", lambda z, t: ((z, t[..., :8]), {})),
        (TypeError, "image_tokens: dtype torch.float64", lambda z, t: ((z.double(), t), {})),
        (TypeError, "text_tokens: dtype torch.int64", lambda z, t: ((z, t.long()), {})),
        (ValueError, "3 images do not fall into 2", lambda z, t: ((z[:3], t), {})),
        (ValueError, "text_tokens: .* nothing to decide on", lambda z, t: ((z, t[:0]), {})),
        (ValueError, "image_tokens: .* nothing to decide on", lambda z, t: ((z[:0], t), {})),
        (TypeError, "image_tokens: expected a tensor", lambda _, t: ((None, t), {})),
        (ValueError, "on meta", lambda z, t: ((z.to("meta"), t), {})),
        (TypeError, "image_mask", lambda z, t: ((z, t), {"image_mask": torch.ones(4, 5)})),
        (
            ValueError,
            "text_mask: shape",
            lambda z, t: ((z, t), {"text_mask": torch.ones(4, 3, dtype=torch.bool)}),
        ),
        (ValueError, "alpha: shape", lambda z, t: ((z, t), {"alpha": torch.rand(3)})),
        (ValueError, "alpha: expected val", lambda z, t: ((z, t), {"alpha": torch.tensor(1.5)})),
        (ValueError, "alpha: expected val", lambda z, t: ((z, t), {"alpha": torch.tensor(-0.1)})),
        (ValueError, "alpha: expected val", lambda z, t: ((z, t), {"alpha": z[:2, 0, 0] * 0 / 0})),
        (TypeError, "alpha: expected", lambda z, t: ((z, t), {"alpha": torch.ones(2).long()})),
        (ValueError, "on meta, the tok", lambda z, t: ((z, t), {"alpha": z[0, 0, 0].to("meta")})),
        (ValueError, "action_logit: shape", lambda z, t: ((z, t), {"action_logit": z[:, 0, 0]})),
        (ValueError, "exclude each", lambda z, t: ((z, t), {"alpha": 0.5, "action_logit": z[0]})),
        (TypeError, "action_logit: expected a", lambda z, t: ((z, t), {"action_logit": 0.3})),
        (TypeError, "image_mask: expected a tensor", lambda z, t: ((z, t), {"image_mask": [True]})),
        (TypeError, "alpha: expected a tensor", lambda z, t: ((z, t), {"alpha": "0.3"})),
        (TypeError, "episodes: expected a whole", lambda z, t: ((z, t), {"episodes": 1.0})),
        (TypeError, "state_images: expected a", lambda z, t: ((z, t), {"state_images": 2.0})),
        (ValueError, "state_images", lambda z, t: ((z, t), {"state_images": 3})),
        (ValueError, "episodes: 2 text groups", lambda z, t: ((z, t), {"episodes": 3})),
    ],
)
def test_wrong_calls(
    make_gate: MakeGate, error: type[Exception], match: str, change: Callable[..., tuple]
) -> None:
    args, options = change(*_tokens())
    with pytest.raises(error, match=match):
        make_gate()(*args, **options)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("dim: 20 is not a multiple of num_heads = 8", {"dim": 20}),
        ("text_dim: expected a positive", {"dim": 16, "text_dim": 0}),
        ("alpha_scope: unknown 'batch'", {"dim": 16, "alpha_scope": "batch"}),
        ("policy: unknown 'gauss'", {"dim": 16, "policy": "gauss"}),
        ("concentration: expected", {"dim": 16, "concentration": 0.0}),
        ("concentration: expected a positive finite", {"dim": 16, "concentration": 1e39}),
        ("fixed_alpha: expected", {"dim": 16, "policy": "fixed", "fixed_alpha": 1.5}),
        ("hidden_dim: expected", {"dim": 16, "hidden_dim": 0}),
    ],
)
def test_wrong_constructions(match: str, options: dict) -> None:
    with pytest.raises(ValueError, match=match):
        RLAGate(**options)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("dim: expected a whole number", {"dim": 16.0}),
        ("hidden_dim: expected a whole number", {"dim": 16, "hidden_dim": 12.0}),
        ("hidden_dim: expected a whole number, got True", {"dim": 16, "hidden_dim": True}),
        ("dtype: expected a floating-point", {"dim": 16, "dtype": torch.int64}),
        ("concentration: expected a number", {"dim": 16, "concentration": "10"}),
        ("fixed_alpha: expected a number", {"dim": 16, "fixed_alpha": None}),
    ],
)
def test_constructions_of_wrong_types(match: str, options: dict) -> None:
    with pytest.raises(TypeError, match=match):
        RLAGate(**options)


@pytest.mark.parametrize("policy", ["fixed", "static", "mlp"])
def test_deterministic_policies_have_no_action_to_score(make_gate: MakeGate, policy: str) -> None:
    with pytest.raises(ValueError, match="action_logit"):
        make_gate(policy=policy)(*_tokens(), action_logit=torch.zeros(2))


@pytest.mark.parametrize("option", ["state_images", "episodes"])
def test_image_scope_has_no_supports(make_gate: MakeGate, option: str) -> None:
    with pytest.raises(ValueError, match="only alpha_scope='episode'"):
        make_gate(alpha_scope="image")(*_tokens(), **{option: 1})


def test_empty_tokens_and_impossible_gates_raise() -> None:
    gate = RLAGate(8, 8, 2)
    image, text = torch.randn(2, 3, 8), torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match=r"text_tokens.*has no token"):
        gate(image, text[:, :0], alpha=0.5)
    with pytest.raises(ValueError, match=r"image_tokens.*has no token"):
        gate(image[:, :0], text)
    with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\]"):
        gate(image, text, alpha=1.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_past_what_lies_at_masked_text(make_gate: MakeGate, bad: float) -> None:
    gate, mask = make_gate(), torch.tensor([[True, True, False, False], [True, False, True, True]])
    tokens, text = torch.randn(6, 5, 16), torch.randn(2, 4, TEXT_DIM)
    gradients = []
    for value in (0.0, bad):
        gate.zero_grad()
        given = text.masked_fill(~mask.unsqueeze(-1), value)
        out = gate(tokens, given, text_mask=mask, sample=False)
        (out.image_tokens.square().sum() + out.log_prob.sum()).backward()
        gradients.append([weight.grad for weight in gate.parameters()])
    for clean, got in zip(*gradients):
        torch.testing.assert_close(got, clean)
