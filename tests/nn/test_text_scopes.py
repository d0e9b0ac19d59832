"""Whose texts an image sees: the scopes in which each class has its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dvla_fast.nn import DVLA, TextTokens, prototype_logits
from dvla_fast.nn.dvla import TEXT_SCOPES

from .conftest import TEXT_DIM, make_episodes, make_text

MakeModel = Callable[..., DVLA]


def test_class_scope_hides_text_from_queries(make_model: MakeModel) -> None:
    model = make_model(text_scope="class").eval()
    support, labels, query, _ = make_episodes(2, 3, 2, 1)
    text = make_text(2, 3)
    changed = TextTokens(text.tokens.clone(), text.levels, text.class_embedding)
    changed.tokens[:, :3] += 1.0  # the first class's texts
    before = model(support, labels, query, text, way=3, alpha=0.5)
    after = model(support, labels, query, changed, way=3, alpha=0.5)
    for trace_a, trace_b in zip(before.layers, after.layers):
        torch.testing.assert_close(trace_a.query_before, trace_a.query_after)
        torch.testing.assert_close(trace_a.query_after, trace_b.query_after)
        moved = (trace_a.support_after - trace_b.support_after).abs().sum(-1) > 1e-5
        assert torch.equal(moved, labels == 0)
    assert before.aligned_labels is labels
    assert not torch.allclose(before.logits, after.logits)


def test_class_scope_compares_gated_supports_with_plain_queries(make_model: MakeModel) -> None:
    model = make_model(text_scope="class").eval()
    support, labels, query, _ = make_episodes(2, 3, 2, 1)
    features: list[torch.Tensor] = []
    model.backbone.register_forward_hook(
        lambda _m, _args, out: features.append(out.unflatten(0, (2, -1)))
    )
    logits = model(support, labels, query, make_text(2, 3), way=3).logits
    gated, plain = features
    torch.testing.assert_close(plain.flatten(0, 1), model.features(query.flatten(0, 1)))
    assert not torch.allclose(gated.flatten(0, 1), model.features(support.flatten(0, 1)), atol=1e-3)
    torch.testing.assert_close(logits, prototype_logits(gated, labels, plain, 3, 0.2))


@pytest.mark.parametrize(("alpha_scope", "alpha"), [("episode", 0.5), ("image", None)])
def test_candidates_meet_one_class_at_a_time(
    make_model: MakeModel, alpha_scope: str, alpha: float | None
) -> None:
    """Only comparisons with a class depend on its texts, of its supports and of all queries."""
    model = make_model(text_scope="candidate", alpha_scope=alpha_scope).eval()
    support, labels, query, _ = make_episodes(2, 3, 2, 1)
    text = make_text(2, 3, masked=True)
    changed = text.tokens.clone()
    changed[:, 3:6] += 1.0  # the second class's texts
    before = model(support, labels, query, text, way=3, alpha=alpha)
    after = model(support, labels, query, text._replace(tokens=changed), way=3, alpha=alpha)
    moved = (before.logits - after.logits).abs() > 1e-5
    assert moved.tolist() == [[[False, True, False]] * 3] * 2
    for trace_a, trace_b in zip(before.layers, after.layers):
        moved = (trace_a.query_after - trace_b.query_after).abs().sum(-1) > 1e-5
        assert moved.tolist() == [[[False, True, False]] * 3] * 2
    first = before.layers[0].query_before  # no gate came before it
    torch.testing.assert_close(first, first[:, :, :1].expand_as(first))
    assert before.aligned_labels is labels


@pytest.mark.parametrize("alpha_scope", ["episode", "image"])
def test_candidates_are_gated_as_supports_are(make_model: MakeModel, alpha_scope: str) -> None:
    """Every query, class by class, as a support of that class; then the nearest prototype."""
    model = make_model(text_scope="candidate", alpha_scope=alpha_scope).eval()
    as_class = make_model(text_scope="class", alpha_scope=alpha_scope).eval()
    as_class.load_state_dict(model.state_dict())
    support, labels, query, _ = make_episodes(2, 3, 2, 2)
    text = make_text(2, 3, masked=True)
    found = model(support, labels, query, text, way=3)
    given = {"alpha": [trace.alpha for trace in found.layers]}
    if alpha_scope == "image":
        given = {"alpha": [trace.alpha[:, :6] for trace in found.layers]}
    seen, _ = as_class.support_features(support, labels, text, way=3, **given)
    for label in range(3):
        if alpha_scope == "image":
            place = slice(6 + 6 * label, 12 + 6 * label)
            given = {"alpha": [trace.alpha[:, place] for trace in found.layers]}
        whose = torch.full(query.shape[:2], label)
        features, traces = as_class.support_features(query, whose, text, way=3, **given)
        logits = prototype_logits(seen, labels, features, 3, model.temperature)
        torch.testing.assert_close(found.logits[..., label], logits[..., label])
        for mine, theirs in zip(found.layers, traces):
            torch.testing.assert_close(mine.query_before[:, :, label], theirs.support_before)
            torch.testing.assert_close(mine.query_after[:, :, label], theirs.support_after)
        alone, decided = as_class.support_features(query, whose, text, way=3)
        if alpha_scope == "image":  # each candidate decides from what it is
            for mine, theirs in zip(found.layers, decided):
                torch.testing.assert_close(mine.alpha[:, place], theirs.alpha)
                torch.testing.assert_close(mine.state[:, place], theirs.state)
            torch.testing.assert_close(alone, features)


@pytest.mark.parametrize("text_scope", ["class", "candidate"])
def test_each_class_has_its_own_mask_and_levels(make_model: MakeModel, text_scope: str) -> None:
    model = make_model(text_scope=text_scope).eval()
    support, labels, query, _ = make_episodes(2, 3, 2, 1)
    text = make_text(2, 3, masked=True)
    levels = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1, 1])
    text.mask[1] = text.mask[1].roll(3)  # the second episode's first class lacks one instead
    text = text._replace(levels=levels, tokens=text.tokens.masked_fill(~text.mask[..., None], 9.0))
    both = model(support, labels, query, text, way=3)
    other = text._replace(tokens=text.tokens.masked_fill(~text.mask[..., None], torch.nan))
    torch.testing.assert_close(model(support, labels, query, other, way=3).logits, both.logits)
    for i in range(2):
        one = slice(i, i + 1)
        own = TextTokens(text.tokens[one], levels, text.class_embedding[one], text.mask[one])
        alone = model(support[one], labels[one], query[one], own, way=3)
        torch.testing.assert_close(alone.logits, both.logits[one])


@pytest.mark.parametrize("alpha_scope", ["episode", "image"])
@pytest.mark.parametrize("text_scope", ["episode", "class", "candidate"])
def test_supports_first_and_queries_later(
    make_model: MakeModel, text_scope: str, alpha_scope: str
) -> None:
    model = make_model(text_scope=text_scope, alpha_scope=alpha_scope).eval()
    support, labels, query, _ = make_episodes(2, 3, 2, 2)
    for text in (make_text(2, 3, masked=True), make_text(2, 3), None):
        expected = model(support, labels, query, text, way=3, sample=False)
        maps = model.prefix(support.flatten(0, 1)).unflatten(0, support.shape[:2])
        features, layers = model.support_features(
            maps, labels, text, way=3, sample=False, from_prefix=True
        )
        for some in (query, query[:, :1]):  # each by itself: the others change nothing
            logits = model.query_logits(features, labels, some, text, layers, way=3)
            torch.testing.assert_close(logits, expected.logits[:, : some.shape[1]])
        maps = model.prefix(query.flatten(0, 1)).unflatten(0, query.shape[:2])
        logits = model.query_logits(features, labels, maps, text, layers, way=3, from_prefix=True)
        torch.testing.assert_close(logits, expected.logits)


@pytest.mark.parametrize("alpha_scope", ["episode", "image"])
@pytest.mark.parametrize("text_scope", ["episode", "class", "candidate"])
def test_queries_later_with_replayed_gates(
    make_model: MakeModel, text_scope: str, alpha_scope: str
) -> None:
    model = make_model(text_scope=text_scope, alpha_scope=alpha_scope).eval()
    support, labels, query, _ = make_episodes(2, 3, 2, 2)
    text = make_text(2, 3)
    for alpha in (0.9, [0.1, 0.8], torch.tensor([0.2, 0.7])):
        expected = model(support, labels, query, text, way=3, alpha=alpha).logits
        features, layers = model.support_features(support, labels, text, way=3, alpha=alpha)
        logits = model.query_logits(features, labels, query, text, layers, way=3, alpha=alpha)
        torch.testing.assert_close(logits, expected)


def test_queries_that_do_not_fit_their_supports(make_model: MakeModel) -> None:
    model = make_model().eval()
    support, labels, query, _ = make_episodes(2, 3, 2, 2)
    text = make_text(2, 3)
    features, layers = model.support_features(support, labels, text, way=3)
    given = {
        "features": features, "support_labels": labels, "query": query, "text": text,
        "layers": layers, "way": 3,
    }  # fmt: skip
    few = tuple(trace._replace(support_before=trace.support_before[:1]) for trace in layers)
    for error, words, changed in (
        (ValueError, r"layers: at \[\], expected", {"layers": ()}),
        (ValueError, r"layers: at .*, expected \[\]", {"text": None}),
        (ValueError, "layers: at", {"layers": layers[::-1]}),
        (ValueError, r"layers: of \(1, 6\) supports", {"layers": few}),
        (ValueError, "query: an episode needs", {"query": query[:, :0]}),
        (ValueError, "query: shape", {"query": query[0]}),
        (TypeError, "query: dtype torch.uint8", {"query": query.byte()}),
        (ValueError, "features: shape", {"features": features[:1]}),
        (
            ValueError,
            r"features: shape .*, expected \(2, supports, ",
            {"features": features[..., :3]},
        ),
        (ValueError, "features: shape", {"features": features.unsqueeze(-1)}),
        (TypeError, "features: expected a tensor", {"features": features.tolist()}),
        (ValueError, "support_labels: shape", {"support_labels": labels[:, :1]}),
        (TypeError, "support_labels: expected int64", {"support_labels": labels.float()}),
    ):
        with pytest.raises(error, match=words):
            model.query_logits(**(given | changed))


def test_class_scope_needs_even_texts(make_model: MakeModel) -> None:
    support, labels, query, _ = make_episodes(1, 3, 1, 1)
    text = make_text(1, 2, attributes=1)._replace(class_embedding=torch.randn(1, 3, TEXT_DIM))
    for scope in ("class", "candidate"):
        model = make_model(text_scope=scope)
        features, layers = model.support_features(support, labels, make_text(1, 3), way=3)
        words = "4 tokens do not fall into 3 classes"
        with pytest.raises(ValueError, match=words):
            model(support, labels, query, text, way=3)
        with pytest.raises(ValueError, match=words):
            model.support_features(support, labels, text, way=3)
        with pytest.raises(ValueError, match=words):
            model.query_logits(features, labels, query, text, layers, way=3)


def test_class_scope_weighs_each_class_by_its_own_levels(make_model: MakeModel) -> None:
    """A class of attributes alone beside one that has a description."""
    model = make_model(text_scope="class", level_weights=((1.0, 0.0), (1.0, 0.0))).eval()
    support, labels, query, _ = make_episodes(2, 2, 2, 1)
    text = make_text(2, 2)._replace(levels=torch.tensor([0, 0, 0, 0, 0, 1]))
    changed = text.tokens.clone()
    changed[:, 5] += 1.0  # the second class's description, which weighs 0

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        given = text._replace(tokens=tokens)
        return model(support, labels, query, given, way=2).logits

    torch.testing.assert_close(logits(changed), logits(text.tokens))
    changed[:, 2] += 1.0  # an attribute of the first
    assert not torch.allclose(logits(changed), logits(text.tokens), atol=1e-4)


def test_when_supports_are_independent(make_model: MakeModel) -> None:
    first, second = (2, 0), (3, 0)
    model = make_model(text_scope="class")
    for alpha in (0.5, torch.tensor(0.5), [0.5, np.float32(0.5)], {first: 0.5, second: 0.1}):
        assert model.supports_are_independent(alpha)
    per_episode = torch.rand(2)
    for alpha in (None, {first: 0.5}, [0.5, None], per_episode, [0.5, per_episode]):
        assert not model.supports_are_independent(alpha)
    image = make_model(text_scope="class", alpha_scope="image")
    assert image.supports_are_independent()
    assert image.supports_are_independent({first: 0.5})
    assert not image.supports_are_independent(torch.rand(2, 3))
    assert make_model(text_scope="class", policy="static").supports_are_independent()
    assert not make_model().supports_are_independent(0.5)
    gated = make_model(text_scope="class").eval()
    support, labels, _, _ = make_episodes(1, 2, 1, 1)
    text = make_text(1, 2)
    alone = TextTokens(
        torch.stack([text.tokens[0].unflatten(0, (2, -1))[i] for i in labels[0].tolist()]),
        text.levels[:3],
        text.class_embedding[0][labels[0]].unsqueeze(1),
    )
    together, _ = gated.support_features(support, labels, text, way=2, alpha=[0.5, 0.2])
    apart, _ = gated.support_features(
        support[0].unsqueeze(1), torch.zeros(2, 1).long(), alone, way=1, alpha=[0.5, 0.2]
    )
    torch.testing.assert_close(apart.flatten(0, 1), together.flatten(0, 1))


@pytest.mark.parametrize("text_scope", ["episode", "candidate"])
def test_later_queries_take_the_mean_in_training_too(
    make_model: MakeModel, text_scope: str
) -> None:
    model = make_model(text_scope=text_scope, alpha_scope="image").eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    text = make_text(2, 3)
    features, layers = model.support_features(support, labels, text, way=3)
    want = model.query_logits(features, labels, query, text, layers, way=3)
    for gate in model.gates:
        gate.train()
    torch.testing.assert_close(
        model.query_logits(features, labels, query, text, layers, way=3), want
    )


@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_pooled_tokens_of_a_half_precision_model_are_float32(
    make_model: MakeModel, text_scope: str
) -> None:
    model = make_model(text_scope=text_scope).bfloat16()
    support, labels, query, _ = make_episodes(1, 2, 1, 1)
    output = model(support.bfloat16(), labels, query.bfloat16(), make_text(1, 2), way=2)
    for trace in output.layers:
        for name in ("support_before", "support_after", "query_before", "query_after", "fused"):
            assert getattr(trace, name).dtype == torch.float32, name
