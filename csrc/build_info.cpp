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
struct Registers {
  explicit Registers(unsigned leaf, unsigned part = 0) {
    if (!__get_cpuid_count(leaf, part, &a, &b, &c, &d)) a = b = c = d = 0;
  }
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// Whether this CPU has the tile instructions for bfloat16 and the system lets this process use them
// (the tile registers are large: Linux hands them out on request).
bool amx_permitted() {
  constexpr unsigned kTiles = 1U << 24, kBf16 = 1U << 22;
  const unsigned features = Registers(7).d;
  if (!(features & kTiles) || !(features & kBf16)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool avx512_bf16() { return Registers(7, 1).a & (1U << 5); }

// Conversions of float16; not every compiler's __builtin_cpu_supports knows them.
bool f16c() { return Registers(1).c & (1U << 29); }

// Whether bfloat16 products in vectors are slow: Intel's processors with tiles, which also have
// AVX512-FP16, start one every other cycle (seen on Emerald Rapids), half the rate at which float32
// products get through the same numbers.
bool slow_bf16_vectors() {
  const bool intel = Registers(0).b == signature_INTEL_ebx;
  return intel && (Registers(7).d & (1U << 23));
}
#else
bool amx_permitted() { return false; }
bool avx512_bf16() { return false; }
bool f16c() { return true; }  // as all of them with AVX2 but some virtual machines
bool slow_bf16_vectors() { return false; }
#endif

// The instruction sets of this machine among those the library may be built for; each needs those
// before it.
std::vector<std::string> cpu_runs() {
  std::vector<std::string> sets{"default"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !f16c()) return sets;
  sets.emplace_back("avx2");
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return sets;
  }
  sets.emplace_back("avx512");
  if (avx512_bf16()) {
    sets.emplace_back("avx512_bf16");
    if (amx_permitted()) sets.emplace_back("amx");
  }
#endif
  return sets;
}

// The fastest of them.
std::string cpu_capability() {
  const std::string best = cpu_runs().back();
  return best == "avx512_bf16" && slow_bf16_vectors() ? "avx512" : best;
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
  m.def("cpu_runs", &cpu_runs, "Instruction sets this CPU can run.");
  m.def("cpu_capability", &cpu_capability, "The fastest of them.");
  m.def("philox4x32", &philox4x32, "The random generator of the policy, for known-answer tests.");
}
