// SPDX-License-Identifier: Apache-2.0
// Tensor -> core view, and the Context a tensor implies, over LibTorch's stable ABI only.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>

#include "structmat/activation.h"
#include "structmat/context.h"
#include "structmat/matrix.h"
#include "structmat/svd.h"

// Exported by libtorch_cuda only. A weak reference lets this library load next to a CPU-only
// libtorch, where the address is null and no CUDA tensor can exist.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

// Each operator has one function for CPU and CUDA tensors. For tests the same sources are built a
// second time as namespace `structmat_emulated`, whose CPU tensors take the CUDA path on the
// emulator.
#ifdef STRUCTMAT_EMULATE
#define STRUCTMAT_OPS structmat_emulated
#else
#define STRUCTMAT_OPS structmat
#endif
#define STRUCTMAT_EXPAND(macro, ...) macro(__VA_ARGS__)
#define STRUCTMAT_LIBRARY(m) STRUCTMAT_EXPAND(STABLE_TORCH_LIBRARY, STRUCTMAT_OPS, m)
#define STRUCTMAT_IMPL(key, m) STRUCTMAT_EXPAND(STABLE_TORCH_LIBRARY_IMPL, STRUCTMAT_OPS, key, m)
#ifdef STRUCTMAT_EMULATE
#define STRUCTMAT_REGISTER(name, function) \
  STRUCTMAT_IMPL(CPU, m) {                 \
    m.impl(name, TORCH_BOX(function));     \
  }
#else
#define STRUCTMAT_REGISTER(name, function) \
  STRUCTMAT_IMPL(CPU, m) {                 \
    m.impl(name, TORCH_BOX(function));     \
  }                                        \
  STRUCTMAT_IMPL(CUDA, m) {                \
    m.impl(name, TORCH_BOX(function));     \
  }
#endif

namespace structmat::torch_bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, bfloat16 or float16, got ",
                      t.scalar_type());
  }
  return DType::f32;
}

// Where the operation runs: made from its first tensor, alive during the call. On CUDA it makes the
// tensor's device current and carries torch's current stream.
class Scope {
 public:
  explicit Scope(const Tensor& t) {
#ifdef STRUCTMAT_EMULATE
    static_cast<void>(t);
    context.device = Device::cuda;
#else
    if (!t.is_cuda()) return;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "structmat: this torch has no CUDA support");
    context.device = Device::cuda;
    guard_.emplace(t.get_device_index());
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(t.get_device_index(), &context.stream));
#endif
  }

  // Lends device memory to the core; torch's allocator owns it, so that CUDA graphs work.
  void lend_workspace(const Tensor& like, std::size_t bytes) {
    if (bytes == 0) return;
    workspace_ =
        torch::stable::new_empty(like, {static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
    context.workspace = workspace_->data_ptr();
    context.workspace_bytes = bytes;
  }

  Context context;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  std::optional<Tensor> workspace_;
};

inline void check_same_device(const Tensor& x, const Tensor& other, const char* op,
                              const char* name) {
  STD_TORCH_CHECK(x.is_cuda() == other.is_cuda() &&
                      (!x.is_cuda() || x.get_device_index() == other.get_device_index()),
                  op, ": ", name, " is on another device than the first argument");
}

// Rows must be contiguous; the rest of the layout is free. Copies only where they are not.
inline Tensor with_contiguous_rows(const Tensor& t) {
  const bool fine = t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1) &&
                    (t.stride(0) >= t.size(1) || t.size(0) <= 1);
  return fine ? t : torch::stable::contiguous(t);
}

inline MatrixView matrix_view(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must have 2 dimensions, got ", t.dim());
  return {t.data_ptr(), dtype_of(t, op, name), t.size(0), t.size(1),
          t.size(0) > 1 ? t.stride(0) : t.size(1)};
}

inline StridedMatrixView strided_matrix_view(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must have 2 dimensions, got ", t.dim());
  return {t.data_ptr(), dtype_of(t, op, name), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// Any strides will do; nothing is copied.
inline ConstArrayView array_view(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", name, " must have 4 dimensions, got ", t.dim());
  ConstArrayView view{t.data_ptr(), dtype_of(t, op, name)};
  for (int d = 0; d < 4; ++d) {
    view.sizes[d] = t.size(d);
    view.strides[d] = t.stride(d);
  }
  return view;
}

constexpr std::size_t kMaxDims = 64;  // torch's own limit

// New memory is the system's, page by page as it is first written: asked for in pages of 2 MB,
// where the system gives them, 64 MB come in 0.3 of the time. Memory that was used before stays as
// it is.
inline void use_large_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const std::int64_t bytes = t.numel() * static_cast<std::int64_t>(t.element_size());
  if (bytes < (std::int64_t{4} << 20) || !t.is_cpu()) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(t.data_ptr());
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                       last = (begin + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(t);
#endif
}

// An uninitialized contiguous tensor of the dtype and device of `like`. torch::stable::new_empty
// goes through the dispatcher by name, which costs 0.7 us more.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::int64_t strides[kMaxDims];
  std::int64_t step = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  std::int32_t dtype = 0, device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()),
                                                  sizes.data(), strides, dtype, device, index,
                                                  &handle));
  const Tensor t(handle);
  use_large_pages(t);
  return t;
}

// like.shape[:-1] + (last,)
inline Tensor new_rows(const Tensor& like, std::int64_t last) {
  const auto sizes = like.sizes();
  std::int64_t shape[kMaxDims];
  std::copy(sizes.begin(), sizes.end(), shape);
  shape[sizes.size() - 1] = last;
  return new_tensor(like, {shape, sizes.size()});
}

// Stands for a gradient that nobody asked for.
inline Tensor nothing(const Tensor& like) {
  return new_tensor(like, {0});
}

// t (..., n) as a matrix of rows, its leading dimensions taken as one; copies only where strides
// leave no single step from row to row.
struct Rows {
  Tensor tensor;  // keeps a copy alive
  ConstMatrixView view;

  Rows(const Tensor& t, const char* op, const char* name) : tensor(t) {
    STD_TORCH_CHECK(t.dim() >= 1, op, ": ", name, " must have at least 1 dimension, got 0");
    const DType dtype = dtype_of(t, op, name);
    std::int64_t step = 0;
    if (!has_single_step(step)) {
      tensor = torch::stable::contiguous(t);
      has_single_step(step);
    }
    const auto sizes = tensor.sizes();
    const std::int64_t cols = sizes[sizes.size() - 1];
    std::int64_t rows = 1;
    for (std::size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
    view = {tensor.data_ptr(), dtype, rows, cols, rows > 1 ? step : cols};
  }

 private:
  bool has_single_step(std::int64_t& step) const {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    std::size_t d = sizes.size() - 1;
    if (strides[d] != 1 && sizes[d] > 1) return false;
    std::int64_t next = -1;  // the stride that the next dimension outwards must have
    step = sizes[d];
    while (d-- > 0) {
      if (sizes[d] == 1) continue;
      if (next < 0)
        step = strides[d];
      else if (strides[d] != next)
        return false;
      next = strides[d] * sizes[d];
    }
    return next < 0 || step >= sizes[sizes.size() - 1];
  }
};

inline VectorView vector_view(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1, op, ": ", name, " must have 1 dimension, got ", t.dim());
  return {t.data_ptr(), dtype_of(t, op, name), t.size(0)};
}

// An optional bias, on the device of `x`; copies only where its elements do not lie side by side.
struct Bias {
  std::optional<Tensor> tensor;  // keeps a copy alive
  ConstVectorView view;

  Bias(const Tensor& x, const std::optional<Tensor>& b, const char* op) {
    if (!b) return;
    check_same_device(x, *b, op, "bias");
    const bool fine = b->dim() != 1 || b->stride(0) == 1 || b->size(0) <= 1;
    tensor = fine ? *b : torch::stable::contiguous(*b);
    view = vector_view(*tensor, op, "bias");
  }
};

inline Activation activation_of(std::int64_t code, const char* op) {
  STD_TORCH_CHECK(code >= 0 && code <= 3, op, ": activation is ", code,
                  ", wanted 0 (none), 1 (relu), 2 (gelu) or 3 (silu)");
  return static_cast<Activation>(code);
}

}  // namespace structmat::torch_bindings
