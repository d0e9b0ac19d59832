// Tensors made, and parts of tensors taken, inside a CPU kernel without PyTorch's dispatcher, whose
// calls take a microsecond each: of a small problem they would be a third of its time. There is
// neither autograd nor another device to ask.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/DimVector.h>

#include <algorithm>

namespace dvla_fast {

inline at::Tensor new_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    return at::empty(sizes, options);  // which fills it
  }
  return at::Tensor(at::detail::empty_cpu(sizes, options));
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
