#include "direct.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/DistributionsHelper.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randint.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <optional>
#include <tuple>

#include "attention/dual_attention.h"
#include "beta/beta_policy.h"
#include "gate/gated_attention.h"
#include "policy/gate_policy.h"

namespace dvla_fast::direct {

namespace py = pybind11;

namespace {

using OptionalGenerator = std::optional<at::Generator>;

constexpr double kLargest = std::numeric_limits<float>::max();

// Whether no one is there to whom the usual way would show the call: no mode in Python, no trace,
// no transform of torch.func. Each of them is in one of these two places of the thread.
bool undisturbed() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included - c10::default_included_set).empty() && !at::impl::torch_function_mode_enabled();
}

// Reads a generator or None; false where it is neither.
bool read_generator(py::handle from, OptionalGenerator& to) {
  if (from.is_none()) return true;
  py::detail::make_caster<at::Generator> caster;
  if (!caster.load(from, false)) return false;
  to = py::detail::cast_op<at::Generator&>(caster);
  return true;
}

// Reads a whole number; none where it is no int, or too large a one.
std::optional<int64_t> read_whole(py::handle from) {
  if (!PyLong_CheckExact(from.ptr())) return std::nullopt;
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(from.ptr(), &overflow);
  return overflow ? std::nullopt : std::optional(value);
}

// The key of draw_key in dvla_fast/ops/beta_policy.py: what torch.randint draws, on a CPU without
// asking it.
at::Tensor draw_key(at::Device device, const OptionalGenerator& generator) {
  constexpr int64_t high = std::numeric_limits<int64_t>::max();
  const at::Device source = generator ? generator->device() : device;
  if (!device.is_cpu() || !source.is_cpu()) {
    const auto options = at::TensorOptions().dtype(at::kLong).device(source);
    return at::randint(high, {2}, generator, options).to(device, /*non_blocking=*/source.is_cpu());
  }
  auto* bits = at::get_generator_or_default<at::CPUGeneratorImpl>(
      generator, at::detail::getDefaultCPUGenerator());
  const at::uniform_int_from_to_distribution<int64_t> word(high, 0);
  at::Tensor key = at::detail::empty_cpu({2}, at::kLong);
  auto* words = key.mutable_data_ptr<int64_t>();
  const std::lock_guard<std::mutex> lock(bits->mutex_);
  words[0] = word(bits), words[1] = word(bits);
  return key;
}

// The tensor in an argument; nullptr unless it is one as PyTorch makes them, of no subclass.
const at::Tensor* plain_tensor(py::handle object) {
  if (!THPVariable_CheckExact(object.ptr())) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
  return tensor.layout() == at::kStrided && !tensor.is_nested() ? &tensor : nullptr;
}

// The tensors in arguments of which the first `required` may not be None.
template <size_t n>
bool plain_tensors(const py::handle (&objects)[n], size_t required,
                   std::array<const at::Tensor*, n>& tensors) {
  for (size_t i = 0; i < n; ++i) {
    const bool absent = i >= required && objects[i].is_none();
    tensors[i] = absent ? nullptr : plain_tensor(objects[i]);
    if (!absent && tensors[i] == nullptr) return false;
  }
  return true;
}

std::optional<at::Tensor> optional(const at::Tensor* tensor) {
  return tensor == nullptr ? std::nullopt : std::optional<at::Tensor>(*tensor);
}

bool has_shape(const at::Tensor& tensor, at::IntArrayRef shape) { return tensor.sizes() == shape; }

bool fits_mask(const at::Tensor* mask, int64_t outer, int64_t length) {
  return mask == nullptr || (mask->scalar_type() == at::kBool && has_shape(*mask, {outer, length}));
}

bool on_device(const at::Tensor& first, std::initializer_list<const at::Tensor*> others) {
  for (const at::Tensor* tensor : others) {
    if (tensor != nullptr && tensor->device() != first.device()) return false;
  }
  return true;
}

struct Attention {  // the arguments of dual_attention; a mask may be absent
  const at::Tensor &query, &image_key, &image_value, &text_key, &text_value, &alpha;
  const at::Tensor *image_mask, *text_mask;
};

// Whether a query (T,H,P,D) and `batch` images fit together, and there are kernels for them.
bool runs(const at::Tensor& query, int64_t batch, bool cuda) {
  const auto type = query.scalar_type();
  const bool half = type == at::kHalf || type == at::kBFloat16;
  const int64_t groups = query.size(0), heads = query.size(1), width = query.size(3);
  if (groups == 0 || heads == 0 || width == 0 || batch % groups != 0) return false;
  return query.is_cuda() ? cuda && (half || type == at::kFloat) && width <= 256
                         : query.is_cpu() && (half || type == at::kFloat || type == at::kDouble);
}

bool fits_gate(const at::Tensor& alpha, int64_t batch, int64_t heads) {
  return at::isFloatingType(alpha.scalar_type()) &&
         (alpha.dim() == 0 || has_shape(alpha, {batch}) || has_shape(alpha, {batch, heads}));
}

// The gate as the ops take it, (B, H) in the type of sums.
at::Tensor spread_gate(const at::Tensor& alpha, at::ScalarType type, int64_t batch, int64_t heads) {
  const auto wide = type == at::kDouble ? at::kDouble : at::kFloat;
  return (alpha.dim() == 1 ? alpha.unsqueeze(1) : alpha).to(wide).expand({batch, heads});
}

// The factor of scores in an argument, D^-1/2 without one; none where Python is to look at it.
std::optional<double> scale_of(py::handle object, int64_t width) {
  if (object.is_none()) return 1.0 / std::sqrt(static_cast<double>(width));
  if (!PyFloat_CheckExact(object.ptr())) return std::nullopt;
  const double scale = PyFloat_AS_DOUBLE(object.ptr());
  return std::abs(scale) <= kLargest ? std::optional(scale) : std::nullopt;
}

// Whether the compiled op takes them as they are. Python names what is wrong with others.
bool fits(const Attention& a, bool cuda) {
  for (const at::Tensor* tensor :
       {&a.query, &a.image_key, &a.image_value, &a.text_key, &a.text_value}) {
    if (tensor->dim() != 4 || tensor->scalar_type() != a.query.scalar_type()) return false;
  }
  if (!on_device(a.query, {&a.image_key, &a.image_value, &a.text_key, &a.text_value, &a.alpha,
                           a.image_mask, a.text_mask})) {
    return false;
  }
  const int64_t groups = a.query.size(0), heads = a.query.size(1), width = a.query.size(3);
  const int64_t batch = a.image_key.size(0), keys = a.image_key.size(2);
  const int64_t text_keys = a.text_key.size(2);
  return runs(a.query, batch, cuda) && has_shape(a.image_key, {batch, heads, keys, width}) &&
         has_shape(a.image_value, {batch, heads, keys, width}) &&
         has_shape(a.text_key, {groups, heads, text_keys, width}) &&
         has_shape(a.text_value, {groups, heads, text_keys, width}) &&
         fits_gate(a.alpha, batch, heads) && fits_mask(a.image_mask, batch, keys) &&
         fits_mask(a.text_mask, groups, text_keys);
}

struct Layer {  // the arguments of gated_attention, cast as autocast asks; a mask may be absent
  at::Tensor query, kv_weight, text_key, text_value, out_weight;
  const at::Tensor &image_tokens, &alpha;
  const at::Tensor *image_mask, *text_mask;

  int64_t groups() const { return query.size(0); }
  int64_t heads() const { return query.size(1); }
  int64_t width() const { return query.size(3); }
  int64_t batch() const { return image_tokens.size(0); }
};

bool fits(const Layer& l, bool cuda) {
  const at::Tensor &query = l.query, &tokens = l.image_tokens;
  if (query.dim() != 4 || tokens.dim() != 3 ||
      !on_device(query, {&l.kv_weight, &l.text_key, &l.text_value, &l.out_weight, &tokens, &l.alpha,
                         l.image_mask, l.text_mask})) {
    return false;
  }
  const auto type = query.scalar_type();
  for (const at::Tensor* tensor : {&l.kv_weight, &l.text_key, &l.text_value, &l.out_weight}) {
    if (tensor->scalar_type() != type) return false;
  }
  const auto passed = tokens.scalar_type();
  if (passed != type && (type == at::kDouble || passed != at::kFloat)) return false;
  const int64_t keys = tokens.size(1), channels = tokens.size(2), inner = l.heads() * l.width();
  return runs(query, l.batch(), cuda) && has_shape(l.kv_weight, {2 * inner, channels}) &&
         has_shape(l.out_weight, {channels, inner}) && has_shape(l.text_key, query.sizes()) &&
         has_shape(l.text_value, query.sizes()) && fits_gate(l.alpha, l.batch(), l.heads()) &&
         fits_mask(l.image_mask, l.batch(), keys) &&
         fits_mask(l.text_mask, l.groups(), query.size(2));
}

const auto& dual_attention_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dvla_fast::dual_attention_forward", "")
                             .typed<decltype(dvla_fast::dual_attention_forward)>();
  return op;
}

using Updated = std::tuple<at::Tensor, at::Tensor>;  // image tokens and H

Updated fused_layer(const Layer& l, const at::Tensor& gate, double scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dvla_fast::gated_attention_forward", "")
                             .typed<decltype(dvla_fast::gated_attention_forward)>();
  auto results = op.call(l.query, l.image_tokens, l.kv_weight, l.text_key, l.text_value, gate,
                         l.out_weight, optional(l.image_mask), optional(l.text_mask), scale, false);
  return {std::get<0>(results), std::get<1>(results)};
}

// As _composed of dvla_fast/ops/gated_attention.py and add_to_tokens of dvla_fast/reference.py.
Updated composed_layer(const Layer& l, const at::Tensor& gate, double scale) {
  at::Tensor tokens = l.image_tokens.to(l.query.scalar_type());
  if (l.image_mask != nullptr) {
    tokens = tokens.masked_fill(l.image_mask->logical_not().unsqueeze(-1), 0);
  }
  const auto kv =
      at::linear(tokens, l.kv_weight).unflatten(-1, {2, l.heads(), l.width()}).unbind(2);
  const at::Tensor query =
      l.text_mask == nullptr
          ? l.query
          : l.query.masked_fill(l.text_mask->logical_not().unsqueeze(1).unsqueeze(-1), 0);
  const at::Tensor mixed = std::get<0>(dual_attention_op().call(
      query, kv[0].transpose(1, 2), kv[1].transpose(1, 2), l.text_key, l.text_value, gate,
      optional(l.image_mask), optional(l.text_mask), scale, false));
  at::Tensor fused = at::linear(mixed.transpose(1, 2).flatten(2), l.out_weight);
  const auto wide = c10::promoteTypes(fused.scalar_type(), at::kFloat);
  const int64_t rows = fused.size(1);
  const auto sum = [&] { return fused.sum(1, true, wide); };
  if (l.text_mask == nullptr) {
    const at::Tensor added = sum() / std::max<int64_t>(1, rows);
    return {l.image_tokens + added.to(l.image_tokens.scalar_type()), fused};
  }
  const at::Tensor keep =
      l.text_mask->unsqueeze(1).expand({l.groups(), l.batch() / l.groups(), rows}).flatten(0, 1);
  fused = fused.masked_fill(keep.logical_not().unsqueeze(-1), 0);
  const at::Tensor added = sum() / keep.sum(1).clamp_min(1).view({-1, 1, 1});
  return {l.image_tokens + added.to(l.image_tokens.scalar_type()), fused};
}

struct Decision {  // the arguments of gate_policy; a mask may be absent
  const at::Tensor &image_tokens, &text_tokens;
  const at::Tensor &hidden_weight, &hidden_bias, &out_weight, &out_bias;
  const at::Tensor *image_mask, *text_mask;
  int64_t groups_per_decision;
  std::optional<int64_t> state_images;  // all without
};

bool fits(const Decision& d, bool cuda) {
  const at::Tensor &image = d.image_tokens, &text = d.text_tokens;
  for (const at::Tensor* tokens : {&image, &text}) {
    const auto type = tokens->scalar_type();
    if (tokens->dim() != 3 || !at::isFloatingType(type) || at::elementSize(type) < 2) return false;
  }
  const int64_t images = image.size(0), groups = text.size(0), width = image.size(2);
  if (image.numel() == 0 || text.numel() == 0 || images % groups != 0 || text.size(2) != width ||
      d.hidden_weight.dim() != 2 || d.hidden_weight.size(0) == 0) {
    return false;
  }
  const auto wide = image.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if ((text.scalar_type() == at::kDouble) != (wide == at::kDouble)) return false;
  for (const at::Tensor* weight : {&d.hidden_weight, &d.hidden_bias, &d.out_weight, &d.out_bias}) {
    if (weight->scalar_type() != wide) return false;
  }
  const bool runs = image.is_cuda() ? cuda && width <= 4096 : image.is_cpu();
  const int64_t share = d.groups_per_decision, units = d.hidden_weight.size(0);
  const bool pools =
      !d.state_images || (share > 0 && *d.state_images >= 1 && *d.state_images <= images / groups);
  return runs && share >= 0 && (share == 0 || groups % share == 0) && pools &&
         has_shape(d.hidden_weight, {units, 2 * width + 1}) && has_shape(d.hidden_bias, {units}) &&
         has_shape(d.out_weight, {1, units}) && has_shape(d.out_bias, {1}) &&
         fits_mask(d.image_mask, images, image.size(1)) &&
         fits_mask(d.text_mask, groups, text.size(1)) &&
         on_device(image, {&text, &d.hidden_weight, &d.hidden_bias, &d.out_weight, &d.out_bias,
                           d.image_mask, d.text_mask});
}

}  // namespace

py::object beta_policy(py::handle logits_object, py::handle concentration_object,
                       py::handle generator_object, std::optional<bool> check, bool cuda) {
  const at::Tensor* found = plain_tensor(logits_object);
  OptionalGenerator generator;
  if (found == nullptr || !PyFloat_CheckExact(concentration_object.ptr()) ||
      !read_generator(generator_object, generator) || !undisturbed()) {
    return py::none();
  }
  const at::Tensor& logits = *found;
  const double concentration = PyFloat_AS_DOUBLE(concentration_object.ptr());
  if (logits.scalar_type() != at::kFloat || !(logits.is_cpu() || (cuda && logits.is_cuda())) ||
      !(concentration > 0.0) || concentration > kLargest) {
    return py::none();
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dvla_fast::beta_policy_forward", "")
                             .typed<decltype(dvla_fast::beta_policy_forward_cpu)>();
  const auto results = [&] {
    const py::gil_scoped_release others_may_run;
    return op.call(logits, std::nullopt, concentration, std::nullopt,
                   draw_key(logits.device(), generator), false, check.value_or(logits.is_cpu()));
  }();
  const auto& [alpha, action, log_prob, entropy, derivatives] = results;
  return py::make_tuple(alpha, action, log_prob, entropy);
}

py::object dual_attention(py::handle query, py::handle image_key, py::handle image_value,
                          py::handle text_key, py::handle text_value, py::handle alpha,
                          py::handle image_mask, py::handle text_mask, py::handle scale_object,
                          bool cuda) {
  std::array<const at::Tensor*, 8> t;
  if (!plain_tensors(
          {query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask}, 6,
          t)) {
    return py::none();
  }
  const Attention a{*t[0], *t[1], *t[2], *t[3], *t[4], *t[5], t[6], t[7]};
  if (!undisturbed() || !fits(a, cuda)) return py::none();
  const auto scale = scale_of(scale_object, a.query.size(3));
  if (!scale) return py::none();
  at::Tensor out = [&] {
    const py::gil_scoped_release others_may_run;
    const at::Tensor gate =
        spread_gate(a.alpha, a.query.scalar_type(), a.image_key.size(0), a.query.size(1));
    return std::get<0>(dual_attention_op().call(a.query, a.image_key, a.image_value, a.text_key,
                                                a.text_value, gate, optional(a.image_mask),
                                                optional(a.text_mask), *scale, false));
  }();
  return py::cast(std::move(out));
}

py::object gated_attention(py::handle query, py::handle image_tokens, py::handle kv_weight,
                           py::handle text_key, py::handle text_value, py::handle alpha,
                           py::handle out_weight, py::handle image_mask, py::handle text_mask,
                           py::handle scale_object, bool cuda, bool composed) {
  std::array<const at::Tensor*, 9> t;
  if (!plain_tensors({query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight,
                      image_mask, text_mask},
                     7, t) ||
      !undisturbed() || !(t[0]->is_cpu() || t[0]->is_cuda())) {
    return py::none();
  }
  const auto device = t[0]->device().type();
  std::optional<at::ScalarType> type;
  if (at::autocast::is_autocast_enabled(device)) type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& x) {
    return type && x.is_floating_point() && x.scalar_type() != at::kDouble ? x.to(*type) : x;
  };
  const Layer l{cast(*t[0]), cast(*t[2]), cast(*t[3]), cast(*t[4]), cast(*t[6]),
                *t[1],       *t[5],       t[7],        t[8]};
  if (!fits(l, cuda)) return py::none();
  const auto scale = scale_of(scale_object, l.width());
  if (!scale) return py::none();
  auto [updated, fused] = [&] {
    const py::gil_scoped_release others_may_run;
    const at::Tensor gate = spread_gate(l.alpha, l.query.scalar_type(), l.batch(), l.heads());
    return composed || l.query.is_cuda() ? composed_layer(l, gate, *scale)
                                         : fused_layer(l, gate, *scale);
  }();
  return py::make_tuple(std::move(updated), std::move(fused));
}

py::object gate_policy(py::handle image_tokens, py::handle text_tokens, py::handle hidden_weight,
                       py::handle hidden_bias, py::handle out_weight, py::handle out_bias,
                       py::handle concentration_object, py::handle groups_per_decision,
                       py::handle state_images, py::handle image_mask, py::handle text_mask,
                       bool draw, py::handle generator_object, std::optional<bool> check,
                       bool cuda) {
  std::array<const at::Tensor*, 8> t;
  OptionalGenerator generator;
  const auto groups = read_whole(groups_per_decision), images = read_whole(state_images);
  if (!plain_tensors({image_tokens, text_tokens, hidden_weight, hidden_bias, out_weight, out_bias,
                      image_mask, text_mask},
                     6, t) ||
      !PyFloat_CheckExact(concentration_object.ptr()) ||
      !read_generator(generator_object, generator) || !groups ||
      !(images || state_images.is_none())) {
    return py::none();
  }
  const Decision d{*t[0], *t[1], *t[2], *t[3], *t[4], *t[5], t[6], t[7], *groups, images};
  const double concentration = PyFloat_AS_DOUBLE(concentration_object.ptr());
  if (!undisturbed() || !fits(d, cuda) || !(concentration > 0.0) || concentration > kLargest) {
    return py::none();
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dvla_fast::gate_policy_forward", "")
                             .typed<decltype(dvla_fast::gate_policy_forward)>();
  auto results = [&] {
    const py::gil_scoped_release others_may_run;
    std::optional<at::Tensor> key;
    if (draw) key = draw_key(d.image_tokens.device(), generator);
    return op.call(d.image_tokens, d.text_tokens, optional(d.image_mask), optional(d.text_mask),
                   d.groups_per_decision, d.state_images.value_or(0), d.hidden_weight,
                   d.hidden_bias, d.out_weight, d.out_bias, concentration, std::nullopt, key, false,
                   check.value_or(d.image_tokens.is_cpu()));
  }();
  const auto& [alpha, action, log_prob, entropy, state, hidden, derivatives] = results;
  return py::make_tuple(alpha, action, log_prob, entropy, state);
}

}  // namespace dvla_fast::direct
