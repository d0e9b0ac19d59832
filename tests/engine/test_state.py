"""The best checkpoint of a training stage: ties, and a run that goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dvla_fast.engine.checkpoint import load_checkpoint, save_checkpoint
from dvla_fast.engine.execution import adamw
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.state import TrainingState
from dvla_fast.errors import CheckpointError


def make_state(path: Path, resume: bool = False) -> TrainingState:
    layer = nn.Linear(2, 1)
    optimizer = adamw(layer.parameters(), lr=0.1)
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    folder = RunFolder(path, {}, resume=resume)
    rng = np.random.default_rng(0)
    spec = {"backbone": {"name": "small", "image_size": 16}, "classes": 1}
    return TrainingState(folder, "pretrain", spec, {"model": layer}, optimizer, rng)


def save(state: TrainingState, *scores: float | None) -> None:
    """Save after one epoch for each score."""
    for score in scores:
        state.epoch += 1
        state.save(score)


def test_a_run_that_goes_on_knows_its_best_score(tmp_path: Path) -> None:
    first = make_state(tmp_path / "run")
    save(first, 0.9, 0.1)
    kept = first.best_path.read_bytes()
    again = make_state(tmp_path / "run", resume=True)
    assert again.restore()
    assert (again.epoch, again.best, again.best_epoch) == (2, 0.9, 1)
    save(again, 0.5, None)
    assert (again.best, again.best_epoch) == (0.9, 1)
    assert again.best_path.read_bytes() == kept
    _, info = load_checkpoint(again.last_path)
    assert (info["epoch"], info["best"], info["best_epoch"]) == (4, 0.9, 1)


def test_the_readable_copy_that_a_kill_left_behind_is_put_right(tmp_path: Path) -> None:
    """Where a run is killed between its last checkpoint and the copy of its description."""
    state = make_state(tmp_path / "run")
    save(state, 0.5)
    copy = state.last_path.with_suffix(".json")
    before = copy.read_bytes()
    save(state, 0.6)
    written = copy.read_bytes()
    copy.write_bytes(before)
    assert make_state(tmp_path / "run", resume=True).restore()
    assert copy.read_bytes() == written


def test_random_states_of_another_kind(tmp_path: Path) -> None:
    """Their size is PyTorch's matter, and not that of every version the same."""
    state = make_state(tmp_path / "run")
    save(state, 0.5)
    tensors, info = load_checkpoint(state.last_path)
    tensors["rng.torch"] = tensors["rng.torch"][:-8]
    save_checkpoint(state.last_path, tensors, info)
    again = make_state(tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match=r"has resume\.rng that cannot be restored \(Runtime"):
        again.restore()


@pytest.mark.parametrize(("scores", "best"), [((0.5, 0.5), 2), ((0.5, 0.5, 0.4), 2)])
def test_ties_go_to_the_later_epoch(tmp_path: Path, scores: tuple[float, ...], best: int) -> None:
    state = make_state(tmp_path / "run")
    save(state, *scores)
    assert (state.best, state.best_epoch) == (0.5, best)
    assert load_checkpoint(state.best_path)[1]["epoch"] == best
