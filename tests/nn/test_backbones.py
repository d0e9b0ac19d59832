"""Gated backbones: equal to the plain network without gates, and faithful carriers with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dvla_fast import _extension
from dvla_fast.errors import MissingDependencyError
from dvla_fast.nn import (
    GatedBackbone,
    GatedTokens,
    Location,
    SmallConvAttention,
    build_backbone,
    visformer_tiny,
)
from dvla_fast.nn.backbones import small as small_backbone
from dvla_fast.nn.backbones.base import drop_path
from dvla_fast.nn.backbones.visformer import _normed


@pytest.fixture(scope="module")
def visformer() -> GatedBackbone:
    torch.manual_seed(0)
    # Shallow stages: the code paths of the full depths 7, 4, 4 in a fraction of the time.
    return visformer_tiny(64, depth=(1, 2, 2), locations=((2, 1), (3, 0))).eval()


@pytest.fixture(scope="module")
def small() -> GatedBackbone:
    torch.manual_seed(0)
    return SmallConvAttention(image_size=16).eval()


@pytest.fixture(params=["small", "visformer"])
def backbone(request: pytest.FixtureRequest) -> GatedBackbone:
    return request.getfixturevalue(request.param)


def images_for(backbone: GatedBackbone, count: int = 2) -> Tensor:
    small = isinstance(backbone, SmallConvAttention)
    torch.manual_seed(1)
    return torch.randn(count, 1, 16, 16) if small else torch.randn(count, 3, 64, 64)


@pytest.mark.parametrize(("size", "sides"), [(224, (28, 14, 7)), (84, (21, 10, 5))])
def test_visformer_tiny_is_timms(size: int, sides: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    backbone = visformer_tiny(size).eval()
    net = backbone.net
    count = sum(p.numel() for p in backbone.parameters())
    assert 9.5e6 < count < 11e6
    x = torch.randn(1, 3, size, size)
    seen: dict[Location, tuple[int, ...]] = {}

    def watch(location: Location, tokens: Tensor) -> None:
        seen[location] = tuple(tokens.shape)

    with torch.inference_mode():
        features = backbone(x, watch, locations=backbone.blocks)
        assert torch.equal(features, net.forward_features(x).mean((2, 3)))
        assert torch.equal(features, net(x))
    assert backbone.feature_dim == features.shape[1] == 384
    assert backbone.locations == ((2, 3), (3, 0))
    assert len(net.stem) == (6 if size == 84 else 3)  # the authors' 84 px stem has two convolutions
    assert [seen[s, 0] for s in (1, 2, 3)] == [
        (1, side**2, width) for side, width in zip(sides, (96, 192, 384))
    ]
    assert all(shape[2] == backbone.widths[location] for location, shape in seen.items())
    assert tuple(seen) == backbone.blocks


def test_small_stem_takes_odd_sizes_and_gates_where_asked() -> None:
    backbone = visformer_tiny(33, depth=(1, 1, 1), locations=[(3, 0)]).eval()
    assert backbone.locations == ((3, 0),)
    assert backbone(torch.randn(1, 3, 33, 33)).shape == (1, 384)


def test_small_backbone_is_small_and_sized_as_said() -> None:
    backbone = SmallConvAttention()
    assert 1e5 < sum(p.numel() for p in backbone.parameters()) < 3e5
    assert backbone.locations == ((2, 1), (3, 0))
    assert [backbone.widths[s, 0] for s in (1, 2, 3)] == [32, 64, 96]
    assert backbone(torch.randn(2, 1, 16, 16)).shape == (2, 96)


@pytest.mark.parametrize(
    ("size", "channels", "tokens"),
    [(8, 1, 16), (16, 3, 64), (28, 1, 196), (32, 3, 64), (84, 3, 100)],
)
def test_small_backbone_on_other_images(size: int, channels: int, tokens: int) -> None:
    backbone = SmallConvAttention(channels, size, width=8).eval()
    shapes: list[int] = []
    out = backbone(torch.randn(2, channels, size, size), lambda _, t: shapes.append(t.shape[1]))
    assert out.shape == (2, 24)
    assert shapes[0] == tokens


def test_gates_that_change_nothing_change_nothing(backbone: GatedBackbone) -> None:
    x = images_for(backbone)
    plain = backbone(x)
    torch.testing.assert_close(backbone(x, lambda _l, _t: None), plain, rtol=0, atol=0)
    torch.testing.assert_close(backbone(x, lambda _l, t: (t, None)), plain, rtol=1e-5, atol=1e-5)


class _OtherBatchNorm(nn.BatchNorm2d):
    """Stands for one whose statistics processes share."""


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, _OtherBatchNorm])
def test_padding_does_not_enter_statistics(
    visformer: GatedBackbone, kind: type[nn.BatchNorm2d], momentum: float | None
) -> None:
    """In training, extra tokens with and without padding: same result, gradients and averages."""
    location = (3, 0)
    x, extra = torch.randn(3, 384, 2, 2), torch.randn(3, 4, 384)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[:, [0, 2, 5]] = False
    padded = torch.full((3, 7, 384), 5.0)
    padded[mask] = extra.flatten(0, 1)
    found = []
    for tokens, keep in ((extra, None), (padded, mask)):
        backbone = copy.deepcopy(visformer)
        block = backbone.net.stage3[0].train()
        block.norm1.momentum = momentum
        given = [x.clone().requires_grad_(), tokens.clone().requires_grad_()]
        for _ in range(2):
            if keep is not None:
                block.norm1.__class__ = kind
            out = backbone.run_block(location, *given, keep)
        out.square().sum().backward()
        seen = given[1].grad if keep is None else given[1].grad[mask].view(3, 4, -1)
        found.append((out, given[0].grad, seen, block.norm1.weight.grad, block.norm1.bias.grad))
        found[-1] += tuple(block.norm1.buffers())
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert not given[1].grad[~mask].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_without_padding_keep_the_dtype(dtype: torch.dtype) -> None:
    norm = nn.BatchNorm2d(3, track_running_stats=False).to(dtype).eval()
    x = torch.randn(2, 3, 5, 1).to(dtype)
    everything = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    got = _normed(norm, x, everything)
    assert got.dtype == dtype
    torch.testing.assert_close(got, norm(x))


def test_padding_does_not_enter_statistics_that_are_not_kept() -> None:
    norm = nn.BatchNorm2d(3, track_running_stats=False).eval()
    x, seen = torch.randn(2, 3, 5, 1), torch.tensor([True, True, False, True, False])
    mask = seen.expand(2, 1, 1, 5)
    got = _normed(norm, x.where(seen[:, None], 50.0), mask)
    torch.testing.assert_close(got[:, :, seen], norm(x[:, :, seen]))


def test_gates_are_called_in_order_where_asked(backbone: GatedBackbone) -> None:
    calls: list[Location] = []
    x = images_for(backbone)
    backbone(x, lambda location, _t: calls.append(location))
    assert tuple(calls) == backbone.locations
    calls.clear()
    backbone(x, lambda location, _t: calls.append(location), locations=[(3, 1), (1, 0)])
    assert calls == [(1, 0), (3, 1)]


def test_extra_tokens_inform_the_block_and_leave(backbone: GatedBackbone) -> None:
    x = images_for(backbone)
    torch.manual_seed(2)
    extras = {at: torch.randn(2, 3, backbone.widths[at]) for at in backbone.locations}
    shapes: list[int] = []

    def gate(location: Location, tokens: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(tokens.shape[1])
        return tokens, extras[location]

    with_extra = backbone(x, gate)
    assert with_extra.shape == (2, backbone.feature_dim)
    assert not torch.allclose(with_extra, backbone(x), atol=1e-3)
    assert shapes[0] == 4 * shapes[1]  # riding tokens do not pile up

    def shuffled(location: Location, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens, extras[location].flip(1)

    torch.testing.assert_close(backbone(x, shuffled), with_extra, rtol=1e-4, atol=1e-4)


def test_riding_tokens_are_as_if_they_were_image_tokens(backbone: GatedBackbone) -> None:
    location = backbone.locations[1]
    torch.manual_seed(4)
    width = backbone.widths[location]
    x, extra = torch.randn(2, width, 2, 3), torch.randn(2, 4, width)
    got = backbone.run_block(location, x, extra, None)
    column = torch.cat((x.flatten(2).transpose(1, 2), extra), 1).transpose(1, 2).unsqueeze(-1)
    whole = backbone.run_block(location, column, None, None)[:, :, :6, 0].unflatten(2, (2, 3))
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)


class Adapted(torch.nn.Module):
    """A layer with a correction beside it that shows the layer's weights, as adapters do."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.correction = layer, copy.deepcopy(layer)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.correction(x)


@pytest.mark.parametrize("riding", [False, True], ids=["alone", "riding"])
def test_adapters_of_the_attention_count(backbone: GatedBackbone, riding: bool) -> None:
    changed = copy.deepcopy(backbone)
    location = changed.locations[0]
    stages = changed if isinstance(changed, SmallConvAttention) else changed.net
    block = getattr(stages, f"stage{location[0]}")[location[1]]
    owner = getattr(block, "attn", block)
    width = changed.widths[location]
    x, extra = torch.randn(2, width, 2, 3), torch.randn(2, 4, width) if riding else None
    plain = owner.qkv
    owner.qkv = Adapted(plain)
    got = changed.run_block(location, x, extra, None)
    got.sum().backward()
    assert owner.qkv.correction.weight.grad is not None
    owner.qkv = plain
    with torch.no_grad():  # with the correction the layer is twice what it was
        for parameter in plain.parameters():
            parameter.mul_(2)
    expected = changed.run_block(location, x, extra, None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, backbone.run_block(location, x, extra, None), atol=1e-3)
    calls: list[Tensor] = []
    plain.register_forward_hook(lambda _m, _a, out: calls.append(out))
    hooked = changed.run_block(location, x, extra, None)
    torch.testing.assert_close(hooked, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


def test_masked_extra_tokens_are_not_seen(backbone: GatedBackbone) -> None:
    x = images_for(backbone)

    def gate(kept: int, total: int, location: Location, tokens: Tensor) -> GatedTokens:
        torch.manual_seed(3)
        extra = torch.randn(2, 5, tokens.shape[2])
        extra[:, kept:] = 50.0
        mask = torch.arange(total).expand(2, total) < kept
        return GatedTokens(tokens, extra[:, :total], mask)

    padded = backbone(x, lambda at, t: gate(2, 5, at, t))
    torch.testing.assert_close(
        padded, backbone(x, lambda at, t: gate(2, 2, at, t)), rtol=1e-4, atol=1e-4
    )
    unmasked = backbone(x, lambda at, t: gate(2, 2, at, t)._replace(extra_mask=None))
    torch.testing.assert_close(padded, unmasked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(padded, backbone(x), atol=1e-3)


def test_prefix_then_rest_is_the_whole(backbone: GatedBackbone) -> None:
    x = images_for(backbone)

    def gate(location: Location, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens * 1.1, tokens[:, :2]

    for stop in backbone.locations:
        rest = backbone(backbone.prefix(x, stop), gate, locations=[stop], start=stop)
        torch.testing.assert_close(rest, backbone(x, gate, locations=[stop]), rtol=1e-5, atol=1e-5)


def test_gradients_reach_everything(backbone: GatedBackbone) -> None:
    x = images_for(backbone).requires_grad_()
    extra = {at: torch.randn(2, 2, d, requires_grad=True) for at, d in backbone.widths.items()}
    used = backbone.locations[0]
    backbone(x, lambda at, t: (t, extra[at]), locations=[used]).square().sum().backward()
    gradient = extra[used].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert all(p.grad is not None for p in backbone.parameters())
    backbone.zero_grad()


def test_training_mode_with_stochastic_depth() -> None:
    torch.manual_seed(0)
    backbone = SmallConvAttention(width=8, drop_path_rate=0.5)
    x = torch.randn(4, 1, 16, 16)
    assert not torch.equal(backbone(x), backbone(x))
    backbone.eval()
    assert torch.equal(backbone(x), backbone(x))
    assert visformer_tiny(64, depth=(1, 1, 1), drop_path_rate=0.3, locations=())(
        torch.randn(2, 3, 64, 64)
    ).shape == (2, 384)


def test_stochastic_depth_drops_whole_samples_and_rescales_the_rest() -> None:
    out = drop_path(torch.ones(4000, 2, 3), 0.25, training=True)
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


def test_extra_tokens_are_refused_by_convolutions(backbone: GatedBackbone) -> None:
    assert not backbone.carries_extra((1, 0))
    assert backbone.carries_extra((3, 0))
    x = images_for(backbone)
    with pytest.raises(ValueError, match=r"\(1, 0\).*spatial convolution"):
        backbone(x, lambda _l, t: (t, t[:, :2]), locations=[(1, 0)])
    changed = backbone(x, lambda _l, t: (t * 2, None), locations=[(1, 0)])
    assert changed.shape == (2, backbone.feature_dim)


def test_wrong_calls(backbone: GatedBackbone) -> None:
    x = images_for(backbone)
    with pytest.raises(ValueError, match=r"location \(4, 0\): no such"):
        backbone(x, lambda _l, _t: None, locations=[(4, 0)])
    with pytest.raises(ValueError, match="named twice"):
        backbone(x, lambda _l, _t: None, locations=[(2, 0), (2, 0)])
    with pytest.raises(ValueError, match=r"location \(\[3\], 0\): no such"):
        backbone(x, lambda _l, _t: None, locations=[([3], 0)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="images: shape"):
        backbone(x[..., :-4])
    with pytest.raises(ValueError, match="expected"):
        backbone(x, lambda _l, t: (t[:, 1:], None))
    with pytest.raises(ValueError, match="extra tokens"):
        backbone(x, lambda _l, t: (t, t[:1, :2]))
    mask = torch.ones(len(x), 2, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"mask of torch\.float32, expected torch\.bool"):
        backbone(x, lambda _l, t: GatedTokens(t, t[:, :2], mask.float()))
    with pytest.raises(ValueError, match=r"mask \(2, 1\), expected \(2, 2\)"):
        backbone(x, lambda _l, t: GatedTokens(t, t[:, :2], mask[:, :1]))


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("image_size", {"image_size": 4}),
        ("depths", {"depths": (1, 0, 1)}),
        ("num_heads", {"width": 10, "num_heads": 3}),
        ("location", {"locations": [(2, 7)]}),
        ("positive", {"in_channels": 0}),
        ("positive", {"num_heads": 0}),
        ("drop_path_rate", {"drop_path_rate": 1.0}),
        ("drop_path_rate", {"drop_path_rate": -0.1}),
    ],
)
def test_wrong_small_backbones(match: str, options: dict) -> None:
    with pytest.raises(ValueError, match=match):
        build_backbone("small", **options)


def test_build_backbone_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(build_backbone("small", width=8, locations=[[2, 0]]), SmallConvAttention)
    with pytest.raises(ValueError, match="unknown 'resnet'"):
        build_backbone("resnet")
    with pytest.raises(ValueError, match=r"image_size: expected at least 16; got 8"):
        visformer_tiny(8)
    with pytest.raises(ValueError, match=r"at least 32, and an even number without the small stem"):
        visformer_tiny(225)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"dvla-fast\[vision\]"):
        visformer_tiny()


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "masked"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "PyTorch"])
def test_small_backbone_attends_as_pytorch(
    masked: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    query, key, value = (torch.randn(3, 2, n, 8).double() for n in (5, 9, 9))
    mask = (torch.rand(3, 1, 1, 9) > 0.3) if masked else None
    leaves = [x.requires_grad_() for x in (query, key, value)]
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    weight = torch.randn_like(want)
    if not fused:
        monkeypatch.setattr(_extension, "problem", "not built")
    got = small_backbone._attention(query, key, value, mask)
    torch.testing.assert_close(got, want)
    pairs = (torch.autograd.grad(out, leaves, weight) for out in (got, want))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_locations_of_a_subclass_may_be_lists() -> None:
    backbone = SmallConvAttention(image_size=8, width=8, depths=(1, 1, 1), num_heads=2)
    backbone.locations = [[2, 0]]  # type: ignore[assignment,list-item]
    calls: list[Location] = []
    backbone(torch.randn(1, 1, 8, 8), lambda location, _tokens: calls.append(location))
    assert calls == [(2, 0)]
