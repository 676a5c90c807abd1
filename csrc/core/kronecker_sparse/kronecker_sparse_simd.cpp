// SPDX-License-Identifier: Apache-2.0
// Block (a, d) of the factor multiplies columns (a, c, d) of x for all c.
#include "kronecker_sparse/kronecker_sparse_simd.h"

#include "block_lanes_simd.h"
#include "kronecker_sparse/kronecker_sparse_columns_simd.h"
#include "simd.h"

namespace structmat {
namespace {

// kPairs: bfloat16 by the machine's own products of pairs.
template <class T, bool kPairs = false>
struct KroneckerSparse {
  using S = accumulator_t<T>;
  static constexpr int w = kLanes<S>;
  using F = Factor<S, T>;

  const Context& context;
  const ConstArrayView& weights;
  const std::int64_t a = weights.sizes[0], b = weights.sizes[1], c = weights.sizes[2],
                     d = weights.sizes[3];

  Axis axis(int i) const { return Axis::of(weights.sizes[i], weights.strides[i]); }
  Axis blocks() const { return Axis::of(weights, 0, 3); }

  // Block (A, D) takes columns (A, p, D), p < depth.
  Columns columns(std::int64_t depth) const { return {d, depth * d, 1, d}; }

  void product(F f, const Columns& from, ConstMatrixView x, Output<S, T> out) const {
    static thread_local Scratch weights_memory, x_memory;
    const std::int64_t blocks = a * d, tokens = x.rows, threads = thread_count(context);
    if (blocks == 0) return;
    const bool few = tokens <= threads * kTokenTile / 2;  // threads share the blocks
    out.neighbours = std::clamp<std::int64_t>(
        std::min(neighbours_of(f), few ? blocks / (4 * threads) : blocks), 1, blocks);
    const std::int64_t groups = out.groups(blocks),
                       work = std::max<std::int64_t>(tokens * f.packed_size * out.group(), 1);
    const auto share_groups = [&](auto&& body) {  // of few tokens, among the threads
      const std::int64_t tasks =
          std::clamp<std::int64_t>(groups * work / 100000, 1, std::min(groups, 4 * threads));
      parallel_for(context, tasks, [&](std::int64_t task) {
        for (std::int64_t g = groups * task / tasks; g < groups * (task + 1) / tasks; ++g)
          body(out.range(g, blocks));
      });
    };
    if constexpr (kPairs)
      if (tokens > kFewRows) {
        LaneWeights<S, T, kPairs> lanes(f.data, f.block, f.depth, f.width);
        lanes.prepare(context, tokens, weights_memory);
        const LaneTiles tiles(tokens, few ? 1 : threads, w);
        if (few)
          return share_groups([&](const auto& range) {
            for (std::int64_t i = 0; i < tiles.count; ++i)
              in_lanes(lanes, from, x, tiles.first(i), tiles.first(i + 1), out, range);
          });
        return parallel_for(context, tiles.count, [&](std::int64_t tile) {
          for (std::int64_t g = 0; g < groups; ++g)
            in_lanes(lanes, from, x, tiles.first(tile), tiles.first(tile + 1), out,
                     out.range(g, blocks));
        });
      }
    if (few) {
      const WideRows<S, T> rows(x, 0, tokens, x_memory);
      return share_groups([&](const auto& range) {
        out.compute(f, rows.data, rows.stride, from, 0, tokens, range);
      });
    }
    f.pack(context, weights_memory);
    const TokenTiles tiles(tokens, threads);
    parallel_for(context, tiles.count, [&](std::int64_t tile) {
      const std::int64_t t0 = tiles.first(tile), t1 = tiles.first(tile + 1);
      const WideRows<S, T> rows(x, t0, t1, x_memory);
      for (std::int64_t g = 0; g < groups; ++g)
        out.compute(f, rows.data, rows.stride, from, t0, t1, out.range(g, blocks));
    });
  }

  // Tokens in the lanes of vectors.
  void in_lanes(const LaneWeights<S, T, kPairs>& f, const Columns& from, ConstMatrixView x,
                std::int64_t t0, std::int64_t t1, const Output<S, T>& out,
                const typename Output<S, T>::Range& range) const {
    static thread_local Scratch memory;
    const std::int64_t lanes = round_up(t1 - t0, w), step = block_step<S>(lanes, f.words());
    S* const panels = memory.get<S>((range.b1 - range.b0) * step);
    load_panels<S, T, kPairs>(row_of<T>(x, t0), x.row_stride, t1 - t0, from, range.b0, range.b1,
                              f.depth.size, panels, lanes, step);
    lanes_output(f, t0, t1, out, range, [&](std::int64_t b, std::int64_t) {
      return Panel<S>{panels + (b - range.b0) * step, lanes};
    });
  }

  // Blocks too small for vectors of their outputs.
  bool small() const { return std::min(b, c) <= kSmallBlock; }

  // The weights (a, b, c, d) as numbers of the sums' type, d contiguous: z = W x, or with
  // `transposed` x and z change places.
  SmallFactor<S> small_factor(bool transposed, Scratch& memory) const {
    const T* const from = static_cast<const T*>(weights.data);
    SmallFactor<S> f{a, b, c, d, nullptr, b * c * d, c * d, d};
    if (std::is_same_v<S, T> && (weights.strides[3] == 1 || d == 1)) {
      f.data = reinterpret_cast<const S*>(from);
      f.stride_a = weights.strides[0], f.stride_r = weights.strides[1];
      f.stride_p = weights.strides[2];
    } else {
      S* to = memory.get<S>(a * b * c * d);
      f.data = to;
      for (std::int64_t i = 0; i < a; ++i)
        for (std::int64_t r = 0; r < b; ++r)
          for (std::int64_t p = 0; p < c; ++p, to += d) {
            const T* const line =
                from + i * weights.strides[0] + r * weights.strides[1] + p * weights.strides[2];
            if (weights.strides[3] == 1)
              convert(line, to, d);
            else
              for (std::int64_t e = 0; e < d; ++e)
                convert(line + e * weights.strides[3], to + e, 1);
          }
    }
    if (transposed) {
      std::swap(f.rows, f.depth);
      std::swap(f.stride_r, f.stride_p);
    }
    return f;
  }

  void forward(ConstMatrixView x, const void* given, Activation activation, MatrixView y) const {
    const T* const bias = static_cast<const T*>(given);
    static thread_local Scratch small_memory;
    if (small() && a * b * d > 0)
      return small_factor(false, small_memory).product(context, x, bias, activation, y);
    static thread_local Scratch bias_memory;
    Output<S, T> out{y, b, d};
    out.activation = activation;
    if (d > 0) out.set_bias(bias, a * d, bias_memory);
    product({weights.data, blocks(), axis(2), axis(1)}, columns(c), x, out);
  }

  void backward(ConstMatrixView dy, ConstMatrixView x,
                const KroneckerSparseGradients& grads) const {
    static thread_local Scratch small_memory;
    if (grads.x.data != nullptr && small() && a * c * d > 0)
      small_factor(true, small_memory)
          .template product<T>(context, dy, nullptr, Activation::none, grads.x);
    else if (grads.x.data != nullptr)
      product({weights.data, blocks(), axis(1), axis(2)}, columns(b), dy,
              Output<S, T>{grads.x, c, d});
    if (grads.w != nullptr && small() && a * b * c * d > 0)
      SmallFactor<S>{a, b, c, d, nullptr, 0, 0, 0}.gradient(context, dy, x,
                                                            static_cast<T*>(grads.w));
    else if (grads.w != nullptr)
      gradient_of_weights(dy, x, static_cast<T*>(grads.w));
    if (grads.bias.data != nullptr) column_sums<S>(context, dy, static_cast<T*>(grads.bias.data));
  }

  void gradient_of_weights(ConstMatrixView dy, ConstMatrixView x, T* to) const {
    static thread_local Scratch total_memory, dy_memory;
    if (a * d == 0) return;
    const std::int64_t tokens = dy.rows, blocks = a * d, threads = thread_count(context),
                       chunk = std::is_same_v<S, T> ? std::max<std::int64_t>(tokens, 1) : 1024;
    WeightGradients<S, T, kPairs> gradients{x, columns(c), c, b, b, nullptr};
    gradients.totals = total_memory.get<S>(blocks * b * gradients.ld());
    const std::int64_t group = gradients.group(blocks, threads), run = d > 1 ? d : blocks,
                       per = ceil_div(run, group);
    for (std::int64_t c0 = 0; c0 < tokens || c0 == 0; c0 += chunk) {
      const std::int64_t c1 = std::min(c0 + chunk, tokens);
      const WideRows<S, T> from(dy, c0, c1, dy_memory);
      parallel_for(context, blocks / run * per, [&](std::int64_t task) {
        const std::int64_t first = task / per * run, b0 = first + task % per * group,
                           b1 = std::min(b0 + group, first + run);
        gradients.add(c0, c1, b0, b1, true, [&](std::int64_t block, std::int64_t t, std::int64_t) {
          return Rows<S>{from.data + columns(b).base(block) + t * from.stride, d, from.stride};
        });
        for (std::int64_t block = b0; c1 == tokens && block < b1; ++block) {
          const S* total = gradients.totals + block * b * gradients.ld();
          for (std::int64_t r = 0; r < b; ++r, total += gradients.ld()) {
            T* const out = to + (block / d * b + r) * c * d + block % d;
            if (d == 1)
              convert(total, out, c);
            else
              for (std::int64_t p = 0; p < c; ++p) convert(total + p, out + p * d, 1);
          }
        }
      });
    }
  }
};

// body(KroneckerSparse) for the type of `x`.
template <class Body>
void with_kernels(DType dtype, const Context& context, const ConstArrayView& w, Body&& body) {
#if defined(__AVX512F__)
  if (dtype == DType::bf16 && simd_level() >= Simd::avx512bf16)
    return body(KroneckerSparse<bfloat16, true>{context, w});
#endif
  dispatch_dtype(dtype,
                 [&](auto element) { body(KroneckerSparse<decltype(element)>{context, w}); });
}

}  // namespace

namespace STRUCTMAT_SIMD {

void kronecker_sparse_forward(const Context& context, ConstMatrixView x, const ConstArrayView& w,
                              ConstVectorView bias, Activation activation, MatrixView y) {
  with_kernels(x.dtype, context, w,
               [&](const auto& kernels) { kernels.forward(x, bias.data, activation, y); });
}

void kronecker_sparse_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                               const ConstArrayView& w, const KroneckerSparseGradients& grads) {
  with_kernels(dy.dtype, context, w, [&](const auto& kernels) { kernels.backward(dy, x, grads); });
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
