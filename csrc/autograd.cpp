// Autograd of the ops on every device, in C++ because a Python autograd.Function costs more than
// the small problems it would wrap. (torch.func transforms take the Python twin of these classes,
// in dvla_fast/ops: functorch does not enter C++ ones.)
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

bool wants_grad(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    TORCH_CHECK_NOT_IMPLEMENTED(!tensor->defined() || !tensor->_fw_grad(0).defined(),
                                "forward-mode derivatives are not implemented; use the reference"
                                " backend (backend='reference' or dvla_fast.set_backend)");
  }
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor* tensor : tensors) {
    if (tensor->defined() && tensor->requires_grad()) return true;
  }
  return false;
}

Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

OptionalTensor or_none(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// First-order results of the node at work: differentiating them again raises instead of giving a
// wrong number. The error takes its place between them and all that they hang on, which is what the
// node came from and the gradients that came in: a derivative by those would miss it otherwise.
variable_list first_order_only(variable_list grads, const variable_list& incoming, const char* op) {
  if (!at::GradMode::is_enabled()) return grads;
  variable_list through;
  for (const Tensor& grad : grads) {
    if (grad.defined()) through.push_back(grad);
  }
  for (const torch::autograd::Edge& edge : torch::autograd::get_current_node()->next_edges()) {
    if (!edge.is_valid()) continue;
    through.push_back(at::empty({0}));
    torch::autograd::impl::set_gradient_edge(through.back(), edge);
  }
  for (const Tensor& grad : incoming) {
    if (grad.defined()) through.push_back(grad);
  }
  auto raise = std::make_shared<torch::autograd::DelayedError>(
      std::string(op) +
          ": second derivatives are not implemented; use the reference backend"
          " (backend='reference' or dvla_fast.set_backend)",
      static_cast<int64_t>(through.size()));
  const variable_list passed = (*raise)(std::move(through));
  size_t next = 0;
  for (Tensor& grad : grads) {
    if (grad.defined()) grad = passed[next++];
  }
  return grads;
}

// ---- beta_policy_forward

using BetaResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BetaSignature = BetaResult(const Tensor&, const OptionalTensor&, double,
                                 const OptionalTensor&, const OptionalTensor&, bool, bool);

using BetaBackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                         const OptionalTensor&);

BetaResult call_beta(const Tensor& logits, const OptionalTensor& concentration, double value,
                     const OptionalTensor& action_logit, const OptionalTensor& key, bool save,
                     bool check) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dvla_fast::beta_policy_forward", "")
                             .typed<BetaSignature>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(logits, concentration, value, action_logit, key, save, check);
}

// Of the op's results only the two with gradients pass through autograd, which costs by the tensor.
class BetaPolicy : public torch::autograd::Function<BetaPolicy> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& /*logits*/,
                               const OptionalTensor& concentration, const BetaResult& computed) {
    const auto& [alpha, action, log_prob, entropy, derivatives] = computed;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({derivatives});
    if (concentration) ctx->saved_data["kappa_shape"] = concentration->sym_sizes();
    return {log_prob, entropy};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return first_order_only(chain_rule(ctx, grads), grads, "beta_policy");
  }

 private:
  static variable_list chain_rule(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("dvla_fast::beta_policy_backward", "")
                               .typed<BetaBackwardSignature>();
    // Unpacked first: activation checkpointing runs the forward again here, autograd included.
    const Tensor derivatives = ctx->get_saved_variables()[0];
    at::AutoDispatchBelowADInplaceOrView below;
    auto [grad_logits, grad_kappa] = op.call(derivatives, or_none(grads[0]), or_none(grads[1]));
    const auto shape = ctx->saved_data.find("kappa_shape");
    grad_kappa = shape == ctx->saved_data.end()
                     ? Tensor()
                     : at::sum_to(grad_kappa, shape->second.toSymIntVector());
    return {grad_logits, grad_kappa, Tensor()};
  }
};

BetaResult beta_policy_autograd(const Tensor& logits, const OptionalTensor& concentration,
                                double value, const OptionalTensor& action_logit,
                                const OptionalTensor& key, bool save, bool check) {
  const Tensor kappa = or_undefined(concentration);
  const bool differentiate = !save && wants_grad({&logits, &kappa});
  auto out =
      call_beta(logits, concentration, value, action_logit, key, save || differentiate, check);
  if (differentiate) {
    const auto densities = BetaPolicy::apply(logits, concentration, out);
    std::get<2>(out) = densities[0], std::get<3>(out) = densities[1];
  }
  return out;
}

// ---- dual_attention_forward

using AttentionResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using AttentionSignature = AttentionResult(const Tensor&, const Tensor&, const Tensor&,
                                           const Tensor&, const Tensor&, const Tensor&,
                                           const OptionalTensor&, const OptionalTensor&, double,
                                           bool);
using AttentionGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using AttentionBackwardSignature = AttentionGrads(const Tensor&, const Tensor&, const Tensor&,
                                                  const Tensor&, const Tensor&, const Tensor&,
                                                  const Tensor&, const OptionalTensor&,
                                                  const OptionalTensor&, const Tensor&,
                                                  const Tensor&, const Tensor&, const Tensor&,
                                                  double);

AttentionResult call_attention(const Tensor& query, const Tensor& image_key,
                               const Tensor& image_value, const Tensor& text_key,
                               const Tensor& text_value, const Tensor& alpha,
                               const OptionalTensor& image_mask, const OptionalTensor& text_mask,
                               double scale, bool save) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dvla_fast::dual_attention_forward", "")
                             .typed<AttentionSignature>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask,
                 scale, save);
}

class DualAttention : public torch::autograd::Function<DualAttention> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& image_key,
                               const Tensor& image_value, const Tensor& text_key,
                               const Tensor& text_value, const Tensor& alpha,
                               const OptionalTensor& image_mask, const OptionalTensor& text_mask,
                               double scale) {
    auto [out, image_out, text_out, image_lse, text_lse] =
        call_attention(query, image_key, image_value, text_key, text_value, alpha, image_mask,
                       text_mask, scale, true);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({query, image_key, image_value, text_key, text_value, alpha,
                            or_undefined(image_mask), or_undefined(text_mask), image_out, text_out,
                            image_lse, text_lse});
    ctx->saved_data["scale"] = scale;
    ctx->mark_non_differentiable({image_out, text_out, image_lse, text_lse});
    return {out, image_out, text_out, image_lse, text_lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return first_order_only(call_backward(ctx, grads[0]), grads, "dual_attention");
  }

 private:
  static variable_list call_backward(AutogradContext* ctx, const Tensor& grad_out) {
    if (!grad_out.defined()) return variable_list(9);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("dvla_fast::dual_attention_backward", "")
                               .typed<AttentionBackwardSignature>();
    const auto s = ctx->get_saved_variables();  // before the guard, see BetaPolicy
    at::AutoDispatchBelowADInplaceOrView below;
    auto [query, image_key, image_value, text_key, text_value, alpha] =
        op.call(grad_out, s[0], s[1], s[2], s[3], s[4], s[5], or_none(s[6]), or_none(s[7]), s[8],
                s[9], s[10], s[11], ctx->saved_data["scale"].toDouble());
    return {query, image_key, image_value, text_key, text_value,
            alpha, Tensor(),  Tensor(),    Tensor()};
  }
};

AttentionResult dual_attention_autograd(const Tensor& query, const Tensor& image_key,
                                        const Tensor& image_value, const Tensor& text_key,
                                        const Tensor& text_value, const Tensor& alpha,
                                        const OptionalTensor& image_mask,
                                        const OptionalTensor& text_mask, double scale, bool save) {
  if (save || !wants_grad({&query, &image_key, &image_value, &text_key, &text_value, &alpha})) {
    return call_attention(query, image_key, image_value, text_key, text_value, alpha, image_mask,
                          text_mask, scale, save);
  }
  const auto out = DualAttention::apply(query, image_key, image_value, text_key, text_value, alpha,
                                        image_mask, text_mask, scale);
  return {out[0], out[1], out[2], out[3], out[4]};
}

// ---- gated_attention_forward

using GatedResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using GatedSignature = GatedResult(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&, const Tensor&, const Tensor&,
                                   const OptionalTensor&, const OptionalTensor&, double, bool);
using GatedGrads = GatedResult;
using GatedBackwardSignature = GatedGrads(const OptionalTensor&, const OptionalTensor&,
                                          const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor&, const OptionalTensor&,
                                          const OptionalTensor&, const Tensor&, const Tensor&,
                                          const Tensor&, const Tensor&, const Tensor&, double,
                                          bool);

GatedResult call_gated(const Tensor& query, const Tensor& image_tokens, const Tensor& kv_weight,
                       const Tensor& text_key, const Tensor& text_value, const Tensor& alpha,
                       const Tensor& out_weight, const OptionalTensor& image_mask,
                       const OptionalTensor& text_mask, double scale, bool save) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dvla_fast::gated_attention_forward", "")
                             .typed<GatedSignature>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight,
                 image_mask, text_mask, scale, save);
}

class GatedAttention : public torch::autograd::Function<GatedAttention> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& query,
                               const Tensor& image_tokens, const Tensor& kv_weight,
                               const Tensor& text_key, const Tensor& text_value,
                               const Tensor& alpha, const Tensor& out_weight,
                               const OptionalTensor& image_mask, const OptionalTensor& text_mask,
                               double scale) {
    auto [updated, fused, image_out, text_out, image_lse, text_lse, kept] =
        call_gated(query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight,
                   image_mask, text_mask, scale, true);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight,
                            or_undefined(image_mask), or_undefined(text_mask), image_out, text_out,
                            image_lse, text_lse, kept});
    ctx->saved_data["scale"] = scale;
    ctx->mark_non_differentiable({image_out, text_out, image_lse, text_lse, kept});
    return {updated, fused, image_out, text_out, image_lse, text_lse, kept};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return first_order_only(call_backward(ctx, grads[0], grads[1]), grads, "gated_attention");
  }

 private:
  static variable_list call_backward(AutogradContext* ctx, const Tensor& grad_updated,
                                     const Tensor& grad_fused) {
    if (!grad_updated.defined() && !grad_fused.defined()) return variable_list(10);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("dvla_fast::gated_attention_backward", "")
                               .typed<GatedBackwardSignature>();
    const bool wants_tokens = ctx->needs_input_grad(1);
    const auto s = ctx->get_saved_variables();  // before the guard, see BetaPolicy
    at::AutoDispatchBelowADInplaceOrView below;
    auto [query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight] =
        op.call(or_none(grad_updated), or_none(grad_fused), s[0], s[1], s[2], s[3], s[4], s[5],
                s[6], or_none(s[7]), or_none(s[8]), s[9], s[10], s[11], s[12], s[13],
                ctx->saved_data["scale"].toDouble(), wants_tokens);
    if (!wants_tokens) image_tokens = Tensor();
    return {query, image_tokens, kv_weight, text_key, text_value,
            alpha, out_weight,   Tensor(),  Tensor(), Tensor()};
  }
};

GatedResult gated_attention_autograd(const Tensor& query, const Tensor& image_tokens,
                                     const Tensor& kv_weight, const Tensor& text_key,
                                     const Tensor& text_value, const Tensor& alpha,
                                     const Tensor& out_weight, const OptionalTensor& image_mask,
                                     const OptionalTensor& text_mask, double scale, bool save) {
  if (save || !wants_grad({&query, &image_tokens, &kv_weight, &text_key, &text_value, &alpha,
                           &out_weight})) {
    return call_gated(query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight,
                      image_mask, text_mask, scale, save);
  }
  const auto out = GatedAttention::apply(query, image_tokens, kv_weight, text_key, text_value,
                                         alpha, out_weight, image_mask, text_mask, scale);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

// ---- gate_policy_forward

using PolicyResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using PolicySignature = PolicyResult(const Tensor&, const Tensor&, const OptionalTensor&,
                                     const OptionalTensor&, int64_t, int64_t, const OptionalTensor&,
                                     const OptionalTensor&, const OptionalTensor&,
                                     const OptionalTensor&, double, const OptionalTensor&,
                                     const OptionalTensor&, bool, bool);
using PolicyGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using PolicyBackwardSignature = PolicyGrads(const OptionalTensor&, const OptionalTensor&,
                                            const OptionalTensor&, const Tensor&, const Tensor&,
                                            const OptionalTensor&, const OptionalTensor&, int64_t,
                                            int64_t, const OptionalTensor&, const OptionalTensor&,
                                            const Tensor&, const Tensor&, const Tensor&);

PolicyResult call_policy(const Tensor& image_tokens, const Tensor& text_tokens,
                         const OptionalTensor& image_mask, const OptionalTensor& text_mask,
                         int64_t groups, int64_t images, const OptionalTensor& hidden_weight,
                         const OptionalTensor& hidden_bias, const OptionalTensor& out_weight,
                         const OptionalTensor& out_bias, double concentration,
                         const OptionalTensor& action_logit, const OptionalTensor& key, bool save,
                         bool check) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dvla_fast::gate_policy_forward", "")
                             .typed<PolicySignature>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(image_tokens, text_tokens, image_mask, text_mask, groups, images, hidden_weight,
                 hidden_bias, out_weight, out_bias, concentration, action_logit, key, save, check);
}

// The gradient of tokens from that of each token that counts (outer, C): without a mask a view.
Tensor spread(const Tensor& rows, const Tensor& tokens, const Tensor& mask) {
  const Tensor all = rows.to(tokens.scalar_type()).unsqueeze(1).expand_symint(tokens.sym_sizes());
  return mask.defined() ? all.masked_fill(mask.logical_not().unsqueeze(2), 0) : all;
}

class GatePolicy : public torch::autograd::Function<GatePolicy> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& image_tokens,
                               const Tensor& text_tokens, const OptionalTensor& image_mask,
                               const OptionalTensor& text_mask, int64_t groups, int64_t images,
                               const OptionalTensor& hidden_weight,
                               const OptionalTensor& hidden_bias, const OptionalTensor& out_weight,
                               const OptionalTensor& out_bias, double concentration,
                               const OptionalTensor& action_logit, const OptionalTensor& key,
                               bool check) {
    auto [alpha, action, log_prob, entropy, state, hidden, derivatives] = call_policy(
        image_tokens, text_tokens, image_mask, text_mask, groups, images, hidden_weight,
        hidden_bias, out_weight, out_bias, concentration, action_logit, key, true, check);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({image_tokens, text_tokens, or_undefined(image_mask),
                            or_undefined(text_mask), or_undefined(hidden_weight),
                            or_undefined(out_weight), state, hidden, derivatives});
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["images"] = images;
    ctx->mark_non_differentiable({alpha, action, hidden, derivatives});
    return {alpha, action, log_prob, entropy, state, hidden, derivatives};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return first_order_only(call_backward(ctx, grads[2], grads[3], grads[4]), grads, "gate_policy");
  }

 private:
  static variable_list call_backward(AutogradContext* ctx, const Tensor& grad_log_prob,
                                     const Tensor& grad_entropy, const Tensor& grad_state) {
    variable_list result(14);
    if (!grad_log_prob.defined() && !grad_entropy.defined() && !grad_state.defined()) {
      return result;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("dvla_fast::gate_policy_backward", "")
                               .typed<PolicyBackwardSignature>();
    const auto s = ctx->get_saved_variables();  // before the guard, see BetaPolicy
    at::AutoDispatchBelowADInplaceOrView below;
    auto [image, text, hidden_weight, hidden_bias, out_weight, out_bias] =
        op.call(or_none(grad_log_prob), or_none(grad_entropy), or_none(grad_state), s[0], s[1],
                or_none(s[2]), or_none(s[3]), ctx->saved_data["groups"].toInt(),
                ctx->saved_data["images"].toInt(), or_none(s[4]), or_none(s[5]), s[6], s[7], s[8]);
    result[0] = spread(image, s[0], s[2]);
    result[1] = spread(text, s[1], s[3]);
    if (s[4].defined()) {
      result[6] = hidden_weight, result[7] = hidden_bias;
      result[8] = out_weight, result[9] = out_bias;
    }
    return result;
  }
};

PolicyResult gate_policy_autograd(const Tensor& image_tokens, const Tensor& text_tokens,
                                  const OptionalTensor& image_mask, const OptionalTensor& text_mask,
                                  int64_t groups, int64_t images,
                                  const OptionalTensor& hidden_weight,
                                  const OptionalTensor& hidden_bias,
                                  const OptionalTensor& out_weight, const OptionalTensor& out_bias,
                                  double concentration, const OptionalTensor& action_logit,
                                  const OptionalTensor& key, bool save, bool check) {
  const Tensor weights[] = {or_undefined(hidden_weight), or_undefined(hidden_bias),
                            or_undefined(out_weight), or_undefined(out_bias)};
  if (save || !wants_grad({&image_tokens, &text_tokens, &weights[0], &weights[1], &weights[2],
                           &weights[3]})) {
    return call_policy(image_tokens, text_tokens, image_mask, text_mask, groups, images,
                       hidden_weight, hidden_bias, out_weight, out_bias, concentration,
                       action_logit, key, save, check);
  }
  const auto out = GatePolicy::apply(image_tokens, text_tokens, image_mask, text_mask, groups,
                                     images, hidden_weight, hidden_bias, out_weight, out_bias,
                                     concentration, action_logit, key, check);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

}  // namespace

TORCH_LIBRARY_IMPL(dvla_fast, Autograd, m) {
  m.impl("gate_policy_forward", &gate_policy_autograd);
  m.impl("gated_attention_forward", &gated_attention_autograd);
  m.impl("beta_policy_forward", &beta_policy_autograd);
  m.impl("dual_attention_forward", &dual_attention_autograd);
}
