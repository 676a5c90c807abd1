// SPDX-License-Identifier: Apache-2.0
// y = h U^T + x base^T + x S^T + bias for 16-bit types in one launch, all on tensor cores, however
// x S^T is computed: a `Part` adds it to the sums of a tile, which a warp keeps in registers. Its
// kDense tells beside what: h U^T alone, and then x is the part's own to read, or x base^T, too.
#pragma once
#include "sparse_low_rank/sparse_tiles_cuda.cuh"

namespace structmat::sparse_low_rank {

struct JoinedProduct {
  StridedProduct dense[2];  // h U^T, x base^T; inner = 0 where there is none
  StridedProduct x;         // A = x, C = y, with the bias
};

// kWay: of h and x; kWeightWay: of U and base.
template <class T, class S, cuda::Way kWay, cuda::Way kWeightWay, class Part>
union JoinedTile {
  cuda::MmaTile<T, S, kWay, kWeightWay, false> product;
  typename Part::template Stages<T, S, kWay> stages;
};

template <class T, class S, cuda::Way kWay, cuda::Way kWeightWay, class Part>
__global__ void __launch_bounds__(S::kThreads, 512 / S::kThreads)
    joined_kernel(JoinedProduct args, Part part, bool y_packs) {
  using Shared = JoinedTile<T, S, kWay, kWeightWay, Part>;
  constexpr int kThreads = S::kThreads;
  SM_DYNAMIC_SHARED(Shared, shared);
  const int thread = threadIdx.x;
  const StridedProduct& p = args.x;
  cuda::Tile tile = cuda::tile_of_block<S::kRows, S::kCols>(p, 1);
  cuda::WarpSums<S> sum = {};
  SM_ROLLED
  for (int i = 0; i < Part::kDense; ++i) {
    const StridedProduct& dense = args.dense[i];
    if (dense.inner == 0) continue;
    tile.inner = dense.inner;
    cuda::add_product<T, S, kWay, kWeightWay, false>(dense, tile, shared->product, sum, thread);
  }
  tile.inner = p.inner;
  part.template add<T, S>(p, tile, shared->stages, sum, thread);
  __syncthreads();
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

template <class T, class S, cuda::Way kWay, cuda::Way kWeightWay, class Part>
void launch_joined(const Context& context, const JoinedProduct& args, const Part& part) {
  using Shared = JoinedTile<T, S, kWay, kWeightWay, Part>;
  const StridedProduct& p = args.x;
  SM_ALLOW_SHARED((joined_kernel<T, S, kWay, kWeightWay, Part>));
  SM_LAUNCH((joined_kernel<T, S, kWay, kWeightWay, Part>),
            (cuda::grid_of<S::kRows, S::kCols>(p, 1)), S::kThreads, sizeof(Shared), context.stream,
            args, part, cuda::packs(p.c.data, p.c.col, p.c.row, p.c.batch));
}

// y = h u^T + x base^T + part + bias. `transposed`: u and base are given as their transposes. Only
// a part beside two products takes a base.
template <class T, class Part>
void multiply_joined(const Context& context, const SparseProduct& s, const ConstMatrixView& h,
                     const ConstMatrixView& u, const ConstMatrixView& base, bool transposed,
                     const Part& part) {
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
  JoinedProduct args;
  StridedProduct& p = args.x;
  p.dtype = s.y.dtype, p.batches = 1, p.rows = s.y.rows, p.cols = s.y.cols, p.inner = s.x.cols;
  p.a = rows_of(s.x), p.c = rows_of(s.y), p.bias = s.bias;
  const auto whole = [](const Operand& x) {  // or not there
    return x.data == nullptr || cuda::packs(x.data, x.col, x.row, x.batch) ||
           cuda::packs(x.data, x.row, x.col, x.batch);
  };
  StridedProduct& low_rank = args.dense[0] = p;
  low_rank.inner = h.cols, low_rank.a = rows_of(h), low_rank.b = weight(u);
  bool in_packs = whole(low_rank.a) && whole(low_rank.b);
  if constexpr (Part::kDense == 2) {
    StridedProduct& with_base = args.dense[1] = p;
    with_base.inner = base.data == nullptr ? 0 : s.x.cols, with_base.b = weight(base);
    in_packs = in_packs && whole(p.a) && whole(with_base.b);
  }

  using Large = typename Part::Large;
  using Small = typename Part::Small;
  constexpr cuda::Way rows = cuda::Way::rows, columns = cuda::Way::columns,
                      numbers = cuda::Way::numbers;
  if (!in_packs) return launch_joined<T, Small, numbers, numbers>(context, args, part);
  // Before that small tiles give more blocks; some devices have no room for large ones.
  const bool large = p.rows > 256 && sizeof(JoinedTile<T, Large, columns, columns, Part>) <=
                                         static_cast<std::size_t>(cuda::max_shared_bytes());
  if (transposed)
    return large ? launch_joined<T, Large, columns, rows>(context, args, part)
                 : launch_joined<T, Small, columns, rows>(context, args, part);
  large ? launch_joined<T, Large, columns, columns>(context, args, part)
        : launch_joined<T, Small, columns, columns>(context, args, part);
}

}  // namespace structmat::sparse_low_rank
