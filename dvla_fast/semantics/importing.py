"""Banks from the vectors that others published (docs/semantics.md).

Files read, all of them dictionaries saved by ``torch.save``:

- VT-FSL, DVLA-RL, SemFew: ``{"semantic_feature": {class: (d,)}}``, one vector of the description;
- DVLA-RL: ``{"attribute_features": {class: (k, d)}}``;
- DVLA-RL++: ``{"text_dim", "classes": {class: {"intrinsic": {"local": (k, d), "global": (1, d)},
  "nuisance": ...}}, "meta"}``; its nuisance vectors are left out.

They are read as data alone (``weights_only``), in whatever float type, and brought to unit norm.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvla_fast.errors import BankError
from dvla_fast.names import normalised_name
from dvla_fast.semantics.bank import ClassEntry, SemanticBank, StoredCount, StoredVectors
from dvla_fast.semantics.vectors import (
    ClassVectors,
    vectors_path,
    vectors_sha256,
    write_stored,
)

_FORMS = (
    'expected {"semantic_feature": {class: vector}}, {"attribute_features": {class: vectors}} or '
    'a DVLA-RL++ bank {"classes": {class: {"intrinsic": {...}}}, "meta": ...}'
)


@dataclass(frozen=True)
class Published:
    """The vectors of published files, by the files' own class keys.

    Attributes:
        classes: unit vectors of each class, float32.
        dim: their length.
        encoder: what they say of their encoder; else ``imported/<dim>``.
        norms: smallest and largest norm before normalising.
        files: name (of a second one called so, the path) and SHA-256 of each file.
        meta: what the files say of themselves.
    """

    classes: dict[str, ClassVectors]
    dim: int
    encoder: str
    norms: tuple[float, float]
    files: dict[str, str]
    meta: dict[str, Any]


def read_published(paths: Iterable[str | Path]) -> Published:
    """Read one or more published files of the same classes, e.g. descriptions and attributes.

    Raises:
        BankError: unreadable or unsafe file, none of the known forms, a vector that is not finite
            or zero, vectors of several lengths, or the same level in two files.
    """
    attributes: dict[str, Tensor] = {}
    descriptions: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    meta: dict[str, Any] = {}
    for path in map(Path, paths):
        content = _load(path)
        files[str(path) if path.name in files else path.name] = hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        found = _levels(content, path)
        for level, known in (("attributes", attributes), ("descriptions", descriptions)):
            if known and found[level]:
                raise BankError(f"{path}: holds {level} again; give one file for each level")
            known.update(found[level])
        meta |= {k: v for k, v in _meta(content).items() if _is_plain(v)}
    every = [*attributes.values(), *descriptions.values()]
    widths = sorted({vectors.shape[1] for vectors in every})
    if len(widths) != 1:
        raise BankError(
            f"{', '.join(files)}: vectors of lengths {widths}; one bank has vectors of one encoder"
        )
    attributes = _joined(attributes, descriptions)
    norms = torch.cat([vectors.norm(dim=1) for vectors in every])
    none = torch.zeros(0, widths[0])
    classes = {
        key: ClassVectors(_unit(attributes.get(key, none)), _unit(descriptions.get(key, none)))
        for key in dict.fromkeys([*descriptions, *attributes])
    }
    encoder = f"imported/{meta.get('text_encoder', widths[0])}"
    return Published(
        classes, widths[0], encoder, (float(norms.min()), float(norms.max())), files, meta
    )


def _joined(attributes: dict[str, Tensor], descriptions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the attributes by the keys of the descriptions, which may be spelled otherwise."""
    keys = {normalised_name(key): key for key in descriptions}
    joined = {key: vectors for key, vectors in attributes.items() if key in descriptions}
    for key, vectors in attributes.items():
        twin = keys.get(normalised_name(key), key)
        if key not in joined:
            joined[key if twin in joined else twin] = vectors
    return joined


def save_published(
    published: Published,
    output: str | Path,
    class_name: Callable[[str], str] = lambda key: key,
    encoder: str = "",
) -> SemanticBank:
    """Write a bank without words: its JSON, and its vectors beside it.

    Args:
        output: the JSON file.
        class_name: gives the bank's class name of a key of the files.
        encoder: name of the encoder, where it is known better.

    Raises:
        BankError: two keys of one name, or a key that is none.
        OutputError: a file cannot be written.
    """
    from dvla_fast import __version__

    output = Path(output)
    named: dict[str, ClassVectors] = {}
    for key, vectors in published.classes.items():
        name = class_name(key)
        if not name.strip():
            raise BankError(f"{', '.join(published.files)}: a class has no name")
        if name in named:
            raise BankError(f"{', '.join(published.files)}: two classes are called {name!r}")
        named[name] = vectors
    bank = SemanticBank(
        output.stem,
        {
            name: ClassEntry((), "", stored=StoredCount(*map(len, vectors)))
            for name, vectors in named.items()
        },
        {
            "kind": "imported",
            "files": published.files,
            "norms_before": list(published.norms),
            **({"meta": published.meta} if published.meta else {}),
            "images_seen": "not recorded by its authors",
            "date": date.today().isoformat(),
            "dvla_fast": __version__,
        },
        str(output),
        StoredVectors(encoder or published.encoder, published.dim, vectors_sha256(named)),
    )
    write_stored(vectors_path(output), named)
    bank.save(output)
    return bank


def _load(path: Path) -> Any:
    try:
        with open(path, "rb") as stream:
            start = stream.read(4)
        if not start.startswith((b"PK", b"\x80")):  # a ZIP archive, or before torch 1.6 pickles
            raise BankError(
                f"{path}: not a file that torch.save wrote; give the .pth or .pt file that its "
                "authors publish"
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BankError(f"{path}: cannot read ({error.strerror or error})") from error
    except BankError:
        raise
    # A damaged or unsafe pickle can fail at any of its instructions
    except Exception as error:
        raise BankError(
            f"{path}: not loaded ({_reason(error)}); only tensors and plain containers are, since "
            "a pickle can run any program: get the file from its publisher again"
        ) from error


def _reason(error: Exception) -> str:
    """Say why torch.load failed, without its advice to load the file unprotected."""
    text = str(error).strip() or type(error).__name__
    if "weights_only" not in text:
        return text.splitlines()[0][:200]
    named = re.search(r"GLOBAL (\S+)", text)
    return f"it names {named[1][:100]}" if named else "damaged, or not from torch.save"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _meta(content: Mapping[str, Any]) -> dict[str, Any]:
    meta = content.get("meta")
    return dict(meta) if isinstance(meta, dict) else {}


def _levels(content: Any, path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the raw vectors of a file, (n, d) float32, by level and class."""
    if not isinstance(content, dict):
        raise BankError(f"{path}: holds a {type(content).__name__}; {_FORMS}")
    raw: dict[str, dict[Any, Any]] = {"attributes": {}, "descriptions": {}}
    if isinstance(content.get("classes"), dict):
        for key, entry in content["classes"].items():
            intrinsic = entry.get("intrinsic") if isinstance(entry, dict) else None
            if not isinstance(intrinsic, dict):
                raise BankError(f"{path}: class {key!r} has no 'intrinsic' vectors; {_FORMS}")
            for level, name in (("attributes", "local"), ("descriptions", "global")):
                value = intrinsic.get(name)
                if value is not None and not _is_empty(value):  # a class without attributes
                    raw[level][key] = value
            if not any(key in vectors for vectors in raw.values()):
                raise BankError(f"{path}: class {key!r} has no vectors; get the file again")
    else:
        for level, name in (
            ("attributes", "attribute_features"),
            ("descriptions", "semantic_feature"),
        ):
            if isinstance(content.get(name), dict):
                raw[level] = content[name]
    if not any(raw.values()):
        raise BankError(f"{path}: has the keys {sorted(map(str, content))[:5]}; {_FORMS}")
    return {
        level: {str(key): _vectors(value, level, str(key), path) for key, value in each.items()}
        for level, each in raw.items()
    }


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and len(value) == 0


def _vectors(value: Any, level: str, key: str, path: Path) -> Tensor:
    where = f"{path}: the {level} of class {key!r}"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise BankError(f"{where} are not a tensor of numbers, but {type(value).__name__}")
    if value.layout != torch.strided:
        raise BankError(f"{where} are sparse; save them as a dense tensor")
    vectors = value.detach().float()
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    if vectors.dim() != 2 or not vectors.numel() or (level == "descriptions" and len(vectors) > 1):
        raise BankError(f"{where} have the shape {tuple(value.shape)}, expected (d,) or (k, d)")
    norms = vectors.norm(dim=1)
    if not bool(((norms > 0) & norms.isfinite()).all()):
        raise BankError(f"{where} hold a zero, infinite or NaN vector; get the file again")
    return vectors


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True) if len(vectors) else vectors
