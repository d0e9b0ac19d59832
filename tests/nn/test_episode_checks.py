"""Texts of episodes that do not fit are refused before the backbone runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dvla_fast.nn import DVLA
from dvla_fast.nn.dvla import TEXT_SCOPES

from .conftest import make_episodes, make_text

MakeModel = Callable[..., DVLA]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"levels": lambda x: x + 2}, ValueError, r"levels: expected 0 \(attribute\) or 1"),
        ({"levels": lambda x: x - 1}, ValueError, r"levels: expected 0 \(attribute\) or 1"),
        ({"levels": lambda x: x.float()}, TypeError, "levels: expected int64"),
        ({"levels": lambda x: x.bool()}, TypeError, "levels: expected int64"),
        ({"mask": lambda x: x[:, :-1]}, ValueError, "mask: shape"),
        ({"mask": lambda x: x.float()}, TypeError, "mask: expected bool"),
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
