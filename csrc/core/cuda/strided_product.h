// SPDX-License-Identifier: Apache-2.0
// Batched products on the GPU whose operands are read and written through maps from indices to
// addresses, so that a permutation costs no pass over memory: C = act(A B^T + bias).
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ceil_div.h"
#include "half.h"
#include "structmat/activation.h"
#include "structmat/context.h"
#include "structmat/matrix.h"

namespace structmat::cuda {

// One index of an operand. Index c of batch b stands for u = b * shift + c * step, whose element
// lies u / divisor * high + u % divisor * low after the origin; u * low without a divisor.
struct Axis {
  std::int64_t low = 0, high = 0, divisor = 0, shift = 0, step = 1;

  static Axis linear(std::int64_t stride) { return {stride, 0, 0, 0, 1}; }
  static Axis split(std::int64_t divisor, std::int64_t high, std::int64_t low) {
    if (high == divisor * low) return linear(low);
    if (divisor == 1) return linear(high);
    return {low, high, divisor, 0, 1};
  }
  STRUCTMAT_HOST_DEVICE std::int64_t at(std::int64_t batch, std::int64_t c) const {
    const std::int64_t u = batch * shift + c * step;
    if (divisor == 0) return u * low;
    if (((u | divisor) >> 32) == 0) {  // a division of 64-bit numbers takes four times as long
      const auto quotient = static_cast<std::uint32_t>(u) / static_cast<std::uint32_t>(divisor);
      return quotient * high + (u - quotient * divisor) * low;
    }
    return u / divisor * high + u % divisor * low;
  }
};

struct Operand {
  const void* data = nullptr;
  Axis batch, row, col;
};

// C[b](r, c) = act(sum_i A[b](r, i) B[b](c, i) + bias), for all b < batches. A, B, C and bias are
// of `dtype`; sums are kept in fp32 (fp64 for f64). Element (b, r, c) of C has the bias that lies
// where C's maps of b and c lead: C's rows are those of a matrix with bias along its columns.
struct StridedProduct {
  DType dtype = DType::f32;
  std::int64_t batches = 0, rows = 0, cols = 0, inner = 0;
  Operand a;          // (rows, inner)
  Operand b;          // (cols, inner)
  Operand c;          // (rows, cols), not const
  bool tall = false;  // A and B are read along rows and cols, a sum over tokens
  const void* bias = nullptr;
  Activation activation = Activation::none;
  // The sum is cut into that many, of `split_inner` terms each, added in order afterwards; their
  // partial sums lie in `partial`, splits * batches * rows * cols of the type of the sum.
  std::int64_t splits = 1, split_inner = 0;
  void* partial = nullptr;
};

// Enqueues on context.stream.
void multiply(const Context& context, const StridedProduct& product);

// ---- What follows from the maps ----------------------------------------------------------------

constexpr int kPack = 8;  // 16-bit numbers of a copy of 16 bytes

// 16-byte copies along `along` reach the right elements: those of a pack lie side by side, and
// packs are aligned.
inline bool packs(const void* data, const Axis& along, const Axis& across, const Axis& batch) {
  const auto whole = [](const Axis& axis) {
    return axis.low % kPack == 0 && axis.high % kPack == 0;
  };
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && along.low == 1 && along.step == 1 &&
         along.shift % kPack == 0 && along.high % kPack == 0 && along.divisor % kPack == 0 &&
         whole(across) && whole(batch);
}

// Batches that share packs of C, where those of one batch alone are shorter: R numbers of each of
// 8 / R batches lie side by side. Else 1.
inline std::int64_t interleaved_batches(const Operand& c) {
  const bool single = c.col.divisor == 0 && c.col.low > 1;  // R = 1
  const std::int64_t run = single ? 1 : c.col.divisor, count = run > 0 ? kPack / run : 1;
  const bool side_by_side = (single || ((run == 2 || run == 4) && c.col.low == 1)) &&
                            c.batch.low == run && c.col.shift == 0 && c.col.step == 1;
  const bool aligned = reinterpret_cast<std::uintptr_t>(c.data) % 16 == 0 &&
                       c.row.low % kPack == 0 && c.row.divisor == 0 &&
                       (single ? c.col.low : c.col.high) % kPack == 0 &&
                       c.batch.high % kPack == 0 && c.batch.divisor % count == 0;
  return side_by_side && aligned ? count : 1;
}

// Into how many parts a sum over tokens is cut, so that all multiprocessors have work: as sizes
// and device alone decide. Parts are multiples of 32 tokens, 256 at least.
struct Split {
  std::int64_t count = 1, inner = 0;
};
inline Split split_sum(std::int64_t batches, std::int64_t rows, std::int64_t cols,
                       std::int64_t inner, int multiprocessors) {
  const std::int64_t blocks =
      std::max<std::int64_t>(1, batches * ceil_div(rows, 64) * ceil_div(cols, 64));
  const std::int64_t wanted = ceil_div(4 * std::int64_t{multiprocessors}, blocks);
  const std::int64_t count =
      std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(1, inner / 256));
  Split split;
  split.inner = std::max<std::int64_t>(32, ceil_div(ceil_div(inner, count), 32) * 32);
  split.count = std::max<std::int64_t>(1, ceil_div(inner, split.inner));
  return split;
}

}  // namespace structmat::cuda
