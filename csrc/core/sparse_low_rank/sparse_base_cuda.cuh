// SPDX-License-Identifier: Apache-2.0
// y += x base^T and dx += dy base for a base of 16 bits beside f32, a pair that cuBLAS does not
// take: rows of the base are widened, never more than kWidened numbers of them at a time.
#pragma once
#include "cuda/arena.h"
#include "cuda/device.h"
#include "cuda/gemm.h"
#include "half.h"
#include "structmat/sparse_low_rank.h"

namespace structmat::sparse_low_rank {

constexpr int kWidenThreads = 256;
constexpr std::int64_t kWidened = std::int64_t{1} << 23;  // 32 MB, of the level-2 cache's 40 or 50

// A block per row.
template <class T>
__global__ void __launch_bounds__(kWidenThreads)
    widen_kernel(const T* from, std::int64_t stride, std::int64_t cols, float* to) {
  from += blockIdx.x * stride, to += blockIdx.x * cols;
  for (std::int64_t j = threadIdx.x; j < cols; j += kWidenThreads) to[j] = to_float(from[j]);
}

class NarrowBase {
 public:
  // Takes the base out of `weights` where it is narrower than the other parts.
  explicit NarrowBase(SparseLowRankWeights& weights) {
    if (weights.base.data == nullptr || weights.base.dtype == weights.values.dtype) return;
    std::swap(base_, weights.base);
    rows_ = std::max<std::int64_t>(
        1, std::min(base_.rows, kWidened / std::max<std::int64_t>(1, base_.cols)));
    if (rows_ > 64) rows_ = rows_ / 64 * 64;  // blocks begin at whole packs
  }

  // What add() needs, from the beginning of the workspace: it comes when all else is done.
  std::size_t bytes() const { return base_.data == nullptr ? 0 : take(nullptr).bytes; }

  // y += x base^T, or x base
  void add(const Context& context, const ConstMatrixView& x, bool transposed,
           const MatrixView& y) const {
    if (base_.data == nullptr || x.rows == 0) return;
    const Space space = take(context.workspace);
    for (std::int64_t i = 0; i < base_.rows; i += rows_) {
      const std::int64_t rows = std::min(rows_, base_.rows - i);
      dispatch_dtype(base_.dtype, [&](auto element) {
        using T = decltype(element);
        if constexpr (sizeof(T) == 2)
          SM_LAUNCH(widen_kernel<T>, static_cast<unsigned>(rows), kWidenThreads, 0, context.stream,
                    static_cast<const T*>(base_.data) + i * base_.row_stride, base_.row_stride,
                    base_.cols, space.wide);
      });
      cuda::Gemm g;
      g.m = x.rows, g.beta = 1;
      g.n = transposed ? rows : base_.cols, g.k = transposed ? base_.cols : rows;
      g.a = static_cast<const float*>(x.data) + (transposed ? 0 : i),
      g.lda = std::max(x.row_stride, x.cols);
      g.b = space.wide, g.ldb = base_.cols, g.trans_b = transposed;
      g.c = static_cast<float*>(y.data) + (transposed ? i : 0),
      g.ldc = std::max(y.row_stride, y.cols);
      if (g.n > 0 && g.k > 0) cuda::gemm(context, g, space.gemm);
    }
  }

 private:
  struct Space {
    float* wide;
    void* gemm;
    std::size_t bytes;
  };
  Space take(void* memory) const {
    cuda::Arena arena(memory);
    float* const wide = arena.take<float>(rows_ * base_.cols);
    void* const gemm = arena.take<unsigned char>(cuda::kGemmWorkspace);
    return {wide, gemm, arena.used()};
  }

  ConstMatrixView base_;
  std::int64_t rows_ = 1;  // widened at a time
};

}  // namespace structmat::sparse_low_rank
