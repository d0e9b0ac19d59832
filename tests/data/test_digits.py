"""The digits: real images, disjoint splits, statistics of the training part alone."""

from __future__ import annotations

import pytest
import torch

from dvla_fast.data import DIGIT_SPLIT, hold_out, load_data, load_digits
from dvla_fast.errors import DataError


def test_splits_are_complete_and_disjoint() -> None:
    data = load_digits()
    assert not set(DIGIT_SPLIT["base"]) & set(DIGIT_SPLIT["novel"])
    assert not set(data.base.class_names) & set(data.novel.class_names)
    assert len(data.base) + len(data.monitor) + len(data.novel) == 1797
    assert data.base.images.shape[1:] == (1, 16, 16)
    assert 0 <= data.base.images.min() < data.base.images.max() <= 1
    share = len(data.monitor) / (len(data.base) + len(data.monitor))
    assert abs(share - 0.25) < 0.01
    assert data.class_names == data.base.class_names + data.novel.class_names


def test_held_out_images_are_not_trained_on() -> None:
    data = load_digits()
    base = {image.numpy().tobytes() for image in data.base.images}
    assert not base & {image.numpy().tobytes() for image in data.monitor.images}


def test_split_seed_changes_only_the_held_out_part() -> None:
    first, same, other = load_digits(), load_digits(), load_digits(split_seed=1)
    assert torch.equal(first.monitor.images, same.monitor.images)
    assert not torch.equal(first.monitor.images, other.monitor.images)
    assert torch.equal(first.novel.images, other.novel.images)


def test_normalised_base_has_zero_mean_and_unit_std() -> None:
    data = load_digits()
    images = data.normalise(data.base.images)
    assert abs(images.mean().item()) < 1e-4
    assert abs(images.std().item() - 1) < 1e-3


def test_hold_out_takes_the_share_of_every_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 4 + [2] * 2)
    kept, held = hold_out(labels, 0.25, 0)
    assert torch.bincount(labels[held]).tolist() == [10, 1, 1]
    assert sorted(kept.tolist() + held.tolist()) == list(range(46))


def test_hold_out_leaves_something_to_train_on() -> None:
    labels = torch.tensor([0] * 40 + [1] * 2)
    assert torch.bincount(labels[hold_out(labels, 0.7, 0)[0]]).tolist() == [12, 1]
    with pytest.raises(DataError, match=r"class 'ox' has 2 image\(s\), and --data.holdout 0.8 w"):
        hold_out(labels, 0.8, 0, ("cow", "ox"))
    with pytest.raises(DataError, match=r"class 1 has 1 image\(s\)"):
        hold_out(labels[:-1], 0.1, 0)


@pytest.mark.parametrize("arguments", [{"image_size": 4}, {"holdout": 0.0}, {"holdout": 1.0}])
def test_impossible_settings_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(DataError):
        load_data("digits", **arguments)  # type: ignore[arg-type]


def test_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="base, monitor, novel"):
        load_digits().split("test")


def test_an_image_set_says_what_it_is_in_a_line() -> None:
    images = load_digits().base
    assert repr(images) == f"ImageSet('digits/base', ({len(images)}, 1, 16, 16) float32, 5 classes)"
    episode = torch.tensor([[3, 1], [0, 2]])
    assert torch.equal(images.gather(episode), images.images[episode])
