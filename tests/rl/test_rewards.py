"""Rewards against values worked out by hand and against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dvla_fast.nn import EpisodeOutput, LayerTrace, TextTokens
from dvla_fast.rl import (
    RewardInputs,
    accuracy_reward,
    alignment_cosine,
    alignment_loss,
    discounted_returns,
    episode_accuracy,
    layer_rewards,
    register_reward,
    reward_names,
    similarity_reward,
    weighted_rewards,
)
from dvla_fast.rl import rewards as rewards_module


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


def test_double_features_are_not_rounded_to_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    aligned = torch.randn(2, 3, 4, generator=generator).double().requires_grad_()
    embedding = torch.randn(2, 5, 4, generator=generator).double()
    labels = torch.tensor([[0, 1, 4], [2, 2, 3]])
    assert torch.autograd.gradcheck(lambda x: alignment_cosine(x, embedding, labels), (aligned,))
    logits = torch.randn(2, 3, 5, generator=generator).double()
    share = episode_accuracy(logits, logits.argmax(-1) * torch.tensor([1, 1, 0]))
    assert share.dtype == torch.float64
    features = torch.zeros(2, 5, 4).double()
    layer = trace(aligned.detach(), (features, features, features, features))
    inputs = RewardInputs(
        EpisodeOutput(logits, (layer,), labels), labels, TextTokens(embedding, labels[0], embedding)
    )
    found = weighted_rewards({"log_likelihood": 1.0}, inputs)[0]
    expected = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    torch.testing.assert_close(found, expected[None])


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


@pytest.mark.parametrize("previous", [torch.tensor(0.25), torch.tensor([0.25, 0.5])])
def test_improvement_over_the_previous_episode(output: EpisodeOutput, previous: Tensor) -> None:
    rewards = layer_rewards(
        output, QUERY_LABELS, one_hot_text(2, 2), 0.0, 1.0, previous_accuracy=previous
    )
    expected = episode_accuracy(output.logits, QUERY_LABELS) - previous
    torch.testing.assert_close(rewards, expected.expand(2, 2))


@pytest.mark.parametrize("shape", [(2, 1), (3,), (1,)])
def test_previous_accuracies_of_a_wrong_shape(output: EpisodeOutput, shape: tuple) -> None:
    """Two layers and two episodes: of (2, 1), each layer would lose another accuracy."""
    text, previous = one_hot_text(2, 2), torch.zeros(shape)
    with pytest.raises(ValueError, match=r"previous_accuracy: shape .* expected \(\) or \(2,\)"):
        layer_rewards(output, QUERY_LABELS, text, previous_accuracy=previous)


@pytest.mark.parametrize("name", ["similarity", "improvement", "accuracy", "log_likelihood"])
def test_labels_that_do_not_fit(output: EpisodeOutput, name: str) -> None:
    def reward(labels: Tensor) -> Tensor:
        inputs = RewardInputs(output, labels, one_hot_text(2, 2))
        return weighted_rewards({name: 1.0}, inputs)[0]

    for wrong in (QUERY_LABELS + 1, QUERY_LABELS - 1):
        with pytest.raises(ValueError, match=r"labels: expected values in \[0, 2\)"):
            reward(wrong)
    for wrong in (QUERY_LABELS[:, :3], QUERY_LABELS[:1], QUERY_LABELS[0]):
        with pytest.raises(ValueError, match=r"labels: shape .* expected \(2, 4\)"):
            reward(wrong)
    with pytest.raises(TypeError, match=r"labels: expected int64, got torch.float32"):
        reward(QUERY_LABELS.float())


def test_support_labels_that_do_not_fit() -> None:
    features, labels = torch.randn(1, 2, 3), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match=r"support_labels: expected values in \[0, 2\)"):
        accuracy_reward(*[features] * 4, labels + 1, labels, 2)


@pytest.mark.usefixtures("unchecked")
def test_values_of_labels_are_read_where_values_are_checked(output: EpisodeOutput) -> None:
    assert episode_accuracy(output.logits, QUERY_LABELS + 2).tolist() == [0.0, 0.0]


def log_likelihood_of_nan(output: EpisodeOutput) -> Tensor:
    spoilt = output._replace(logits=output.logits * torch.tensor([1.0, torch.nan])[:, None, None])
    inputs = RewardInputs(spoilt, QUERY_LABELS, one_hot_text(2, 2))
    return weighted_rewards({"log_likelihood": 1.0}, inputs)[0]


def test_a_reward_that_is_no_number_is_named(output: EpisodeOutput) -> None:
    with pytest.raises(ValueError, match="reward 'log_likelihood': NaN or infinity found"):
        log_likelihood_of_nan(output)


@pytest.mark.usefixtures("unchecked")
def test_values_of_rewards_are_read_where_values_are_checked(output: EpisodeOutput) -> None:
    assert log_likelihood_of_nan(output).isnan().tolist() == [[False, True]] * 2


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


def test_named_rewards_and_their_weighted_sum(output: EpisodeOutput) -> None:
    inputs = RewardInputs(output, QUERY_LABELS, one_hot_text(2, 2), torch.tensor(0.25))
    weights = {"similarity": 0.5, "improvement": 2.0, "accuracy": -1.0}
    total, parts = weighted_rewards(weights, inputs)
    assert set(parts) == set(weights)
    want = 0.5 * parts["similarity"] + 2.0 * parts["improvement"] - parts["accuracy"]
    torch.testing.assert_close(total, want)
    accuracy = episode_accuracy(output.logits, QUERY_LABELS)
    torch.testing.assert_close(parts["accuracy"], accuracy.expand(2, 2))
    more = {name: weighted_rewards({name: 1.0}, inputs)[0] for name in reward_names()}
    torch.testing.assert_close(more["episode_improvement"], (accuracy - 0.25).expand(2, 2))
    first = weighted_rewards({"episode_improvement": 1.0}, inputs._replace(previous_accuracy=None))
    assert not first[0].any()  # there were no episodes before
    loss = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), QUERY_LABELS.flatten(), reduction="none"
    )
    likelihood = -loss.view(2, 4).mean(1)
    torch.testing.assert_close(more["log_likelihood"], likelihood.expand(2, 2))
    before = layer_rewards(output, QUERY_LABELS, inputs.text)
    both, _ = weighted_rewards({"similarity": 0.5, "improvement": 1.0}, inputs)
    torch.testing.assert_close(both, before)


def test_a_user_adds_a_reward(output: EpisodeOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards_module, "_REWARDS", dict(rewards_module._REWARDS))

    @register_reward("half_way")
    def half_way(inputs: RewardInputs) -> Tensor:
        return -torch.stack([(t.alpha - 0.5).abs() for t in inputs.output.layers])

    inputs = RewardInputs(output, QUERY_LABELS, one_hot_text(2, 2))
    total, _ = weighted_rewards({"half_way": 2.0}, inputs)
    assert total.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert "half_way" in reward_names()
    with pytest.raises(ValueError, match="registered already"):
        register_reward("half_way")(half_way)
    register_reward("flat")(lambda inputs: torch.zeros(2))
    with pytest.raises(ValueError, match=r"reward 'flat': shape \(2,\), expected .* \(2, 2\)"):
        weighted_rewards({"flat": 1.0}, inputs)


@pytest.mark.parametrize(
    ("weights", "match"),
    [({}, "at least one"), ({"glory": 1.0}, "unknown 'glory'"), ({"accuracy": 1e400}, "finite")],
)
def test_wrong_reward_weights(output: EpisodeOutput, weights: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        weighted_rewards(weights, RewardInputs(output, QUERY_LABELS, one_hot_text(2, 2)))


@pytest.mark.parametrize("name", [3, None, lambda inputs: inputs], ids=["int", "None", "function"])
def test_a_reward_is_registered_by_a_string(name: Any) -> None:
    with pytest.raises(TypeError, match=f"^name: expected a string, got {type(name).__name__}$"):
        register_reward(name)
    assert name not in reward_names()


def test_returns_of_no_layer() -> None:
    for shape in ((0, 3), ()):
        with pytest.raises(ValueError, match=r"rewards: shape .* of at least one layer"):
            discounted_returns(torch.zeros(shape), 0.5)
    with pytest.raises(TypeError, match="rewards: expected a tensor, got list"):
        discounted_returns([1.0], 0.5)  # type: ignore[arg-type]
    assert discounted_returns(torch.ones(2, 0), 0.5).shape == (2, 0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 6), (2, 3, 5)), r"class_embedding: shape \(2, 3, 5\), expected \(2, way, 6\)"),
        (((2, 4, 6), (1, 3, 6)), r"class_embedding: shape \(1, 3, 6\), expected \(2, way, 6\)"),
        (((2, 4, 6), (3, 6)), r"class_embedding: expected 3 dimensions, got shape \(3, 6\)"),
        (((4, 6), (2, 3, 6)), r"aligned: expected 3 dimensions, got shape \(4, 6\)"),
    ],
)
def test_embeddings_that_do_not_fit(shapes: tuple, message: str) -> None:
    labels = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        similarity_reward(*map(torch.zeros, shapes), labels)
    with pytest.raises(TypeError, match="aligned: expected a tensor, got list"):
        similarity_reward([1.0], torch.zeros(2, 3, 6), labels)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="labels: expected a tensor, got list"):
        similarity_reward(torch.zeros(2, 4, 6), torch.zeros(2, 3, 6), [[0] * 4] * 2)  # type: ignore
