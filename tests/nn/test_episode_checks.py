"""Texts of episodes that do not fit are refused before the backbone runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dvla_fast.nn import DVLA
from dvla_fast.nn.dvla import TEXT_SCOPES

from .conftest import make_episodes, make_text

MakeModel = Callable[..., DVLA]


def to_meta(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"levels": lambda x: x + 2}, ValueError, r"levels: expected 0 \(attribute\) or 1"),
        ({"levels": lambda x: x - 1}, ValueError, r"levels: expected 0 \(attribute\) or 1"),
        ({"levels": lambda x: x.float()}, TypeError, "levels: expected int64"),
        ({"levels": lambda x: x.bool()}, TypeError, "levels: expected int64"),
        ({"mask": lambda x: x[:, :-1]}, ValueError, "mask: shape"),
        ({"mask": lambda x: x.float()}, TypeError, "mask: expected bool"),
        ({"tokens": lambda x: None}, TypeError, "text.tokens: expected a tensor, got NoneType"),
        ({"levels": lambda x: [0, 1]}, TypeError, "text.levels: expected a tensor, got list"),
        ({"mask": lambda x: True}, TypeError, "text.mask: expected a tensor, got bool"),
        ({"tokens": to_meta}, ValueError, "text.tokens: on meta, the images on cpu"),
        ({"levels": to_meta}, ValueError, "text.levels: on meta"),
        ({"class_embedding": to_meta}, ValueError, "text.class_embedding: on meta"),
        ({"mask": to_meta}, ValueError, "text.mask: on meta"),
    ],
)
@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_texts_that_do_not_fit(
    make_model: MakeModel, text_scope: str, change: dict, error: type[Exception], message: str
) -> None:
    model = make_model(text_scope=text_scope)
    support, labels, query, _ = make_episodes(2, 3, 1, 1)
    text = make_text(2, 3, masked=True)
    ((name, function),) = change.items()
    model.backbone = None  # nothing is computed before
    given = text._replace(**{name: function(getattr(text, name))})
    with pytest.raises(error, match=message):
        model(support, labels, query, given, way=3)


def test_images_that_are_no_numbers_of_the_model(make_model: MakeModel) -> None:
    model = make_model()
    support, labels, query, _ = make_episodes(2, 3, 1, 1)
    text = make_text(2, 3)
    model.backbone = None  # nothing is computed before
    with pytest.raises(TypeError, match=r"support: dtype torch.uint8, expected floating.*unit_"):
        model(support.to(torch.uint8), labels, query, text, way=3)
    with pytest.raises(TypeError, match=r"query: dtype torch.float64, support has torch.float32"):
        model(support, labels, query.double(), text, way=3)


def test_images_and_labels_on_two_devices(make_model: MakeModel) -> None:
    model = make_model()
    support, labels, query, _ = make_episodes(2, 3, 1, 1)
    text = make_text(2, 3)
    features, layers = model.support_features(support, labels, text, way=3)
    model.backbone.forward = None  # nothing is computed before
    with pytest.raises(ValueError, match="query: on meta, support on cpu"):
        model(support, labels, query.to("meta"), text, way=3)
    with pytest.raises(ValueError, match="support_labels: on meta, support on cpu"):
        model(support, labels.to("meta"), query, text, way=3)
    with pytest.raises(ValueError, match="features: on meta, query on cpu"):
        model.query_logits(features.to("meta"), labels, query, text, layers, way=3)


@pytest.mark.parametrize("replayed", [{"alpha": 0.5}, {"action_logit": torch.zeros(2)}])
def test_no_gate_replays_without_texts(make_model: MakeModel, replayed: dict) -> None:
    model = make_model()
    support, labels, query, _ = make_episodes(2, 3, 1, 1)
    (name,) = replayed
    with pytest.raises(ValueError, match=rf"^{name}: without text no gate runs"):
        model(support, labels, query, way=3, **replayed)
    if name == "alpha":
        with pytest.raises(ValueError, match=r"^alpha: without text no gate runs"):
            model.support_features(support, labels, way=3, **replayed)
        features, _ = model.support_features(support, labels, way=3)
        with pytest.raises(ValueError, match=r"^alpha: without text no gate runs"):
            model.query_logits(features, labels, query, way=3, **replayed)


def test_a_temperature_to_be_learned(make_model: MakeModel) -> None:
    with pytest.raises(TypeError, match="temperature: expected a number, got a tensor that asks"):
        make_model(temperature=torch.nn.Parameter(torch.tensor(0.2)))
    assert make_model(temperature=torch.tensor(0.5)).temperature == 0.5
