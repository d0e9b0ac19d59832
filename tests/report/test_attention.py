"""Attention over images: right places, common scales, any grid."""

from __future__ import annotations

import pytest
import torch

from dvla_fast.report.attention import attention_map, overlay_attention, peak_ratio, resize


def test_map_is_bilinear() -> None:
    """Exact at token centres, linear between them, constant beyond the outermost."""
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0])  # [[0, 1], [2, 3]]
    found = attention_map(weights, (4, 4))
    expected = torch.tensor([0.0, 0.25, 0.75, 1.0])
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[:, 0], 2 * expected)
    assert attention_map(torch.rand(3, 5, 6), (8, 12), (2, 3)).shape == (3, 5, 8, 12)


def test_colour_follows_attention() -> None:
    """On a grey image, the token looked at is the most coloured place, and only there."""
    weights = torch.zeros(16)
    weights[5] = 1.0  # row 1, column 1 of 4 x 4
    picture = overlay_attention(torch.full((1, 32, 32), 0.5), weights).float()
    assert picture.shape == (32, 32, 3)
    tint = picture.amax(-1) - picture.amin(-1)
    row, column = divmod(int(tint.argmax()), 32)
    assert 8 <= row < 16
    assert 8 <= column < 16
    assert tint[24:].max() < 2  # far away: grey, as the image


def test_limits_make_pictures_comparable() -> None:
    image = torch.zeros(3, 8, 8)
    weak, strong = torch.full((4,), 0.2), torch.full((4,), 1.0)
    common = (0.0, 1.0)
    first = overlay_attention(image, weak, limits=common).float().mean()
    second = overlay_attention(image, strong, limits=common).float().mean()
    assert second > first + 50
    even = overlay_attention(image, weak).float().mean()  # no contrast of its own: no colour
    assert even < 1


def test_stored_images_and_sizes() -> None:
    image = torch.randint(0, 256, (3, 10, 20), dtype=torch.uint8)
    assert overlay_attention(image, torch.rand(8), grid=(2, 4), size=30).shape == (30, 60, 3)
    small = resize(image, 40)
    assert torch.equal(small[:, ::4, ::4], image.float() / 255)  # every pixel stays a square
    assert resize(image, 5).shape == (3, 5, 10)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="weights: 6 tokens"):
        attention_map(torch.rand(6), (4, 4))
    with pytest.raises(ValueError, match="image: shape"):
        overlay_attention(torch.rand(2, 4, 4), torch.rand(4))
    with pytest.raises(ValueError, match="weights: shape"):
        overlay_attention(torch.rand(1, 4, 4), torch.rand(2, 4))


def test_peak() -> None:
    assert peak_ratio(torch.full((9,), 1 / 9)) == pytest.approx(1.0)
    assert peak_ratio(torch.eye(4)[2]) == pytest.approx(4.0)
