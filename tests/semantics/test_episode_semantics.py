"""The texts of single episodes, alone and many together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla_fast.errors import BankError, LanguageModelError
from dvla_fast.semantics import HashedNGramEncoder, build_encoder
from dvla_fast.semantics.construct import Episode, EpisodeSemantics, Settings
from dvla_fast.semantics.language_models.base import Request
from tests.semantics.scripted import Scripted, good_answer, image, spoil

NAMES = ("Crow", "Gull", "Owl")
ENCODER = build_encoder("hashed-ngram", 128)


def test_texts_of_an_episode(tmp_path: Path) -> None:
    model = Scripted()
    episodes = EpisodeSemantics(model, ENCODER, settings=Settings(top_k=3))
    supports = [(image(i),) for i in range(3)]
    tokens = episodes.tokens(NAMES, supports)
    assert tokens.tokens.shape == (1, 3 * 4, 128)
    assert tokens.levels.tolist() == [0, 0, 0, 1] * 3
    shown = {item.id for request in model.asked for item in request.images}
    assert shown == {"image-0", "image-1", "image-2"}
    asked = len(model.asked)
    again = episodes.texts(NAMES, supports)
    assert len(model.asked) == asked == 6
    assert again.class_names == NAMES
    episodes.texts(NAMES, [(image(0),), (image(1),), (image(7),)])
    assert {request.subject for request in model.asked[asked:]} == {"Owl"}


def looked_at(request: Request) -> str:
    """Other attributes for other images; some answers are of no use at first."""
    seen = "".join(item.id for item in request.images)
    if request.subject == "Gull" and "could not be used" not in request.prompt:
        return "I like gulls. They are nice."
    return good_answer(request.stage, request.subject + seen)


def test_episodes_together_are_as_one_by_one() -> None:
    episodes: list[Episode] = [
        (NAMES, [(image(0),), (image(1),), (image(2),)]),
        (NAMES[::-1], [(image(3),), (image(1),), (image(4), image(5))]),
        (NAMES[:2], [(image(0),), ()]),
        (NAMES, [(image(0),), (image(1),), (image(2),)]),
    ]
    together, single = Scripted(looked_at), Scripted(looked_at)
    both = [EpisodeSemantics(m, ENCODER, settings=Settings(top_k=3)) for m in (together, single)]
    banks = both[0].banks(episodes)
    assert banks == [both[1].bank(*episode) for episode in episodes]
    assert banks[0].classes["Crow"] != banks[1].classes["Crow"]
    key = both[0].model.key
    assert sorted(map(key, together.asked)) == sorted(map(key, single.asked))
    for found, episode in zip(both[0].all_texts(episodes), episodes):
        expected = both[1].texts(*episode)
        assert found.class_names == expected.class_names
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.class_embedding, expected.class_embedding)
    assert len(together.asked) == len(single.asked)  # all_texts asked nothing more


def test_all_episodes_are_asked_about_at_once() -> None:
    class Counting(Scripted):
        def answers(self, requests: Sequence[Request]) -> Any:
            calls.append(len(requests))
            return super().answers(requests)

    calls: list[int] = []
    episodes: list[Episode] = [(NAMES, [(image(3 * i + j),) for j in range(3)]) for i in range(4)]
    EpisodeSemantics(Counting(), ENCODER).banks(episodes)
    assert calls[0] == 12
    assert len(calls) == 2


def test_first_episode_without_texts_is_the_one_named() -> None:
    episodes: list[Episode] = [(NAMES[:1], [()]), (NAMES, [()] * 3), (NAMES[2:], [()])]
    semantics = EpisodeSemantics(spoil("candidates", "Owl", "no"), ENCODER)
    with pytest.raises(LanguageModelError, match="no texts for 1 of its classes: candidates of 'O"):
        semantics.banks(episodes)


@pytest.mark.parametrize("stage", ["candidates", "description"])
def test_episode_without_texts_says_what_helps(stage: str) -> None:
    semantics = EpisodeSemantics(spoil(stage, "Owl", "no"), ENCODER)
    with pytest.raises(LanguageModelError) as caught:
        semantics.texts(NAMES, [()] * 3)
    for setting in ("construct.attempts", f"construct.{stage}_prompt", "model.temperature above 0"):
        assert setting in str(caught.value)
    broken = EpisodeSemantics(spoil(stage, "Owl", LanguageModelError("answered 500")), ENCODER)
    with pytest.raises(LanguageModelError, match=r"'Owl': answered 500$"):
        broken.texts(NAMES, [()] * 3)  # here asking again helps


def test_answers_of_episodes_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    supports = [(image(i),) for i in range(3)]
    first = EpisodeSemantics(Scripted(), ENCODER, journal=path)
    bank = first.bank(NAMES, supports)
    first.close()
    model = Scripted()
    assert EpisodeSemantics(model, ENCODER, journal=path).bank(NAMES, supports) == bank
    assert model.asked == []


def test_episode_cannot_go_without_a_class() -> None:
    episodes = EpisodeSemantics(spoil("candidates", "Owl", "no"), ENCODER)
    with pytest.raises(LanguageModelError, match="no texts for 1 of its classes: candidates of 'O"):
        episodes.texts(NAMES, [()] * 3)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        episodes.texts(NAMES, [()] * 2)


def test_encoder_that_reads_too_little_is_said_so() -> None:
    encoder = HashedNGramEncoder(64, max_tokens=12)
    with pytest.raises((LanguageModelError, BankError), match="12 words"):
        EpisodeSemantics(Scripted(), encoder).texts(NAMES, [()] * 3)
