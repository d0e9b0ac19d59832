// The Python module dvla_fast._build_info: what was built, and what this CPU can run. It needs no
// torch, so it can be asked before anything is loaded that does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#if defined(__x86_64__) && defined(__linux__)
// Whether this CPU has the tile instructions for bfloat16 and the system lets this process use them
// (the tile registers are large: Linux hands them out on request).
bool amx_permitted() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTiles = 1U << 24, kBf16 = 1U << 22;
  if (!(d & kTiles) || !(d & kBf16)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1U << 5));
}
#else
bool amx_permitted() { return false; }
bool avx512_bf16() { return false; }
#endif

// The best instruction set of this machine among those the library is built for.
std::string cpu_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (!avx512_bf16()) return "avx512";
    return amx_permitted() ? "amx" : "avx512_bf16";
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
  m.attr("schemas") = DVLA_SCHEMAS;
  m.attr("cpu_capabilities") = split(DVLA_CAPABILITIES);
  m.attr("cuda_architectures") = split(DVLA_CUDA_ARCHITECTURES);
  m.attr("compiler") = DVLA_COMPILER;
  m.attr("cuda_compiler") = DVLA_CUDA_COMPILER;
  m.def("cpu_capability", &cpu_capability, "Best instruction set this CPU can run.");
  m.def("philox4x32", &philox4x32, "The random generator of the policy, for known-answer tests.");
}
