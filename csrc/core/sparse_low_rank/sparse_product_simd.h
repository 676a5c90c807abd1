// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias for W (m, n) = base + left right + S, S sparse, and dx = dy W, which is the same
// with the parts transposed. For files under structmat_simd_sources (everything is in an anonymous
// namespace).
#pragma once
#include "product_simd.h"
#include "sparse_low_rank/spmm_simd.h"

namespace structmat {
namespace {

template <class T>
struct SparseProduct {
  using S = accumulator_t<T>;
  static constexpr int w = kLanes<S>;
  static constexpr std::int64_t kChunk = 96;  // rows of W whose sums stay in the level-1 cache

  std::int64_t m, n, r;
  Operand<T> left;   // (m, r)
  Operand<T> right;  // (r, n)
  Operand<T> base;   // (m, n) or none
  SparseMatrix<T> sparse;
  const T* bias = nullptr;

  // S is a dense matrix (m, k) of some columns of x, as all rows share theirs.
  bool columns() const { return sparse.pattern.groups() == 1 && m > 16; }

  // What the tasks of a tile share.
  struct Tile : TokenTile {
    S *panel, *hidden, *gathered, *zeros;
    std::int64_t parts;  // of the panel, each with its zeros
  };
  std::int64_t gathered_columns() const { return columns() ? sparse.group(0).k : 0; }
  Tile tile(const TokenTile& tokens, std::int64_t parts, Scratch& memory) const {
    const std::int64_t ld = tokens.ld, hidden = r + w;
    S* const to = memory.get<S>((n + hidden + gathered_columns() + parts) * ld);
    return {tokens,
            to,
            to + n * ld,
            to + (n + hidden) * ld,
            to + (n + hidden + gathered_columns()) * ld,
            parts};
  }

  // One of `parts` of the panel.
  void load(const Tile& tile, const ConstMatrixView& x, std::int64_t part) const {
    const std::int64_t squares = ceil_div(n, w);
    const std::int64_t j0 = squares * part / tile.parts * w,
                       j1 = std::min(n, squares * (part + 1) / tile.parts * w);
    load_panel<S, T>(x, tile, j0, j1, tile.panel + j0 * tile.ld, tile.zeros + part * tile.ld);
  }

  // Rows [k0, k1) of right times the panel, for tokens and all.
  void hidden(const Tile& tile, std::int64_t k0, std::int64_t k1, const MatrixView& out) const {
    if (k0 == k1) return;
    multiply_range(
        Product<T, S, S>{r, tile.ld, n, right, {tile.panel, tile.ld, false}, tile.hidden, tile.ld},
        k0, k1, 0, tile.ld);
    if (out.data == nullptr) return;
    const S* const from = tile.hidden + k0 * tile.ld;
    const auto store_as = [&](auto element) {
      using To = decltype(element);
      store_transposed(from, tile.ld, k1 - k0, tile.tokens(), row_of<To>(out, tile.t0) + k0,
                       out.row_stride);
    };
    if (out.dtype == dtype_of<T>())
      store_as(T{});
    else
      store_as(S{});
  }

  void gather(const Tile& tile) const {
    const SparsePatternView& p = sparse.pattern;
    for (std::int64_t s = 0; s < p.slabs(); ++s)
      for (std::int64_t e = p.starts[s]; e < p.starts[s + 1]; ++e)
        std::copy_n(tile.panel + (s * sparse_slab_columns + p.columns[e]) * tile.ld, tile.ld,
                    tile.gathered + e * tile.ld);
  }

  static Operand<T> rows_from(Operand<T> a, std::int64_t i) {
    a.data += a.transposed ? i : i * a.stride;
    return a;
  }

  // Columns [i0, i1) of y.
  void rows(const Tile& tile, std::int64_t i0, std::int64_t i1, const MatrixView& y) const {
    static thread_local Scratch memory;
    const std::int64_t ld = tile.ld, count = i1 - i0;
    S* const sums = memory.get<S>((count + w) * 2 * ld);
    S* const more = sums + (count + w) * ld;
    bool begun = false;
    const auto add = [&](const Operand<T>& a, std::int64_t k, const S* b) {
      S* const to = begun ? more : sums;
      multiply_range(Product<T, S, S>{count, ld, k, rows_from(a, i0), {b, ld, false}, to, ld}, 0,
                     count, 0, ld);
      for (std::int64_t at = 0; begun && at < count * ld; at += w)
        store(sums + at, structmat::load(sums + at) + structmat::load(more + at));
      begun = true;
    };
    if (base.data != nullptr) add(base, n, tile.panel);
    if (r > 0) add(left, r, tile.hidden);
    if (columns())
      add({sparse.values, gathered_columns(), false}, gathered_columns(), tile.gathered);
    for (std::int64_t v = 0; v < ld; v += w) {
      Vec<S> zero{};
      for (std::int64_t part = 0; part < tile.parts; ++part)
        zero = zero + structmat::load(tile.zeros + part * ld + v);
      for (std::int64_t i = 0; i < count; ++i) {
        S* const to = sums + i * ld + v;
        Vec<S> start = bias == nullptr ? zero : zero + broadcast<S>(to_float(bias[i0 + i]));
        store(to, begun ? start + structmat::load(to) : start);
      }
    }
    if (!columns()) sparse.multiply(i0, i1, tile.panel, tile, sums);
    store_transposed(sums, ld, count, tile.tokens(), row_of<T>(y, tile.t0) + i0, y.row_stride);
  }

  void all_rows(const Tile& tile, std::int64_t i0, std::int64_t i1, const MatrixView& y) const {
    for (std::int64_t i = i0; i < i1; i += kChunk) rows(tile, i, std::min(i1, i + kChunk), y);
  }

  void run(const Context& context, const ConstMatrixView& x, const MatrixView& y,
           const MatrixView& hidden_out) const {
    if (x.rows == 0) return;
    static thread_local Scratch memory;
    const std::int64_t threads = thread_count(context);
    const TokenTiles<S> tiles(x.rows, kTileVecs);
    if (tiles.count % threads == 0 || tiles.count >= 4 * threads) {
      parallel_for(context, tiles.count, [&](std::int64_t i) {
        static thread_local Scratch own;
        const Tile t = tile(tiles[i], 1, own);
        load(t, x, 0);
        hidden(t, 0, r, hidden_out);
        if (columns()) gather(t);
        all_rows(t, 0, m, y);
      });
      return;
    }
    for (std::int64_t i = 0; i < tiles.count; ++i) {
      const Tile t = tile(tiles[i], threads, memory);
      parallel_for(context, threads, [&](std::int64_t part) { load(t, x, part); });
      if (r > 0) {
        const std::int64_t step = ceil_div(ceil_div(r, threads), kMicroRows) * kMicroRows;
        parallel_for(context, ceil_div(r, step), [&](std::int64_t part) {
          hidden(t, part * step, std::min(r, (part + 1) * step), hidden_out);
        });
      }
      if (columns()) gather(t);
      parallel_for(context, ceil_div(m, kChunk), [&](std::int64_t chunk) {
        rows(t, chunk * kChunk, std::min(m, (chunk + 1) * kChunk), y);
      });
    }
  }
};

}  // namespace
}  // namespace structmat
