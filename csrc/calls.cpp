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

#include <limits>
#include <mutex>
#include <optional>

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

}  // namespace

PYBIND11_MODULE(_calls, m) { m.def("beta_policy", torch::wrap_pybind_function(&beta_policy)); }
