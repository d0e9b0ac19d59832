"""Class semantics: banks of attributes and descriptions, and encoders that make tokens of them."""

from dvla_fast.semantics.bank import (
    Candidate,
    ClassEntry,
    SemanticBank,
    load_bank,
)
from dvla_fast.semantics.bundled import bundled_banks
from dvla_fast.semantics.encoders import HashedNGramEncoder, TextEncoder, build_encoder
from dvla_fast.semantics.tokens import EncodedTexts, choose_attributes, encode_bank
from dvla_fast.semantics.topk import Selection, progressive_top_k

__all__ = [
    "Candidate",
    "ClassEntry",
    "EncodedTexts",
    "HashedNGramEncoder",
    "Selection",
    "SemanticBank",
    "TextEncoder",
    "build_encoder",
    "bundled_banks",
    "choose_attributes",
    "encode_bank",
    "load_bank",
    "progressive_top_k",
]
