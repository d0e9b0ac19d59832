// The Python module dvla_fast._calls: the direct calls of direct.h and the recordings of replay.h.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "direct.h"
#include "replay.h"

namespace {

namespace py = pybind11;
namespace replay = dvla_fast::replay;

using PythonParameter = std::tuple<int64_t, int64_t, int64_t>;  // source, index, value
using PythonLaunch =
    std::tuple<int64_t, unsigned, unsigned, unsigned, std::vector<PythonParameter>>;

replay::Call call_of(const std::string& op, const py::tuple& arguments) {
  const auto* found = std::find(std::begin(replay::kOps), std::end(replay::kOps), op);
  TORCH_CHECK_VALUE(found != std::end(replay::kOps), "no op ", op, " is recorded");
  replay::Call call(found - std::begin(replay::kOps));
  for (const py::handle argument : arguments) {
    if (argument.is_none()) {
      call.add(std::optional<at::Tensor>());
    } else if (THPVariable_Check(argument.ptr())) {
      call.add(THPVariable_Unpack(argument.ptr()));
    } else if (PyFloat_Check(argument.ptr())) {
      call.add(argument.cast<double>());
    } else {
      call.add(argument.cast<int64_t>());
    }
  }
  return call;
}

std::vector<replay::Layout> layouts_of(const std::vector<at::Tensor>& tensors) {
  std::vector<replay::Layout> layouts;
  for (const at::Tensor& tensor : tensors) {
    layouts.push_back({tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type()});
  }
  return layouts;
}

// Called by dvla_fast/ops/replay.py. `kept` is held as long as the recording.
void record(const std::string& op, const py::tuple& arguments,
            const std::vector<at::Tensor>& results, const std::vector<at::Tensor>& scratch,
            const std::vector<PythonLaunch>& launches, py::object kept) {
  replay::Recording recording{layouts_of(results), layouts_of(scratch), {}, nullptr};
  for (const auto& [function, grid, threads, shared, parameters] : launches) {
    replay::Launch launch{reinterpret_cast<void*>(function), grid, threads, shared, {}};
    for (const auto& [source, index, value] : parameters) {
      launch.parameters.push_back({static_cast<replay::Source>(source), index, value});
    }
    recording.launches.push_back(std::move(launch));
  }
  recording.kept = std::shared_ptr<void>(kept.release().ptr(), [](void* object) {
    const py::gil_scoped_acquire locked;  // the last to hold it may be a thread without Python
    Py_DECREF(static_cast<PyObject*>(object));
  });
  replay::record(call_of(op, arguments).key(), std::move(recording));
}

}  // namespace

PYBIND11_MODULE(_calls, m) {
  m.def("beta_policy", torch::wrap_pybind_function(&dvla_fast::direct::beta_policy));
  m.def("dual_attention", torch::wrap_pybind_function(&dvla_fast::direct::dual_attention));
  m.def("gated_attention", torch::wrap_pybind_function(&dvla_fast::direct::gated_attention));
  m.def("gate_policy", torch::wrap_pybind_function(&dvla_fast::direct::gate_policy));
  m.def("record", torch::wrap_pybind_function(&record));
  m.def("forget", &replay::forget);
  m.def("recordings", &replay::recordings);
  m.def("use_driver", &replay::use_driver);
}
