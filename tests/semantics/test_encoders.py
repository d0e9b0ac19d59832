"""The hashed encoder is stable, unit-norm and loud about what it does not read; episodes gather."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dvla_fast.errors import BankError
from dvla_fast.semantics import (
    ClassEntry,
    HashedNGramEncoder,
    SemanticBank,
    build_encoder,
    encode_bank,
    load_bank,
)
from dvla_fast.semantics.topk import progressive_top_k


def test_vectors_are_unit_and_related_phrases_are_closer() -> None:
    a, b, c = HashedNGramEncoder().encode(
        ["one closed loop at the top", "a closed loop at the bottom", "sharp diagonal stroke"]
    )
    torch.testing.assert_close(torch.stack([a, b, c]).norm(dim=1), torch.ones(3))
    assert a @ b > 0.3 > a @ c


def test_negation_changes_the_vector() -> None:
    a, b = HashedNGramEncoder().encode(["closed loop", "no closed loop"])
    assert a @ b < 0.95


def test_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from dvla_fast.semantics import HashedNGramEncoder as E;"
        "v = E(64).encode(['two closed loops'])[0]; print(v.double().numpy().tobytes().hex())"
    )
    run = [sys.executable, "-c", code]
    outputs = {
        subprocess.run(run, check=True, capture_output=True, env=env, text=True).stdout
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    }
    here = HashedNGramEncoder(64).encode(["two closed loops"])[0]
    assert outputs == {here.double().numpy().tobytes().hex() + "\n"}


def test_long_text_is_an_error_by_default() -> None:
    long = " ".join(["loop"] * 78)
    with pytest.raises(BankError, match=r"1 of 2 texts are longer than the 77 words.*78 words"):
        HashedNGramEncoder().encode(["short", long])


def test_truncation_is_reported_and_counted() -> None:
    words = [f"word{number}" for number in range(90)]
    encoder = HashedNGramEncoder(truncate=True)
    with pytest.warns(UserWarning, match="1 of 1 texts are longer"):
        cut = encoder.encode([" ".join(words)])
    assert encoder.truncated == 1
    torch.testing.assert_close(cut, encoder.encode([" ".join(words[:77])]))


def test_text_without_a_word_is_refused() -> None:
    with pytest.raises(BankError, match="no word"):
        HashedNGramEncoder().encode(["..."])


def test_unknown_encoder_is_refused() -> None:
    with pytest.raises(BankError, match="hashed-ngram"):
        build_encoder("clip-of-tomorrow")


def test_encoded_bank_gathers_episodes() -> None:
    names = ["one", "eight", "four"]
    texts = encode_bank(load_bank("digits"), names, HashedNGramEncoder(32))
    classes = torch.tensor([[2, 0], [1, 2]])
    tokens = texts.episodes(classes)
    assert tokens.tokens.shape == (2, 2 * 6, 32)
    assert tokens.levels.tolist() == [0, 0, 0, 0, 0, 1] * 2
    assert tokens.levels.dtype == torch.int64
    assert tokens.mask is None
    torch.testing.assert_close(tokens.tokens[1, 6:], texts.tokens[2])
    torch.testing.assert_close(tokens.class_embedding[0, 1], texts.class_embedding[0])


BIRDS = {
    "owl": {"attributes": ["round face", "big eyes"], "description": "A night bird."},
    "jay": {"attributes": ["blue wing"], "description": "A loud bird."},
}


def test_one_level_alone() -> None:
    encoder = HashedNGramEncoder(32)
    texts = encode_bank(SemanticBank.from_dict({"classes": BIRDS}), list(BIRDS), encoder)
    attributes, description = texts.only("attributes"), texts.only("description")
    assert torch.equal(attributes.tokens, texts.tokens[:, :2])
    assert attributes.mask.tolist() == [[True, True], [True, False]]
    assert attributes.levels.tolist() == [0, 0]
    assert torch.equal(description.tokens, texts.tokens[:, 2:])
    assert description.levels.tolist() == [1]
    for found, rows in (
        (attributes, texts.tokens[:, :2].sum(1)),
        (description, texts.tokens[:, 2]),
    ):
        torch.testing.assert_close(found.class_embedding, rows / rows.norm(dim=1, keepdim=True))
    bare = replace(texts, mask=torch.tensor([[True] * 3, [False, False, True]]))
    with pytest.raises(BankError, match=r"1 of 2 classes have no attributes \(first: 'jay'\)"):
        bare.only("attributes")


def test_classes_without_texts_among_others() -> None:
    encoder = HashedNGramEncoder(32)
    texts = encode_bank(SemanticBank.from_dict({"classes": BIRDS}), list(BIRDS), encoder)
    more = texts.among(["cat", "jay", "owl"])
    assert more.class_names == ("cat", "jay", "owl")
    assert torch.equal(more.levels, texts.levels)
    for found, mine in ((more.tokens, texts.tokens), (more.mask, texts.mask),
                        (more.class_embedding, texts.class_embedding)):  # fmt: skip
        assert torch.equal(found[1:], mine.flip(0))
        assert not found[0].any()


def test_classes_with_fewer_attributes_are_masked() -> None:
    encoder = HashedNGramEncoder(32)
    texts = encode_bank(SemanticBank.from_dict({"classes": BIRDS}), ["owl", "jay"], encoder)
    tokens = texts.episodes(torch.tensor([[1, 0]]))
    assert tokens.mask is not None
    assert tokens.mask.tolist() == [[True, False, True, True, True, True]]
    torch.testing.assert_close(tokens.tokens[0, 2], encoder.encode(["A loud bird."])[0])
    assert tokens.tokens[0, 1].abs().sum() == 0


def test_bank_error_names_the_bank() -> None:
    with pytest.raises(BankError, match=r"digits\.json.*'owl'"):
        encode_bank(load_bank("digits"), ["owl"], HashedNGramEncoder())


class Answering(HashedNGramEncoder):
    """An encoder of somebody's own, whose answers are changed."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__(32)
        self.change = change

    def encode(self, texts: Sequence[str]) -> Any:
        return self.change(super().encode(texts))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: 3 * x, "has norm 3, expected 1: normalise"),
        (lambda x: x * torch.nan, "has norm nan, expected 1"),
        (lambda x: x[:-1], "gives shape"),
        (lambda x: x[:, :8], "gives shape"),
        (lambda x: x.numpy(), "gives ndarray, expected a float tensor"),
        (lambda x: x.int(), "gives torch.int32, expected a float tensor"),
    ],
)
def test_an_encoder_is_held_to_its_word(change: Callable[[Tensor], Any], words: str) -> None:
    bank, encoder = load_bank("digits"), Answering(change)
    for top_k in (0, 2):
        with pytest.raises(BankError, match=words):
            encode_bank(bank, ["one", "two"], encoder, top_k=top_k)


def test_what_is_asked_of_a_bank_is_checked_first() -> None:
    bank, encoder = load_bank("digits"), HashedNGramEncoder(32)
    with pytest.raises(ValueError, match="template must be one of all, last, got 'lasst'"):
        encode_bank(bank, ["one"], encoder, template="lasst")
    with pytest.raises(TypeError, match="class_names: expected a list of names, got 'one'"):
        encode_bank(bank, "one", encoder)
    with pytest.raises(BankError, match="no classes were asked for"):
        encode_bank(bank, [], encoder)
    with pytest.raises(TypeError, match="attributes: expected a tuple of texts, got one text"):
        ClassEntry(attributes="fur", description="")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="candidates: expected a list of texts of 'a'"):
        progressive_top_k(["a"], ["abc"], encoder, 1)
    with pytest.raises(ValueError, match=r"classes: shape \(2,\), expected"):
        encode_bank(bank, ["one", "two"], encoder).episodes(torch.tensor([0, 1]))


def test_unit_vectors_of_bfloat16_are_unit_vectors() -> None:
    normed = Answering(lambda x: torch.nn.functional.normalize(x.bfloat16(), dim=-1))
    assert encode_bank(load_bank("digits"), ["one", "two"], normed).tokens.isfinite().all()
