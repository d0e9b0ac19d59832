"""Vectors beside a bank: only what changed is encoded again, and wrong files are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import Tensor

from dvla_fast.data.shapes import load_shapes
from dvla_fast.engine.config import SemanticsConfig
from dvla_fast.engine.texts import build_texts
from dvla_fast.errors import BankError, OutputError
from dvla_fast.semantics import HashedNGramEncoder, encode_bank, load_bank
from dvla_fast.semantics.vectors import _PARTS, FORMAT, CachedEncoder, make_room, vectors_path

ENTRIES = {
    "owl": {"attributes": ["round face", "big eyes"], "description": "A night bird."},
    "jay": {"candidates": ["blue wing", "long tail"], "description": "A loud bird."},
}


class Counting(HashedNGramEncoder):
    def __init__(self, dim: int = 16, **options: Any) -> None:
        super().__init__(dim, **options)
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.seen += texts
        return super().encode(texts)


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    path = tmp_path / "birds.json"
    path.write_text(json.dumps({"classes": ENTRIES}))
    return path


def cached(bank: Path, inner: HashedNGramEncoder, **options: Any) -> CachedEncoder:
    return CachedEncoder(vectors_path(bank), "counting", "counting", lambda: inner, **options)


def test_an_edit_encodes_only_what_changed(bank: Path) -> None:
    first = cached(bank, Counting())
    tokens = encode_bank(load_bank(bank), ["owl", "jay"], first).tokens
    assert first.save() == 6
    entries = json.loads(bank.read_text())
    entries["classes"]["owl"]["attributes"][1] = "small eyes"
    bank.write_text(json.dumps(entries))
    inner = Counting()
    second = cached(bank, inner)
    changed = encode_bank(load_bank(bank), ["owl", "jay"], second).tokens
    assert inner.seen == ["small eyes"]
    assert torch.equal(changed[1], tokens[1])
    assert not torch.equal(changed[0, 1], tokens[0, 1])
    assert second.save(prune=True) == 6  # the old text is gone
    assert cached(bank, inner).missing(["big eyes", "small eyes"]) == ["big eyes"]
    assert cached(bank, inner).save(prune=True) == 0
    assert cached(bank, inner).missing(["small eyes"]) == ["small eyes"]


def test_an_encoder_that_does_not_count_tokens(bank: Path) -> None:
    inner: Any = SimpleNamespace(dim=3, encode=lambda texts: torch.eye(len(texts), 3))
    assert torch.equal(cached(bank, inner).encode(["round face", "big eyes"]), torch.eye(2, 3))


@pytest.mark.parametrize("bundled", [True, False])
def test_where_vectors_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundled: bool
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = load_bank("digits").source if bundled else tmp_path / "file" / "birds.json"
    way_out = "set XDG_CACHE_HOME to a folder" if bundled else "copy the bank to a folder"
    with pytest.raises(OutputError, match=way_out):
        make_room(vectors_path(source))


def test_what_another_process_wrote_meanwhile_stays(bank: Path) -> None:
    first, second = cached(bank, Counting()), cached(bank, Counting())
    first.encode(["big eyes"])
    second.encode(["small eyes"])
    first.save()
    assert second.save() == 2
    assert cached(bank, Counting()).missing(["big eyes", "small eyes"]) == []


def test_a_full_cache_needs_no_encoder(bank: Path) -> None:
    first = cached(bank, Counting())
    expected = encode_bank(load_bank(bank), ["owl"], first, top_k=1)
    first.save()

    def never() -> HashedNGramEncoder:
        raise AssertionError("built")

    again = CachedEncoder(vectors_path(bank), "counting", "counting", never)
    assert again.dim == 16
    found = encode_bank(load_bank(bank), ["owl"], again, top_k=1)
    assert torch.equal(found.tokens, expected.tokens)


def test_encoders_do_not_meet(bank: Path) -> None:
    for identity, dim in (("one", 16), ("two", 24)):
        encoder = CachedEncoder(vectors_path(bank), identity, identity, lambda d=dim: Counting(d))
        encode_bank(load_bank(bank), ["owl"], encoder)
        encoder.save()
    for identity, dim in (("one", 16), ("two", 24)):
        encoder = CachedEncoder(vectors_path(bank), identity, identity, Counting)
        assert encoder.dim == dim
        assert encoder.missing(["round face"]) == []


def test_a_cut_text_stays_known_as_cut(bank: Path) -> None:
    first = cached(bank, Counting(max_tokens=2, truncate=True), truncate=True)
    with pytest.warns(UserWarning, match="longer than the 2 words"):
        first.encode(["round face", "a night bird"])
    first.save()
    assert (first.truncated, cached(bank, Counting(), truncate=True).truncated) == (1, 0)
    again = cached(bank, Counting(), truncate=True)
    again.encode(["a night bird"])
    assert again.truncated == 1
    with pytest.raises(BankError, match="1 of 1 texts are longer than the counting encoder reads"):
        cached(bank, Counting()).encode(["a night bird"])


def test_a_full_disk_leaves_the_old_vectors(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = cached(bank, Counting())
    encoder.encode(["round face"])
    encoder.save()
    before = vectors_path(bank).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    encoder.encode(["big eyes"])
    with pytest.raises(OutputError, match=r"birds\.safetensors: cannot write \(.*No space left"):
        encoder.save()
    assert vectors_path(bank).read_bytes() == before


@pytest.mark.parametrize("damage", ["garbage", "foreign", "cut"])
def test_wrong_files_are_refused(bank: Path, damage: str) -> None:
    path = vectors_path(bank)
    encoder = cached(bank, Counting())
    encoder.encode(["round face"])
    encoder.save()
    if damage == "garbage":
        path.write_bytes(b"none of this")
    elif damage == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    else:
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BankError, match=r"birds\.safetensors: not usable .*semantics encode"):
        cached(bank, Counting())


@pytest.mark.parametrize(
    ("info", "vectors", "message"),
    [
        ({}, torch.ones(1, 1), r"birds\.safetensors: not usable \('kind'\)"),
        ({"kind": "bank"}, torch.eye(1, 16), "holds the vectors of a bank without words"),
        ({"kind": "cache"}, torch.ones(1), "its parts have other shapes than are written"),
        ({"kind": "cache"}, torch.ones(1, 16), "it holds vectors that are no unit vectors"),
        ({"kind": "cache"}, torch.full((1, 16), torch.nan), "no unit vectors"),
    ],
)
def test_damaged_vectors_are_the_files_fault(
    bank: Path, info: dict[str, str], vectors: Tensor, message: str
) -> None:
    parts = (torch.zeros(1, 16, dtype=torch.uint8), vectors, torch.zeros(1, dtype=torch.uint8))
    tensors = {f"counting|{name}": part for name, part in zip(_PARTS, parts)}
    metadata = {"dvla_fast": json.dumps({"format": FORMAT, **info})}
    save_file(tensors, vectors_path(bank), metadata=metadata)
    with pytest.raises(BankError, match=message):
        cached(bank, Counting())


def test_vectors_of_another_length_are_named(bank: Path) -> None:
    """Other weights under the same name."""
    first, second = cached(bank, Counting(24)), cached(bank, Counting(16))
    first.encode(["big eyes"])
    second.encode(["small eyes"])  # the file is not there yet
    first.save()
    with pytest.raises(BankError, match=r"counting vectors have length 24, now 16.*remove it"):
        second.save()
    third = cached(bank, Counting(16))
    assert third.encode(["big eyes"]).shape == (1, 24)
    with pytest.raises(BankError, match=r"counting vectors have length 24, now 16.*remove it"):
        third.encode(["big eyes", "small eyes"])


def test_bundled_vectors_lie_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "dvla-fast" / "banks" / "digits.safetensors"
    assert vectors_path(load_bank("digits").source) == expected
    assert vectors_path("elsewhere/digits.json") == Path("elsewhere/digits.safetensors")


def test_training_texts_come_from_the_cache(tmp_path: Path) -> None:
    data = load_shapes(16, 2, classes=20)
    entries = {
        name: {"attributes": [f"mark {name}"], "description": f"Sign {name}."}
        for name in data.class_names
    }
    bank = tmp_path / "signs.json"
    bank.write_text(json.dumps({"classes": entries}))
    config = SemanticsConfig(bank=str(bank), dim=32)
    plain, described = build_texts(config, data, torch.device("cpu"))
    encoder = CachedEncoder(
        vectors_path(bank), "hashed-ngram/32", "hashed-ngram", lambda: HashedNGramEncoder(32)
    )
    encode_bank(load_bank(bank), data.class_names, encoder)
    marked = next(iter(encoder._rows))
    encoder._rows[marked] = (torch.zeros(32), False)  # to be told from a vector encoded now
    encoder.save()
    texts, again = build_texts(config, data, torch.device("cpu"))
    assert described == again
    assert (texts.tokens != plain.tokens).any(-1).sum() == 1
