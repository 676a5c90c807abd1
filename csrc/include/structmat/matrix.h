// SPDX-License-Identifier: Apache-2.0
// Non-owning views of dense matrices and vectors. The core never allocates the data of its
// operands.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace structmat {

// Storage of the 16-bit types. Arithmetic on them is done in fp32.
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

enum class DType : std::int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr std::size_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
constexpr const char* name_of(DType dtype) {
  return dtype == DType::f32    ? "float32"
         : dtype == DType::f64  ? "float64"
         : dtype == DType::bf16 ? "bfloat16"
                                : "float16";
}

template <class T>
constexpr DType dtype_of() {
  using U = std::remove_const_t<T>;
  static_assert(std::is_same_v<U, float> || std::is_same_v<U, double> ||
                    std::is_same_v<U, bfloat16> || std::is_same_v<U, float16>,
                "structmat has float, double, bfloat16 and float16");
  return std::is_same_v<U, float>      ? DType::f32
         : std::is_same_v<U, double>   ? DType::f64
         : std::is_same_v<U, bfloat16> ? DType::bf16
                                       : DType::f16;
}

// A row-major 2-D view of `dtype`: element (i, j) lies at data[i * row_stride + j].
struct MatrixView {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;  // in elements

  MatrixView() = default;
  MatrixView(void* data, DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t row_stride)
      : data(data), dtype(dtype), rows(rows), cols(cols), row_stride(row_stride) {}
  template <class T>
  MatrixView(T* data, std::int64_t rows, std::int64_t cols)
      : MatrixView(data, dtype_of<T>(), rows, cols, cols) {}
};

struct ConstMatrixView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;

  ConstMatrixView() = default;
  ConstMatrixView(const void* data, DType dtype, std::int64_t rows, std::int64_t cols,
                  std::int64_t row_stride)
      : data(data), dtype(dtype), rows(rows), cols(cols), row_stride(row_stride) {}
  ConstMatrixView(const MatrixView& m)
      : ConstMatrixView(m.data, m.dtype, m.rows, m.cols, m.row_stride) {}
  template <class T>
  ConstMatrixView(const T* data, std::int64_t rows, std::int64_t cols)
      : ConstMatrixView(data, dtype_of<T>(), rows, cols, cols) {}
};

// A 4-D array read through its strides, which are in elements and may be anything: element
// (a, b, c, d) lies at data[a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3]].
struct ConstArrayView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t sizes[4] = {0, 0, 0, 0};
  std::int64_t strides[4] = {0, 0, 0, 0};
};

// A contiguous vector; `data == nullptr` stands for "none" where an argument is optional.
struct VectorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t size = 0;

  VectorView() = default;
  VectorView(void* data, DType dtype, std::int64_t size) : data(data), dtype(dtype), size(size) {}
  template <class T>
  VectorView(T* data, std::int64_t size) : VectorView(data, dtype_of<T>(), size) {}
};

struct ConstVectorView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t size = 0;

  ConstVectorView() = default;
  ConstVectorView(const void* data, DType dtype, std::int64_t size)
      : data(data), dtype(dtype), size(size) {}
  ConstVectorView(const VectorView& v) : ConstVectorView(v.data, v.dtype, v.size) {}
  template <class T>
  ConstVectorView(const T* data, std::int64_t size) : ConstVectorView(data, dtype_of<T>(), size) {}
};

}  // namespace structmat
