// SPDX-License-Identifier: Apache-2.0
// Conversions between the 16-bit storage types and fp32, round to nearest even, NaN kept.
// Host and device; on the device one instruction each.
#pragma once
#include <cstdint>
#include <cstring>

#include "structmat/matrix.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define STRUCTMAT_HOST_DEVICE __host__ __device__
#else
#define STRUCTMAT_HOST_DEVICE
#endif

namespace structmat {

STRUCTMAT_HOST_DEVICE inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
STRUCTMAT_HOST_DEVICE inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

STRUCTMAT_HOST_DEVICE inline float to_float(float v) {
  return v;
}
STRUCTMAT_HOST_DEVICE inline double to_float(double v) {
  return v;
}
STRUCTMAT_HOST_DEVICE inline float to_float(bfloat16 v) {
  return bits_to_float(static_cast<std::uint32_t>(v.bits) << 16);
}
STRUCTMAT_HOST_DEVICE inline float to_float(float16 v) {
#if defined(__CUDA_ARCH__)
  __half h;
  std::memcpy(&h, &v.bits, 2);
  return __half2float(h);
#else
  // Shift the exponent and mantissa into place and rescale: exact for normals and subnormals.
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000u) << 16;
  const std::uint32_t rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  const float magnitude = bits_to_float(rest << 13) * 0x1p112f;
  return bits_to_float(sign | float_to_bits(magnitude));
#endif
}

template <class T>
STRUCTMAT_HOST_DEVICE inline T from_float(float v);
template <>
STRUCTMAT_HOST_DEVICE inline float from_float<float>(float v) {
  return v;
}
template <>
STRUCTMAT_HOST_DEVICE inline double from_float<double>(float v) {
  return v;
}
template <>
STRUCTMAT_HOST_DEVICE inline bfloat16 from_float<bfloat16>(float v) {
#if defined(__CUDA_ARCH__)
  const __nv_bfloat16 h = __float2bfloat16_rn(v);
  bfloat16 out;
  std::memcpy(&out.bits, &h, 2);
  return out;
#else
  const std::uint32_t bits = float_to_bits(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};  // quiet NaN
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}
template <>
STRUCTMAT_HOST_DEVICE inline float16 from_float<float16>(float v) {
#if defined(__CUDA_ARCH__)
  const __half h = __float2half_rn(v);
  float16 out;
  std::memcpy(&out.bits, &h, 2);
  return out;
#else
  const std::uint32_t bits = float_to_bits(v);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude <
      0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded subnormal in the low bits
    const std::uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return {static_cast<std::uint16_t>(sign | (shifted - 0x3f000000u))};
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
#endif
}

// The type sums are kept in: fp64 for fp64, fp32 for all others.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

// Calls f(T{}) with T the element type of `dtype`.
template <class F>
decltype(auto) dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bfloat16{});
    default:
      return f(float16{});
  }
}

}  // namespace structmat
