"""Class semantics: banks of attributes and descriptions, and encoders that make tokens of them."""

from dvla_fast.semantics.bank import ClassEntry, SemanticBank, bundled_banks, load_bank
from dvla_fast.semantics.encoders import (
    EncodedTexts,
    HashedNGramEncoder,
    TextEncoder,
    build_encoder,
    encode_bank,
)

__all__ = [
    "ClassEntry",
    "EncodedTexts",
    "HashedNGramEncoder",
    "SemanticBank",
    "TextEncoder",
    "build_encoder",
    "bundled_banks",
    "encode_bank",
    "load_bank",
]
