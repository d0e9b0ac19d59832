"""The ops a user calls. Each lives in ``dvla_fast.ops``; this module is the public door."""

from dvla_fast.ops import policy_cuda  # noqa: F401  (registers kernels)
from dvla_fast.ops.beta_policy import (
    BetaPolicyOutput,
    beta_entropy,
    beta_log_prob,
    beta_policy,
    beta_sample,
)
from dvla_fast.ops.beta_special import beta_cdf, beta_implicit_derivatives, beta_kl
from dvla_fast.ops.dual_attention import dual_attention
from dvla_fast.ops.dual_attention_cuda import float32_precision, set_float32_precision
from dvla_fast.ops.gate_policy import GatePolicyOutput, gate_policy, gate_state
from dvla_fast.ops.gated_attention import gated_attention
from dvla_fast.ops.value_checks import set_value_checks, value_checks

__all__ = [
    "BetaPolicyOutput",
    "GatePolicyOutput",
    "beta_cdf",
    "beta_entropy",
    "beta_implicit_derivatives",
    "beta_kl",
    "beta_log_prob",
    "beta_policy",
    "beta_sample",
    "dual_attention",
    "float32_precision",
    "gate_policy",
    "gate_state",
    "gated_attention",
    "set_float32_precision",
    "set_value_checks",
    "value_checks",
]
