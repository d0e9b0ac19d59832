"""Text encoders: one unit vector per phrase.

The offline encoder hashes word and character n-grams into a fixed number of signed buckets
(the "hashing trick"). It needs no weights and no network, and gives related phrases related
vectors as far as they share words or word parts. It knows no meaning: a CLIP text encoder does,
and can take its place behind the same interface.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from dvla_fast.errors import BankError

_WORD = re.compile(r"[^\W_]+")
# Function words carry no class information and would make every pair of phrases look alike.
# Negations stay: "no closed loop" is not "closed loop".
_FUNCTION_WORDS = frozenset(
    (
        *("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "from", "has", "have"),
        *("in", "into", "is", "it", "its", "like", "of", "on", "or", "over", "so", "than"),
        *("that", "the", "their", "then", "there", "this", "to", "under", "which", "with"),
    )
)
_BIGRAM_WEIGHT = 0.5
_CHARACTER_WEIGHT = 0.25


class TextEncoder(Protocol):
    """What the engine needs of a text encoder."""

    name: str
    dim: int
    truncated: int

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode n phrases into float32 unit vectors (n, dim)."""
        ...


class HashedNGramEncoder:
    """Offline encoder: signed feature hashing of word 1-2-grams and character 3-4-grams.

    Args:
        dim: length of a vector.
        max_tokens: words that the encoder reads of a text (77, as CLIP's tokens).
        truncate: cut longer texts, count them in ``truncated`` and warn; by default they are an
            error, because a text that is cut silently loses its end without anybody noticing.
    """

    name = "hashed-ngram"

    def __init__(self, dim: int = 512, max_tokens: int = 77, *, truncate: bool = False) -> None:
        if dim < 1 or max_tokens < 1:
            raise ValueError(
                f"dim and max_tokens must be positive, got dim={dim}, max_tokens={max_tokens}"
            )
        self.dim = dim
        self.max_tokens = max_tokens
        self.truncate = truncate
        self.truncated = 0

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode n phrases.

        Returns:
            float32 (n, dim), unit norm; the same on every machine and in every process.

        Raises:
            BankError: a text without a word, or longer than ``max_tokens`` words (unless
                ``truncate``).
        """
        words = [_WORD.findall(text.lower()) for text in texts]
        for text, found in zip(texts, words, strict=True):
            if not found:
                raise BankError(f"text {text!r} holds no word to encode; write one in the bank")
        self._report_long(texts, words)
        out = torch.zeros(len(texts), self.dim, dtype=torch.float64)
        for row, found in enumerate(words):
            for feature, weight in _features(found[: self.max_tokens]):
                digest = hashlib.blake2b(feature.encode(), digest_size=8).digest()
                bucket = int.from_bytes(digest[:7], "little") % self.dim
                out[row, bucket] += weight if digest[7] & 1 else -weight
        norm = out.norm(dim=1, keepdim=True)
        # Signed features can cancel exactly in a tiny dim; a zero vector has no direction.
        if bool((norm == 0).any()):
            raise BankError(f"a text hashes to a zero vector with dim={self.dim}; use a larger dim")
        return (out / norm).float()

    def _report_long(self, texts: Sequence[str], words: Sequence[Sequence[str]]) -> None:
        long = [index for index, found in enumerate(words) if len(found) > self.max_tokens]
        if not long:
            return
        longest = max(long, key=lambda index: len(words[index]))
        message = (
            f"{len(long)} of {len(texts)} texts are longer than the {self.max_tokens} words that "
            f"the {self.name} encoder reads (longest: {len(words[longest])} words, "
            f"{texts[longest][:40]!r}...)"
        )
        if not self.truncate:
            raise BankError(f"{message}; shorten them, or allow the cut with truncate=True")
        self.truncated += len(long)
        warnings.warn(f"{message}; the rest of each is ignored", stacklevel=3)


def _features(words: Sequence[str]) -> Iterator[tuple[str, float]]:
    content = [word for word in words if word not in _FUNCTION_WORDS] or list(words)
    for word in content:
        yield f"w:{word}", 1.0
        padded = f"<{word}>"
        for size in (3, 4):
            for start in range(len(padded) - size + 1):
                yield f"c:{padded[start : start + size]}", _CHARACTER_WEIGHT
    for first, second in pairwise(content):
        yield f"b:{first} {second}", _BIGRAM_WEIGHT


_ENCODERS = {"hashed-ngram": HashedNGramEncoder}


def build_encoder(name: str, dim: int = 0, *, truncate: bool = False) -> TextEncoder:
    """Build a text encoder by name.

    Args:
        dim: length of a vector; 0: the encoder's own.

    Raises:
        BankError: unknown name.
    """
    if name not in _ENCODERS:
        raise BankError(f"text encoder {name!r} is unknown; choose one of {', '.join(_ENCODERS)}")
    return _ENCODERS[name](dim or 512, truncate=truncate)
