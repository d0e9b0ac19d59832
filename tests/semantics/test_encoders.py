"""The hashed encoder is stable, unit-norm and loud about what it does not read; episodes gather."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dvla_fast.errors import BankError
from dvla_fast.semantics import (
    HashedNGramEncoder,
    SemanticBank,
    build_encoder,
    encode_bank,
    load_bank,
)


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
    assert tokens.mask is None
    torch.testing.assert_close(tokens.tokens[1, 6:], texts.tokens[2])
    torch.testing.assert_close(tokens.class_embedding[0, 1], texts.class_embedding[0])


def test_classes_with_fewer_attributes_are_masked() -> None:
    bank = SemanticBank.from_dict(
        {
            "classes": {
                "owl": {"attributes": ["round face", "big eyes"], "description": "A night bird."},
                "jay": {"attributes": ["blue wing"], "description": "A loud bird."},
            }
        }
    )
    encoder = HashedNGramEncoder(32)
    texts = encode_bank(bank, ["owl", "jay"], encoder)
    tokens = texts.episodes(torch.tensor([[1, 0]]))
    assert tokens.mask is not None
    assert tokens.mask.tolist() == [[True, False, True, True, True, True]]
    torch.testing.assert_close(tokens.tokens[0, 2], encoder.encode(["A loud bird."])[0])
    assert tokens.tokens[0, 1].abs().sum() == 0


def test_bank_error_names_the_bank() -> None:
    with pytest.raises(BankError, match=r"digits\.json.*'owl'"):
        encode_bank(load_bank("digits"), ["owl"], HashedNGramEncoder())
