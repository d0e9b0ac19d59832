"""The rows of an ablation: each is a name and what it changes in the base configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dvla_fast.data.shapes import KINDS
from dvla_fast.engine.config import AblateRun
from dvla_fast.engine.models import backbone_spec
from dvla_fast.engine.settings import UsageError, did_you_mean, from_mapping
from dvla_fast.engine.settle import sized
from dvla_fast.nn import build_backbone
from dvla_fast.nn.level_weights import default_level_weights
from dvla_fast.rl import OBJECTIVES
from dvla_fast.semantics import ClassEntry, load_bank

FULL, VISUAL = "full", "visual"
GROUPS = {
    "semantics": "Which texts",
    "alpha": "How the gate is set",
    "objective": "How the policy learns",
    "k": "k of top-k selection",
    "kappa": "Concentration κ of the Beta policy",
    "lambda": "Reward weights λ",
    "entropy": "Entropy weight τ",
    "temperature": "Temperature of the classifier (τ in the authors' code)",
    "levels": "Weights of attributes and descriptions",
    "layers": "Gated layers (stage, block)",
    "scope": "Whose text an image sees",
}
_SCOPES = {
    "episode": "every image sees the texts of all the episode's classes",
    "class": "supports see their own class's texts, queries none",
    "candidate": "supports see their own class's texts, queries each class's in turn",
}
_PARTS = {  # semantics.parts of the base configuration
    "all": "attributes and description",
    "attributes": "attributes alone",
    "description": "description alone",
    "name": "class name alone (A photo of a NAME)",
    "shuffled": "each class with the texts of another",
}
_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Variant:
    """One row of an ablation.

    Attributes:
        name: unique, also the name of its cells' files.
        group: key of ``GROUPS``.
        title: the row's words.
        overrides: dotted setting -> value, over the base configuration.
        trains: False: the pre-trained backbone alone, visual prototypes, no meta-tuning.
    """

    name: str
    group: str
    title: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = True

    def apply(self, config: AblateRun) -> AblateRun:
        """Return the configuration of this variant (UsageError for values out of range)."""
        nested: dict[str, Any] = {}
        for key, value in self.overrides.items():
            *path, last = key.split(".")
            place = nested
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        return from_mapping(AblateRun, nested, f"variant {self.name}", config)


def all_variants(config: AblateRun, channels: int) -> list[Variant]:
    """Return every row for a base configuration, the base itself first.

    A value of a sweep that the base configuration already has is no row of its own.

    Args:
        channels: of the images, for the blocks of the backbone.
    """
    full = Variant(FULL, "semantics", f"{_texts(config)}, {_gate(config)}")
    rows = [full, *_semantics(config), *_alphas(config), *_objectives(config)]
    rows += _sweep("k", "k", "semantics.top_k", config.ablate.k, config.semantics.top_k)
    model, tuning, ablate = config.model, config.metatune, config.ablate
    rows += _sweep("kappa", "kappa", "model.concentration", ablate.kappa, model.concentration)
    for name in ("lambda_sim", "lambda_imp"):
        values = getattr(ablate, name)
        rows += _sweep("lambda", name, f"metatune.{name}", values, getattr(tuning, name))
    weight, temperature = tuning.entropy_weight, model.temperature
    rows += _sweep("entropy", "entropy", "metatune.entropy_weight", ablate.entropy_weight, weight)
    rows += _sweep(
        "temperature", "temperature", "model.temperature", ablate.temperature, temperature
    )
    spec = backbone_spec(config.model, channels, sized(config.data).image_size)
    backbone: Any = build_backbone(**spec)
    rows += _levels(config, backbone)
    rows += _layers(config, backbone)
    for scope, words in _SCOPES.items():
        if scope != model.text_scope:
            rows.append(Variant(f"scope={scope}", "scope", words, {"model.text_scope": scope}))
    return rows


def chosen_variants(config: AblateRun, channels: int) -> list[Variant]:
    """Return the rows that ``--ablate.groups`` and ``--ablate.variants`` ask for.

    The reference is always among them.

    Raises:
        UsageError: an unknown group or variant.
    """
    rows = all_variants(config, channels)
    names = [row.name for row in rows]
    wanted = config.ablate
    _check_known("groups", wanted.groups, GROUPS)
    base = _base_names(config)
    _check_known("variants", wanted.variants, names, base)
    _check_known("reference", [wanted.reference], names, base)
    if not wanted.groups and not wanted.variants:
        return rows
    return [
        row
        for row in rows
        if row.group in wanted.groups or row.name in wanted.variants or row.name == wanted.reference
    ]


def _base_names(config: AblateRun) -> set[str]:
    """What rows would be called that are none, since the base has their value."""
    tuning = config.metatune
    values = {
        "k": config.semantics.top_k,
        "kappa": config.model.concentration,
        "lambda_sim": tuning.lambda_sim,
        "lambda_imp": tuning.lambda_imp,
        "entropy": tuning.entropy_weight,
        "temperature": config.model.temperature,
    }
    swept = {f"{label}={value:g}" for label, value in values.items()}
    texts = config.semantics.parts
    return swept | {tuning.objective, f"scope={config.model.text_scope}", texts}


def _check_known(
    option: str, given: Iterable[str], known: Iterable[str], base: Iterable[str] = ()
) -> None:
    names = list(known)
    for name in given:
        if name in names:
            continue
        if name in base:
            raise UsageError(
                f"ablate.{option}: {name!r} is what the base configuration has already: the row "
                f"{FULL!r}"
            )
        near = did_you_mean(name, names)
        hint = f"; did you mean {near!r}?" if near else ""
        raise UsageError(
            f"ablate.{option}: {name!r} is unknown{hint}; choose from {', '.join(names)}"
        )


def _chosen(config: AblateRun) -> str:
    k = config.semantics.top_k
    return f"top-{k}" if k else "the bank's choice"


def _selects(config: AblateRun) -> bool:
    """Whether the texts of the base configuration depend on the selection of attributes."""
    return config.semantics.parts not in ("description", "name")


def _texts(config: AblateRun) -> str:
    words = _PARTS[config.semantics.parts]
    return f"{words}, {_chosen(config)}" if _selects(config) else words


def _gate(config: AblateRun) -> str:
    if config.model.policy in ("beta", "categorical"):
        return f"RL gate ({config.metatune.objective})"
    return f"gate {config.model.policy}"


def _semantics(config: AblateRun) -> list[Variant]:
    def row(name: str, title: str, **changes: Any) -> Variant:
        overrides = {f"semantics.{key}": value for key, value in changes.items()}
        return Variant(name, "semantics", title, overrides)

    bank, given = load_bank(config.semantics.bank), config.semantics
    rows = [Variant(VISUAL, "semantics", "visual prototypes, no text, no gate", trains=False)]
    if bank.vectors is None:
        rows.append(row("name", _PARTS["name"], parts="name"))
    if any(_has_both(entry) for entry in bank.classes.values()):
        rows.append(row("attributes", f"attributes alone, {_chosen(config)}", parts="attributes"))
        rows.append(row("description", "description alone", parts="description"))
    rows.append(row("shuffled", f"{_PARTS['shuffled']}: a control", parts="shuffled"))
    rows = [item for item in rows if item.overrides.get("semantics.parts") != given.parts]
    most = max((len(entry.proposals) for entry in bank.classes.values()), default=0)
    if bank.vectors is None and given.top_k and given.top_k < most:
        if _selects(config):
            title = f"{_PARTS[given.parts]} without top-k: all {most} proposed"
            rows.append(row("no-top-k", title, top_k=most))
        if given.parts != "attributes":
            title = f"attributes alone without top-k: all {most} proposed"
            rows.append(row("no-top-k-attributes", title, parts="attributes", top_k=most))
    if given.bank in KINDS and given.parts != "name":
        title = f"{_PARTS[given.parts]}, hallucinations taken out by hand"
        rows.append(row("true", title, bank=f"{given.bank}-true", top_k=0))
    return rows


def _has_both(entry: ClassEntry) -> bool:
    """Whether a class has both levels of texts."""
    if entry.stored is not None:
        return min(entry.stored) > 0
    return bool(entry.proposals and entry.description)


def _alphas(config: AblateRun) -> list[Variant]:
    # Only the draws of a policy have an objective to choose: the others learn through the loss.
    plain = {"metatune.objective": "reinforce", "metatune.baseline": "auto"}
    rows = [
        Variant(
            f"alpha={value:g}",
            "alpha",
            f"fixed α = {value:g}" + {0.0: " (text alone)", 1.0: " (image alone)"}.get(value, ""),
            {"model.policy": "fixed", "model.fixed_alpha": value, **plain},
        )
        for value in _ALPHAS
    ]
    learned = {"static": "one learned α per layer", "mlp": "MLP gate, learned through the loss"}
    for policy, title in learned.items():
        rows.append(Variant(policy, "alpha", title, {"model.policy": policy, **plain}))
    rows.append(
        Variant("categorical", "alpha", "RL gate, categorical", {"model.policy": "categorical"})
    )
    model = config.model
    base: dict[str, Any] = {"model.policy": model.policy}
    if model.policy == "fixed":
        base["model.fixed_alpha"] = model.fixed_alpha
    return [row for row in rows if not base.items() <= row.overrides.items()]


def _objectives(config: AblateRun) -> list[Variant]:
    if config.model.policy not in ("beta", "categorical"):
        return []
    return [
        Variant(name, "objective", f"RL gate, {name}", {"metatune.objective": name})
        for name in OBJECTIVES
        if name != config.metatune.objective
    ]


def _sweep(group: str, label: str, key: str, values: Iterable[Any], base: Any) -> list[Variant]:
    texts = {value: f"{value:g}" for value in values if value != base}
    # a name is also a file's: two values must not share the six digits
    texts = {value: text if float(text) == value else repr(value) for value, text in texts.items()}
    return [
        Variant(f"{label}={text}", group, f"{label} = {text}", {key: value})
        for value, text in texts.items()
    ]


def _levels(config: AblateRun, backbone: Any) -> list[Variant]:
    layers = [(stage, block) for stage, block in config.model.gated_layers] or backbone.locations
    default = [list(pair) for pair in default_level_weights(layers, backbone.deep_from)]
    rows = {
        "levels=shallow-first": (
            "attributes lead in shallow layers, descriptions in deep",
            default,
        ),
        "levels=equal": ("both alike in every layer", [[0.5, 0.5]] * len(default)),
        "levels=swapped": (
            "descriptions lead in shallow layers, attributes in deep",
            [pair[::-1] for pair in default],
        ),
    }
    base = config.model.level_weights or default
    return [
        Variant(name, "levels", title, {"model.level_weights": weights})
        for name, (title, weights) in rows.items()
        if weights != base
    ]


def _layers(config: AblateRun, backbone: Any) -> list[Variant]:
    default = [list(pair) for pair in backbone.locations]
    base = config.model.gated_layers or default
    sets = [layers or default for layers in config.ablate.layers]  # [] as in model.gated_layers
    if not sets:
        blocks = [[s, b] for s, b in backbone.blocks if s > 1]
        sets = [[pair] for pair in base] + [blocks]
    # by name: what is given twice is one row
    named = {"+".join(f"{stage}.{block}" for stage, block in layers): layers for layers in sets}
    return [
        Variant(
            f"layers={name}",
            "layers",
            "gates before " + ", ".join(f"({stage}, {block})" for stage, block in layers),
            {"model.gated_layers": layers},
        )
        for name, layers in named.items()
        if layers != base
    ]
