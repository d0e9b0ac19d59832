"""Prototypes against a plain loop, and the classifier's errors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dvla_fast.nn import prototype_logits, prototypes


@pytest.mark.parametrize(
    ("episodes", "way", "shot", "queries"), [(1, 2, 1, 1), (3, 5, 1, 4), (2, 4, 5, 3), (1, 1, 3, 2)]
)
def test_logits_equal_a_loop(episodes: int, way: int, shot: int, queries: int) -> None:
    labels = torch.stack(
        [torch.arange(way).repeat(shot)[torch.randperm(way * shot)] for _ in range(episodes)]
    )
    support = torch.randn(episodes, way * shot, 7, dtype=torch.float64)
    query = torch.randn(episodes, queries, 7, dtype=torch.float64)
    got = prototype_logits(support, labels, query, way, temperature=0.5)
    assert got.shape == (episodes, queries, way)
    for e in range(episodes):
        for c in range(way):
            mean = torch.stack([f for f, y in zip(support[e], labels[e]) if y == c]).mean(0)
            for q in range(queries):
                cosine = query[e, q] @ mean / (query[e, q].norm() * mean.norm())
                torch.testing.assert_close(got[e, q, c], cosine / 0.5)


def test_a_temperature_may_be_a_tensor() -> None:
    features, labels = torch.randn(1, 4, 7), torch.tensor([[0, 1, 0, 1]])
    got = prototype_logits(features, labels, features, 2, torch.tensor(0.5))  # type: ignore
    torch.testing.assert_close(got, prototype_logits(features, labels, features, 2, 0.5))


def test_queries_with_features_for_each_class() -> None:
    support = torch.randn(2, 6, 7, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, 2, 0, 1], [2, 1, 0, 0, 1, 2]])
    query = torch.randn(2, 4, 3, 7, dtype=torch.float64)
    got = prototype_logits(support, labels, query, 3)
    for c in range(3):
        alone = prototype_logits(support, labels, query[:, :, c], 3)
        torch.testing.assert_close(got[..., c], alone[..., c])


def test_uneven_shots_and_absent_classes() -> None:
    features = torch.tensor([[[2.0, 0.0], [4.0, 0.0], [0.0, 3.0]]])
    means = prototypes(features, torch.tensor([[0, 0, 2]]), way=3)
    assert means.tolist() == [[[3.0, 0.0], [0.0, 0.0], [0.0, 3.0]]]
    with pytest.raises(ValueError, match="a class of an episode has no support"):
        prototype_logits(features, torch.tensor([[0, 0, 2]]), features, way=3)  # 0 could win
    for wrong in ([[1, 2, 3]], [[0, -1, 1]]):
        with pytest.raises(ValueError, match=r"support_labels: expected values in \[0, 3\)"):
            prototype_logits(features, torch.tensor(wrong), features, way=3)
    logits = prototype_logits(features, torch.tensor([[0, 0, 1]]), features, way=2)
    assert logits.argmax(-1).tolist() == [[0, 0, 1]]


def test_half_features_are_classified_in_float32() -> None:
    features = torch.randn(1, 4, 8).bfloat16()
    labels = torch.tensor([[0, 1, 0, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        logits = prototype_logits(features, labels, features, 2)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits, prototype_logits(features.float(), labels, features.float(), 2)
    )


def test_gradients_reach_supports_and_queries() -> None:
    support = torch.randn(1, 4, 8, requires_grad=True)
    query = torch.randn(1, 3, 8, requires_grad=True)
    prototype_logits(support, torch.tensor([[0, 1, 0, 1]]), query, 2).square().sum().backward()
    assert support.grad is not None
    assert support.grad.any()
    assert query.grad is not None
    assert query.grad.any()


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, "support_features: shape", {"support_features": torch.randn(4, 8)}),
        (ValueError, "query_features: shape", {"query_features": torch.randn(2, 3, 8)}),
        (ValueError, "query_features: shape", {"query_features": torch.randn(1, 3, 5)}),
        (ValueError, "query_features: shape", {"query_features": torch.randn(1, 3, 3, 8)}),
        (ValueError, "query_features: shape .* 3 or 4", {"query_features": torch.randn(3, 8)}),
        (TypeError, "query_features: expected", {"query_features": torch.ones(1, 3, 8).long()}),
        (TypeError, "support_labels: expected int64", {"support_labels": torch.zeros(1, 4)}),
        (ValueError, "support_labels: shape", {"support_labels": torch.zeros(1, 3).long()}),
        (ValueError, "way", {"way": 0}),
        (TypeError, r"way: expected a whole number, got 2\.0", {"way": 2.0}),
        (TypeError, "query_features: expected a tensor, got NoneType", {"query_features": None}),
        (TypeError, "temperature: expected a number, got '0.2'", {"temperature": "0.2"}),
        (ValueError, "temperature", {"temperature": 0.0}),
        (ValueError, "temperature", {"temperature": float("nan")}),
        (ValueError, "temperature", {"temperature": float("inf")}),
    ],
)
def test_wrong_arguments(error: type[Exception], match: str, changed: dict) -> None:
    arguments = {
        "support_features": torch.randn(1, 4, 8),
        "support_labels": torch.tensor([[0, 1, 0, 1]]),
        "query_features": torch.randn(1, 3, 8),
        "way": 2,
        **changed,
    }
    with pytest.raises(error, match=match):
        prototype_logits(**arguments)


@pytest.mark.parametrize("autocast", [False, True])
def test_means_of_large_half_features(autocast: bool) -> None:
    features = torch.full((1, 5, 4), 30_000.0).half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        means = prototypes(features, torch.zeros(1, 5, dtype=torch.int64), 1)
        wide = prototypes(features.float() * 3, torch.zeros(1, 5, dtype=torch.int64), 1)
    assert torch.equal(means, torch.full((1, 1, 4), 30_000.0).half())
    assert torch.equal(wide, torch.full((1, 1, 4), 90_000.0))


def test_float64_queries_keep_their_precision() -> None:
    labels = torch.zeros(1, 2, dtype=torch.int64)
    logits = prototype_logits(torch.randn(1, 2, 3), labels, torch.randn(1, 2, 3).double(), 1)
    assert logits.dtype == torch.float64


def test_without_values_there_is_nothing_to_check() -> None:
    features, labels = torch.randn(1, 3, 4), torch.tensor([[0, 1, 1]])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (features, labels)]
        assert prototype_logits(*fake, fake[0], 2).shape == (1, 3, 2)
    traced = make_fx(lambda x, y: prototype_logits(x, y, x, 2), tracing_mode="symbolic")
    torch.testing.assert_close(
        traced(features, labels)(features, labels), prototype_logits(features, labels, features, 2)
    )
