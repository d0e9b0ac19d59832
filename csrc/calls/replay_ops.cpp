// The ops on CUDA tensors: a recorded launch where there is one, else the Triton kernels in Python.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>

#include "attention/dual_attention.h"
#include "policy/gate_policy.h"
#include "replay.h"

namespace {

template <int64_t op, class Signature>
struct OnCuda;

template <int64_t op, class Result, class... Arguments>
struct OnCuda<op, Result(Arguments...)> {
  static Result call(Arguments... arguments) {
    dvla_fast::replay::Call call(op);
    (call.add(arguments), ...);
    if (auto tensors = dvla_fast::replay::repeat(call)) {
      return as_result(*tensors, std::make_index_sequence<std::tuple_size_v<Result>>());
    }
    static const std::string name = std::string("dvla_fast::") + dvla_fast::replay::kOps[op];
    static const auto by_python = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow((name + "_triton").c_str(), "")
                                      .template typed<Result(Arguments...)>();
    return by_python.call(std::forward<Arguments>(arguments)...);
  }

 private:
  template <size_t... i>
  static Result as_result(std::vector<at::Tensor>& tensors, std::index_sequence<i...>) {
    return {std::move(tensors[i])...};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(dvla_fast, CUDA, m) {
  m.impl("dual_attention_forward", &OnCuda<0, decltype(dvla_fast::dual_attention_forward)>::call);
  m.impl("dual_attention_backward", &OnCuda<1, decltype(dvla_fast::dual_attention_backward)>::call);
  m.impl("gate_policy_forward", &OnCuda<2, decltype(dvla_fast::gate_policy_forward)>::call);
  m.impl("gate_policy_backward", &OnCuda<3, decltype(dvla_fast::gate_policy_backward)>::call);
}
