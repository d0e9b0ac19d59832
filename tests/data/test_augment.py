"""Random affine: identity when off, batched, reproducible, and it moves things as told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dvla_fast.data.augment import Draws, color_jitter, random_affine, random_erasing


def blob() -> torch.Tensor:
    image = torch.zeros(64, 1, 16, 16)
    image[:, :, 6:10, 6:10] = 1
    return image


def test_off_is_the_identity() -> None:
    assert random_affine(blob()) is not None
    assert torch.equal(random_affine(blob()), blob())


def test_tiny_amounts_change_next_to_nothing() -> None:
    out = random_affine(blob(), shift=1e-4, rotate=1e-2, scale=1e-4)
    torch.testing.assert_close(out, blob(), atol=1e-2, rtol=0)


def test_shift_stays_within_its_limit_and_keeps_the_mass() -> None:
    out = random_affine(blob(), shift=0.25)
    rows = torch.arange(16.0)
    centre = (out.sum((1, 3)) * rows).sum(1) / out.sum((1, 2, 3))
    assert ((centre - 7.5).abs() <= 4.01).all()
    assert (centre - 7.5).abs().max() > 2
    torch.testing.assert_close(out.sum((1, 2, 3)), torch.full((64,), 16.0), atol=0.2, rtol=0)


def test_flip_mirrors_about_half() -> None:
    image = torch.zeros(200, 1, 8, 8)
    image[..., :4] = 1
    out = random_affine(image, flip=True)
    flipped = (out[:, 0, 4, 6] > 0.5).float().mean()
    assert 0.35 < flipped < 0.65


def test_generator_fixes_the_result() -> None:
    draws = [
        random_affine(
            blob(), rotate=30, draws=Draws(64, generator=torch.Generator().manual_seed(s))
        )
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    "kind", [lambda x: x.uniform(2), lambda x: x.whole(2), Draws.normal, lambda x: x.integers(9)]
)
def test_every_number_comes_from_the_generator(kind: Callable[[Draws], torch.Tensor]) -> None:
    one, same, other = (
        kind(Draws(8, generator=torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_part_of_a_batch_draws_its_own_numbers_of_the_whole() -> None:
    images = torch.rand(12, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    for change in (
        lambda x, d: random_affine(x, shift=0.1, rotate=20, flip=True, crop=0.4, draws=d),
        lambda x, d: color_jitter(x, 0.4, d),
    ):
        torch.manual_seed(1)
        whole = change(images, Draws(12))
        torch.manual_seed(1)
        part = change(images[4:8], Draws(4, 4, 12))
        torch.testing.assert_close(part, whole[4:8])


def test_crop_keeps_the_asked_area() -> None:
    # A ramp's slope tells the size of the part that was kept.
    ramp = torch.linspace(0, 1, 32).expand(400, 1, 32, 32).contiguous()
    out = random_affine(ramp, crop=0.25)
    width = (out[:, 0, 16, 24] - out[:, 0, 16, 8]) / (ramp[0, 0, 16, 24] - ramp[0, 0, 16, 8])
    rows = ramp.transpose(2, 3).contiguous()
    torch.manual_seed(2)
    wide = random_affine(ramp, crop=0.25, padding="reflection")
    torch.manual_seed(2)
    tall = random_affine(rows, crop=0.25, padding="reflection")
    horizontal = (wide[:, 0, 16, 24] - wide[:, 0, 16, 8]) * 31 / 16
    vertical = (tall[:, 0, 24, 16] - tall[:, 0, 8, 16]) * 31 / 16
    area = horizontal * vertical
    assert area.min() > 0.2
    assert area.max() < 1.05
    assert 0.5 < area.mean() < 0.75
    assert width.min() > 0.4
    assert out.min() >= 0
    assert out.max() <= 1


def test_whole_image_crop_is_the_identity() -> None:
    images = torch.rand(8, 3, 9, 9)
    out = random_affine(images, crop=0.9999)
    torch.testing.assert_close(out, images, atol=2e-2, rtol=0)


def test_color_jitter_changes_each_image_by_its_own_factors() -> None:
    images = torch.full((64, 3, 4, 4), 0.5)
    assert torch.equal(color_jitter(images, 0.0), images)
    out = color_jitter(images, 0.4)  # flat and grey: brightness alone shows
    levels = out.flatten(1).mean(1)
    torch.testing.assert_close(out.flatten(1).std(1), torch.zeros(64), atol=1e-6, rtol=0)
    assert 0.29 < levels.min() < 0.35
    assert 0.65 < levels.max() < 0.71
    coloured = torch.rand(200, 3, 6, 6)
    spread = color_jitter(coloured, 1.0)
    assert spread.min() >= 0
    assert spread.max() <= 1


def test_erasing_replaces_one_rectangle_by_noise() -> None:
    images = torch.full((400, 3, 32, 32), 7.0)
    out = random_erasing(images, 0.25)
    erased = (out != 7.0).all(1)
    share = erased.flatten(1).float().mean(1)
    hit = share > 0
    assert 0.18 < hit.float().mean() < 0.32
    assert share.max() < 0.42
    assert share[hit].min() > 0.005
    for mask in erased[hit][:20]:  # full rows and columns: a rectangle
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None, :])
    noise = out[out != 7.0]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert random_erasing(images, 0.0) is images
