"""Whether a bank's texts were written from images that an evaluation asks about.

A bank lists the support images that were shown to its language model. Such an image may be a
support, whose class is known anyway; as a query it has told the texts what it shows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine.config import SemanticsConfig
from dvla_fast.semantics import SemanticBank, load_bank

# What texts can be made from without any image: then there is nothing to leak.
BLIND_KINDS = ("class-names", "definitions")


def seen_images(bank: SemanticBank, data: FewShotData, split: str) -> tuple[Tensor, dict[str, Any]]:
    """Find the images of a split that a bank's texts were written from.

    Returns:
        (N,) bool over the split's images, and what a summary says of it: ``bank_kind``,
        ``images_seen`` (by the texts of the data set's classes), ``seen_in_split``, ``unmatched``
        (seen images that the data set does not have), ``unlisted`` (classes of the split whose
        texts do not say which images they were made from; 0 for texts made without images), and
        ``verdict``: "overlap" (images of the split were seen), "unknown" (``unmatched`` or
        ``unlisted`` are not 0), or "clean" (no image of the split was seen).
    """
    lacking = set(bank.missing(data.class_names))
    entries = bank.select(name for name in data.class_names if name not in lacking)
    seen = {image for entry in entries for image in entry.images}
    images = data.split(split)
    mask = torch.tensor([image in seen for image in images.ids], dtype=torch.bool)
    if not images.ids:
        mask = torch.zeros(len(images), dtype=torch.bool)
    known = {image for part in (data.base, data.monitor, data.novel) for image in part.ids}
    unmatched = len(seen - known)
    evaluated = [name for name in images.class_names if name not in lacking]
    unlisted = sum(not entry.images for entry in bank.select(evaluated))
    unlisted = (
        0 if bank.kind in BLIND_KINDS else unlisted + len(images.class_names) - len(evaluated)
    )
    told = not unlisted and not unmatched
    verdict = "overlap" if bool(mask.any()) else "clean" if told else "unknown"
    return mask, {
        "bank_kind": bank.kind,
        "images_seen": len(seen),
        "seen_in_split": int(mask.sum()),
        "unmatched": unmatched,
        "unlisted": unlisted,
        "verdict": verdict,
    }


def leak_summary(
    facts: dict[str, Any], action: str, mask: Tensor, queries: Tensor
) -> dict[str, Any]:
    """Complete the facts of ``seen_images`` for one list of episodes.

    Args:
        action: ``semantics.seen_images``.
        mask: (N,) as from ``seen_images``.
        queries: indices of all queries drawn, any shape.

    Returns:
        The facts, with ``action`` ("none", "excluded" or "reported"), ``seen_queries`` and
        ``queries`` (numbers of draws), and where images overlap the verdict "leak" (some are
        queries), "unknown" (others may be, see ``seen_images``), "excluded" or "clean".
    """
    drawn = int(mask[queries.cpu()].sum())
    summary = {**facts, "action": "none", "seen_queries": drawn, "queries": queries.numel()}
    if facts["verdict"] == "overlap":
        summary["action"] = "excluded" if action == "exclude" else "reported"
        untold = facts["unlisted"] or facts["unmatched"]
        kept_out = "excluded" if action == "exclude" else "clean"
        summary["verdict"] = "leak" if drawn else "unknown" if untold else kept_out
    return summary


class SeenImages(NamedTuple):
    """What ``seen_images`` finds for a run, and what its settings make of it."""

    mask: Tensor
    facts: dict[str, Any]
    action: str

    @property
    def barred(self) -> Tensor | None:
        """(N,) bool, the images that are kept out of the queries; None: none are."""
        assert self.action in ("exclude", "report")  # the option checks what is given
        return self.mask if self.action == "exclude" else None

    def summary(self, sampler: EpisodeSampler, episodes: int) -> dict[str, Any]:
        """The facts of one list of episodes, as ``leak_summary`` gives them."""
        return leak_summary(self.facts, self.action, self.mask, sampler.batch(0, episodes).query)


def find_seen_images(config: SemanticsConfig, data: FewShotData, split: str) -> SeenImages:
    """Find the images of a split that a run's bank was written from (BankError)."""
    return SeenImages(*seen_images(load_bank(config.bank), data, split), config.seen_images)
