#include "replay.h"

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>

#include <atomic>
#include <bit>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace dvla_fast::replay {

namespace {

constexpr size_t kMostRecordings = 4096;
constexpr uint64_t kAlignment = 16;  // what Triton tells apart in an address

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t word : key) {
      hash = (std::rotl(hash, 23) ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15u;
    }
    return hash ^ hash >> 32;
  }
};

struct Memory {
  std::shared_mutex mutex;
  std::unordered_map<Key, std::shared_ptr<const Recording>, Hash> recordings;
};

// Never destroyed: the interpreter, which the recordings hold objects of, ends before.
Memory& memory() {
  static auto* const instance = new Memory;
  return *instance;
}

// The two functions of the CUDA driver that are called, as cuda.h declares them.
struct Driver {
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                unsigned shared, void* stream, void** parameters, void** extra) = nullptr;
  int (*current_context)(void** context) = nullptr;

  static Driver loaded() {
    Driver driver;
    if (void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL)) {
      driver.launch = reinterpret_cast<decltype(driver.launch)>(dlsym(library, "cuLaunchKernel"));
      driver.current_context =
          reinterpret_cast<decltype(driver.current_context)>(dlsym(library, "cuCtxGetCurrent"));
    }
    return driver;
  }

  // A thread that has not used CUDA has no context yet; Triton's launcher gives it one.
  bool ready() const {
    void* context = nullptr;
    return launch != nullptr && current_context != nullptr && current_context(&context) == 0 &&
           context != nullptr;
  }
};

std::atomic<const Driver*> replaced{nullptr};

const Driver& driver() {
  static const Driver own = Driver::loaded();
  const Driver* other = replaced.load();
  return other == nullptr ? own : *other;
}

void* current_stream(at::Device device) {
  if (device.is_cpu()) return nullptr;  // in tests
  return c10::impl::getDeviceGuardImpl(device.type())->getStream(device).native_handle();
}

std::vector<at::Tensor> allocate(const std::vector<Layout>& layouts, at::Device device) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(layouts.size());
  for (const Layout& layout : layouts) {
    const auto options = at::TensorOptions().dtype(layout.type).device(device);
    tensors.push_back(at::empty_strided(layout.sizes, layout.strides, options));
  }
  return tensors;
}

uint64_t address_of(const at::Tensor& tensor) {
  return reinterpret_cast<uint64_t>(tensor.const_data_ptr());
}

}  // namespace

Call::Call(int64_t op) {
  key_.push_back(op);
  // What float32 products run in unless it is set (dvla_fast/ops/dual_attention_cuda.py).
  key_.push_back(
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
      at::Float32Precision::TF32);
}

void Call::add(const at::Tensor& tensor) {
  const uint64_t address = address_of(tensor);
  const bool aligned = address % kAlignment == 0;
  // A parameter is known by its address, so which inputs share one is part of what was recorded.
  size_t first = 0;
  while (first < tensors_.size() && address_of(*tensors_[first]) != address) ++first;
  key_.push_back(static_cast<int64_t>(first));
  key_.push_back(tensor.dim());
  key_.append(tensor.sizes().begin(), tensor.sizes().end());
  key_.append(tensor.strides().begin(), tensor.strides().end());
  key_.push_back(static_cast<int64_t>(tensor.scalar_type()) << 32 |
                 int64_t{tensor.device().index() + 1} << 1 | int64_t{aligned});
  tensors_.push_back(&tensor);
}

void Call::add(const std::optional<at::Tensor>& tensor) {
  if (tensor && tensor->defined()) return add(*tensor);
  key_.push_back(-1);
}

void Call::add(double number) { key_.push_back(std::bit_cast<int64_t>(number)); }

void record(const Key& key, Recording recording) {
  auto shared = std::make_shared<const Recording>(std::move(recording));
  const std::unique_lock lock(memory().mutex);
  if (memory().recordings.size() >= kMostRecordings) memory().recordings.clear();
  memory().recordings[key] = std::move(shared);
}

void forget() {
  const std::unique_lock lock(memory().mutex);
  memory().recordings.clear();
}

int64_t recordings() {
  const std::shared_lock lock(memory().mutex);
  return static_cast<int64_t>(memory().recordings.size());
}

void use_driver(int64_t launch, int64_t current_context) {
  if (launch == 0) return replaced.store(nullptr);
  auto* other = new Driver;  // never freed: a call in another thread may hold it
  other->launch = reinterpret_cast<decltype(other->launch)>(launch);
  other->current_context = reinterpret_cast<decltype(other->current_context)>(current_context);
  replaced.store(other);
}

std::optional<std::vector<at::Tensor>> repeat(const Call& call) {
  std::shared_ptr<const Recording> recording;
  {
    const std::shared_lock lock(memory().mutex);
    const auto found = memory().recordings.find(call.key());
    if (found == memory().recordings.end()) return std::nullopt;
    recording = found->second;
  }
  const at::Device device = call.tensors()[0]->device();
  const c10::DeviceGuard guard(device);
  if (!driver().ready()) return std::nullopt;
  std::vector<at::Tensor> results = allocate(recording->results, device);
  const std::vector<at::Tensor> scratch = allocate(recording->scratch, device);
  void* const stream = current_stream(device);

  for (const Launch& launch : recording->launches) {
    c10::SmallVector<uint64_t, 64> values;
    for (const Parameter& p : launch.parameters) {
      const uint64_t base = p.source == Source::argument  ? address_of(*call.tensors()[p.index])
                            : p.source == Source::result  ? address_of(results[p.index])
                            : p.source == Source::scratch ? address_of(scratch[p.index])
                                                          : 0;
      values.push_back(base + static_cast<uint64_t>(p.value));
    }
    c10::SmallVector<void*, 64> parameters;
    for (uint64_t& value : values) parameters.push_back(&value);
    const int status = driver().launch(launch.function, launch.grid, 1, 1, launch.threads, 1, 1,
                                       launch.shared, stream, parameters.data(), nullptr);
    TORCH_CHECK(status == 0, "dvla_fast: launching a kernel of ", kOps[call.key()[0]],
                " failed with CUDA driver error ", status);
  }
  return results;
}

}  // namespace dvla_fast::replay
