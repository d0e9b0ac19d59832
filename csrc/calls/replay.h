// Launches of Triton kernels, repeated without Python. Planning a launch and binding its arguments
// there costs more than a few-shot problem takes on a GPU. All of it but the addresses follows from
// sizes, strides, types and numbers, so the first call of a kind runs in Python and is recorded
// (dvla_fast/ops/replay.py); each later call of that kind allocates and launches the same from
// here.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace dvla_fast::replay {

// The ops that are recorded; kOps[i] names op i.
inline constexpr const char* kOps[] = {"dual_attention_forward", "dual_attention_backward",
                                       "gate_policy_forward", "gate_policy_backward"};

using Key = c10::SmallVector<int64_t, 160>;

// An op with its arguments, added in the order of its schema.
class Call {
 public:
  explicit Call(int64_t op);
  void add(const at::Tensor& tensor);
  void add(const std::optional<at::Tensor>& tensor);
  void add(int64_t number) { key_.push_back(number); }
  void add(bool flag) { key_.push_back(flag); }
  void add(double number);

  const Key& key() const { return key_; }
  const c10::SmallVector<const at::Tensor*, 16>& tensors() const { return tensors_; }

 private:
  Key key_;  // everything that a launch depends on but the addresses
  c10::SmallVector<const at::Tensor*, 16> tensors_;
};

// Where a parameter of a kernel comes from: a number as it is, or the address of a tensor.
enum class Source : int64_t { number, argument, result, scratch };

struct Parameter {
  Source source;
  int64_t index;  // of the tensor among those of its source
  int64_t value;  // bits of the number; bytes from the tensor's first element
};

struct Launch {
  void* function;  // CUfunction
  unsigned grid, threads, shared;
  std::vector<Parameter> parameters;
};

struct Layout {
  std::vector<int64_t> sizes, strides;
  at::ScalarType type;
};

struct Recording {
  std::vector<Layout> results, scratch;
  std::vector<Launch> launches;
  std::shared_ptr<void> kept;  // what keeps the functions loaded
};

void record(const Key& key, Recording recording);
void forget();
int64_t recordings();

// The results; none if no such call was recorded, or no launch is possible from this thread yet.
std::optional<std::vector<at::Tensor>> repeat(const Call& call);

// The driver's cuLaunchKernel and cuCtxGetCurrent, for tests on machines without one; 0: its own.
void use_driver(int64_t launch, int64_t current_context);

}  // namespace dvla_fast::replay
