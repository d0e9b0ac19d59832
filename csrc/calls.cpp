// The Python module dvla_fast._calls: direct calls of ops. The usual way, which parses every
// argument by the op's schema, takes longer than a small op itself.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/DistributionsHelper.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <limits>
#include <mutex>
#include <optional>

#include "attention/dual_attention.h"
#include "beta/beta_policy.h"

namespace {

// Whether no one is there to whom the usual way would show the call: no mode in Python, no trace,
// no transform of torch.func. Each of them is in one of these two places of the thread.
bool undisturbed() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included - c10::default_included_set).empty() && !at::impl::torch_function_mode_enabled();
}

// The key of draw_key in dvla_fast/ops/beta_policy.py: what torch.randint draws, as it does.
at::Tensor draw_key(const std::optional<at::Generator>& generator) {
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(
      generator, at::detail::getDefaultCPUGenerator());
  const at::uniform_int_from_to_distribution<int64_t> word(std::numeric_limits<int64_t>::max(), 0);
  at::Tensor key = at::detail::empty_cpu({2}, at::kLong);
  auto* words = key.mutable_data_ptr<int64_t>();
  const std::lock_guard<std::mutex> lock(source->mutex_);
  words[0] = word(source), words[1] = word(source);
  return key;
}

// The tensor in an argument; nullptr unless it is one as PyTorch makes them, of no subclass.
const at::Tensor* plain_tensor(py::handle object) {
  if (!THPVariable_CheckExact(object.ptr())) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
  return tensor.layout() == at::kStrided ? &tensor : nullptr;
}

// A draw as by beta_policy in dvla_fast/ops, of a plain float32 tensor on a CPU and a valid number;
// None for anything else.
py::object beta_policy(py::handle logits_object, py::handle concentration_object,
                       const std::optional<at::Generator>& generator, bool check) {
  if (!THPVariable_CheckExact(logits_object.ptr()) ||
      !PyFloat_CheckExact(concentration_object.ptr()) || !undisturbed()) {
    return py::none();
  }
  const at::Tensor& logits = THPVariable_Unpack(logits_object.ptr());
  const double concentration = PyFloat_AS_DOUBLE(concentration_object.ptr());
  if (logits.scalar_type() != at::kFloat || !logits.is_cpu() || !(concentration > 0.0) ||
      concentration > std::numeric_limits<float>::max()) {
    return py::none();
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dvla_fast::beta_policy_forward", "")
                             .typed<decltype(dvla_fast::beta_policy_forward_cpu)>();
  const auto results = [&] {
    const py::gil_scoped_release others_may_run;
    return op.call(logits, std::nullopt, concentration, std::nullopt, draw_key(generator), false,
                   check);
  }();
  const auto& [alpha, action, log_prob, entropy, derivatives] = results;
  return py::make_tuple(alpha, action, log_prob, entropy);
}

struct Attention {  // the arguments of dual_attention; a mask may be absent
  const at::Tensor &query, &image_key, &image_value, &text_key, &text_value, &alpha;
  const at::Tensor *image_mask, *text_mask;
};

bool has_shape(const at::Tensor& tensor, at::IntArrayRef shape) { return tensor.sizes() == shape; }

// Whether the compiled op takes them as they are. Python names what is wrong with others.
bool fits(const Attention& a) {
  for (const at::Tensor* tensor :
       {&a.query, &a.image_key, &a.image_value, &a.text_key, &a.text_value}) {
    if (tensor->dim() != 4 || tensor->scalar_type() != a.query.scalar_type()) return false;
  }
  for (const at::Tensor* tensor : {&a.image_key, &a.image_value, &a.text_key, &a.text_value,
                                   &a.alpha, a.image_mask, a.text_mask}) {
    if (tensor != nullptr && tensor->device() != a.query.device()) return false;
  }
  const auto type = a.query.scalar_type();
  const bool half = type == at::kHalf || type == at::kBFloat16;
  const int64_t groups = a.query.size(0), heads = a.query.size(1), width = a.query.size(3);
  const int64_t batch = a.image_key.size(0), keys = a.image_key.size(2);
  const int64_t text_keys = a.text_key.size(2);
  if (groups == 0 || heads == 0 || width == 0 || batch % groups != 0) return false;
  if (a.query.is_cuda() ? !(half || type == at::kFloat) || width > 256
                        : !a.query.is_cpu() || !(half || type == at::kFloat || type == at::kDouble))
    return false;
  const auto fits_mask = [](const at::Tensor* mask, int64_t outer, int64_t length) {
    return mask == nullptr ||
           (mask->scalar_type() == at::kBool && has_shape(*mask, {outer, length}));
  };
  return has_shape(a.image_key, {batch, heads, keys, width}) &&
         has_shape(a.image_value, {batch, heads, keys, width}) &&
         has_shape(a.text_key, {groups, heads, text_keys, width}) &&
         has_shape(a.text_value, {groups, heads, text_keys, width}) &&
         at::isFloatingType(a.alpha.scalar_type()) &&
         (a.alpha.dim() == 0 || has_shape(a.alpha, {batch}) ||
          has_shape(a.alpha, {batch, heads})) &&
         fits_mask(a.image_mask, batch, keys) && fits_mask(a.text_mask, groups, text_keys);
}

// The mix as by dual_attention in dvla_fast/ops, of plain tensors that fit together; None for
// anything else.
py::object dual_attention(py::handle query, py::handle image_key, py::handle image_value,
                          py::handle text_key, py::handle text_value, py::handle alpha,
                          py::handle image_mask, py::handle text_mask, py::handle scale_object) {
  const py::handle objects[] = {query,      image_key, image_value, text_key,
                                text_value, alpha,     image_mask,  text_mask};
  const at::Tensor* t[8];
  for (int i = 0; i < 8; ++i) {
    const bool absent = i >= 6 && objects[i].is_none();
    t[i] = absent ? nullptr : plain_tensor(objects[i]);
    if (!absent && t[i] == nullptr) return py::none();
  }
  const Attention a{*t[0], *t[1], *t[2], *t[3], *t[4], *t[5], t[6], t[7]};
  if (!undisturbed() || !fits(a)) return py::none();
  double scale = 1.0 / std::sqrt(static_cast<double>(a.query.size(3)));
  if (!scale_object.is_none()) {
    if (!PyFloat_CheckExact(scale_object.ptr())) return py::none();
    scale = PyFloat_AS_DOUBLE(scale_object.ptr());
    if (!(std::abs(scale) <= std::numeric_limits<float>::max())) return py::none();
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dvla_fast::dual_attention_forward", "")
                             .typed<decltype(dvla_fast::dual_attention_forward)>();
  const auto mask = [](const at::Tensor* tensor) {
    return tensor == nullptr ? std::nullopt : std::optional<at::Tensor>(*tensor);
  };
  at::Tensor out = [&] {
    const py::gil_scoped_release others_may_run;
    const auto wide = a.query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor gate = (a.alpha.dim() == 1 ? a.alpha.unsqueeze(1) : a.alpha).to(wide);
    return std::get<0>(op.call(a.query, a.image_key, a.image_value, a.text_key, a.text_value,
                               gate.expand({a.image_key.size(0), a.query.size(1)}),
                               mask(a.image_mask), mask(a.text_mask), scale, false));
  }();
  return py::cast(std::move(out));
}

}  // namespace

PYBIND11_MODULE(_calls, m) {
  m.def("beta_policy", torch::wrap_pybind_function(&beta_policy));
  m.def("dual_attention", torch::wrap_pybind_function(&dual_attention));
}
