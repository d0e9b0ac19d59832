"""Attention on demand: the gate's own weights, with masks, for one gate and for a whole model."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dvla_fast.nn import DVLA, GateAttention, RLAGate, explain_episodes, prototype_logits
from dvla_fast.nn.dvla import TEXT_SCOPES
from dvla_fast.nn.gate import per_image

from .conftest import TEXT_DIM, make_episodes, make_text

MakeGate = Callable[..., RLAGate]


def by_hand(
    gate: RLAGate, z: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weights of method §3 in float64, image by image and head by head."""
    gate = gate.double()
    heads, dim = gate.num_heads, gate.dim
    z, text = z.double(), text.double()
    w_q, w_kt, _ = gate.text_qkv.weight.split(dim)
    w_kv = gate.image_kv.weight[:dim]
    groups, per_group = text.shape[0], z.shape[0] // text.shape[0]
    image = torch.zeros(z.shape[0], heads, text.shape[1], z.shape[1], dtype=torch.float64)
    inner = torch.zeros(groups, heads, text.shape[1], text.shape[1], dtype=torch.float64)
    for t in range(groups):
        h_t = text[t] @ gate.text_projection.weight.T + gate.text_projection.bias
        keep_t = torch.ones(len(h_t)).bool() if text_mask is None else text_mask[t]
        for h in range(heads):
            part = slice(h * dim // heads, (h + 1) * dim // heads)
            q = (h_t @ w_q.T)[:, part] * (dim // heads) ** -0.5
            for p in keep_t.nonzero()[:, 0]:
                scores = (h_t @ w_kt.T)[:, part] @ q[p]
                inner[t, h, p, keep_t] = scores[keep_t].softmax(0)
                for i in range(t * per_group, (t + 1) * per_group):
                    keep = torch.ones(z.shape[1]).bool() if image_mask is None else image_mask[i]
                    scores = (z[i] @ w_kv.T)[:, part] @ q[p]
                    image[i, h, p, keep] = scores[keep].softmax(0)
    return image, inner


def cases(masked: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    z, text = 3 * torch.randn(6, 7, 16), 3 * torch.randn(2, 5, TEXT_DIM)
    if not masked:
        return z, text, None, None
    image_mask, text_mask = torch.rand(6, 7) < 0.6, torch.rand(2, 5) < 0.6
    image_mask[:, 0] = text_mask[:, 0] = True
    image_mask[4] = False  # an image without a single token
    text_mask[0, 1] = False
    return z, text, image_mask, text_mask


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_weights_are_those_of_the_method(make_gate: MakeGate, masked: bool) -> None:
    gate = make_gate(alpha_scope="image").eval()
    z, text, image_mask, text_mask = cases(masked)
    found = gate.explain(z, text, image_mask=image_mask, text_mask=text_mask)
    assert isinstance(found, GateAttention)
    out = gate(z, text, image_mask=image_mask, text_mask=text_mask)
    assert torch.equal(found.alpha, out.alpha)
    assert not found.image.requires_grad
    image, inner = by_hand(gate, z, text, image_mask, text_mask)
    assert found.image.dtype == torch.float32
    torch.testing.assert_close(found.image.double(), image, rtol=1e-5, atol=2e-7)
    torch.testing.assert_close(found.text.double(), inner, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_weights_and_alpha_make_the_fused_tokens(make_gate: MakeGate, masked: bool) -> None:
    """What is shown is what was computed: mixing values by the weights gives H again."""
    gate = make_gate().eval()
    z, text, image_mask, text_mask = cases(masked)
    found = gate.explain(z, text, image_mask=image_mask, text_mask=text_mask, alpha=0.3)
    assert found.alpha.tolist() == pytest.approx([0.3, 0.3])
    with torch.no_grad():
        _, _, text_value = gate._heads(gate.text_qkv(gate.text_projection(text)), 3)
        _, image_value = gate._heads(gate.image_kv(z), 2)
        seen = found.image @ image_value
        inner = (found.text @ text_value).repeat_interleave(3, 0)
        mixed = 0.3 * seen + 0.7 * inner
        fused = gate.out_projection(mixed.transpose(1, 2).flatten(2))
        out = gate(z, text, image_mask=image_mask, text_mask=text_mask, alpha=0.3)
    torch.testing.assert_close(fused, out.fused, rtol=1e-4, atol=1e-5)


def test_explain_takes_the_mean_and_can_sample(make_gate: MakeGate) -> None:
    gate = make_gate().train()
    z, text, _, _ = cases(False)
    mean = gate(z, text, sample=False).alpha
    assert torch.equal(gate.explain(z, text).alpha, mean)
    drawn = gate.explain(z, text, sample=True, generator=torch.Generator().manual_seed(1)).alpha
    assert not torch.equal(drawn, mean)
    with pytest.raises(ValueError, match="image_tokens"):
        gate.explain(z[..., :3], text)


@pytest.mark.parametrize("alpha_scope", ["episode", "image"])
@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_whole_model(make_model: Callable[..., DVLA], text_scope: str, alpha_scope: str) -> None:
    model = make_model(text_scope=text_scope, alpha_scope=alpha_scope).eval()
    support, labels, query, _ = make_episodes(2, 3, 2, 4)
    text = make_text(2, 3, masked=True)
    found = explain_episodes(model, support, labels, query, text, way=3)
    plain = model(support, labels, query, text, way=3)
    assert torch.equal(found.output.logits, plain.logits)
    assert found.features.shape == (2, 18, model.backbone.feature_dim)
    shown, asked = found.features.split((6, 12), 1)  # classified as they are shown
    again = prototype_logits(shown, labels, asked, 3, model.temperature).gather(
        2, plain.logits.argmax(-1, keepdim=True)
    )
    torch.testing.assert_close(again.squeeze(2), plain.logits.amax(-1))
    images = 18 if text_scope == "episode" else 6
    for layer, trace in zip(found.layers, plain.layers, strict=True):
        tokens = 9 if text_scope == "episode" else 3
        assert layer.location == trace.location
        assert torch.equal(layer.alpha, trace.alpha)
        assert layer.image.shape[:4] == (2, images, 2, tokens)
        assert layer.text.shape == (2, 1 if text_scope == "episode" else 6, 2, tokens, tokens)
        sums = layer.image.sum(-1)
        assert text.mask is not None
        if text_scope == "episode":
            expected = per_image(text.mask, 36)
        else:
            expected = text.mask.unflatten(1, (3, -1))[torch.arange(2)[:, None], labels]
        assert expected is not None
        rows = expected.reshape(2, images, 1, tokens).expand_as(sums).float()
        torch.testing.assert_close(sums, rows)


def test_whole_model_can_sample(make_model: Callable[..., DVLA]) -> None:
    model = make_model().eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 1)
    text = make_text(2, 3)

    def drawn(**options: bool) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        found = explain_episodes(
            model, support, labels, query, text, way=3, generator=generator, **options
        )
        return found.layers[0].alpha

    assert torch.equal(drawn(sample=True), drawn(sample=True))
    assert not torch.equal(drawn(sample=True), drawn())


def test_candidates_are_not_kept(make_model: Callable[..., DVLA]) -> None:
    """Their tokens are many (way times the queries'), and nobody looks at their attention."""
    model = make_model(text_scope="candidate").eval()
    given: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []
    for gate in model.gates:
        gate.register_forward_pre_hook(lambda _m, args: given.append(weakref.ref(args[0])))
    model.backbone.register_forward_hook(
        lambda _m, _args, _out: alive.append([kept() is not None for kept in given])
    )
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    explain_episodes(model, support, labels, query, make_text(2, 3), way=3)
    assert alive == [[True, True], [True, True, False, False]]  # supports, then candidates


def test_prefix_and_replayed_gates(make_model: Callable[..., DVLA]) -> None:
    model = make_model().eval()
    support, labels, query, _ = make_episodes(1, 2, 1, 2)
    text = make_text(1, 2)
    whole = explain_episodes(model, support, labels, query, text, way=2, alpha=0.9)
    maps = [model.prefix(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (support, query)]
    again = explain_episodes(
        model, maps[0], labels, maps[1], text, way=2, alpha=0.9, from_prefix=True
    )
    for first, second in zip(whole.layers, again.layers):
        torch.testing.assert_close(first.image, second.image)
        assert first.alpha.tolist() == pytest.approx([0.9])


def test_a_normal_forward_pays_nothing(
    make_model: Callable[..., DVLA], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an explanation no hook is left, and forward never asks for weights."""
    model = make_model().eval()
    support, labels, query, _ = make_episodes(1, 2, 1, 2)
    text = make_text(1, 2)
    explain_episodes(model, support, labels, query, text, way=2)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("explain was called")

    monkeypatch.setattr(RLAGate, "explain", refuse)
    model(support, labels, query, text, way=2)
    for module in model.modules():
        assert not module._forward_hooks
    with pytest.raises(AssertionError, match="explain was called"):
        explain_episodes(model, support, labels, query, text, way=2)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_lies_at_masked_places_is_not_seen(make_gate: MakeGate, bad: float) -> None:
    gate = make_gate().eval()
    z, text, image_mask, text_mask = cases(True)
    masks = {"image_mask": image_mask, "text_mask": text_mask}
    clean = gate.explain(z, text, **masks)
    z = z.masked_fill(~image_mask.unsqueeze(-1), bad)
    text = text.masked_fill(~text_mask.unsqueeze(-1), bad)
    found = gate.explain(z, text, **masks)
    for name in ("image", "text", "alpha"):
        torch.testing.assert_close(getattr(found, name), getattr(clean, name))
