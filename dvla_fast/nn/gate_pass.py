"""The gates of one forward call, in each text scope: what they see, and what they leave behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvla_fast import reference
from dvla_fast.nn.backbones.base import GatedTokens, Location
from dvla_fast.nn.episode import LayerTrace, TextTokens
from dvla_fast.nn.gate import GateOutput, per_image
from dvla_fast.nn.layers import lookup, weight_of

if TYPE_CHECKING:
    from dvla_fast.nn.dvla import DVLA


class GatePass:
    """Callbacks for the backbone, and the traces of the layers that they have passed.

    Args:
        model: whose gates run.
        text: the episodes' texts.
        counts: supports and queries of an episode; without either the others go through alone.
        way: classes of an episode.
        options: of every gate's policy: ``sample`` and ``generator``.
        alpha, action_logit: replayed gates, as ``DVLA.forward`` takes them.
        traces: of the supports, where they have gone through before.

    Raises:
        TypeError: replayed gates that are neither numbers nor tensors, nor a collection of them.
        ValueError: replayed gates that do not fit the layers, episodes or images.
    """

    def __init__(
        self,
        model: DVLA,
        text: TextTokens,
        counts: tuple[int, int],
        way: int,
        options: dict[str, Any],
        alpha: Any,
        action_logit: Any,
        traces: Sequence[LayerTrace] = (),
    ) -> None:
        self.model, self.counts, self.way, self.options = model, counts, way, options
        self.episodes = text.tokens.shape[0]
        self.text = text
        self.tokens, self.mask, self.levels = text.tokens, text.mask, text.levels
        self.alphas = per_layer("alpha", alpha, model.gated_layers)
        self.actions = per_layer("action_logit", action_logit, model.gated_layers)
        supports, queries = counts
        met = {"episode": queries, "class": 0, "candidate": way * queries}[model.text_scope]
        self.images = supports + met  # of an episode, one after another: what gates meet
        for name, all_given in (("alpha", self.alphas), ("action_logit", self.actions)):
            for given in all_given:  # before any work
                self._decided(name, given, slice(None))
        self.traces = list(traces)

    def select_classes(self, labels: Tensor) -> None:
        """Make every support image a text group with its class's tokens."""
        rows = torch.arange(self.episodes, device=labels.device).unsqueeze(1)
        text, way = self.text, self.way
        self.tokens = text.tokens.unflatten(1, (way, -1))[rows, labels].flatten(0, 1)
        self.levels = text.levels.unflatten(0, (way, -1))[labels].flatten(0, 1)
        if text.mask is not None:
            self.mask = text.mask.unflatten(1, (way, -1))[rows, labels].flatten(0, 1)

    def select_candidates(self) -> None:
        """Make every class of an episode a text group, of all its queries."""
        text, way = self.text, self.way
        self.tokens = text.tokens.unflatten(1, (way, -1)).flatten(0, 1)
        self.levels = text.levels.unflatten(0, (way, -1)).repeat(self.episodes, 1)
        if text.mask is not None:
            self.mask = text.mask.unflatten(1, (way, -1)).flatten(0, 1)

    def episode_gate(self, location: Location, tokens: Tensor) -> GatedTokens:
        """Supports and queries of an episode, in that order, are one text group."""
        # Queries alone replay what their supports' gate decided: their state is not read.
        options = self._asked(location, slice(None), state_images=max(1, self.counts[0]))
        out, before, fused = self._run(location, tokens, options)
        support, query = before.split(self.counts, dim=1)
        support_added, query_added = fused.split(self.counts, dim=1)
        pooled = (support, support + support_added, query, query + query_added)
        self._record(location, out, pooled, query_added)
        return self._handed_back(location, out)

    def class_gate(self, location: Location, tokens: Tensor) -> GatedTokens:
        """Supports alone, each its own text group; an episode's groups share a decision."""
        options = self._asked(location, slice(self.counts[0]), episodes=self.episodes)
        out, before, fused = self._run(location, tokens, options)
        self._record(location, out, (before, before + fused, before, before), fused)
        return self._handed_back(location, out)

    def observe_query(self, location: Location, tokens: Tensor) -> None:
        """Queries see no text: their pooled tokens are the same before and after the gate."""
        pooled = self._pooled(tokens)
        self._complete(location, pooled, pooled)

    def candidate_gate(self, location: Location, tokens: Tensor) -> GatedTokens:
        """Each class with all queries; in alpha scope "episode" they replay the supports' gate."""
        if self._decides_once:
            alpha = self.traces[self._index(location)].alpha
            # Of the state, which nobody reads here, as little as can be.
            options = {"alpha": alpha, "episodes": self.episodes, "state_images": 1}
        else:
            options = self._asked(location, slice(self.counts[0], None))
        out, before, fused = self._run(location, tokens, options)
        decided = None if self._decides_once else self._decisions(out)
        shape = (self.way, -1)  # [E, way · Q, d] -> [E, Q, way, d]
        before, fused = (x.unflatten(1, shape).transpose(1, 2) for x in (before, fused))
        self._complete(location, before, before + fused, decided)
        return self._handed_back(location, out)

    @property
    def _decides_once(self) -> bool:
        return self.model.alpha_scope == "episode"

    def _index(self, location: Location) -> int:
        return self.model.gated_layers.index(location)

    def _asked(self, location: Location, rows: slice, **once: int) -> dict[str, Any]:
        """A gate's options where it decides. ``rows``: its images among all that gates meet;
        ``once``: options of one decision an episode.
        """
        index = self._index(location)
        return {
            "alpha": self._decided("alpha", self.alphas[index], rows),
            "action_logit": self._decided("action_logit", self.actions[index], rows),
            **self.options,
            **(once if self._decides_once else {}),
        }

    def _run(
        self, location: Location, tokens: Tensor, options: dict[str, Any]
    ) -> tuple[GateOutput, Tensor, Tensor]:
        """Gate output; pooled tokens (E, n, d); GAP(H) (E, n, d)."""
        index = self._index(location)
        gate: Any = self.model.gates[index]
        wide = torch.promote_types(self.tokens.dtype, torch.float32)
        scale = lookup(self.model.level_scales[index], self.levels, wide)  # [P] or [T, P]
        text = (self.tokens * scale.unsqueeze(-1)).to(gate._weight().dtype)
        out: GateOutput = gate(tokens, text, text_mask=self.mask, **options)
        keep = per_image(self.mask, tokens.shape[0])
        fused = reference.masked_mean(out.fused, keep).unflatten(0, (self.episodes, -1))
        return out, self._pooled(tokens), fused

    def _decided(self, name: str, given: Any, rows: slice) -> Any:
        """Given gates in the gate's rows: (E,), or (B,) in alpha scope "image"."""
        if not isinstance(given, Tensor) or given.dim() == 0:
            return given
        whole = (self.episodes, self.images)
        expected = (whole[:1],) if self._decides_once else (whole[:1], whole)
        if tuple(given.shape) not in expected:
            wanted = " or ".join(map(str, expected))
            raise ValueError(
                f"{name}: shape {tuple(given.shape)}, alpha_scope={self.model.alpha_scope!r} takes"
                f" {wanted}"
            )
        if self._decides_once:
            return given
        return given.reshape(self.episodes, -1).expand(whole)[:, rows].flatten()

    def _pooled(self, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return tokens.mean(1, dtype=wide).unflatten(0, (self.episodes, -1))

    def _decisions(self, out: GateOutput) -> tuple[Tensor, ...]:
        """α, action, log-density, entropy and state, in the shapes of a trace."""
        found = (out.alpha, out.action_logit, out.log_prob, out.entropy, out.state)
        if self._decides_once:
            return found
        return tuple(x.unflatten(0, (self.episodes, -1)) for x in found)

    def _record(
        self,
        location: Location,
        out: GateOutput,
        pooled: tuple[Tensor, Tensor, Tensor, Tensor],
        fused: Tensor,
    ) -> None:
        alignment: Any = self.model.alignments[self._index(location)]
        aligned = alignment(fused.detach().to(weight_of(alignment).dtype))
        alpha, action_logit, log_prob, entropy, state = self._decisions(out)
        self.traces.append(
            LayerTrace(
                location, alpha, action_logit, log_prob, entropy, *pooled, fused, aligned, state
            )
        )

    def _complete(
        self,
        location: Location,
        before: Tensor,
        after: Tensor,
        decided: tuple[Tensor, ...] | None = None,
    ) -> None:
        """Add the queries, which go through after the supports, to their layer's trace."""
        index = self._index(location)
        seen = self.traces[index]
        decision: Any = (seen.alpha, seen.action_logit, seen.log_prob, seen.entropy, seen.state)
        if decided is not None:
            decision = [torch.cat(parts, 1) for parts in zip(decision, decided)]
        alpha, action_logit, log_prob, entropy, state = decision
        # Not _replace, which torch.compile of 2.11 cannot follow.
        self.traces[index] = LayerTrace(
            location, alpha, action_logit, log_prob, entropy,
            seen.support_before, seen.support_after, before, after,
            seen.fused, seen.aligned, state,
        )  # fmt: skip

    def _handed_back(self, location: Location, out: GateOutput) -> GatedTokens:
        if not self.model.backbone.carries_extra(location):
            return GatedTokens(out.image_tokens)
        return GatedTokens(out.image_tokens, out.fused, per_image(self.mask, out.fused.shape[0]))


def per_layer(name: str, given: Any, layers: tuple[Location, ...]) -> list[Any]:
    """One entry per gated layer from what ``alpha`` and ``action_logit`` may be."""
    if given is None or isinstance(given, (Tensor, Real)):
        return [given] * len(layers)
    if isinstance(given, Mapping):
        strangers = set(given) - set(layers)
        if strangers:
            shown = sorted(strangers, key=str)
            raise ValueError(f"{name}: {shown} are not gated; gates are at {layers}")
        return [given.get(location) for location in layers]
    try:
        count = len(given)
    except TypeError as error:
        raise TypeError(
            f"{name}: expected a number, a tensor, one for each gated layer or a mapping from"
            f" locations, got {type(given).__name__}"
        ) from error
    if count != len(layers):
        raise ValueError(f"{name}: {count} entries for {len(layers)} gated layers")
    return list(given)
