"""DVLA: a gated backbone, one RL gate per gated layer, and the prototype classifier on top.

Episodes are batched. By default supports and queries go through the network in one pass; the gates
decide from the supports alone, and queries replay their decision (method §3 and §4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dvla_fast.nn.backbones.base import GatedBackbone, Location
from dvla_fast.nn.episode import EpisodeOutput, LayerTrace, TextTokens
from dvla_fast.nn.episode_checks import (
    check_episodes,
    check_learned,
    check_no_replay,
    check_text,
)
from dvla_fast.nn.gate import RLAGate
from dvla_fast.nn.gate_pass import GatePass, per_layer
from dvla_fast.nn.layers import reset_parts
from dvla_fast.nn.level_weights import level_scales
from dvla_fast.nn.prototype import check_temperature, nearest_prototypes

TEXT_SCOPES = ("episode", "class", "candidate")


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
            supports see their own class's texts, queries none; "candidate": supports likewise, and
            each query goes through once for every class, with that class's texts, and is compared
            with that class's prototype as it came out (ours, in none of the papers).
        level_weights: (attribute, description) weights for each gated layer, pairs or an array
            (layers, 2); they scale the text tokens, and equal weights leave them alone. Default:
            (0.7, 0.3) before the backbone's ``deep_from`` (stage 3 of Visformer), then (0.3, 0.7).
        policy: of the gates: "beta", "categorical", "fixed", "static" or "mlp".
        hidden_dim: hidden width of the policy networks.
        fixed_alpha: the gate of policy "fixed".

    Raises:
        TypeError: ``backbone`` is none, ``gated_layers`` are no pairs, or an option that is a
            number is something else.
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
        level_weights: Sequence[Sequence[float]] | Tensor | None = None,
        policy: str = "beta",
        hidden_dim: int = 128,
        fixed_alpha: float = 0.5,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, GatedBackbone):
            raise TypeError(
                f"backbone: expected a GatedBackbone, got {type(backbone).__name__}; "
                "dvla_fast.nn.build_backbone makes one, docs/backbones.md says how to write one"
            )
        self.gated_layers = _checked_layers(backbone, gated_layers)
        if text_scope not in TEXT_SCOPES:
            raise ValueError(f"text_scope: unknown {text_scope!r}; expected one of {TEXT_SCOPES}")
        if isinstance(temperature, Tensor) and temperature.requires_grad:
            raise TypeError("temperature: expected a number, got a tensor that asks to be learned")
        check_temperature(temperature)
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

    def reset_parameters(self) -> None:
        """Initialise all weights and buffers anew, as a model from the meta device needs::

            with torch.device("meta"):
                model = DVLA(backbone)
            model.to_empty(device="cuda").reset_parameters()

        Raises:
            NotImplementedError: a backbone whose weights come from elsewhere (:class:`ClipViT`).
        """
        reset_parts(self)

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
            support_labels: (E, S) int64 in [0, way), with every class.
            query: (E, Q, C, H, W).
            text: the episodes' texts; None: visual prototypes only, no gate runs.
            way: classes of an episode.
            alpha: replay gates: one number or tensor for all layers, a sequence with one per
                layer, or a mapping from location (layers it lacks ask their policy). Tensors of
                shape (), (E,), or as ``LayerTrace.alpha``.
            action_logit: re-evaluate stored actions, given likewise, in tensors of shape (E,) or as
                ``LayerTrace.action_logit``.
            sample: draw gates (True) or take the policy's mean (False); None: draw in training.
            generator: source of randomness on the inputs' device.
            from_prefix: ``support`` and ``query`` are maps of :meth:`prefix`, not images.

        Raises:
            TypeError, ValueError: arguments that do not fit together; where values are checked
                (:func:`dvla_fast.functional.set_value_checks`), labels out of range or a class
                without supports.
        """
        check_episodes(support, support_labels, query, way)
        if text is not None:
            check_text(text, support, way, self.text_dim, self.text_scope != "episode")
        start = self.gated_layers[0] if from_prefix else None
        counts = (support.shape[1], query.shape[1])
        if text is None:
            check_no_replay(alpha=alpha, action_logit=action_logit)
            features = self._through(torch.cat((support, query), dim=1), None, start)
            return self._classify(features, counts, support_labels, way, ())
        options: dict[str, Any] = {"sample": sample, "generator": generator}
        pass_ = GatePass(self, text, counts, way, options, alpha, action_logit)
        if self.text_scope == "episode":
            images = torch.cat((support, query), dim=1)
            features = self._through(images, pass_.episode_gate, start)
            return self._classify(features, counts, support_labels, way, tuple(pass_.traces))
        seen = self._class_supports(pass_, support, support_labels, start)
        if self.text_scope == "class":
            queries = self._through(query, pass_.observe_query, start)
        else:
            queries = self._candidates(pass_, query, from_prefix)
        logits = nearest_prototypes(seen, support_labels, queries, way, self.temperature)
        return EpisodeOutput(logits, tuple(pass_.traces), support_labels, support_labels)

    if TYPE_CHECKING:
        __call__ = forward

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
            for gate, given in zip(gates, per_layer("alpha", alpha, self.gated_layers))
        )

    def support_features(
        self,
        support: Tensor,
        support_labels: Tensor,
        text: TextTokens | None = None,
        *,
        way: int,
        alpha: Any = None,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        from_prefix: bool = False,
    ) -> tuple[Tensor, tuple[LayerTrace, ...]]:
        """Features (E, S, feature_dim) of the supports alone: no query changes them.

        They serve all queries of the same episode (:meth:`query_logits`). Where
        :meth:`supports_are_independent` holds, every image can be an episode of its own (way 1,
        S = 1), and its feature then serves all episodes. Arguments are those of :meth:`forward`;
        the traces' query fields repeat the supports', or are empty in text scope "episode".

        Raises:
            TypeError, ValueError: arguments that do not fit together.
        """
        check_episodes(support, support_labels, support, way, whole=False)
        start = self.gated_layers[0] if from_prefix else None
        if text is None:
            check_no_replay(alpha=alpha)
            return self._through(support, None, start), ()
        check_text(text, support, way, self.text_dim, self.text_scope != "episode")
        options: dict[str, Any] = {"sample": sample, "generator": generator}
        pass_ = GatePass(self, text, (support.shape[1], 0), way, options, alpha, None)
        if self.text_scope == "episode":
            features = self._through(support, pass_.episode_gate, start)
        else:
            features = self._class_supports(pass_, support, support_labels, start)
        return features, tuple(pass_.traces)

    def query_logits(
        self,
        features: Tensor,
        support_labels: Tensor,
        query: Tensor,
        text: TextTokens | None = None,
        layers: Sequence[LayerTrace] = (),
        *,
        way: int,
        alpha: Any = None,
        from_prefix: bool = False,
    ) -> Tensor:
        """Logits (E, Q, way) of queries whose supports went through before.

        In evaluation mode they are those of :meth:`forward` with all images at once, up to
        rounding. In alpha scope "episode" the queries replay the supports' gates; in scope "image"
        they have their own, the policy's means.

        Args:
            features, layers: what :meth:`support_features` returned.
            support_labels: (E, S), text, way: what it was given.
            query: (E, Q, C, H, W); with ``from_prefix`` maps of :meth:`prefix`.
            alpha: replay these gates in alpha scope "image": numbers and tensors of shape () or
                (E,), as in :meth:`forward`.

        Raises:
            TypeError, ValueError: arguments that do not fit together.
        """
        width = self.backbone.feature_dim
        check_learned(features, support_labels, query, layers, way, width)
        expected = () if text is None else self.gated_layers
        if tuple(trace.location for trace in layers) != expected:
            raise ValueError(
                f"layers: at {[trace.location for trace in layers]}, expected {list(expected)};"
                " give what support_features returned for the same text"
            )
        if text is None:
            check_no_replay(alpha=alpha)
        else:
            check_text(text, query, way, self.text_dim, self.text_scope != "episode")
        start = self.gated_layers[0] if from_prefix else None
        if text is None or self.text_scope == "class":  # which sees no text in its queries
            queries = self._through(query, None, start)
        else:
            if self.alpha_scope == "episode":
                alpha = [trace.alpha for trace in layers]
            counts, options = (0, query.shape[1]), {"sample": False}
            if self.text_scope == "episode":
                pass_ = GatePass(self, text, counts, way, options, alpha, None)
                queries = self._through(query, pass_.episode_gate, start)
            else:
                pass_ = GatePass(self, text, counts, way, options, alpha, None, layers)
                queries = self._candidates(pass_, query, from_prefix)
        return nearest_prototypes(features, support_labels, queries, way, self.temperature)

    def _through(self, images: Tensor, gate: Any, start: Location | None) -> Tensor:
        """Features (E, n, feature_dim) of images (E, n, C, H, W), gated where a gate is given."""
        features: Tensor = self.backbone(
            images.flatten(0, 1), gate, locations=self.gated_layers, start=start
        )
        return features.unflatten(0, images.shape[:2])

    def _class_supports(
        self, pass_: GatePass, support: Tensor, labels: Tensor, start: Location | None
    ) -> Tensor:
        pass_.select_classes(labels)
        return self._through(support, pass_.class_gate, start)

    def _candidates(self, pass_: GatePass, query: Tensor, from_prefix: bool) -> Tensor:
        """Features (E, Q, way, feature_dim) of each query as a candidate of each class."""
        episodes, queries = query.shape[:2]
        maps = query.flatten(0, 1) if from_prefix else self.prefix(query.flatten(0, 1))
        maps = maps.unflatten(0, (episodes, 1, queries)).expand(-1, pass_.way, -1, *maps.shape[1:])
        pass_.select_candidates()
        features = self.backbone(
            maps.flatten(0, 2),
            pass_.candidate_gate,
            locations=self.gated_layers,
            start=self.gated_layers[0],
        )
        return features.unflatten(0, (episodes, pass_.way, queries)).transpose(1, 2)

    def _classify(
        self,
        features: Tensor,
        counts: tuple[int, int],
        labels: Tensor,
        way: int,
        traces: tuple[LayerTrace, ...],
    ) -> EpisodeOutput:
        support, query = features.split(counts, dim=1)
        logits = nearest_prototypes(support, labels, query, way, self.temperature)
        return EpisodeOutput(logits, traces, labels)


def _checked_layers(
    backbone: GatedBackbone, layers: Sequence[Sequence[int]] | None
) -> tuple[Location, ...]:
    if layers is not None and not isinstance(layers, Iterable):
        raise TypeError(f"gated_layers: expected (stage, block) pairs, got {layers!r}")
    checked = backbone.check_locations(backbone.locations if layers is None else layers)
    if not checked:
        raise ValueError("gated_layers: expected at least one (stage, block)")
    if list(checked) != sorted(checked):
        raise ValueError(f"gated_layers: {checked} are not in the order of the backbone's blocks")
    return checked
