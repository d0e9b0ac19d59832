"""Progressive top-k selection of attributes (docs/method.md §2).

Round i scores every attribute not yet chosen by its cosine with an encoded template, T0 = "A photo
of a {class}", and takes the best; the next template names what was chosen: all of it, or only the
last. A template depends on the class and on the choices so far, so each round encodes one text per
class: ``progressive_top_k`` does that for all classes at once and needs k + 1 calls of the encoder,
not classes · k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from dvla_fast.errors import BankError
from dvla_fast.semantics.encoders import TextEncoder, encode_checked

TEMPLATES = ("all", "last")
# Cosines are compared after rounding, so that equal ones are equal however they were summed.
_DECIMALS = 6


class Selection(NamedTuple):
    """What was chosen for one class.

    order: positions of the chosen candidates, in order of selection.
    scores: of each candidate its cosine in every round in which it could still be chosen.
    """

    order: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]


def check_template(template: str) -> None:
    """Refuse a template that is not known (ValueError)."""
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")


def template_text(class_name: str, chosen: Sequence[str] = (), template: str = "all") -> str:
    """Return the text that a round's candidates are compared with."""
    text = f"A photo of a {class_name}"
    if not chosen:
        return text
    return f"{text}, which has {', '.join(chosen if template == 'all' else chosen[-1:])}"


def progressive_top_k(
    class_names: Sequence[str],
    candidates: Sequence[Sequence[str]],
    encoder: TextEncoder,
    k: int,
    template: str = "all",
) -> list[Selection]:
    """Choose up to k attributes of every class, all classes together.

    Args:
        class_names: C names, as the template has them.
        candidates: C lists of candidate attributes, of any lengths; a class with k or fewer gets
            all of them, in order of selection.
        encoder: of templates and candidates.
        template: "all" or "last": which chosen attributes the template names.

    Returns:
        One selection per class; ties go to the lower position.

    Raises:
        ValueError: k < 1, an unknown template, or numbers of names and lists that differ.
        BankError: a text, or a template, that the encoder cannot read whole.
    """
    _check(class_names, candidates, k, template)
    unique = {text: row for row, text in enumerate(dict.fromkeys(chain.from_iterable(candidates)))}
    vectors = encode_checked(encoder, list(unique)) if unique else torch.zeros(0, encoder.dim)
    longest = max(map(len, candidates), default=0)
    index = torch.zeros(len(candidates), longest, dtype=torch.int64)
    mask = torch.zeros(len(candidates), longest, dtype=torch.bool)
    for row, texts in enumerate(candidates):
        index[row, : len(texts)] = torch.tensor([unique[text] for text in texts])
        mask[row, : len(texts)] = True

    def templates(order: list[list[int]]) -> Tensor:
        texts = [
            template_text(name, [proposed[i] for i in chosen], template)
            for name, proposed, chosen in zip(class_names, candidates, order)
        ]
        return _encode_templates(encoder, texts, template)

    return select_vectors(vectors[index.to(vectors.device)], mask, templates, k)


def select_vectors(
    vectors: Tensor, mask: Tensor, templates: Callable[[list[list[int]]], Tensor], k: int
) -> list[Selection]:
    """Select among encoded candidates.

    Args:
        vectors: (C, S, dim) unit vectors of C classes' candidates, padded.
        mask: (C, S) bool, True for a candidate.
        templates: called with the positions chosen so far, class by class; returns the encoded
            templates (C, dim).
        k: rounds.

    Returns:
        One selection per class.
    """
    classes, longest = mask.shape
    vectors, open_ = vectors.double(), mask.to(vectors.device, copy=True)
    rounds = min(k, longest)
    scores = torch.full((rounds, classes, longest), -torch.inf, dtype=torch.float64)
    order: list[list[int]] = [[] for _ in range(classes)]
    for step in range(rounds):
        query = templates(order).to(vectors.device).double()
        cosine = torch.bmm(vectors, query.unsqueeze(-1)).squeeze(-1).round(decimals=_DECIMALS)
        cosine = cosine.masked_fill(~open_, -torch.inf)
        best = cosine.argmax(1, keepdim=True)  # the first of equal ones
        scores[step] = cosine.cpu()
        for chosen, place, left in zip(order, best[:, 0].tolist(), open_.any(1).tolist()):
            if left:
                chosen.append(place)
        open_.scatter_(1, best, False)
    per_candidate = scores.permute(1, 2, 0).tolist()  # [C, S, rounds]
    counts = mask.sum(1).tolist()
    return [
        Selection(
            tuple(chosen),
            tuple(tuple(s for s in row if s != -torch.inf) for row in rows[:count]),
        )
        for chosen, rows, count in zip(order, per_candidate, counts)
    ]


def _encode_templates(encoder: TextEncoder, texts: list[str], template: str) -> Tensor:
    try:
        return encode_checked(encoder, texts)
    except BankError as error:
        remedy = "choose fewer (top_k)" + (", or template 'last'" if template == "all" else "")
        raise BankError(f"the template of top-k selection: {error}; {remedy}") from error


def _check(
    class_names: Sequence[str], candidates: Sequence[Sequence[str]], k: int, template: str
) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_template(template)
    for name, texts in zip(class_names, candidates):
        if isinstance(texts, str):
            raise TypeError(f"candidates: expected a list of texts of {name!r}, got one text")
    if len(class_names) != len(candidates):
        raise ValueError(f"{len(class_names)} class names, but {len(candidates)} lists")
