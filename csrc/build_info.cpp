// The Python module dvla_fast._build_info: what was built, and what this CPU can run. It needs no
// torch, so it can be asked before anything is loaded that does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "beta/philox.h"

namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::istringstream stream(list);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

// The best instruction set of this machine among those the library is built for.
std::string cpu_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return "avx512";
  }
  if (avx2) return "avx2";
#endif
  return "default";
}

std::vector<std::uint32_t> philox4x32(const std::vector<std::uint32_t>& counter,
                                      const std::vector<std::uint32_t>& key) {
  const auto words = dvla_fast::philox({counter.at(0), counter.at(1), counter.at(2), counter.at(3)},
                                       key.at(0), key.at(1));
  return {words.w0, words.w1, words.w2, words.w3};
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.attr("torch_version") = DVLA_TORCH_VERSION;
  m.attr("cpu_capabilities") = split(DVLA_CAPABILITIES);
  m.attr("cuda_architectures") = split(DVLA_CUDA_ARCHITECTURES);
  m.attr("compiler") = DVLA_COMPILER;
  m.attr("cuda_compiler") = DVLA_CUDA_COMPILER;
  m.def("cpu_capability", &cpu_capability, "Best instruction set this CPU can run.");
  m.def("philox4x32", &philox4x32, "The random generator of the policy, for known-answer tests.");
}
