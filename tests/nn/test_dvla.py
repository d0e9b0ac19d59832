"""DVLA: episodes, scopes, replays, and the traces that rewards read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import dvla_fast
from dvla_fast.nn import (
    DVLA,
    ResNet12,
    SmallConvAttention,
    TextTokens,
    prototype_logits,
    visformer_tiny,
)
from dvla_fast.nn.dvla import TEXT_SCOPES
from dvla_fast.nn.policy import POLICIES

from .conftest import TEXT_DIM, make_episodes, make_text

MakeModel = Callable[..., DVLA]


@pytest.mark.parametrize(
    ("episodes", "way", "shot", "queries"), [(1, 2, 1, 1), (3, 5, 1, 2), (2, 3, 4, 1), (2, 1, 2, 3)]
)
@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
@pytest.mark.parametrize("alpha_scope", ["episode", "image"])
def test_shapes(
    make_model: MakeModel,
    episodes: int,
    way: int,
    shot: int,
    queries: int,
    text_scope: str,
    alpha_scope: str,
) -> None:
    model = make_model(text_scope=text_scope, alpha_scope=alpha_scope)
    support, labels, query, _ = make_episodes(episodes, way, shot, queries)
    output = model(support, labels, query, make_text(episodes, way), way=way)
    s, q = way * shot, way * queries
    seen = q if text_scope == "episode" else s
    drawn = s + {"episode": q, "class": 0, "candidate": way * q}[text_scope]
    classes = (way,) if text_scope == "candidate" else ()
    assert output.logits.shape == (episodes, q, way)
    assert [t.location for t in output.layers] == [(2, 0), (3, 0)]
    for trace, width in zip(output.layers, (16, 24)):
        shape = (episodes,) if alpha_scope == "episode" else (episodes, drawn)
        for value in (trace.alpha, trace.action_logit, trace.log_prob, trace.entropy):
            assert value.shape == shape
        assert trace.support_before.shape == trace.support_after.shape == (episodes, s, width)
        compared = (episodes, q, *classes, width)
        assert trace.query_before.shape == trace.query_after.shape == compared
        assert trace.fused.shape == (episodes, seen, width)
        assert trace.aligned.shape == (episodes, seen, TEXT_DIM)
    assert (output.aligned_labels is None) == (text_scope == "episode")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_every_policy_trains(make_model: MakeModel, policy: str, text_scope: str) -> None:
    model = make_model(policy=policy, text_scope=text_scope)
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    output = model(support, labels, query, make_text(2, 3, masked=True), way=3)
    loss = output.logits.square().mean()
    loss = loss + sum(t.log_prob.sum() + t.aligned.square().sum() for t in output.layers)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_without_text_it_is_the_visual_classifier(make_model: MakeModel) -> None:
    model = make_model().eval()
    support, labels, query, _ = make_episodes(2, 3, 2, 2)
    output = model(support, labels, query, way=3)
    assert output.layers == ()
    features = [model.features(x.flatten(0, 1)).unflatten(0, (2, -1)) for x in (support, query)]
    torch.testing.assert_close(
        output.logits, prototype_logits(features[0], labels, features[1], 3, 0.2)
    )


@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_batched_episodes_are_independent(make_model: MakeModel, text_scope: str) -> None:
    model = make_model(text_scope=text_scope).eval()
    support, labels, query, _ = make_episodes(3, 3, 2, 2)
    text = make_text(3, 3, masked=True)
    together = model(support, labels, query, text, way=3)
    assert text.mask is not None
    for e in range(3):
        one = slice(e, e + 1)
        alone_text = TextTokens(
            text.tokens[one], text.levels, text.class_embedding[one], text.mask[one]
        )
        alone = model(support[one], labels[one], query[one], alone_text, way=3)
        torch.testing.assert_close(alone.logits, together.logits[one], rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(alone.layers, together.layers):
            torch.testing.assert_close(mine.alpha, theirs.alpha[one], rtol=1e-4, atol=1e-4)


def test_supports_decide_and_queries_replay(make_model: MakeModel) -> None:
    model = make_model().eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    text = make_text(2, 3)
    first = model(support, labels, query, text, way=3)
    other = model(support, labels, torch.randn_like(query), text, way=3)
    for mine, theirs in zip(first.layers, other.layers):
        torch.testing.assert_close(mine.alpha, theirs.alpha)
        torch.testing.assert_close(mine.support_after, theirs.support_after)
    # Query by query gives the same: no query sees another.
    singly = [model(support, labels, query[:, i : i + 1], text, way=3).logits for i in range(6)]
    torch.testing.assert_close(torch.cat(singly, 1), first.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha_scope", ["episode", "image"])
@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_traced_gates_replay(make_model: MakeModel, alpha_scope: str, text_scope: str) -> None:
    model = make_model(alpha_scope=alpha_scope, text_scope=text_scope)
    model.backbone.eval()  # batch norm apart
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    text = make_text(2, 3)
    drawn = model(support, labels, query, text, way=3, sample=True)
    alphas = [t.alpha for t in drawn.layers]
    again = model(support, labels, query, text, way=3, alpha=alphas)
    torch.testing.assert_close(again.logits, drawn.logits)
    actions = {t.location: t.action_logit for t in drawn.layers}
    scored = model(support, labels, query, text, way=3, action_logit=actions)
    torch.testing.assert_close(scored.logits, drawn.logits)
    for mine, theirs in zip(scored.layers, drawn.layers):
        torch.testing.assert_close(mine.log_prob, theirs.log_prob)


def test_forms_of_given_gates(make_model: MakeModel) -> None:
    model = make_model().eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    text = make_text(2, 3)

    def logits(alpha: object) -> torch.Tensor:
        return model(support, labels, query, text, way=3, alpha=alpha).logits

    for form in (torch.tensor(0.3), [0.3, 0.3], {(2, 0): 0.3, (3, 0): torch.full((2,), 0.3)}):
        torch.testing.assert_close(logits(form), logits(0.3))
    partly = model(support, labels, query, text, way=3, alpha={(3, 0): 1.0})
    assert partly.layers[1].alpha.tolist() == [1.0, 1.0]
    assert partly.layers[0].entropy.any()  # asked its policy


def test_prefix_saves_work_and_changes_nothing(make_model: MakeModel) -> None:
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    text = make_text(2, 3)
    for scope in TEXT_SCOPES:
        model = make_model(text_scope=scope).eval()
        maps = [model.prefix(x.flatten(0, 1)).unflatten(0, (2, -1)) for x in (support, query)]
        for given in (text, None):
            got = model(maps[0], labels, maps[1], given, way=3, from_prefix=True)
            torch.testing.assert_close(
                got.logits, model(support, labels, query, given, way=3).logits
            )


def test_level_weights_scale_the_texts(make_model: MakeModel) -> None:
    support, labels, query, _ = make_episodes(1, 2, 1, 1)
    text = make_text(1, 2)
    model = make_model(level_weights=((0.5, 0.5), (2.0, 2.0)))
    assert model.level_scales == ((1.0, 1.0), (1.0, 1.0))
    assert make_model().level_scales == ((1.4, 0.6), (0.6, 1.4))
    only_attributes = make_model(level_weights=((1.0, 0.0), (1.0, 0.0))).eval()
    without = TextTokens(
        text.tokens * (text.levels == 0).float().unsqueeze(-1), text.levels, text.class_embedding
    )
    torch.testing.assert_close(
        only_attributes(support, labels, query, text, way=2).logits,
        only_attributes(support, labels, query, without, way=2).logits,
    )


def test_pooled_traces_are_the_tokens_around_the_gate(make_model: MakeModel) -> None:
    model = make_model().eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 1)
    record: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    model.gates[0].register_forward_hook(
        lambda _m, args, out: record.append((args[0], out.image_tokens, out.fused))
    )
    trace = model(support, labels, query, make_text(2, 3, masked=True), way=3).layers[0]
    before, after, _ = (x.mean(1).unflatten(0, (2, 6)) for x in record[0])
    torch.testing.assert_close(trace.support_before, before[:, :3])
    torch.testing.assert_close(trace.support_after, after[:, :3])
    torch.testing.assert_close(trace.query_before, before[:, 3:])
    torch.testing.assert_close(trace.query_after, after[:, 3:])
    torch.testing.assert_close(trace.fused, trace.query_after - trace.query_before)
    torch.testing.assert_close(trace.aligned, model.alignments[0](trace.fused))


def test_alignment_trains_u_alone(make_model: MakeModel) -> None:
    model = make_model()
    support, labels, query, _ = make_episodes(1, 2, 1, 1)
    output = model(support, labels, query, make_text(1, 2), way=2)
    sum(t.aligned.square().sum() for t in output.layers).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"alignments.0.weight", "alignments.1.weight"}


def test_over_visformer() -> None:
    backbone = visformer_tiny(64, depth=(1, 1, 2), locations=((2, 0), (3, 0)))
    model = dvla_fast.DVLA(backbone, text_dim=TEXT_DIM)
    support, labels, _, _ = make_episodes(2, 2, 1, 1)
    support, query = torch.randn(2, 2, 3, 64, 64), torch.randn(2, 2, 3, 64, 64)
    output = model(support, labels, query, make_text(2, 2, masked=True), way=2)
    assert output.logits.shape == (2, 2, 2)
    (output.logits.sum() + output.layers[0].log_prob.sum()).backward()
    assert [t.fused.shape[-1] for t in output.layers] == [192, 384]


def test_gates_before_convolutions_act_through_the_image_tokens_alone() -> None:
    torch.manual_seed(0)
    backbone = ResNet12(16, 1, widths=(8, 8, 16, 16))
    model = DVLA(backbone, text_dim=TEXT_DIM, num_heads=2, hidden_dim=8).eval()
    assert model.level_scales == ((1.4, 0.6), (0.6, 1.4))
    support, labels, query, _ = make_episodes(2, 3, 1, 2, side=16)
    text = make_text(2, 3, masked=True)
    output = model(support, labels, query, text, way=3)
    assert [t.location for t in output.layers] == [(3, 0), (4, 0)]
    plain = model(support, labels, query, way=3)
    assert not torch.allclose(output.logits, plain.logits, atol=1e-4)
    trace = output.layers[1]  # z + GAP(H), and nothing else of the text
    torch.testing.assert_close(trace.query_after, trace.query_before + trace.fused)
    split = model(
        model.prefix(support.flatten(0, 1)).unflatten(0, (2, -1)),
        labels,
        model.prefix(query.flatten(0, 1)).unflatten(0, (2, -1)),
        text,
        way=3,
        from_prefix=True,
    )
    torch.testing.assert_close(split.logits, output.logits)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("no such", {"gated_layers": [(2, 9)]}),
        ("not in the order", {"gated_layers": [(3, 0), (2, 0)]}),
        ("at least one", {"gated_layers": []}),
        ("text_scope: unknown", {"text_scope": "image"}),
        ("alpha_scope: unknown", {"alpha_scope": "class"}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": float("inf")}),
        ("level_weights: 1 pairs", {"level_weights": [(0.7, 0.3)]}),
        ("level_weights: expected two", {"level_weights": [(0.7, 0.3), (0.0, 0.0)]}),
        ("level_weights: expected two", {"level_weights": [(0.7, 0.3), (0.5, float("nan"))]}),
        ("level_weights: expected two", {"level_weights": [(0.7, 0.3), (float("nan"), 0.5)]}),
        ("level_weights: expected two", {"level_weights": [(0.7, 0.3), (float("inf"), 1.0)]}),
        ("num_heads", {"num_heads": 5}),
    ],
)
def test_wrong_constructions(match: str, options: dict) -> None:
    backbone = SmallConvAttention(image_size=8, width=8, depths=(1, 1, 1), num_heads=2)
    with pytest.raises(ValueError, match=match):
        DVLA(backbone, **{"text_dim": TEXT_DIM, "num_heads": 2, **options})


def test_a_backbone_that_is_none() -> None:
    with pytest.raises(TypeError, match="backbone: expected a GatedBackbone, got Linear"):
        DVLA(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_gated_layers_that_are_no_pairs() -> None:
    backbone = SmallConvAttention(image_size=8, width=8, depths=(1, 1, 1), num_heads=2)
    with pytest.raises(TypeError, match=r"^gated_layers: expected \(stage, block\) pairs, got 3$"):
        DVLA(backbone, 3)  # type: ignore[arg-type]


def test_a_temperature_of_several_numbers() -> None:
    backbone = SmallConvAttention(image_size=8, width=8, depths=(1, 1, 1), num_heads=2)
    with pytest.raises(TypeError, match=r"^temperature: expected a number, got .* \(2,\)$"):
        DVLA(backbone, text_dim=TEXT_DIM, num_heads=2, temperature=torch.ones(2))  # type: ignore


def test_replayed_gates_of_another_kind_are_named(make_model: MakeModel) -> None:
    model = make_model()
    support, labels, query, _ = make_episodes(2, 3, 1, 1)
    text = make_text(2, 3)
    for wrong in (0.5j, np.array(0.5), iter([0.5, 0.5])):
        with pytest.raises(TypeError, match=r"^alpha: expected a number, a tensor, one for each"):
            model(support, labels, query, text, way=3, alpha=wrong)
    with pytest.raises(ValueError, match=r"^action_logit: \[\(9, 9\), 'x'\] are not gated"):
        model(support, labels, query, text, way=3, action_logit={"x": 0.5, (9, 9): 0.5})


@pytest.mark.parametrize("option", ["temperature", "concentration", "fixed_alpha"])
def test_an_option_that_is_no_number(option: str) -> None:
    backbone = SmallConvAttention(image_size=8, width=8, depths=(1, 1, 1), num_heads=2)
    with pytest.raises(TypeError, match=f"{option}: expected a number, got 'a'"):
        DVLA(backbone, **{"text_dim": TEXT_DIM, "num_heads": 2, option: "a"})


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"location \(2,\): no such", {"gated_layers": [2, 1]}),
        ("level_weights: expected two", {"level_weights": [0.7, 0.3]}),
        ("level_weights: expected two", {"level_weights": torch.ones(2)}),
        ("level_weights: expected two", {"level_weights": torch.ones(2, 3)}),
        ("level_weights: 3 pairs for 2", {"level_weights": np.ones((3, 2))}),
        ("level_weights: expected two", {"level_weights": ["ab", "cd"]}),
    ],
)
def test_numbers_where_pairs_are_meant(match: str, options: dict) -> None:
    test_wrong_constructions(match, options)


@pytest.mark.parametrize("form", [list, torch.tensor, np.array, lambda x: list(torch.tensor(x))])
def test_level_weights_as_pairs_or_as_an_array(make_model: MakeModel, form: Callable) -> None:
    model = make_model(level_weights=form([(0.5, 1.5), (3.0, 1.0)]))
    assert model.level_scales == ((0.5, 1.5), (1.5, 0.5))
    assert {type(x) for pair in model.level_scales for x in pair} == {float}


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([("a", 1)] * 2, "level_weights: expected a number, got 'a'"),
        ([(None, 1)] * 2, "level_weights: expected a number, got None"),
        (3, "level_weights: expected two numbers for each gated layer, got 3"),
    ],
)
def test_level_weights_of_a_wrong_kind(make_model: MakeModel, weights: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        make_model(level_weights=weights)


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, "support: shape", {"support": torch.randn(3, 1, 8, 8)}),
        (ValueError, "query: shape", {"query": torch.randn(1, 6, 1, 8, 8)}),
        (ValueError, "does not fit support", {"query": torch.randn(2, 6, 1, 8, 9)}),
        (ValueError, "at least one image", {"query": torch.randn(2, 0, 1, 8, 8)}),
        (TypeError, "support_labels", {"support_labels": torch.zeros(2, 3)}),
        (ValueError, "support_labels: shape", {"support_labels": torch.zeros(3).long()}),
        (TypeError, "support_labels: expected a tensor", {"support_labels": [[0, 1, 2]] * 2}),
        (
            ValueError,
            r"expected values in \[0, 3\)",
            {"support_labels": torch.ones(2, 3).long().cumsum(1)},
        ),
        (ValueError, "has no support", {"support_labels": torch.zeros(2, 3).long()}),
        (TypeError, "query: expected a tensor", {"query": np.zeros((2, 6, 1, 8, 8))}),
        (TypeError, "text: expected TextTokens, got Tensor", {"text": torch.zeros(2, 3, 4)}),
        (ValueError, "way", {"way": 0}),
        (TypeError, r"way: expected a whole number, got 3\.0", {"way": 3.0}),
        (TypeError, "way: expected a whole number, got None", {"way": None}),
        (ValueError, "text.tokens: shape", {"text": make_text(1, 3)}),
        (ValueError, "text.class_embedding: shape", {"text": make_text(2, 2)}),
        (
            ValueError,
            "text.levels: shape",
            {"text": make_text(2, 3)._replace(levels=torch.zeros(2).long())},
        ),
        (ValueError, "alpha: 1 entries for 2", {"alpha": [0.5]}),
        (ValueError, "are not gated", {"alpha": {(2, 1): 0.5}}),
        (ValueError, "alpha: shape", {"alpha": torch.rand(5)}),
        (TypeError, "alpha: expected a tensor or a number", {"alpha": ["half", None]}),
    ],
)
def test_wrong_calls(
    make_model: MakeModel, error: type[Exception], match: str, changed: dict
) -> None:
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    arguments = {
        "support": support,
        "support_labels": labels,
        "query": query,
        "text": make_text(2, 3),
        "way": 3,
        **changed,
    }
    with pytest.raises(error, match=match):
        make_model()(**arguments)


@pytest.mark.parametrize("part", ["gates", "alignments", "backbone", None])
def test_quantised_parts(make_model: MakeModel, part: str | None) -> None:
    """Layers in int8, of one part or of all: their weight is a method then."""
    model = make_model().eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    text = make_text(2, 3)
    expected = model(support, labels, query, text, way=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about its own quantisation
        small = torch.ao.quantization.quantize_dynamic(
            model if part is None else getattr(model, part), {torch.nn.Linear}
        )
    if part is None:
        model = small
    else:
        setattr(model, part, small)
    got = model(support, labels, query, text, way=3)
    torch.testing.assert_close(got.logits, expected.logits, atol=0.5, rtol=0.05)
    assert not torch.equal(got.layers[1].aligned, expected.layers[1].aligned)


def test_a_number_of_numpy_replays_all_layers(make_model: MakeModel) -> None:
    model = make_model()
    support, labels, query, _ = make_episodes(1, 2, 1, 1)
    output = model(support, labels, query, make_text(1, 2), way=2, alpha=np.float32(0.25))
    assert [trace.alpha.tolist() for trace in output.layers] == [[0.25], [0.25]]


@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_one_gate_an_episode_reaches_its_images(make_model: MakeModel, text_scope: str) -> None:
    model = make_model(alpha_scope="image", text_scope=text_scope).eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    text, alpha = make_text(2, 3), torch.tensor([0.2, 0.9])
    output = model(support, labels, query, text, way=3, alpha=alpha)
    images = {"episode": 9, "class": 3, "candidate": 21}[text_scope]
    for trace in output.layers:
        for value in (trace.alpha, trace.action_logit, trace.log_prob, trace.entropy):
            assert value.shape == (2, images)
        assert torch.equal(trace.alpha, alpha.unsqueeze(1).expand(2, images))
    again = model(support, labels, query, text, way=3, alpha=output.layers[0].alpha)
    torch.testing.assert_close(again.logits, output.logits)


@pytest.mark.parametrize("name", ["alpha", "action_logit"])
@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_gates_of_images_are_refused_for_episodes(
    make_model: MakeModel, text_scope: str, name: str
) -> None:
    model = make_model(text_scope=text_scope)
    model.backbone.forward = None  # nothing is computed before
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    images = {"episode": 9, "class": 3, "candidate": 21}[text_scope]
    match = rf"{name}: shape \(2, {images}\), alpha_scope='episode' takes \(2,\)"
    for given in (torch.rand(2, images), [None, torch.rand(2, images)]):
        with pytest.raises(ValueError, match=match):
            model(support, labels, query, make_text(2, 3), way=3, **{name: given})


@pytest.mark.parametrize("policy", ["beta", "categorical"])
def test_hooks_of_all_modules_run_in_every_layer(make_model: MakeModel, policy: str) -> None:
    """Profilers and counters of operations register one for all modules."""
    model = make_model(policy=policy).eval()
    support, labels, query, _ = make_episodes(2, 3, 1, 2)
    given, text = (support, labels, query), make_text(2, 3)
    expected = model(*given, text, way=3)
    one_by_one: set[torch.nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, _a, _o: one_by_one.add(m)) for m in model.modules()]
    model(*given, text, way=3)
    for hook in hooks:
        hook.remove()
    at_once: set[torch.nn.Module] = set()
    register = torch.nn.modules.module.register_module_forward_hook
    hook = register(lambda m, _a, _o: at_once.add(m))
    try:
        hooked = model(*given, text, way=3)
    finally:
        hook.remove()
    assert at_once == one_by_one
    assert model.gates[0].image_kv in at_once
    torch.testing.assert_close(hooked.logits, expected.logits)


@pytest.mark.parametrize("policy", ["beta", "categorical"])
def test_weights_are_all_there_is(make_model: MakeModel, policy: str) -> None:
    """A model made on the meta device is whole with the weights of another."""
    support, labels, query, _ = make_episodes(1, 2, 1, 1)
    text = make_text(1, 2)
    model = make_model(policy=policy).eval()
    want = model(support, labels, query, text, way=2).logits
    loaded = make_model(policy=policy).eval().to("meta").to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict())
    assigned = make_model(policy=policy).eval().to("meta")
    assigned.load_state_dict(model.state_dict(), assign=True)
    for other in (loaded, assigned):
        assert torch.equal(other(support, labels, query, text, way=2).logits, want)


def test_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = DVLA(SmallConvAttention(), text_dim=TEXT_DIM, num_heads=2)
    backbone = model.backbone
    support, query = torch.randn(2, 1, 2, backbone.in_channels, *[backbone.image_size] * 2)
    labels = torch.zeros(1, 2, dtype=torch.int64)
    text = make_text(1, 2)
    on_meta = [x.to("meta") for x in (support, labels, query)]
    given = TextTokens(*(x.to("meta") for x in text if x is not None))
    assert model(*on_meta, given, way=2).logits.shape == (1, 2, 2)
