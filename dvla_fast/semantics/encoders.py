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
from pathlib import Path
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
_UNIT = 1e-3  # how far from 1 the norm of a unit vector may be
_BIGRAM_WEIGHT = 0.5
_CHARACTER_WEIGHT = 0.25
HASHED_DIM = 512


class TextEncoder(Protocol):
    """What the engine needs of a text encoder.

    Attributes:
        name: identifies the encoder: texts encoded under one name may be compared and mixed.
        dim: length of a vector.
        truncated: texts cut so far.
    """

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def truncated(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode n phrases into float32 unit vectors (n, dim) on the CPU."""
        ...


def encode_checked(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """Encode texts, and hold the encoder to what ``TextEncoder`` says of its vectors.

    Raises:
        BankError: as the encoder; or its answer is no float tensor (n, dim) of finite unit vectors
            (a vector of zeros counts as "nothing known").
    """
    vectors = encoder.encode(texts)
    expected = (len(texts), encoder.dim)
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        kind = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
        raise BankError(f"text encoder {encoder.name!r}: gives {kind}, expected a float tensor")
    if tuple(vectors.shape) != expected:
        raise BankError(
            f"text encoder {encoder.name!r}: gives shape {tuple(vectors.shape)}, expected "
            f"{expected}"
        )
    off = not_unit(vectors)
    if bool(off.any()):
        first = int(off.nonzero()[0])
        raise BankError(
            f"text encoder {encoder.name!r}: the vector of {texts[first]!r:.60} has norm "
            f"{float(vectors[first].double().norm()):.4g}, expected 1: normalise what encode() "
            "returns"
        )
    return vectors


def not_unit(vectors: Tensor) -> Tensor:
    """Tell which of n vectors (n, dim) are neither of unit norm nor zero: (n,) bool."""
    norms = vectors.double().norm(dim=-1)
    allowed = _UNIT
    if vectors.is_floating_point():
        allowed = max(_UNIT, torch.finfo(vectors.dtype).eps)
    return ~(((norms - 1).abs() < allowed) | (norms == 0))  # NaN is not


class LimitedEncoder:
    """What encoders share that read a limited number of words or tokens of a text.

    Args:
        max_tokens: how many.
        truncate: cut longer texts, count them in ``truncated`` and warn; by default they are an
            error, because a text that is cut silently loses its end without anybody noticing.

    A subclass has ``name``, ``dim``, ``lengths`` and ``_vectors``.
    """

    name: str
    dim: int
    unit = "tokens"

    def __init__(self, max_tokens: int, truncate: bool) -> None:
        self.max_tokens, self.truncate, self.truncated = max_tokens, truncate, 0

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the length of each text in the encoder's unit, uncut."""
        raise NotImplementedError

    def _vectors(self, texts: list[str]) -> Tensor:
        """Encode texts (at least one, none blank), cut to ``max_tokens``: (n, dim), any norm."""
        raise NotImplementedError

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode n phrases.

        Returns:
            float32 (n, dim), unit norm, on the CPU.

        Raises:
            BankError: a text without a word, or longer than ``max_tokens`` (unless ``truncate``).
        """
        texts = list(texts)
        if not texts:
            return torch.zeros(0, self.dim)
        for text in texts:
            if not _WORD.search(text):
                raise BankError(f"text {text!r} holds no word to encode; write one in the bank")
        self._report_long(texts)
        vectors = self._vectors(texts)
        norm = vectors.norm(dim=1, keepdim=True)
        if not bool(((norm > 0) & norm.isfinite()).all()):
            raise BankError(
                f"a text becomes a zero or infinite vector with {self.name} (dim={self.dim}); use "
                "a larger dim, or another encoder"
            )
        return (vectors / norm).float().cpu()

    def _report_long(self, texts: Sequence[str]) -> None:
        lengths = self.lengths(texts)
        long = [index for index, length in enumerate(lengths) if length > self.max_tokens]
        if not long:
            return
        longest = max(long, key=lengths.__getitem__)
        message = (
            f"{len(long)} of {len(texts)} texts are longer than the {self.max_tokens} {self.unit} "
            f"that the {self.name} encoder reads (longest: {lengths[longest]} {self.unit}, "
            f"{texts[longest][:40]!r}...)"
        )
        if not self.truncate:
            raise BankError(f"{message}; shorten them, or allow the cut with truncate=True")
        self.truncated += len(long)
        warnings.warn(f"{message}; the rest of each is ignored", stacklevel=3)


class HashedNGramEncoder(LimitedEncoder):
    """Offline encoder: signed feature hashing of word 1-2-grams and character 3-4-grams.

    The same vectors on every machine and in every process.

    Args:
        dim: length of a vector.
        max_tokens: words that the encoder reads of a text (77, as CLIP's tokens).
        truncate: as for ``LimitedEncoder``.
    """

    name = "hashed-ngram"
    unit = "words"

    def __init__(self, dim: int = 512, max_tokens: int = 77, *, truncate: bool = False) -> None:
        if dim < 1 or max_tokens < 1:
            raise ValueError(
                f"dim and max_tokens must be positive, got dim={dim}, max_tokens={max_tokens}"
            )
        super().__init__(max_tokens, truncate)
        self.dim = dim

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of words of each text."""
        return [len(_WORD.findall(text)) for text in texts]

    def _vectors(self, texts: list[str]) -> Tensor:
        out = torch.zeros(len(texts), self.dim, dtype=torch.float64)
        for row, text in enumerate(texts):
            words = _WORD.findall(text.lower())
            for feature, weight in _features(words[: self.max_tokens]):
                digest = hashlib.blake2b(feature.encode(), digest_size=8).digest()
                bucket = int.from_bytes(digest[:7], "little") % self.dim
                out[row, bucket] += weight if digest[7] & 1 else -weight
        return out  # signed features can cancel exactly in a tiny dim


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


ENCODERS = "hashed-ngram, open_clip:MODEL/WEIGHTS, transformers:MODEL"


def _split(name: str) -> tuple[str, str, str]:
    """Split an encoder's name into family, model, and weights or folder (BankError otherwise)."""
    family, _, rest = name.partition(":")
    if family == "hashed-ngram" and not rest:
        return family, "", ""
    if family == "transformers" and rest:
        return family, rest, rest
    # sha256-: what encoder_identity makes of a local-dir
    if family == "open_clip" and re.match(r"(?:hf-hub:|local-dir:|sha256-).", rest):
        return family, rest, rest.removeprefix("local-dir:")
    model, _, weights = rest.partition("/")
    if family == "open_clip" and model and weights:
        return family, model, weights
    raise BankError(
        f"text encoder {name!r} is unknown; choose one of {ENCODERS}, e.g. "
        "open_clip:ViT-B-16/openai, open_clip:ViT-B-16/weights.safetensors or "
        "transformers:google/siglip-base-patch16-224"
    )


def encoder_identity(name: str, dim: int = 0) -> str:
    """Return the name under which an encoder's vectors are kept, without loading it.

    Published weights are known by their name, local ones by their content: another file in the same
    place is another encoder. An identity is its own.

    Raises:
        BankError: a name that means no encoder, or a path to weights that are not there.
    """
    family, model, weights = _split(name)
    if family == "hashed-ngram":
        return f"{family}/{dim or HASHED_DIM}"
    path = Path(weights)
    if path.exists():
        model = "" if family == "transformers" or model.startswith("local-dir:") else f"{model}/"
        return f"{family}:{model}{_content_hash(path)}"
    if _is_path(family, model, path):
        raise BankError(f"{weights}: no such file or folder of weights, asked for by {name!r}")
    return name


def _is_path(family: str, model: str, path: Path) -> bool:
    """Tell a path that is not there from the name of published weights."""
    if path.is_absolute() or path.parts[0] in (".", "..", "~") or model.startswith("local-dir:"):
        return True
    if family == "transformers":
        return len(path.parts) > 2  # the hub's names are owner/name
    return path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".npz")


def build_encoder(
    name: str,
    dim: int = 0,
    *,
    truncate: bool = False,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> TextEncoder:
    """Build a text encoder by name.

    Args:
        name: ``hashed-ngram``; ``open_clip:MODEL/WEIGHTS`` with a pretrained tag or the path of a
            weights file, or ``open_clip:hf-hub:NAME``, ``open_clip:local-dir:PATH``;
            ``transformers:NAME`` or ``transformers:PATH``: CLIP, SigLIP and their relatives, or a
            sentence encoder.
        dim: length of a vector; 0: the encoder's own.
        truncate: cut texts that are too long instead of failing.
        device, batch_size: where a model runs, and on how many texts at once.

    Raises:
        BankError: unknown name, weights that cannot be loaded, or an encoder of another ``dim``.
        MissingDependencyError: the encoder's package is not installed.
    """
    if re.search(r"[:/]sha256-[0-9a-f]{16}$", name):
        raise BankError(
            f"text encoder {name!r}: its weights came from a file, and are known by their content "
            "only; name that file or folder again, e.g. open_clip:ViT-B-16/FILE"
        )
    family, model, weights = _split(name)
    if family == "hashed-ngram":
        return HashedNGramEncoder(dim or HASHED_DIM, truncate=truncate)
    identity = encoder_identity(name)
    encoder: TextEncoder
    if family == "open_clip":
        from dvla_fast.semantics.open_clip_encoder import OpenCLIPEncoder

        encoder = OpenCLIPEncoder(
            model, weights, identity, truncate=truncate, device=device, batch_size=batch_size
        )
    else:
        from dvla_fast.semantics.transformers_encoder import TransformersEncoder

        encoder = TransformersEncoder(
            model, identity, truncate=truncate, device=device, batch_size=batch_size
        )
    check_dim(name, encoder.dim, dim)
    return encoder


def check_dim(what: str, actual: int, wanted: int) -> None:
    """Check the length of vectors against a setting; 0 takes any (BankError otherwise)."""
    if wanted not in (0, actual):
        raise BankError(
            f"{what}: gives vectors of length {actual}, but semantics.dim asks for {wanted}; set "
            f"--semantics.dim {actual} (or 0: the encoder's own)"
        )


def _content_hash(path: Path) -> str:
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        relative = file.relative_to(path)
        if any(part.startswith(".") for part in relative.parts):
            continue  # download caches and the like
        digest.update(f"{relative.as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return f"sha256-{digest.hexdigest()[:16]}"
