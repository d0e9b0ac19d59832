"""ResNet-12: the published network, its DropBlock, and gates before its stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dvla_fast.nn import Location, ResNet12, build_backbone
from dvla_fast.nn.backbones.resnet12 import drop_block

WIDTHS = (8, 10, 12, 14)


@pytest.fixture(scope="module")
def backbone() -> ResNet12:
    torch.manual_seed(0)
    return ResNet12(21, widths=WIDTHS).eval()


@pytest.mark.parametrize(("size", "sides"), [(84, (21, 10)), (224, (56, 28))])
def test_size_of_the_published_network(size: int, sides: tuple[int, int]) -> None:
    backbone = build_backbone("resnet12", image_size=size).eval()
    # 12.42 M, as Lee et al. and those after them state
    assert sum(p.numel() for p in backbone.parameters()) == 12_424_320
    assert (backbone.feature_dim, backbone.depths) == (640, (1, 1, 1, 1))
    seen: dict[Location, tuple[int, ...]] = {}

    def watch(location: Location, tokens: Tensor) -> None:
        seen[location] = tuple(tokens.shape)

    with torch.inference_mode():
        assert backbone(torch.randn(1, 3, size, size), watch).shape == (1, 640)
    assert seen == {(3, 0): (1, sides[0] ** 2, 160), (4, 0): (1, sides[1] ** 2, 320)}


def test_block_is_the_published_one(backbone: ResNet12) -> None:
    x = torch.randn(2, 8, 9, 9)
    block = backbone.stages[1]
    leaky = torch.nn.LeakyReLU(0.1)
    main = torch.nn.Sequential(
        block.conv1, block.norm1, leaky, block.conv2, block.norm2, leaky, block.conv3, block.norm3
    )
    expected = torch.nn.MaxPool2d(2)(leaky(main(x) + block.shortcut(x)))
    torch.testing.assert_close(backbone.run_block((2, 0), x, None, None), expected)


def test_gates_change_what_follows(backbone: ResNet12) -> None:
    x = torch.randn(2, 3, 21, 21)
    plain = backbone(x)
    torch.testing.assert_close(backbone(x, lambda _l, t: (t, None)), plain)
    calls: list[Location] = []
    backbone(x, lambda location, _t: calls.append(location), locations=backbone.blocks)
    assert calls == [(1, 0), (2, 0), (3, 0), (4, 0)]
    changed = backbone(x, lambda _l, t: (t + 1, None), locations=[(4, 0)])
    assert not torch.allclose(changed, plain, atol=1e-3)
    middle = backbone.prefix(x, (4, 0))
    rest = backbone(middle, lambda _l, t: (t + 1, None), locations=[(4, 0)], start=(4, 0))
    torch.testing.assert_close(rest, changed)
    with pytest.raises(ValueError, match=r"\(3, 0\).*spatial convolution"):
        backbone(x, lambda _l, t: (t, t[:, :2]))


def test_dropblock_removes_whole_squares_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = drop_block(torch.ones(16, 32, 10, 10), torch.tensor(0.1), 5)
    kept = out != 0
    assert 0.05 < 1 - kept.float().mean() < 0.12  # overlaps remove a little less than 0.1
    assert out.mean().item() == pytest.approx(1.0, abs=1e-5)
    # every removed place lies in a removed 5 × 5 square
    gone = torch.nn.functional.unfold((~kept).float().flatten(0, 1).unsqueeze(1), 5).all(1)
    squares = gone.float().reshape(-1, 1, 6, 6)
    covered = torch.nn.functional.conv_transpose2d(squares, torch.ones(1, 1, 5, 5)) > 0
    assert torch.equal(covered.reshape(kept.shape), ~kept)
    assert drop_block(torch.ones(1, 1, 3, 3), torch.tensor(0.0), 5).eq(1).all()


def test_dropblock_ramps_with_training_passes() -> None:
    torch.manual_seed(0)
    backbone = ResNet12(32, widths=WIDTHS, drop_rate=0.3, ramp_steps=2)
    x = torch.randn(8, 3, 32, 32)
    backbone(x)
    assert backbone.passes == 1
    assert "passes" in backbone.state_dict()
    backbone.eval()
    assert torch.equal(backbone(x), backbone(x))
    assert backbone.passes == 1
    shares = []
    for passes in (0, 10):  # 0: nothing is removed yet
        backbone.passes.fill_(passes)
        backbone.train()
        out = backbone._drop(torch.ones(64, 8, 8, 8), 3)
        shares.append((out == 0).float().mean().item())
    assert shares[0] == 0.0
    assert shares[1] > 0.15


@pytest.mark.parametrize(("options", "stage"), [({}, 2), ({"drop_block": False}, 3)])
def test_elsewhere_dropout_is_there_from_the_start(options: dict, stage: int) -> None:
    torch.manual_seed(0)
    backbone = ResNet12(32, widths=WIDTHS, drop_rate=0.3, **options).train()
    out = backbone._drop(torch.ones(64, 8, 8, 8), stage)
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_grey_images() -> None:
    backbone = ResNet12(16, in_channels=1, widths=WIDTHS, block_size=1, ramp_steps=1)
    assert backbone(torch.randn(2, 1, 16, 16)).shape == (2, WIDTHS[3])


def test_regularisation_shares_weights() -> None:
    first = ResNet12(16, widths=WIDTHS)
    second = ResNet12(16, widths=WIDTHS, drop_block=False, drop_rate=0.0)
    assert first.state_dict().keys() == second.state_dict().keys()
    second.train()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(second(x), second(x))


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("image_size", {"image_size": 15}),
        ("four positive", {"widths": (8, 8, 8)}),
        ("four positive", {"widths": (8, 8, 8, 0)}),
        ("drop_rate", {"drop_rate": 1.0}),
        ("block_size", {"block_size": 0}),
        ("no such", {"locations": [(1, 1)]}),
    ],
)
def test_wrong_constructions(match: str, options: dict) -> None:
    with pytest.raises(ValueError, match=match):
        ResNet12(**options)


def test_wrong_images(backbone: ResNet12) -> None:
    with pytest.raises(ValueError, match=r"images: shape .*expected \(B, \*\(3, 21, 21\)\)"):
        backbone(torch.randn(1, 3, 20, 20))
    with pytest.raises(ValueError, match="no published weights"):
        backbone.load_pretrained("somewhere.pth")
