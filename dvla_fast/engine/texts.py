"""From configuration to texts: banks, what of them is read, encoders and their vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dvla_fast.data import FewShotData
from dvla_fast.engine.config import SemanticsConfig
from dvla_fast.engine.settings import UsageError
from dvla_fast.engine.text_options import EncoderOptions
from dvla_fast.semantics import (
    EncodedTexts,
    HashedNGramEncoder,
    SemanticBank,
    TextEncoder,
    build_encoder,
    encode_bank,
    load_bank,
)
from dvla_fast.semantics.bundled import is_made
from dvla_fast.semantics.encoders import check_dim, encoder_identity
from dvla_fast.semantics.tokens import encode_names, shuffled_sources, stored_tokens
from dvla_fast.semantics.vectors import CachedEncoder, vectors_path


def build_texts(
    config: SemanticsConfig,
    data: FewShotData,
    device: torch.device,
    splits: Sequence[str] = (),
    encoder: TextEncoder | None = None,
) -> tuple[EncodedTexts, dict[str, Any]]:
    """Encode the bank's texts for all classes of the data set.

    Args:
        splits: only the classes of these must be in the bank, others may lack texts; none: all.
        encoder: of ``config`` (``bank_encoder``), where several calls share one.

    Returns:
        The texts in the order of ``data.class_names``, and a description for the summary.

    Raises:
        BankError: missing bank, class or text, or a text longer than the encoder reads.
    """
    bank = load_bank(config.bank)
    names = list(data.class_names)
    if splits:
        needed = dict.fromkeys(name for split in splits for name in data.split(split).class_names)
        which = f"split{'s' if len(splits) > 1 else ''} {' and '.join(splits)}"
        bank.require(needed, f"the data set ({which})")
        lacking = set(bank.missing(names))
        names = [name for name in names if name not in lacking]
    sources = text_sources(config, data, names)
    texts, described = encode_texts(config, bank, sources, device, encoder)
    texts = replace(texts, class_names=tuple(names))
    if len(names) < len(data.class_names):
        texts = texts.among(data.class_names)
    return texts, described


def text_sources(config: SemanticsConfig, data: FewShotData, names: Sequence[str]) -> list[str]:
    """Return the class whose texts each named class gets: itself, but with parts ``shuffled``."""
    if config.parts != "shuffled":
        return list(names)
    kept = set(names)
    splits = (data.base, data.monitor, data.novel)
    sources = shuffled_sources([n for n in split.class_names if n in kept] for split in splits)
    return [sources[name] for name in names]


def encode_texts(
    config: SemanticsConfig,
    bank: SemanticBank | str,
    names: list[str],
    device: torch.device,
    encoder: TextEncoder | None = None,
) -> tuple[EncodedTexts, dict[str, Any]]:
    """Encode a bank's texts for the named classes, in that order; see :func:`build_texts`.

    For parts ``shuffled`` the caller exchanges the names (:func:`text_sources`).
    """
    bank = load_bank(bank) if isinstance(bank, str) else bank
    if bank.vectors and config.parts == "name":
        raise UsageError(
            f"semantics.parts: {bank.source} has vectors and no words, so its classes' names "
            "cannot be encoded; choose all, attributes or description"
        )
    if bank.vectors:
        texts = stored_tokens(bank, names, config.top_k)
        check_dim(bank.source, bank.vectors.dim, config.dim)
        encoder_name, truncated = bank.vectors.encoder, 0
    else:
        encoder = encoder or bank_encoder(config, bank, device)
        cut_before = encoder.truncated
        if config.parts == "name":
            texts = encode_names(bank, names, encoder)
        else:
            texts = encode_bank(bank, names, encoder, top_k=config.top_k, template=config.template)
        encoder_name, truncated = encoder.name, encoder.truncated - cut_before
    if config.parts in ("attributes", "description"):
        texts = texts.only(config.parts)
    described = {
        "bank": bank.name,
        "bank_sha256": bank.fingerprint(),
        "bank_kind": bank.kind,
        "encoder": encoder_name,
        "dim": texts.tokens.shape[-1],
        "top_k": config.top_k,
        "template": config.template if config.top_k else None,
        "parts": config.parts,
        "truncate": config.truncate,
        "truncated_texts": truncated,
    }
    return texts.to(device), described


def bank_encoder(
    config: EncoderOptions, bank: SemanticBank, device: torch.device, *, cache: bool = False
) -> TextEncoder:
    """Build the encoder of a bank's texts, over the vectors beside the bank where there are any.

    Args:
        cache: use the file of vectors even if it does not exist yet.

    Raises:
        BankError: unknown encoder, weights that cannot be loaded, another ``config.dim``, or a
            damaged file of vectors.
    """

    def build() -> TextEncoder:
        return build_encoder(config.encoder, config.dim, truncate=config.truncate, device=device)

    path = vectors_path(bank.source)
    known = is_made(bank.source) or Path(bank.source).is_file()
    if not cache and not (known and os.path.exists(path)):
        return build()
    identity = encoder_identity(config.encoder, config.dim)
    name = HashedNGramEncoder.name if config.encoder == HashedNGramEncoder.name else identity
    encoder = CachedEncoder(path, identity, name, build, truncate=config.truncate)
    check_dim(config.encoder, encoder.dim, config.dim)
    return encoder
