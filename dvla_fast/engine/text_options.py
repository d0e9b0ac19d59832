"""How a bank's texts are chosen and encoded, as the commands are told."""

from __future__ import annotations

from dataclasses import dataclass

from dvla_fast.engine.settings import one_of, option


@dataclass
class EncoderOptions:
    """What reads texts."""

    encoder: str = option(
        "hashed-ngram",
        "text encoder: hashed-ngram, open_clip:MODEL/TAG_OR_FILE or transformers:NAME_OR_FOLDER",
    )
    dim: int = option(
        0, "length of a text vector; 0: the encoder's own (hashed-ngram: any, 512 if 0)", 0
    )
    truncate: bool = option(False, "cut texts longer than the encoder reads instead of failing")


@dataclass
class SelectionOptions(EncoderOptions):
    """Which attributes of a class."""

    top_k: int = option(
        0,
        "attributes that progressive selection chooses of each class; 0: the bank's own choice",
        0,
    )
    template: str = option(
        "all",
        "chosen attributes that the template of that selection names: all, or the last",
        check=one_of("dvla_fast.semantics.topk:TEMPLATES"),
    )


@dataclass
class TextOptions(SelectionOptions):
    """Which texts."""

    parts: str = option(
        "all",
        "texts of a class that the gates read: all (attributes and description), attributes, "
        "description, name ('A photo of a NAME' alone), or shuffled (all, of another class of its "
        "split: a control)",
        check=one_of("dvla_fast.semantics.tokens:PARTS"),
    )
