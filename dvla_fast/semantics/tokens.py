"""The text tokens of episodes: a bank's texts, chosen and encoded once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dvla_fast.errors import BankError
from dvla_fast.semantics.bank import SemanticBank
from dvla_fast.semantics.encoders import TextEncoder, encode_checked
from dvla_fast.semantics.topk import check_template, progressive_top_k, template_text
from dvla_fast.semantics.vectors import ClassVectors, read_stored

if TYPE_CHECKING:
    from dvla_fast.nn import TextTokens


PARTS = ("all", "attributes", "description", "name", "shuffled")


@dataclass(frozen=True)
class EncodedTexts:
    """The encoded texts of C classes: k attributes (padded) and one description each.

    Attributes:
        tokens: (C, k + 1, dim) float32 unit vectors, zero where padded; the description is last.
        mask: (C, k + 1) bool, True for a text.
        levels: (k + 1,) int64, 0 = attribute, 1 = description.
        class_embedding: (C, dim), unit mean of the class's texts: the target of the similarity
            reward.
    """

    class_names: tuple[str, ...]
    tokens: Tensor
    mask: Tensor
    levels: Tensor
    class_embedding: Tensor

    def to(self, device: torch.device | str) -> EncodedTexts:
        """Return a copy on another device."""
        return EncodedTexts(
            self.class_names,
            self.tokens.to(device),
            self.mask.to(device),
            self.levels.to(device),
            self.class_embedding.to(device),
        )

    def among(self, class_names: Sequence[str]) -> EncodedTexts:
        """Return the texts in the order of more classes; those without texts have none."""
        place = {name: row for row, name in enumerate(self.class_names)}
        rows = torch.tensor([place.get(name, len(place)) for name in class_names])

        def spread(tensor: Tensor) -> Tensor:
            empty = torch.zeros_like(tensor[:1])
            return torch.cat([tensor, empty])[rows.to(tensor.device)]

        return EncodedTexts(
            tuple(class_names),
            spread(self.tokens),
            spread(self.mask),
            self.levels,
            spread(self.class_embedding),
        )

    def only(self, part: str) -> EncodedTexts:
        """Return the texts of one level, "attributes" or "description", alone.

        Raises:
            BankError: a class has none of them.
        """
        keep = self.levels == (1 if part == "description" else 0)
        tokens, mask = self.tokens[:, keep], self.mask[:, keep]
        bare = [name for name, has in zip(self.class_names, mask.any(1).tolist()) if not has]
        if bare:
            raise BankError(
                f"{len(bare)} of {len(self.class_names)} classes have no {part} (first: "
                f"{bare[0]!r}); choose another --semantics.parts, or complete the bank"
            )
        embedding = torch.nn.functional.normalize(tokens.sum(1), dim=-1)
        return EncodedTexts(self.class_names, tokens, mask, self.levels[keep], embedding)

    def episodes(self, classes: Tensor) -> TextTokens:
        """Gather the text tokens of episodes.

        Args:
            classes: (E, way) int64 indices into ``class_names``.

        Returns:
            TextTokens with tokens (E, way * (k + 1), dim), class by class; ``mask`` is None when
            no class is padded.
        """
        from dvla_fast.nn import TextTokens

        if classes.dim() != 2:
            raise ValueError(f"classes: shape {tuple(classes.shape)}, expected (episodes, way)")
        episodes, way = classes.shape
        per_class = self.tokens.shape[1]
        tokens = self.tokens[classes].reshape(episodes, way * per_class, -1)
        mask = None
        if not self._full:
            mask = self.mask[classes].reshape(episodes, way * per_class)
        return TextTokens(tokens, self.levels.repeat(way), self.class_embedding[classes], mask)

    @cached_property
    def _full(self) -> bool:
        return bool(self.mask.all())  # waits for a GPU: once, not in every step


def shuffled_sources(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Give each class another class of its group, a control: its texts are wrong, though as good.

    Depends on nothing but the names of a group.

    Args:
        groups: class names, a group a split. A class alone in its group stays itself.

    Returns:
        class -> the class whose texts it gets, a different one for each class of a group.
    """

    def place(name: str) -> bytes:
        return hashlib.sha256(name.encode(errors="surrogatepass")).digest()

    sources: dict[str, str] = {}
    for group in groups:
        names = sorted(set(group), key=place)
        sources.update(zip(names, names[1:] + names[:1]))
    return sources


def choose_attributes(
    bank: SemanticBank,
    class_names: Sequence[str],
    encoder: TextEncoder,
    top_k: int = 0,
    template: str = "all",
) -> list[tuple[str, ...]]:
    """Return the attributes of each named class that become tokens.

    Args:
        top_k: 0: the bank's own choice, or all candidates where it has made none; k > 0: the k that
            progressive selection finds among the candidates (or attributes, without candidates), or
            all, in the bank's order, where no class has more than k.
        template: of that selection; see ``progressive_top_k``.

    Raises:
        BankError: a class missing from the bank, or a text that the encoder cannot read whole.

    Warns:
        UserWarning: no class has ``top_k`` attributes.
    """
    check_template(template)
    if bank.vectors:
        raise BankError(f"{bank.source}: has vectors and no words")
    names = bank.resolve(class_names)
    entries = [bank.classes[name] for name in names]
    if top_k == 0:
        return [entry.attributes or entry.proposals for entry in entries]
    proposals = [entry.proposals for entry in entries]
    most = max(map(len, proposals), default=0)
    if top_k > most:
        warnings.warn(
            f"semantics.top_k: {top_k} asked for, but no class here has more than {most} "
            "attributes: all are used",
            stacklevel=2,
        )
    if top_k >= most:  # all of them, whatever their order: nothing to encode
        return proposals
    found = progressive_top_k(names, proposals, encoder, top_k, template)
    return [
        tuple(texts[place] for place in selection.order)
        for texts, selection in zip(proposals, found)
    ]


def encode_bank(
    bank: SemanticBank,
    class_names: Sequence[str],
    encoder: TextEncoder,
    *,
    top_k: int = 0,
    template: str = "all",
) -> EncodedTexts:
    """Encode the texts of the named classes once; episodes then only gather.

    Args:
        encoder: not asked where the bank has vectors and no words.
        top_k, template: which attributes; see ``choose_attributes``.

    Raises:
        BankError: no classes, one missing from the bank, a text that the encoder cannot read whole,
            or vectors that are no unit vectors.
        TypeError: one name in the place of a list of names.
    """
    if isinstance(class_names, str):
        raise TypeError(f"class_names: expected a list of names, got {class_names!r}")
    if not len(class_names):
        raise BankError(f"{bank.source}: no classes were asked for")
    try:
        if bank.vectors:
            return stored_tokens(bank, class_names, top_k)
        entries = bank.select(class_names)
        attributes = choose_attributes(bank, class_names, encoder, top_k, template)
        texts = [
            text
            for chosen, entry in zip(attributes, entries)
            for text in (*chosen, entry.description)
        ]
        vectors = encode_checked(encoder, texts)
    except BankError as error:
        if str(error).startswith(bank.source):
            raise
        raise BankError(f"{bank.source}: {error}") from error
    classes = [
        ClassVectors(part[:-1], part[-1:])
        for part in vectors.split([len(chosen) + 1 for chosen in attributes])
    ]
    return _assemble(class_names, classes, encoder.dim)


def encode_names(
    bank: SemanticBank, class_names: Sequence[str], encoder: TextEncoder
) -> EncodedTexts:
    """Encode "A photo of a NAME" as each class's only text, at the level of descriptions.

    Raises:
        BankError: a class missing from the bank, or a name that the encoder cannot read whole.
    """
    texts = [template_text(name) for name in bank.resolve(class_names)]
    vectors = encode_checked(encoder, texts)
    classes = [ClassVectors(row[:0], row) for row in vectors.split(1)]
    return _assemble(class_names, classes, encoder.dim)


def check_top_k(bank: SemanticBank, top_k: int) -> None:
    """Refuse top-k selection in a bank that has vectors and no words (BankError)."""
    if bank.vectors and top_k:
        raise BankError(
            f"{bank.source}: has vectors and no words, so there is nothing for top-k selection to "
            "choose from; leave top_k at 0"
        )


def stored_tokens(bank: SemanticBank, class_names: Sequence[str], top_k: int = 0) -> EncodedTexts:
    """Return the tokens of a bank that has vectors and no words.

    Raises:
        BankError: a class missing from the bank, missing or damaged vectors, or ``top_k`` > 0.
    """
    assert bank.vectors is not None
    check_top_k(bank, top_k)
    names = bank.resolve(class_names)
    found = read_stored(bank)
    return _assemble(class_names, [found[name] for name in names], bank.vectors.dim)


def _assemble(
    class_names: Sequence[str], classes: Sequence[ClassVectors], dim: int
) -> EncodedTexts:
    most = max(len(item.attributes) for item in classes)
    tokens = torch.zeros(len(classes), most + 1, dim)
    mask = torch.zeros(len(classes), most + 1, dtype=torch.bool)
    for row, item in enumerate(classes):
        count = len(item.attributes)
        tokens[row, :count], mask[row, :count] = item.attributes, True
        if len(item.description):
            tokens[row, -1], mask[row, -1] = item.description[0], True
    levels = torch.zeros(most + 1, dtype=torch.int64)
    levels[-1] = 1
    class_embedding = torch.nn.functional.normalize(tokens.sum(1), dim=-1)
    return EncodedTexts(tuple(class_names), tokens, mask, levels, class_embedding)
