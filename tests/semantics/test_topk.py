"""Progressive top-k: the batched selection is the one-by-one definition, and ties are settled."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks import topk
from dvla_fast.errors import BankError
from dvla_fast.semantics import HashedNGramEncoder, SemanticBank, choose_attributes
from dvla_fast.semantics.topk import (
    TEMPLATES,
    progressive_top_k,
    template_text,
)

WORDS = [
    "red",
    "blue",
    "long",
    "short",
    "beak",
    "wing",
    "tail",
    "crest",
    "dark",
    "pale",
    "striped",
    "round",
    "feather",
    "eye",
    "ring",
]


class Counting(HashedNGramEncoder):
    """The hashed encoder, with a list of the texts of every call."""

    def __init__(self) -> None:
        super().__init__(64)
        self.calls: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.calls.append(list(texts))
        return super().encode(texts)


def problem(seed: int, classes: int = 12) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)
    names = [f"{rng.choice(WORDS)} bird {number}" for number in range(classes)]
    phrase = lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))  # noqa: E731
    return names, [[phrase() for _ in range(rng.randint(0, 9))] for _ in names]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("seed", range(4))
def test_batched_is_one_by_one(seed: int, k: int, template: str) -> None:
    # Few words and repeated phrases: ties are frequent.
    names, candidates = problem(seed)
    encoder = HashedNGramEncoder(64)
    batched = progressive_top_k(names, candidates, encoder, k, template)
    assert batched == topk.one_by_one_top_k(names, candidates, encoder, k, template)
    assert [len(found.order) for found in batched] == [min(k, len(c)) for c in candidates]


def test_one_encoder_call_a_round() -> None:
    names, candidates = problem(0, classes=40)
    encoder = Counting()
    progressive_top_k(names, candidates, encoder, 4)
    assert len(encoder.calls) == 1 + 4
    assert all(len(call) == 40 for call in encoder.calls[1:])


def test_templates_name_what_was_chosen() -> None:
    encoder = Counting()
    candidates = [["red beak", "long tail", "blue wing"]]
    order = progressive_top_k(["jay"], candidates, encoder, 3)[0].order
    first, second = (candidates[0][i] for i in order[:2])
    assert encoder.calls[1] == ["A photo of a jay"]
    assert encoder.calls[3] == [f"A photo of a jay, which has {first}, {second}"]
    assert template_text("jay", [first, second], "last") == f"A photo of a jay, which has {second}"


def test_scores_end_with_the_round_of_choice() -> None:
    candidates = [["a crest", "jay wings", "the jay"], ["an owl eye"]]
    found = progressive_top_k(["jay", "owl"], candidates, HashedNGramEncoder(64), 2)
    for place, scores in enumerate(found[0].scores):
        chosen = place in found[0].order
        assert len(scores) == (found[0].order.index(place) + 1 if chosen else 2)
    assert found[1].order == (0,)
    assert len(found[1].scores[0]) == 1


def test_equal_scores_go_to_the_first() -> None:
    found = progressive_top_k(["jay"], [["tail", "beak", "beak"]], HashedNGramEncoder(64), 3)
    assert found[0].order.index(1) < found[0].order.index(2)


def test_long_template_names_the_remedy() -> None:
    candidates = [[" ".join([word] * 30) for word in ("a", "b", "c", "d")]]
    with pytest.raises(BankError, match=r"template of top-k.*top_k.*'last'"):
        progressive_top_k(["jay"], candidates, HashedNGramEncoder(64), 4)
    progressive_top_k(["jay"], candidates, HashedNGramEncoder(64), 4, "last")


@pytest.mark.parametrize(
    ("k", "template", "message"), [(0, "all", "k must"), (1, "some", "template must be one of")]
)
def test_wrong_arguments(k: int, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        progressive_top_k(["jay"], [["a"]], HashedNGramEncoder(), k, template)


def test_a_bank_without_a_choice_gives_candidates_or_the_best() -> None:
    entry = {"candidates": ["a crest", "the jay wing", "jay"], "description": "A bird."}
    chosen = {"attributes": ["a tail", "a jay beak"], "description": "A bird."}
    bank = SemanticBank.from_dict({"classes": {"jay": entry, "Jay_2": chosen}})
    encoder = HashedNGramEncoder(64)
    names = ["jay", "jay 2"]
    assert choose_attributes(bank, names, encoder) == [
        ("a crest", "the jay wing", "jay"),
        ("a tail", "a jay beak"),
    ]
    best = choose_attributes(bank, names, encoder, top_k=1)
    assert [len(each) for each in best] == [1, 1]
    expected = torch.stack([encoder.encode([t])[0] for t in entry["candidates"]])
    # where nothing is left out there is nothing to encode, and the bank's order stays
    unused = HashedNGramEncoder(64, max_tokens=1)  # too few for any template
    with pytest.warns(UserWarning, match="3 asked for, but no class here has more than 2"):
        all_of_them = choose_attributes(bank, ["jay 2"], unused, top_k=3)
    assert all_of_them == choose_attributes(bank, ["jay 2"], unused, top_k=2)
    assert all_of_them == [("a tail", "a jay beak")]
    place = int((expected @ encoder.encode(["A photo of a jay"])[0]).argmax())
    assert best[0] == (entry["candidates"][place],)


def test_the_benchmark_measures_what_it_says() -> None:
    seconds = topk.measure_time(classes=5, repeats=1)
    assert set(seconds) == {"one by one", "selection", "with look-up of texts"}
    table = topk.measure_filter(HashedNGramEncoder())
    assert table[9] == (pytest.approx(6 / 9), 1.0)  # all nine: six true, three made up
    assert all(
        recall == pytest.approx(precision * k / 6) for k, (precision, recall) in table.items()
    )
    telling = topk.measure_filter(HashedNGramEncoder(), telling=True)
    assert telling[1][0] > table[1][0]
