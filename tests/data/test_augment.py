"""Random affine: identity when off, batched, reproducible, and it moves things as told."""

from __future__ import annotations

import torch

from dvla_fast.data.augment import random_affine


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
        random_affine(blob(), rotate=30, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
