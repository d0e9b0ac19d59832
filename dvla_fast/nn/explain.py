"""What a whole model looked at: the attention of every gate, recorded while episodes run.

Nothing of this exists in a normal forward: for one call, hooks keep the tokens that each gate and
the classifier meet, and :meth:`RLAGate.explain` computes the weights from them afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dvla_fast.nn.backbones.base import Location
from dvla_fast.nn.dvla import DVLA
from dvla_fast.nn.episode import EpisodeOutput, TextTokens


class LayerAttention(NamedTuple):
    """Attention at one gated layer.

    M images meet text: supports, then queries (text scope "episode"), or the supports alone (the
    other scopes; of candidates nothing is kept). G text groups make an episode: 1, or one for each
    support. P is the number of text tokens of a group, N that of image tokens.
    """

    location: Location
    alpha: Tensor
    """(E,); in alpha scope "image" as ``LayerTrace.alpha``."""
    image: Tensor
    """(E, M, H, P, N)."""
    text: Tensor
    """(E, G, H, P, P)."""


class Explanation(NamedTuple):
    """What :func:`explain_episodes` returns."""

    output: EpisodeOutput
    """As the model returns it."""
    features: Tensor
    """(E, S + Q, d): what the prototype classifier compares, supports first. In text scope
    "candidate" a query's are those of the class that it was put into."""
    layers: tuple[LayerAttention, ...]
    """One for each gated layer, in order."""


@torch.no_grad()
def explain_episodes(
    model: DVLA,
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    text: TextTokens,
    *,
    way: int,
    alpha: Any = None,
    sample: bool | None = False,
    generator: torch.Generator | None = None,
    from_prefix: bool = False,
) -> Explanation:
    """Run episodes and say where every gate looked.

    Arguments and errors are those of :meth:`DVLA.forward`; by default gates take their policy's
    mean. The model's mode (training or evaluation) is left as it is. Memory: E·M·H·P·N numbers a
    layer, so give a few episodes at a time.
    """
    calls: list[tuple[Any, Tensor, dict[str, Any], Tensor]] = []
    features: list[Tensor] = []

    def keep_gate(gate: Any, given: Any, options: dict[str, Any], out: Any) -> None:
        if len(calls) < len(model.gates):  # what follows are candidates
            calls.append((gate, given, options, out.alpha))

    hooks = [gate.register_forward_hook(keep_gate, with_kwargs=True) for gate in model.gates]
    hooks.append(model.backbone.register_forward_hook(lambda _m, _i, out: features.append(out)))
    try:
        output = model(
            support, support_labels, query, text, way=way, alpha=alpha, sample=sample,
            generator=generator, from_prefix=from_prefix,
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    episodes = support.shape[0]
    layers = []
    for trace, (gate, given, options, used) in zip(output.layers, calls):
        scope = {key: options[key] for key in ("state_images", "episodes") if key in options}
        found = gate.explain(*given, text_mask=options["text_mask"], alpha=used, **scope)
        layers.append(
            LayerAttention(
                trace.location,
                trace.alpha,
                found.image.unflatten(0, (episodes, -1)),
                found.text.unflatten(0, (episodes, -1)),
            )
        )
    parts = [part.unflatten(0, (episodes, -1)) for part in features]
    if model.text_scope == "candidate":
        rows = parts[1].unflatten(1, (way, -1)).transpose(1, 2)  # [E, Q, way, d]
        answers = output.logits.argmax(-1)[..., None, None].expand(-1, -1, 1, rows.shape[-1])
        parts[1] = rows.gather(2, answers).squeeze(2)
    return Explanation(output, torch.cat(parts, 1), tuple(layers))
