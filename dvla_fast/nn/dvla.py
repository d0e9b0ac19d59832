"""DVLA: a gated backbone, one RL gate per gated layer, and the prototype classifier on top.

Episodes are batched. Supports and queries go through the network in one pass; the gates decide from
the supports alone, and queries replay their decision (method §3 and §4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from dvla_fast import reference
from dvla_fast.nn.backbones.base import GatedBackbone, GatedTokens, Location
from dvla_fast.nn.episode_checks import check_episodes, check_text
from dvla_fast.nn.gate import GateOutput, RLAGate, per_image
from dvla_fast.nn.layers import lookup, weight_of
from dvla_fast.nn.level_weights import level_scales
from dvla_fast.nn.prototype import prototype_logits

TEXT_SCOPES = ("episode", "class")


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

    M images have a text: the Q queries in text scope "episode", the S supports in scope "class".
    """

    location: Location
    alpha: Tensor
    """(E,); (E, images) in alpha scope "image"; so are the next three."""
    action_logit: Tensor
    log_prob: Tensor
    entropy: Tensor
    support_before: Tensor
    """(E, S, d): mean of the image tokens before the gate."""
    support_after: Tensor
    """(E, S, d): and after it."""
    query_before: Tensor
    """(E, Q, d)."""
    query_after: Tensor
    """(E, Q, d)."""
    fused: Tensor
    """(E, M, d): GAP(H)."""
    aligned: Tensor
    """(E, M, text_dim): U · GAP(H) with GAP(H) detached, so that a loss on it trains U alone."""
    state: Tensor | None = None
    """(E, 2d + 1) that the policy decided from; (E, images, 2d + 1) in alpha scope "image"."""


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


class DVLA(nn.Module):
    """Few-shot classifier of method §1: backbone, gates, prototypes.

    Args:
        backbone: the image network.
        gated_layers: (stage, block) pairs, in the backbone's order; None: ``backbone.locations``.
            Where the block is convolutional, no text tokens ride through it: there the gate acts
            through z + mean(H) alone.
        text_dim: width of the text tokens.
        num_heads: attention heads of each gate.
        concentration: κ of the Beta policy.
        temperature: of the prototype classifier.
        alpha_scope: one decision per "episode", from its supports, or per "image".
        text_scope: "episode": every image sees the texts of all the episode's classes; "class":
            supports see their own class's texts, queries none.
        level_weights: (attribute, description) weights for each gated layer; they scale the text
            tokens, and equal weights leave them alone. Default: (0.7, 0.3) before the backbone's
            ``deep_from`` (stage 3 of Visformer), then (0.3, 0.7).
        policy: of the gates: "beta", "categorical", "fixed", "static" or "mlp".
        hidden_dim: hidden width of the policy networks.
        fixed_alpha: the gate of policy "fixed".

    Raises:
        ValueError: options that do not fit the backbone or each other.
    """

    def __init__(
        self,
        backbone: GatedBackbone,
        gated_layers: Sequence[Sequence[int]] | None = None,
        text_dim: int = 512,
        num_heads: int = 8,
        concentration: float = 10.0,
        temperature: float = 0.2,
        alpha_scope: str = "episode",
        text_scope: str = "episode",
        level_weights: Sequence[Sequence[float]] | None = None,
        policy: str = "beta",
        hidden_dim: int = 128,
        fixed_alpha: float = 0.5,
    ) -> None:
        super().__init__()
        self.gated_layers = _checked_layers(backbone, gated_layers)
        if text_scope not in TEXT_SCOPES:
            raise ValueError(f"text_scope: unknown {text_scope!r}; expected one of {TEXT_SCOPES}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
        self.backbone = backbone
        self.text_dim, self.temperature = text_dim, float(temperature)
        self.alpha_scope, self.text_scope = alpha_scope, text_scope
        widths = [backbone.widths[location] for location in self.gated_layers]
        self.gates = nn.ModuleList(
            RLAGate(
                width,
                text_dim,
                num_heads,
                concentration=concentration,
                hidden_dim=hidden_dim,
                alpha_scope=alpha_scope,
                policy=policy,
                fixed_alpha=fixed_alpha,
            )
            for width in widths
        )
        self.alignments = nn.ModuleList(
            nn.Linear(width, text_dim, bias=False) for width in widths
        )  # U of the similarity reward
        self.level_scales = level_scales(level_weights, self.gated_layers, backbone.deep_from)

    def features(self, images: Tensor) -> Tensor:
        """Visual features (B, feature_dim) of images (B, C, H, W): the backbone without gates."""
        result: Tensor = self.backbone(images)
        return result

    def prefix(self, images: Tensor) -> Tensor:
        """States (B, ·, ·, ·) just before the first gate, which no text and no episode changes.

        Compute them once per image and give them to :meth:`forward` with ``from_prefix=True``:
        an evaluation in which images recur then pays for the early stages once.
        """
        return self.backbone.prefix(images, self.gated_layers[0])

    def forward(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        text: TextTokens | None = None,
        *,
        way: int,
        alpha: Any = None,
        action_logit: Any = None,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        from_prefix: bool = False,
    ) -> EpisodeOutput:
        """Classify the queries of E episodes.

        Args:
            support: (E, S, C, H, W).
            support_labels: (E, S) int64 in [0, way); the range is not read.
            query: (E, Q, C, H, W).
            text: the episodes' texts; None: visual prototypes only, no gate runs.
            way: classes of an episode.
            alpha: replay gates: one number or tensor for all layers, a sequence with one per
                layer, or a mapping from location (layers it lacks ask their policy). Tensors of
                shape (), (E,), or as ``LayerTrace.alpha``.
            action_logit: re-evaluate stored actions, given likewise.
            sample: draw gates (True) or take the policy's mean (False); None: draw in training.
            generator: source of randomness on the inputs' device.
            from_prefix: ``support`` and ``query`` are maps of :meth:`prefix`, not images.

        Raises:
            TypeError, ValueError: arguments that do not fit together.
        """
        check_episodes(support, support_labels, query, way)
        if text is not None:
            check_text(text, len(support), way, self.text_dim, self.text_scope == "class")
        start = self.gated_layers[0] if from_prefix else None
        counts = (support.shape[1], query.shape[1])
        images = torch.cat((support, query), dim=1).flatten(0, 1)
        if text is None:
            features = self.backbone(images, start=start)
            return self._classify(features, counts, support_labels, way, ())
        options: dict[str, Any] = {"sample": sample, "generator": generator}
        pass_ = _GatePass(self, text, counts, options, alpha, action_logit)
        if self.text_scope == "episode":
            features = self.backbone(
                images, pass_.episode_gate, locations=self.gated_layers, start=start
            )
            return self._classify(features, counts, support_labels, way, tuple(pass_.traces))
        seen = self._class_supports(pass_, support, support_labels, way, start)
        plain = self.backbone(
            query.flatten(0, 1), pass_.observe_query, locations=self.gated_layers, start=start
        ).unflatten(0, (support.shape[0], -1))
        features = torch.cat((seen, plain), dim=1).flatten(0, 1)
        output = self._classify(features, counts, support_labels, way, tuple(pass_.traces))
        return EpisodeOutput(output.logits, output.layers, output.support_labels, support_labels)

    def supports_are_independent(self, alpha: Any = None) -> bool:
        """Whether a support's feature is the same in every episode that draws the image.

        It is in text scope "class", where a support sees its own class's text alone, when none of
        its gates looks at the episode either: alpha scope "image", one replayed number (``alpha``
        as in :meth:`forward`), or policies that read no state. In alpha scope "episode" the Beta,
        categorical and MLP policies pool their state over all supports of the episode.
        """
        if self.text_scope != "class":
            return False
        gates: Any = self.gates
        return all(
            self.alpha_scope == "image" or not gate.policy.reads_state
            if given is None
            else not isinstance(given, Tensor) or given.dim() == 0
            for gate, given in zip(gates, _per_layer("alpha", alpha, self.gated_layers))
        )

    def support_features(
        self,
        support: Tensor,
        support_labels: Tensor,
        text: TextTokens,
        *,
        way: int,
        alpha: Any = None,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        from_prefix: bool = False,
    ) -> tuple[Tensor, tuple[LayerTrace, ...]]:
        """Features (E, S, feature_dim) of the supports alone, in text scope "class".

        Queries see no text there: theirs are :meth:`features`. Where
        :meth:`supports_are_independent` holds, every image can be an episode of its own (way 1,
        S = 1), and its feature then serves all episodes. Arguments are those of :meth:`forward`;
        the traces' query fields repeat the supports'.

        Raises:
            ValueError: another text scope, where supports and queries go through together.
            TypeError, ValueError: arguments that do not fit together.
        """
        if self.text_scope != "class":
            raise ValueError(
                f"support_features: text_scope is {self.text_scope!r}, expected 'class'; call"
                " the model with supports and queries"
            )
        check_episodes(support, support_labels, support, way)
        check_text(text, len(support), way, self.text_dim, by_class=True)
        options: dict[str, Any] = {"sample": sample, "generator": generator}
        pass_ = _GatePass(self, text, (support.shape[1], 0), options, alpha, None)
        start = self.gated_layers[0] if from_prefix else None
        features = self._class_supports(pass_, support, support_labels, way, start)
        return features, tuple(pass_.traces)

    def _class_supports(
        self, pass_: _GatePass, support: Tensor, labels: Tensor, way: int, start: Location | None
    ) -> Tensor:
        pass_.select_classes(labels, way)
        features = self.backbone(
            support.flatten(0, 1), pass_.class_gate, locations=self.gated_layers, start=start
        )
        return features.unflatten(0, (support.shape[0], -1))

    def _classify(
        self,
        features: Tensor,
        counts: tuple[int, int],
        labels: Tensor,
        way: int,
        traces: tuple[LayerTrace, ...],
    ) -> EpisodeOutput:
        support, query = features.unflatten(0, (-1, sum(counts))).split(counts, dim=1)
        logits = prototype_logits(support, labels, query, way, self.temperature)
        return EpisodeOutput(logits, traces, labels)


class _GatePass:
    """The gates of one forward call: what they are given, and what they leave behind."""

    def __init__(
        self,
        model: DVLA,
        text: TextTokens,
        counts: tuple[int, int],
        options: dict[str, Any],
        alpha: Any,
        action_logit: Any,
    ) -> None:
        self.model, self.counts, self.options = model, counts, options
        self.episodes = text.tokens.shape[0]
        self.tokens, self.mask, self.levels = text.tokens, text.mask, text.levels
        self.alphas = _per_layer("alpha", alpha, model.gated_layers)
        self.actions = _per_layer("action_logit", action_logit, model.gated_layers)
        # Before any work: the images that gates see, one after another by episode.
        seen = self.episodes * (sum(counts) if model.text_scope == "episode" else counts[0])
        for name, all_given in (("alpha", self.alphas), ("action_logit", self.actions)):
            for given in all_given:
                self._decided(name, given, seen)
        self.traces: list[LayerTrace] = []

    def select_classes(self, labels: Tensor, way: int) -> None:
        """Text scope "class": every support image becomes a text group with its class's tokens."""
        rows = torch.arange(self.episodes, device=labels.device).unsqueeze(1)
        self.tokens = self.tokens.unflatten(1, (way, -1))[rows, labels].flatten(0, 1)
        self.levels = self.levels.unflatten(0, (way, -1))[labels].flatten(0, 1)
        if self.mask is not None:
            self.mask = self.mask.unflatten(1, (way, -1))[rows, labels].flatten(0, 1)

    def episode_gate(self, location: Location, tokens: Tensor) -> GatedTokens:
        """Supports and queries of an episode, in that order, are one text group."""
        scope: dict[str, Any] = {}
        if self.model.alpha_scope == "episode":
            scope["state_images"] = self.counts[0]
        out, before, fused, aligned = self._run(location, tokens, scope)
        support, query = before.split(self.counts, dim=1)
        support_added, query_added = fused.split(self.counts, dim=1)
        self._record(
            location,
            out,
            (support, support + support_added, query, query + query_added),
            query_added,
            aligned[:, self.counts[0] :],
        )
        return self._handed_back(location, out)

    def class_gate(self, location: Location, tokens: Tensor) -> GatedTokens:
        """Supports alone, each its own text group; an episode's groups share a decision."""
        scope: dict[str, Any] = {}
        if self.model.alpha_scope == "episode":
            scope["episodes"] = self.episodes
        out, before, fused, aligned = self._run(location, tokens, scope)
        self._record(location, out, (before, before + fused, before, before), fused, aligned)
        return self._handed_back(location, out)

    def observe_query(self, location: Location, tokens: Tensor) -> None:
        """Queries see no text: their pooled tokens are the same before and after the gate."""
        index = self.model.gated_layers.index(location)
        pooled = self._pooled(tokens)
        # Not _replace, which torch.compile of 2.11 cannot follow.
        seen = self.traces[index]
        self.traces[index] = LayerTrace(
            seen.location, seen.alpha, seen.action_logit, seen.log_prob, seen.entropy,
            seen.support_before, seen.support_after, pooled, pooled,
            seen.fused, seen.aligned, seen.state,
        )  # fmt: skip

    def _run(
        self, location: Location, tokens: Tensor, scope: dict[str, Any]
    ) -> tuple[GateOutput, Tensor, Tensor, Tensor]:
        """Gate output; pooled tokens (E, n, d); GAP(H) (E, n, d); U·GAP(H) (E, n, text_dim)."""
        index = self.model.gated_layers.index(location)
        gate: Any = self.model.gates[index]
        wide = torch.promote_types(self.tokens.dtype, torch.float32)
        scale = lookup(self.model.level_scales[index], self.levels, wide)  # [P] or [T, P]
        text = (self.tokens * scale.unsqueeze(-1)).to(gate._weight().dtype)
        out: GateOutput = gate(
            tokens,
            text,
            text_mask=self.mask,
            alpha=self._decided("alpha", self.alphas[index], tokens.shape[0]),
            action_logit=self._decided("action_logit", self.actions[index], tokens.shape[0]),
            **scope,
            **self.options,
        )
        keep = per_image(self.mask, tokens.shape[0])
        fused = reference.masked_mean(out.fused, keep).unflatten(0, (self.episodes, -1))
        alignment: Any = self.model.alignments[index]
        aligned = alignment(fused.detach().to(weight_of(alignment).dtype))
        return out, self._pooled(tokens), fused, aligned

    def _decided(self, name: str, given: Any, images: int) -> Any:
        """Given gates in the gate's rows: (E,), or (B,) in alpha scope "image"."""
        if not isinstance(given, Tensor) or given.dim() == 0:
            return given
        whole, scope = (self.episodes, images // self.episodes), self.model.alpha_scope
        expected = (whole[:1], whole) if scope == "image" else (whole[:1],)
        if tuple(given.shape) not in expected:
            wanted = " or ".join(map(str, expected))
            raise ValueError(
                f"{name}: shape {tuple(given.shape)}, alpha_scope={scope!r} takes {wanted}"
            )
        if scope == "episode":
            return given
        return given.reshape(whole[0], -1).expand(whole).flatten()

    def _pooled(self, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return tokens.mean(1, dtype=wide).unflatten(0, (self.episodes, -1))

    def _record(
        self,
        location: Location,
        out: GateOutput,
        pooled: tuple[Tensor, Tensor, Tensor, Tensor],
        fused: Tensor,
        aligned: Tensor,
    ) -> None:
        decision, state = (out.alpha, out.action_logit, out.log_prob, out.entropy), out.state
        if self.model.alpha_scope == "image":
            decision = tuple(x.unflatten(0, (self.episodes, -1)) for x in decision)
            state = state.unflatten(0, (self.episodes, -1))
        self.traces.append(LayerTrace(location, *decision, *pooled, fused, aligned, state))

    def _handed_back(self, location: Location, out: GateOutput) -> GatedTokens:
        if not self.model.backbone.carries_extra(location):
            return GatedTokens(out.image_tokens)
        return GatedTokens(out.image_tokens, out.fused, per_image(self.mask, out.fused.shape[0]))


def _per_layer(name: str, given: Any, layers: tuple[Location, ...]) -> list[Any]:
    """One entry per gated layer from what ``alpha`` and ``action_logit`` may be."""
    if given is None or isinstance(given, (Tensor, Real)):
        return [given] * len(layers)
    if isinstance(given, Mapping):
        strangers = set(given) - set(layers)
        if strangers:
            raise ValueError(f"{name}: {sorted(strangers)} are not gated; gates are at {layers}")
        return [given.get(location) for location in layers]
    if len(given) != len(layers):
        raise ValueError(f"{name}: {len(given)} entries for {len(layers)} gated layers")
    return list(given)


def _checked_layers(
    backbone: GatedBackbone, layers: Sequence[Sequence[int]] | None
) -> tuple[Location, ...]:
    checked = backbone.check_locations(backbone.locations if layers is None else layers)
    if not checked:
        raise ValueError("gated_layers: expected at least one (stage, block)")
    if list(checked) != sorted(checked):
        raise ValueError(f"gated_layers: {checked} are not in the order of the backbone's blocks")
    return checked
