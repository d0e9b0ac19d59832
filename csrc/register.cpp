// Binds the CPU implementations to the op schemas, which dvla_fast/ops/schemas.py defines.
#include <torch/library.h>

#include "attention/dual_attention.h"
#include "beta/beta_policy.h"
#include "gate/gated_attention.h"
#include "policy/gate_policy.h"

TORCH_LIBRARY_IMPL(dvla_fast, CPU, m) {
  m.impl("beta_policy_forward", &dvla_fast::beta_policy_forward_cpu);
  m.impl("beta_policy_backward", &dvla_fast::beta_policy_backward_cpu);
  m.impl("dual_attention_forward", &dvla_fast::dual_attention_forward);
  m.impl("dual_attention_backward", &dvla_fast::dual_attention_backward);
  m.impl("gated_attention_forward", &dvla_fast::gated_attention_forward);
  m.impl("gated_attention_backward", &dvla_fast::gated_attention_backward);
  m.impl("gate_policy_forward", &dvla_fast::gate_policy_forward);
  m.impl("gate_policy_backward", &dvla_fast::gate_policy_backward);
}
