"""Rewards against values worked out by hand and against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dvla_fast.nn import EpisodeOutput, LayerTrace, TextTokens
from dvla_fast.rl import (
    accuracy_reward,
    alignment_loss,
    episode_accuracy,
    layer_rewards,
    similarity_reward,
)


def one_hot_text(episodes: int, way: int) -> TextTokens:
    embedding = torch.eye(way).expand(episodes, way, way)
    return TextTokens(embedding, torch.zeros(way, dtype=torch.int64), embedding)


def trace(aligned: Tensor, pairs: tuple[Tensor, Tensor, Tensor, Tensor]) -> LayerTrace:
    episodes = aligned.shape[0]
    decision = (torch.full((episodes,), 0.5), torch.zeros(episodes)) + (torch.zeros(episodes),) * 2
    return LayerTrace((2, 0), *decision, *pairs, aligned, aligned)


def test_episode_accuracy() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    assert episode_accuracy(logits, torch.tensor([[0, 1], [1, 0]])).tolist() == [1.0, 0.5]


def test_similarity_reward_is_the_mean_cosine_with_the_true_class() -> None:
    aligned = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    embedding = torch.tensor([[[5.0, 0.0], [0.0, 1.0]]])
    reward = similarity_reward(aligned, embedding, torch.tensor([[0, 0, 1]]))
    torch.testing.assert_close(reward, torch.tensor([(1 + 0 + 0.5**0.5) / 3]))


def test_accuracy_reward_counts_what_the_gate_mended() -> None:
    support_labels = torch.tensor([[0, 1]])
    query_labels = torch.tensor([[0, 1, 0, 1]])
    supports = torch.tensor([[[1.0, 0.1], [0.1, 1.0]]])
    bad = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])  # half right
    good = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    arguments = (support_labels, query_labels, 2)
    assert accuracy_reward(supports, supports, bad, good, *arguments).tolist() == [0.5]
    assert accuracy_reward(supports, supports, good, bad, *arguments).tolist() == [-0.5]
    assert accuracy_reward(supports, supports.flip(1), good, good, *arguments).tolist() == [-1.0]


@pytest.fixture
def output() -> EpisodeOutput:
    torch.manual_seed(0)
    aligned = torch.randn(2, 4, 2, requires_grad=True)
    support, query = torch.randn(2, 2, 3), torch.randn(2, 4, 3)
    layers = (
        trace(aligned, (support, support, query, query)),
        trace(aligned.detach(), (support, support.flip(1), query, query)),
    )
    labels = torch.tensor([[0, 1], [0, 1]])
    return EpisodeOutput(torch.randn(2, 4, 2), layers, labels)


QUERY_LABELS = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])


def test_layer_rewards_weigh_their_parts(output: EpisodeOutput) -> None:
    text = one_hot_text(2, 2)
    similarity = layer_rewards(output, QUERY_LABELS, text, 1.0, 0.0)
    improvement = layer_rewards(output, QUERY_LABELS, text, 0.0, 1.0)
    both = layer_rewards(output, QUERY_LABELS, text)
    assert both.shape == (2, 2)
    assert not both.requires_grad
    torch.testing.assert_close(both, 0.5 * similarity + improvement)
    assert improvement[0].tolist() == [0.0, 0.0]  # that gate changed nothing
    first = torch.cosine_similarity(output.layers[0].aligned[0, 1], torch.tensor([0.0, 1.0]), dim=0)
    rest = [
        torch.cosine_similarity(
            output.layers[0].aligned[0, i], torch.eye(2)[QUERY_LABELS[0, i]], dim=0
        )
        for i in (0, 2, 3)
    ]
    torch.testing.assert_close(similarity[0, 0], (first + sum(rest)) / 4)


def test_improvement_over_the_previous_episode(output: EpisodeOutput) -> None:
    rewards = layer_rewards(
        output, QUERY_LABELS, one_hot_text(2, 2), 0.0, 1.0, previous_accuracy=torch.tensor(0.25)
    )
    expected = episode_accuracy(output.logits, QUERY_LABELS) - 0.25
    torch.testing.assert_close(rewards, expected.expand(2, 2))


def test_supports_stand_for_their_own_class_in_class_scope(output: EpisodeOutput) -> None:
    text = one_hot_text(2, 2)
    supports = output._replace(aligned_labels=1 - QUERY_LABELS)
    mine = layer_rewards(supports, QUERY_LABELS, text, 1.0, 0.0)
    theirs = layer_rewards(output, 1 - QUERY_LABELS, text, 1.0, 0.0)
    torch.testing.assert_close(mine, theirs)


def test_alignment_loss_falls_to_zero_when_aligned(output: EpisodeOutput) -> None:
    text = one_hot_text(2, 2)
    aligned = torch.eye(2)[QUERY_LABELS].requires_grad_()
    perfect = output._replace(layers=(output.layers[0]._replace(aligned=aligned),))
    loss = alignment_loss(perfect, QUERY_LABELS, text)
    torch.testing.assert_close(loss, torch.tensor(0.0))
    alignment_loss(output, QUERY_LABELS, text).backward()
    gradient = output.layers[0].aligned.grad
    assert gradient is not None
    assert gradient.any()


def test_rewards_need_gates(output: EpisodeOutput) -> None:
    with pytest.raises(ValueError, match="no gated layers"):
        layer_rewards(output._replace(layers=()), QUERY_LABELS, one_hot_text(2, 2))
