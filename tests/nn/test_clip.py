"""CLIP's image towers: equal to open_clip's without gates, faithful carriers with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvla_fast.errors import CheckpointError, MissingDependencyError
from dvla_fast.nn import DVLA, ClipViT, GatedTokens, Location, build_backbone, clip_statistics
from dvla_fast.nn.dvla import TEXT_SCOPES
from tests.clip_model import TINY, register_tiny_clip

from .conftest import TEXT_DIM, make_episodes, make_text

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> ClipViT:
    register_tiny_clip(tmp_path_factory.mktemp("clip"))
    torch.manual_seed(0)
    built = build_backbone("clip", image_size=32, architecture=TINY).eval()
    assert isinstance(built, ClipViT)
    return built


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32)


def test_without_gates_it_is_open_clips_tower(backbone: ClipViT, images: Tensor) -> None:
    seen: dict[Location, tuple[int, ...]] = {}

    def watch(location: Location, tokens: Tensor) -> None:
        seen[location] = tuple(tokens.shape)

    assert torch.equal(backbone(images, watch, locations=backbone.blocks), backbone.net(images))
    assert seen == {(1, b): (2, 16, 32) for b in range(4)}
    assert backbone.locations == ((1, 2), (1, 3))
    assert backbone.deep_from == (1, 3)
    assert backbone.feature_dim == 16
    torch.testing.assert_close(backbone(images, lambda _l, t: (t, None)), backbone.net(images))


def test_features_before_the_projection(backbone: ClipViT, images: Tensor) -> None:
    plain = ClipViT(backbone.net, TINY, projection=False)
    assert plain.feature_dim == 32
    torch.testing.assert_close(plain(images) @ backbone.net.proj, backbone(images))


def test_gates_see_patches_and_leave_the_class_token(backbone: ClipViT, images: Tensor) -> None:
    state = backbone.prefix(images, (1, 2))
    changed = backbone.with_tokens(state, backbone.tokens(state) + 1)
    assert torch.equal(changed[:, 0, 0], state[:, 0, 0])
    assert torch.equal(changed[:, 0, 1:], state[:, 0, 1:] + 1)


def test_riding_tokens_are_as_if_they_were_patches(backbone: ClipViT, images: Tensor) -> None:
    location = (1, 2)
    state = backbone.prefix(images, location)
    extra = torch.randn(2, 5, 32)
    got = backbone.run_block(location, state, extra, None)
    whole = backbone.run_block(location, torch.cat((state, extra.unsqueeze(1)), 2), None, None)
    torch.testing.assert_close(got, whole[:, :, :17])
    assert not torch.allclose(got, backbone.run_block(location, state, None, None), atol=1e-3)


def test_attention_is_called(backbone: ClipViT, images: Tensor) -> None:
    """Adapters of open_clip's attention stand in its place; hooks tell of them."""
    attention = backbone.net.transformer.resblocks[2].attn
    calls: list[Tensor] = []
    hook = attention.register_forward_hook(lambda _m, _a, out: calls.append(out[0]))
    backbone(images, lambda _l, t: (t, t[:, :2]), locations=[(1, 2)])
    hook.remove()
    assert [out.shape for out in calls] == [(2, 17, 32)]


def test_masked_extra_tokens_are_not_seen(backbone: ClipViT, images: Tensor) -> None:
    extra = torch.randn(2, 5, 32)
    mask = torch.tensor([True, True, False, False, False]).expand(2, -1)

    def padded(_: Location, tokens: Tensor) -> GatedTokens:
        filled = torch.where(mask.unsqueeze(2), extra, 50.0)
        return GatedTokens(tokens, filled, mask)

    expected = backbone(images, lambda _l, t: (t, extra[:, :2]))
    torch.testing.assert_close(backbone(images, padded), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, backbone(images), atol=1e-3)


def test_prefix_then_rest_is_the_whole(backbone: ClipViT, images: Tensor) -> None:
    def gate(_: Location, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens * 1.1, tokens[:, :2]

    for stop in [(1, 0), (1, 2)]:
        rest = backbone(backbone.prefix(images, stop), gate, locations=[stop], start=stop)
        torch.testing.assert_close(rest, backbone(images, gate, locations=[stop]))


@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_under_dvla(backbone: ClipViT, text_scope: str) -> None:
    model = DVLA(
        backbone, text_dim=TEXT_DIM, num_heads=2, hidden_dim=8, text_scope=text_scope
    ).eval()
    assert [scale for scale, _ in model.level_scales] == [1.4, 0.6]
    _, labels, _, _ = make_episodes(2, 3, 1, 2)
    support, query = torch.randn(2, 3, 3, 32, 32), torch.randn(2, 6, 3, 32, 32)
    text = make_text(2, 3, masked=True)
    output = model(support, labels, query, text, way=3)
    assert output.logits.shape == (2, 6, 3)
    split = model(
        model.prefix(support.flatten(0, 1)).unflatten(0, (2, -1)),
        labels,
        model.prefix(query.flatten(0, 1)).unflatten(0, (2, -1)),
        text,
        way=3,
        from_prefix=True,
    )
    torch.testing.assert_close(split.logits, output.logits)
    model.zero_grad()
    (output.logits.square().sum() + output.layers[0].log_prob.sum()).backward()
    assert all(p.grad is not None for p in backbone.net.transformer.parameters())
    model.zero_grad()


def saved_clip(folder: Path, size: int) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(5)
    model = open_clip.create_model(TINY, force_image_size=size)
    path = folder / "clip.pt"
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, path)
    return path, model


def test_weights_of_a_file(backbone: ClipViT, images: Tensor, tmp_path: Path) -> None:
    path, model = saved_clip(tmp_path, 32)
    built = build_backbone("clip", image_size=32, architecture=TINY).eval()
    report = built.load_pretrained(str(path))
    assert report["left_out"] == ["text tower"]
    assert torch.equal(built(images), model.eval().encode_image(images))


def test_positions_are_interpolated_to_another_size(backbone: ClipViT, tmp_path: Path) -> None:
    path, model = saved_clip(tmp_path, 32)
    built = build_backbone("clip", image_size=48, architecture=TINY).eval()
    built.load_pretrained(str(path))
    assert built.net.positional_embedding.shape == (37, 32)
    assert torch.equal(built.net.positional_embedding[0], model.visual.positional_embedding[0])
    assert built(torch.randn(1, 3, 48, 48)).shape == (1, 16)


def test_wrong_weights(backbone: ClipViT, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match="neither a file nor weights that open_clip knows"):
        backbone.load_pretrained("laion9b")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"broken\.pt: cannot be loaded as CLIP weights"):
        backbone.load_pretrained(str(broken))
    path, model = saved_clip(tmp_path, 32)
    state = model.state_dict()
    state.pop("visual.proj")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="cannot be loaded as CLIP weights of"):
        backbone.load_pretrained(str(path))
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())


def test_weights_of_another_activation_are_refused(backbone: ClipViT) -> None:
    other = ClipViT(backbone.net, "ViT-B-16")  # OpenAI trained with QuickGELU
    with pytest.raises(CheckpointError, match=r"--model\.clip_model ViT-B-16-quickgelu"):
        other.load_pretrained("openai")


def test_weights_of_the_same_activation_are_fetched(
    backbone: ClipViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", unreachable)
    same = ClipViT(backbone.net, "ViT-B-16-quickgelu")
    with pytest.raises(CheckpointError, match=r"openai: cannot be loaded .*\(no network\)"):
        same.load_pretrained("openai")


def test_statistics_are_those_of_the_weights() -> None:
    assert clip_statistics("ViT-B-16")[0] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    assert clip_statistics("ViT-B-16-SigLIP", "webli") == ([0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("open_clip knows no 'ViT-C-17'", {"architecture": "ViT-C-17"}),
        ("no plain ViT", {"architecture": f"{TINY}-resnet"}),
        ("at least one patch of 8", {"architecture": TINY, "image_size": 7}),
        ("no such", {"architecture": TINY, "image_size": 32, "locations": [(2, 0)]}),
    ],
)
def test_wrong_constructions(backbone: ClipViT, match: str, options: dict) -> None:
    with pytest.raises(ValueError, match=match):
        build_backbone("clip", **options)


def test_wrong_images(backbone: ClipViT) -> None:
    with pytest.raises(ValueError, match="images: shape"):
        backbone(torch.randn(1, 3, 40, 40))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(MissingDependencyError, match=r"dvla-fast\[semantics\]"):
        build_backbone("clip")
