"""Modules: the RL gate, its policies, gated backbones, prototypes, and DVLA made of them."""

from dvla_fast.nn.backbones import (
    BACKBONES,
    ClipViT,
    GatedBackbone,
    GatedTokens,
    GateFn,
    Location,
    ResNet12,
    SmallConvAttention,
    Visformer,
    build_backbone,
    clip_statistics,
    clip_vit,
    has_small_stem,
    visformer_tiny,
)
from dvla_fast.nn.dvla import DVLA
from dvla_fast.nn.episode import EpisodeOutput, LayerTrace, TextTokens
from dvla_fast.nn.explain import Explanation, LayerAttention, explain_episodes
from dvla_fast.nn.gate import GateAttention, GateOutput, RLAGate
from dvla_fast.nn.policy import (
    POLICIES,
    BetaPolicy,
    CategoricalPolicy,
    FixedPolicy,
    GatePolicy,
    MLPPolicy,
    PolicyStep,
    StaticPolicy,
    build_policy,
    frozen_policy,
)
from dvla_fast.nn.prototype import prototype_logits, prototypes

__all__ = [
    "BACKBONES",
    "DVLA",
    "POLICIES",
    "BetaPolicy",
    "CategoricalPolicy",
    "ClipViT",
    "EpisodeOutput",
    "Explanation",
    "FixedPolicy",
    "GateAttention",
    "GateFn",
    "GateOutput",
    "GatePolicy",
    "GatedBackbone",
    "GatedTokens",
    "LayerAttention",
    "LayerTrace",
    "Location",
    "MLPPolicy",
    "PolicyStep",
    "RLAGate",
    "ResNet12",
    "SmallConvAttention",
    "StaticPolicy",
    "TextTokens",
    "Visformer",
    "build_backbone",
    "build_policy",
    "clip_statistics",
    "clip_vit",
    "explain_episodes",
    "frozen_policy",
    "has_small_stem",
    "prototype_logits",
    "prototypes",
    "visformer_tiny",
]
