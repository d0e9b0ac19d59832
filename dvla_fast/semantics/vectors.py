"""The vectors of a bank, in one safetensors file beside its JSON.

For a bank of words the file is a cache: the vector of each text under the hash of the text and the
name of its encoder, so that a text that was edited is the only one to be encoded again, and a
machine without the encoder's weights can train. For a bank without words it is the bank.

The vectors of a bank that comes with the package lie in the user's cache folder
(``$XDG_CACHE_HOME/dvla-fast/banks``, or ``~/.cache/dvla-fast/banks``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dvla_fast.errors import BankError, MissingDependencyError
from dvla_fast.files import check_writable, write_tensors_atomic
from dvla_fast.semantics.bank import SemanticBank
from dvla_fast.semantics.bundled import bank_path, bundled_banks
from dvla_fast.semantics.encoders import TextEncoder, not_unit

FORMAT = "dvla-fast-vectors/1"
_PARTS = ("keys", "vectors", "truncated")


def vectors_path(source: str | Path) -> Path:
    """Return the file that holds, or would hold, the vectors of a bank of this source."""
    path = Path(source)
    if path.stem in bundled_banks() and path == bank_path(path.stem):
        return _cache_folder() / f"{path.stem}.safetensors"
    return path.with_suffix(".safetensors")


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # a user without a home keeps the "~", which must not become a folder here
    return Path("/nonexistent" if cache.startswith("~") else cache, "dvla-fast", "banks")


def make_room(path: Path) -> None:
    """Make the folder of a bank's vectors, if need be, and see that they can be written.

    Raises:
        OutputError: they cannot, with the way out.
    """
    remedy = "copy the bank to a folder that you may write to, and encode it there"
    if path.parent == _cache_folder():
        remedy = "set XDG_CACHE_HOME to a folder that you may write to, here and in training"
    check_writable(path, remedy)


class CachedEncoder:
    """A text encoder that encodes only what the cache does not hold.

    Args:
        path: file of the vectors; it may not exist yet.
        identity: name of the encoder in the file (``encoder_identity``).
        name: the encoder's ``name``, known before it is built.
        build: builds the encoder; called when a text is missing.
        truncate: take the vectors of texts that were cut when they were encoded; else an error.

    Raises:
        BankError: the file is damaged or foreign.
    """

    def __init__(
        self,
        path: Path,
        identity: str,
        name: str,
        build: Callable[[], TextEncoder],
        *,
        truncate: bool = False,
    ) -> None:
        self.path, self.identity, self.name, self._build = path, identity, name, build
        self.truncate = truncate
        self.encoded = self._cut = 0
        self._inner: TextEncoder | None = None
        self._rows: dict[bytes, tuple[Tensor, bool]] = {}
        self._used: set[bytes] = set()
        if os.path.exists(path):  # False, too, in a folder that must not be looked into
            tensors, kind = _read(path)
            if kind != "cache":
                raise BankError(f"{path}: holds the vectors of a bank without words; move it away")
            self._rows = self._stored(tensors)

    def _stored(self, tensors: Mapping[str, Tensor]) -> dict[bytes, tuple[Tensor, bool]]:
        """Return this encoder's vectors, and whether each text was cut, by the text's key."""
        names = [f"{self.identity}|{part}" for part in _PARTS]
        if not all(name in tensors for name in names):
            return {}
        keys, vectors, truncated = (tensors[name] for name in names)
        if (keys.dim(), vectors.dim(), truncated.dim()) != (2, 2, 1):
            raise BankError(_damaged(self.path, "its parts have other shapes than are written"))
        if not len(keys) == len(vectors) == len(truncated):
            raise BankError(_damaged(self.path, "its parts have different lengths"))
        if bool(not_unit(vectors).any()):
            raise BankError(_damaged(self.path, "it holds vectors that are no unit vectors"))
        if self._inner is not None:
            self._check_length(vectors.shape[1], self._inner)
        return {
            bytes(key): (vector, bool(cut))
            for key, vector, cut in zip(keys.numpy(), vectors, truncated.tolist())
        }

    @property
    def dim(self) -> int:
        """Length of a vector."""
        for vector, _ in self._rows.values():
            return len(vector)
        return self.inner.dim

    @property
    def inner(self) -> TextEncoder:
        """The encoder behind the cache, built on first use."""
        if self._inner is None:
            inner = self._build()
            if self._rows:
                self._check_length(self.dim, inner)
            self._inner = inner
        return self._inner

    def _check_length(self, stored: int, inner: TextEncoder) -> None:
        """Other weights of the same name give vectors of another length (BankError)."""
        if stored != inner.dim:
            raise BankError(
                _damaged(
                    self.path, f"its {self.name} vectors have length {stored}, now {inner.dim}"
                )
            )

    @property
    def truncated(self) -> int:
        """Texts handed out that were cut."""
        return self._cut

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Return the texts that the cache does not hold, each once."""
        return [text for text in dict.fromkeys(texts) if _key(text) not in self._rows]

    def add(self, texts: Sequence[str]) -> None:
        """Encode texts that are missing (BankError as the encoder)."""
        if not texts:
            return
        lengths = getattr(self.inner, "lengths", None)
        limit = getattr(self.inner, "max_tokens", 0)
        cut = [n > limit for n in lengths(texts)] if lengths else [False] * len(texts)
        vectors = self.inner.encode(texts)
        self.encoded += len(texts)
        for text, vector, flag in zip(texts, vectors, cut):
            self._rows[_key(text)] = (vector, flag)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors (n, dim) of n phrases, float32, unit norm.

        Raises:
            BankError: as the encoder; or a text was cut when it was encoded, without ``truncate``.
        """
        self.add(self.missing(texts))
        rows = [self._rows[_key(text)] for text in texts]
        self._used.update(map(_key, texts))
        cut = [text for text, (_, flag) in zip(texts, rows) if flag]
        if cut and not self.truncate:
            raise BankError(
                f"{len(cut)} of {len(texts)} texts are longer than the {self.name} encoder reads "
                f"({cut[0][:40]!r}...); shorten them, or allow the cut with truncate=True"
            )
        self._cut += len(cut)
        return torch.stack([vector for vector, _ in rows]) if rows else torch.zeros(0, self.dim)

    def save(self, *, prune: bool = False) -> int:
        """Write this encoder's vectors beside those of other encoders.

        Args:
            prune: only those used so far: what an edit has left behind goes, and what other
                settings of the selection use. Else what another process wrote meanwhile stays.

        Returns:
            The number of vectors of this encoder in the file.

        Raises:
            OutputError: the file cannot be written; the old one stays.
        """
        make_room(self.path)
        tensors = _read(self.path)[0] if self.path.exists() else {}
        others = {k: v for k, v in tensors.items() if k.rpartition("|")[0] != self.identity}
        if not prune:
            self._rows = self._stored(tensors) | self._rows
        used = {key: self._rows[key] for key in sorted(self._used if prune else self._rows)}
        if used:
            values = (
                torch.tensor([list(key) for key in used], dtype=torch.uint8),
                torch.stack([vector for vector, _ in used.values()]),
                torch.tensor([cut for _, cut in used.values()], dtype=torch.uint8),
            )
            others |= {f"{self.identity}|{part}": value for part, value in zip(_PARTS, values)}
        _write(self.path, others, "cache")
        return len(used)


class ClassVectors(NamedTuple):
    """The vectors of a class: attributes (k, dim) and descriptions (0 or 1, dim)."""

    attributes: Tensor
    description: Tensor


def vectors_sha256(classes: Mapping[str, ClassVectors]) -> str:
    """Return the SHA-256 of the vectors of all classes."""
    digest = hashlib.sha256()
    for name in sorted(classes):
        for vectors in classes[name]:
            digest.update(f"{name}\0{tuple(vectors.shape)}\0".encode())
            digest.update(vectors.contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def write_stored(path: Path, classes: Mapping[str, ClassVectors]) -> None:
    """Write the vectors of a bank without words (OutputError when they cannot be written)."""
    tensors = {}
    for name, vectors in classes.items():
        tensors[f"attributes|{name}"] = vectors.attributes.contiguous()
        tensors[f"description|{name}"] = vectors.description.contiguous()
    check_writable(path)
    _write(path, tensors, "bank")


def read_stored(bank: SemanticBank) -> dict[str, ClassVectors]:
    """Read the vectors of a bank without words, all of its classes.

    Raises:
        BankError: missing, damaged or changed file, or other vectors than the bank lists.
    """
    assert bank.vectors is not None
    path = vectors_path(bank.source)
    if not path.exists():
        raise BankError(
            f"{bank.source}: its vectors are not beside it ({path.name} is missing); copy both "
            "files, or import the bank again"
        )
    tensors, _ = _read(path)
    found = {}
    for name, entry in bank.classes.items():
        parts = [tensors.get(f"{level}|{name}") for level in ("attributes", "description")]
        shapes = [None if part is None else tuple(part.shape) for part in parts]
        assert entry.stored is not None
        wanted = [(count, bank.vectors.dim) for count in entry.stored]
        if shapes != wanted:
            raise BankError(
                f"{path}: class {name!r} has vectors of shapes {shapes}, but {bank.source} lists "
                f"{wanted}; import the bank again"
            )
        found[name] = ClassVectors(*parts)  # type: ignore[arg-type]
    whole = len(tensors) == 2 * len(found)  # a class may be removed from the JSON by hand
    others = whole and vectors_sha256(found) != bank.vectors.sha256
    if others or any(bool(not_unit(part).any()) for parts in found.values() for part in parts):
        raise BankError(_damaged(path, f"its vectors are not those that {bank.source} was made of"))
    return found


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def _damaged(path: Path, reason: str) -> str:
    return (
        f"{path}: not usable ({reason}); remove it and run 'dvla-fast semantics encode' again, or "
        "import the bank again if it has no words"
    )


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a file and what it is: "cache" or "bank" (BankError)."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = json.loads(metadata["dvla_fast"])
        version, kind = info["format"], info["kind"]
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BankError(_damaged(path, reason)) from error
    if version != FORMAT:
        raise BankError(_damaged(path, f"format {version!r:.80} is unknown"))
    return tensors, kind


def _write(path: Path, tensors: Mapping[str, Tensor], kind: str) -> None:
    _safetensors()
    description = json.dumps({"format": FORMAT, "kind": kind})
    write_tensors_atomic(path, dict(sorted(tensors.items())), description)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError(
            "the vectors of banks need safetensors, which is not installed; run "
            "pip install 'dvla-fast[semantics]'"
        ) from error
    return safetensors
