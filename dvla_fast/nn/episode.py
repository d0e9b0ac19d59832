"""What a model is given with a batch of episodes, and what it says of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from dvla_fast.nn.backbones.base import Location


class TextTokens(NamedTuple):
    """The texts of E episodes, one vector a phrase, class by class: P = way · (phrases a class)."""

    tokens: Tensor
    """(E, P, text_dim)."""
    levels: Tensor
    """(P,) int64: 0 = attribute, 1 = description."""
    class_embedding: Tensor
    """(E, way, text_dim): one vector a class, the target t* of the similarity reward."""
    mask: Tensor | None = None
    """(E, P) bool, True = a phrase; None: all are."""


class LayerTrace(NamedTuple):
    """What happened at one gated layer: everything that rewards and losses read.

    Gates meet the S supports, and after them in text scope "episode" the Q queries, in scope
    "candidate" the way · Q candidates: all queries with the first class's texts, then with the
    second's, and so on. M of them the similarity reward judges: the queries in scope "episode", the
    supports in the others.
    """

    location: Location
    alpha: Tensor
    """(E,); in alpha scope "image" one for each that the gate met; so are the next three."""
    action_logit: Tensor
    log_prob: Tensor
    entropy: Tensor
    support_before: Tensor
    """(E, S, d): mean of the image tokens before the gate."""
    support_after: Tensor
    """(E, S, d): and after it."""
    query_before: Tensor
    """(E, Q, d); (E, Q, way, d) in text scope "candidate", one for each class."""
    query_after: Tensor
    """Likewise."""
    fused: Tensor
    """(E, M, d): GAP(H)."""
    aligned: Tensor
    """(E, M, text_dim): U · GAP(H) with GAP(H) detached, so that a loss on it trains U alone."""
    state: Tensor | None = None
    """(E, 2d + 1) that the policy decided from; (E, ·, 2d + 1) in alpha scope "image"."""


class EpisodeOutput(NamedTuple):
    """Result of a batch of episodes."""

    logits: Tensor
    """(E, Q, way)."""
    layers: tuple[LayerTrace, ...]
    """One per gated layer, in order; empty without text."""
    support_labels: Tensor
    """(E, S), as given."""
    aligned_labels: Tensor | None = None
    """(E, M): classes of the images behind ``fused``; None: they are the queries."""


for _kind in (TextTokens, LayerTrace, EpisodeOutput):  # as GateOutput, for torch.export.save
    _pytree._register_namedtuple(_kind, serialized_type_name=f"dvla_fast.{_kind.__name__}")
# An exported program keeps its example inputs, and is loaded as data alone.
torch.serialization.add_safe_globals([TextTokens])
