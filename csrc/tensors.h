// Tensors made, and parts of tensors taken, inside a CPU kernel without PyTorch's dispatcher, whose
// calls take a microsecond each: of a small problem they would be a third of its time. There is
// neither autograd nor another device to ask.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/DimVector.h>
#include <sys/mman.h>

#include <algorithm>

namespace dvla_fast {

// Asks for large pages where malloc takes memory from the system anew each time (glibc: from 32 MiB
// on): 512 times fewer page faults, which are else a seventh of a large layer's time.
inline void prefer_large_pages(const at::Tensor& x) {
  constexpr size_t kAlwaysMapped = size_t{32} << 20, kPage = 4096;
  if (x.nbytes() < kAlwaysMapped) return;
  const auto first = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage;
  // A hint: where the system knows none, nothing is lost.
  (void)madvise(reinterpret_cast<void*>(begin), first + x.nbytes() - begin, MADV_HUGEPAGE);
}

inline at::Tensor new_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    return at::empty(sizes, options);  // which fills it
  }
  const at::Tensor x(at::detail::empty_cpu(sizes, options));
  prefer_large_pages(x);
  return x;
}

// float32 or float64.
inline at::Tensor new_filled(at::IntArrayRef sizes, double value,
                             const at::TensorOptions& options) {
  const at::Tensor x = new_empty(sizes, options);
  if (x.scalar_type() == at::kDouble) {
    std::fill_n(x.mutable_data_ptr<double>(), x.numel(), value);
  } else {
    std::fill_n(x.mutable_data_ptr<float>(), x.numel(), static_cast<float>(value));
  }
  return x;
}

inline at::Tensor strided(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides,
                          int64_t offset) {
  at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(x.storage()), x.key_set(), x.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return view;
}

// Places [first, first + count) of a dimension.
inline at::Tensor narrow(const at::Tensor& x, int64_t dim, int64_t first, int64_t count) {
  if (first == 0 && count == x.size(dim)) return x;
  TORCH_CHECK_INDEX(first >= 0 && count >= 0 && first + count <= x.size(dim), "places ", first,
                    " to ", first + count, " of a dimension of ", x.size(dim));
  c10::DimVector sizes(x.sizes());
  sizes[dim] = count;
  return strided(x, sizes, x.strides(), x.storage_offset() + first * x.stride(dim));
}

// Of a matrix.
inline at::Tensor transposed(const at::Tensor& x) {
  return strided(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)}, x.storage_offset());
}

}  // namespace dvla_fast
