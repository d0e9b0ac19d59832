"""The authors' published list of episodes, and what is said of lists that cannot be theirs."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla_fast.cli import main
from dvla_fast.data import FewShotData
from dvla_fast.engine import evaluate
from dvla_fast.engine.episode_lists import AuthorsEpisodeSampler, build_sampler
from dvla_fast.engine.settings import UsageError
from tests.engine.runs import evaluate_arguments


def test_authors_list_is_the_legacy_stream(few_digits: FewShotData) -> None:
    """Drawn here as the authors' code draws it: classes, then each class's images in turn."""
    images = few_digits.novel
    sampler = AuthorsEpisodeSampler(images, 3, 2, 4)
    stream = np.random.RandomState(0)
    members = [np.flatnonzero(images.labels.numpy() == c) for c in range(5)]
    for number in range(140):  # past the first block
        classes = stream.choice(5, 3, replace=False)
        drawn = [members[c][stream.choice(len(members[c]), 6, replace=False)] for c in classes]
        batch = sampler.batch(number, 1)
        assert batch.classes[0].tolist() == classes.tolist()
        assert batch.support[0].tolist() == [i for row in drawn for i in row[:2]]
        assert batch.query[0].tolist() == [i for row in drawn for i in row[2:]]
    # Any part of the list can be asked for, in any order.
    again = AuthorsEpisodeSampler(images, 3, 2, 4)
    assert torch.equal(again.batch(130, 2).query, sampler.batch(130, 2).query)
    assert again.fingerprint(20) == sampler.fingerprint(20)
    with pytest.raises(UsageError, match="--seed 4294967296: the authors' list takes seeds from 0"):
        build_sampler("authors", images, 3, 2, 4, 2**32)


def test_authors_list_of_another_seed_is_said(backbone: str, tmp_path: Path) -> None:
    authors = ["--evaluate.episode_list=authors", "--evaluate.episodes=2"]
    with pytest.warns(UserWarning, match="--seed 1: the authors' published list .* of seed 0"):
        assert main(evaluate_arguments(backbone, tmp_path / "one", *authors, "--seed=1")) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(evaluate_arguments(backbone, tmp_path / "zero", *authors)) == 0


def test_authors_list_of_images_in_another_order_is_said(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_data = evaluate.build_data

    def unordered(*given: Any, **options: Any) -> FewShotData:
        data = build_data(*given, **options)
        return replace(data, novel=replace(data.novel, file_order=False))

    monkeypatch.setattr(evaluate, "build_data", unordered)
    few = "--evaluate.episodes=2"
    authors = [few, "--evaluate.episode_list=authors"]
    with pytest.warns(UserWarning, match="images without file names, in an order of their publ"):
        assert main(evaluate_arguments(backbone, tmp_path / "authors", *authors)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(evaluate_arguments(backbone, tmp_path / "own", few)) == 0
