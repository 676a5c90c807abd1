// SPDX-License-Identifier: Apache-2.0
// y = h U^T + x base^T + x S^T + bias for 16-bit types in one launch, all on tensor cores: a tile
// of S is zeros in shared memory with its few entries written over them. S is read once per tile of
// tokens in its own few bytes; nothing but y is written.
#pragma once
#include "sparse_low_rank/sparse_tiles_cuda.cuh"

namespace structmat::sparse_low_rank {

struct ScatterProduct {
  StridedProduct low_rank, base;  // without data, or inner = 0, where there is none
  StridedProduct x;               // A = x, C = y, with the bias
  SparsePatternView pattern;
  const void* values = nullptr;
};

// Four lanes follow a row of S from step to step, each row of a thread kThreads / 4 below the last.
template <class T, int kRows, int kThreads>
class RowCursors {
 public:
  static constexpr int kOfThread = kRows * 4 / kThreads;
  static_assert(kOfThread * kThreads == kRows * 4);

  __device__ RowCursors(const SparsePatternView& pattern, const T* values, std::int64_t row0,
                        int thread)
      : columns_(pattern.columns), values_(values), row_(thread / 4), lane_(thread % 4) {
    SM_UNROLL
    for (int q = 0; q < kOfThread; ++q) {
      const std::int64_t row = row0 + row_ + q * (kThreads / 4);
      if (row >= pattern.rows) continue;
      const RowOfPattern where(pattern, row);
      slab_[q] = pattern.starts + where.starts;
      shift_[q] = where.shift;
    }
  }

  // Writes the entries of the kDepth columns from `column` on to a panel of zeros, and asks for
  // those of the next step.
  template <class Panel>
  __device__ void scatter(Panel& panel, std::int64_t column) {
    const int begin = static_cast<int>(column % sparse_slab_columns);
    if (begin == 0) {
      SM_UNROLL
      for (int q = 0; q < kOfThread; ++q) {
        if (slab_[q] != nullptr) {
          next_[q] = static_cast<int>(slab_[q][0]), end_[q] = static_cast<int>(slab_[q][1]);
          ++slab_[q];
        }
        fetch(q);
      }
    }
    SM_UNROLL
    for (int q = 0; q < kOfThread; ++q) {
      for (bool more = true; more;) {
        const bool inside = column_[q] - begin < cuda::kDepth;  // as columns ascend
        if (inside) *panel.at(row_ + q * (kThreads / 4), column_[q] - begin) = value_[q];
        const unsigned all = __ballot_sync(~0u, inside);
        const int count = __popc(all >> (threadIdx.x % 32 & ~3u) & 15u);
        next_[q] += count;
        if (count > 0) fetch(q);
        more = __any_sync(~0u, count == 4) != 0;
      }
    }
  }

 private:
  __device__ void fetch(int q) {
    const int entry = next_[q] + lane_;
    column_[q] = 2 * static_cast<int>(sparse_slab_columns);  // beyond any step
    if (entry >= end_[q]) return;
    column_[q] = columns_[entry];
    value_[q] = values_[entry + shift_[q]];
  }

  const std::uint16_t* columns_;
  const T* values_;
  int row_, lane_;
  const std::int64_t* slab_[kOfThread] = {};
  int next_[kOfThread] = {}, end_[kOfThread] = {}, shift_[kOfThread] = {}, column_[kOfThread] = {};
  T value_[kOfThread] = {};
};

// kWay: of h and x; kWeightWay: of U and base.
template <class T, class S, cuda::Way kWay, cuda::Way kWeightWay>
struct ScatterTile {
  using Product = cuda::MmaTile<T, S, kWay, kWeightWay, false>;
  struct Stage {
    alignas(16) cuda::Panel<T, S::kRows, kWay, false> x;
    alignas(16) cuda::Panel<T, S::kCols, cuda::Way::columns, false> s;
  };
  struct Stages {
    decltype(Product::at) at;
    Stage stage[cuda::kStages];
  };
  union {
    Product product;
    Stages stages;
  };
};

// sum += x S^T over the tile. One meeting a step: while panels k are multiplied, entries of step
// k + 1 go to a panel that was cleared during step k - 1, and that of step k - 1 is cleared.
template <class T, class S, class Stages>
__device__ void add_scattered(const ScatterProduct& args, const cuda::Tile& tile, Stages& shared,
                              cuda::WarpSums<S>& sum, int thread) {
  using cuda::kDepth;
  using cuda::kStages;
  constexpr int kThreads = S::kThreads;
  static_assert(kStages == 3);
  const StridedProduct& p = args.x;
  const int lane = thread % 32, warp = thread / 32;
  const int row = warp / S::kAcross * S::kA * 16, col = warp % S::kAcross * S::kB * 16;
  const int steps = static_cast<int>(cuda::tiles_of(tile.inner, kDepth));
  const T* const x = cuda::operand<T>(p.a, 0);
  RowCursors<T, S::kCols, kThreads> cursors(args.pattern, static_cast<const T*>(args.values),
                                            tile.col, thread);
  const auto clear = [&](int step) {
    auto* const packs = reinterpret_cast<uint4*>(&shared.stage[step % kStages].s);
    constexpr int kCount = sizeof(shared.stage[0].s) / sizeof(uint4);
    SM_ROLLED
    for (int i = thread; i < kCount; i += kThreads) packs[i] = uint4{0, 0, 0, 0};
  };
  const auto load = [&](int step) {
    if (step < steps) {
      const std::int64_t left = tile.inner - std::int64_t{step} * kDepth;
      shared.stage[step % kStages].x.template load<kThreads>(
          x, shared.at.a_row, shared.at.a_inner[step % 4], tile.height,
          left < kDepth ? static_cast<int>(left) : kDepth, thread);
    }
    cuda::copy_commit();
  };
  shared.at.start(p, tile, thread, kThreads);
  SM_ROLLED
  for (int s = 0; s < kStages; ++s) shared.at.step(p, tile, s, thread);
  clear(0);
  clear(1);
  __syncthreads();
  SM_ROLLED
  for (int s = 0; s < kStages - 1; ++s) load(s);
  cursors.scatter(shared.stage[0].s, 0);
  SM_ROLLED
  for (int step = 0; step < steps; ++step) {
    cuda::copy_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    shared.at.step(p, tile, step + kStages, thread);
    clear(step + 2);
    if (step + 1 < steps)
      cursors.scatter(shared.stage[(step + 1) % kStages].s, std::int64_t{step + 1} * kDepth);
    auto& now = shared.stage[step % kStages];
    cuda::multiply_panels<T, S>(now.x, now.s, sum, row, col, lane);
  }
  cuda::copy_wait<0>();
  __syncthreads();
}

template <class T, class S, cuda::Way kWay, cuda::Way kWeightWay>
__global__ void __launch_bounds__(S::kThreads, 512 / S::kThreads)
    scatter_product_kernel(ScatterProduct args, bool y_packs) {
  using Shared = ScatterTile<T, S, kWay, kWeightWay>;
  constexpr int kThreads = S::kThreads;
  SM_DYNAMIC_SHARED(Shared, shared);
  const int thread = threadIdx.x;
  const StridedProduct& p = args.x;
  cuda::Tile tile = cuda::tile_of_block<S::kRows, S::kCols>(p, 1);
  cuda::WarpSums<S> sum = {};
  SM_ROLLED
  for (int i = 0; i < 2; ++i) {
    const StridedProduct& dense = i == 0 ? args.low_rank : args.base;
    if (dense.inner == 0) continue;
    tile.inner = dense.inner;
    cuda::add_product<T, S, kWay, kWeightWay, false>(dense, tile, shared->product, sum, thread);
  }
  tile.inner = p.inner;
  add_scattered<T, S>(args, tile, shared->stages, sum, thread);
  auto& out = shared->product;
  out.at.finish(p, tile, thread, kThreads);
  cuda::share_sums<S>(sum, out.sums, thread);
  __syncthreads();
  cuda::finish_sums<T, kThreads>(p, tile, out.sums, out.at, thread);
  if (y_packs)
    cuda::store_packs<T, kThreads>(p, tile, out.sums, out.at, thread);
  else
    cuda::store_sums<T, kThreads>(p, tile, out.sums, out.at, thread);
}

template <class T, class S, cuda::Way kWay, cuda::Way kWeightWay>
void launch_scatter(const Context& context, const ScatterProduct& args) {
  using Shared = ScatterTile<T, S, kWay, kWeightWay>;
  const StridedProduct& p = args.x;
  SM_ALLOW_SHARED((scatter_product_kernel<T, S, kWay, kWeightWay>));
  SM_LAUNCH((scatter_product_kernel<T, S, kWay, kWeightWay>),
            (cuda::grid_of<S::kRows, S::kCols>(p, 1)), S::kThreads, sizeof(Shared), context.stream,
            args, cuda::packs(p.c.data, p.c.col, p.c.row, p.c.batch));
}

// y = h u^T + x base^T + x S^T + bias. `transposed`: u and base are given as their transposes.
template <class T>
void multiply_scattered(const Context& context, const SparseProduct& s, const ConstMatrixView& h,
                        const ConstMatrixView& u, const ConstMatrixView& base, bool transposed) {
  if (s.y.rows == 0 || s.y.cols == 0) return;
  using cuda::Axis;
  using cuda::Operand;
  const auto rows_of = [](const ConstMatrixView& a) {
    return Operand{a.data, {}, Axis::linear(a.row_stride), Axis::linear(1)};
  };
  const auto weight = [&](const ConstMatrixView& a) {
    Operand out = rows_of(a);
    if (transposed) std::swap(out.row, out.col);
    return out;
  };
  ScatterProduct args;
  StridedProduct& p = args.x;
  p.dtype = s.x.dtype, p.batches = 1, p.rows = s.y.rows, p.cols = s.y.cols, p.inner = s.x.cols;
  p.a = rows_of(s.x), p.c = rows_of(s.y), p.bias = s.bias;
  args.low_rank = args.base = p;
  args.low_rank.inner = h.cols, args.low_rank.a = rows_of(h), args.low_rank.b = weight(u);
  args.base.inner = base.data == nullptr ? 0 : s.x.cols, args.base.b = weight(base);
  args.pattern = s.pattern, args.values = s.values;

  const auto whole = [](const Operand& x) {  // or not there
    return x.data == nullptr || cuda::packs(x.data, x.col, x.row, x.batch) ||
           cuda::packs(x.data, x.row, x.col, x.batch);
  };
  using Large = cuda::Shape<128, 128, 2, 4>;
  using Small = cuda::Shape<64, 64, 2, 2>;
  constexpr cuda::Way rows = cuda::Way::rows, columns = cuda::Way::columns,
                      numbers = cuda::Way::numbers;
  if (!whole(p.a) || !whole(args.low_rank.a) || !whole(args.low_rank.b) || !whole(args.base.b))
    return launch_scatter<T, Small, numbers, numbers>(context, args);
  const bool large = p.rows > 256;  // before that, small tiles give more blocks
  if (transposed)
    return large ? launch_scatter<T, Large, columns, rows>(context, args)
                 : launch_scatter<T, Small, columns, rows>(context, args);
  large ? launch_scatter<T, Large, columns, columns>(context, args)
        : launch_scatter<T, Small, columns, columns>(context, args);
}

}  // namespace structmat::sparse_low_rank
