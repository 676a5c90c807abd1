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
  static constexpr std::int64_t kFewTokens = 2;
  std::int64_t m, n, r;
  Operand<T> left;       // (m, r)
  Operand<T> right;      // (r, n)
  ConstMatrixView base;  // (m, n), or where `left` is transposed (n, m); or none
  SparseMatrix<T> sparse;
  bool transposed = false;  // S is the transpose of `sparse`
  const T* bias = nullptr;

  // All rows of `sparse` have the same columns: S is a dense matrix between some numbers of x, or
  // of y if transposed.
  bool columns() const { return sparse.pattern.groups() == 1 && sparse.pattern.rows > 16; }
  std::int64_t column_count() const { return columns() ? sparse.group(0).k : 0; }

  // Rows of W at a time: their sums stay in the level-1 cache. Whole groups, so that not the
  // threads decide how a group is cut into blocks of rows.
  std::int64_t unit() const {
    const std::int64_t group = transposed || columns() ? 1 : sparse.pattern.group;
    return ceil_div(96, group) * group;
  }
  // Their sums stay in the level-2 cache: beside one slab of the panel, or where all of them meet
  // every group of dy.
  std::int64_t chunk() const {
    const bool many = transposed ? !columns() : sparse.pattern.slabs() > 1;
    return unit() * (many ? 12 : 1);
  }

  // What the tasks of a tile share.
  struct Tile : TokenTile {
    S *panel, *hidden, *gathered, *zeros;
    std::int64_t parts;  // of the panel, each with its zeros
  };
  Tile tile(const TokenTile& tokens, std::int64_t parts, Scratch& memory) const {
    const std::int64_t ld = tokens.ld, hidden = r + w, gathered = column_count();
    S* const to = memory.get<S>((n + hidden + gathered + parts) * ld);
    return {tokens, to, to + n * ld, to + (n + hidden) * ld, to + (n + hidden + gathered) * ld,
            parts};
  }

  // One of `parts` of the panel.
  void load(const Tile& tile, const ConstMatrixView& x, std::int64_t part) const {
    const std::int64_t squares = ceil_div(n, w);
    const std::int64_t j0 = squares * part / tile.parts * w,
                       j1 = std::min(n, squares * (part + 1) / tile.parts * w);
    load_panel<S, T>(x, tile, j0, j1, tile.panel + j0 * tile.ld, tile.zeros + part * tile.ld);
  }

  // body(base), of T or of 16 bits beside floats, which products widen part by part.
  template <class Body>
  void with_base(Body&& body) const {
    const auto as = [&](auto element) {
      using B = decltype(element);
      body(Operand<B>{static_cast<const B*>(base.data), base.row_stride, left.transposed});
    };
    if constexpr (std::is_same_v<T, float>) {
      if (base.dtype == DType::bf16) return as(bfloat16{});
      if (base.dtype == DType::f16) return as(float16{});
    }
    as(T{});
  }

  // Hidden units [k0, k1), for tokens and all: rows of `right` times the panel, or, transposed,
  // rows of x times columns of `right`, as they lie. Theirs are (r, ld), or (tokens, r).
  void hidden(const Tile& tile, const ConstMatrixView& x, std::int64_t k0, std::int64_t k1,
              const MatrixView& out) const {
    if (k0 == k1) return;
    if (right.transposed) {
      by_tokens(tile, row_of<T>(x, tile.t0), x.row_stride, right, n, k0, k1, tile.hidden + k0, r,
                false);
      for (std::int64_t t = 0; out.data != nullptr && t < tile.tokens(); ++t)
        std::copy_n(tile.hidden + t * r + k0, k1 - k0, row_of<S>(out, tile.t0 + t) + k0);
      return;
    }
    multiply_range(
        Product<T, S, S>{r, tile.ld, n, right, {tile.panel, tile.ld, false}, tile.hidden, tile.ld},
        k0, k1, 0, tile.ld);
    if (out.data != nullptr)
      store_transposed(tile.hidden + k0 * tile.ld, tile.ld, k1 - k0, tile.tokens(),
                       row_of<T>(out, tile.t0) + k0, out.row_stride);
  }

  // Rows [i0, i1) of a transposed A (., k) times rows of `x`, which are tokens.
  template <class TX, class TA>
  static void by_tokens(const Tile& tile, const TX* x, std::int64_t x_stride, const Operand<TA>& a,
                        std::int64_t k, std::int64_t i0, std::int64_t i1, S* to,
                        std::int64_t to_stride, bool to_transposed) {
    multiply_range(Product<TX, TA, S>{tile.tokens(),
                                      i1 - i0,
                                      k,
                                      {x, x_stride, false},
                                      {a.data + i0, a.stride, false},
                                      to,
                                      to_stride,
                                      nullptr,
                                      to_transposed},
                   0, tile.tokens(), 0, i1 - i0);
  }

  // The columns [e0, e1) that all rows of `sparse` have: their rows of the panel, or, transposed,
  // their sums over all of it.
  void gather(const Tile& tile, const ConstMatrixView& x, std::int64_t e0, std::int64_t e1) const {
    if (e0 == e1) return;
    const std::int64_t ld = tile.ld, k = column_count();
    if (transposed)
      return by_tokens(tile, row_of<T>(x, tile.t0), x.row_stride,
                       Operand<T>{sparse.values, k, true}, n, e0, e1, tile.gathered + e0 * ld, ld,
                       true);
    sparse.for_slabs(0, [&](std::int64_t s, std::int64_t begin, std::int64_t end) {
      for (std::int64_t e = std::max(begin, e0); e < std::min(end, e1); ++e)
        std::copy_n(tile.panel + (s * sparse_slab_columns + sparse.pattern.columns[e]) * ld, ld,
                    tile.gathered + e * ld);
    });
  }

  // Their sums, added to those of rows [i0, i1).
  void scatter(const Tile& tile, std::int64_t i0, std::int64_t i1, S* sums) const {
    sparse.for_slabs(0, [&](std::int64_t s, std::int64_t begin, std::int64_t end) {
      for (std::int64_t e = begin; e < end; ++e) {
        const std::int64_t i = s * sparse_slab_columns + sparse.pattern.columns[e];
        if (i < i0 || i >= i1) continue;
        S *const to = sums + (i - i0) * tile.ld, *const from = tile.gathered + e * tile.ld;
        for (std::int64_t v = 0; v < tile.ld; v += w)
          store(to + v, structmat::load(to + v) + structmat::load(from + v));
      }
    });
  }

  template <class TA>
  static Operand<TA> rows_from(const Operand<TA>& a, std::int64_t i) {
    return {a.data + i * a.stride, a.stride, false};
  }

  // Columns [i0, i1) of y.
  void rows(const Tile& tile, const ConstMatrixView& x, std::int64_t i0, std::int64_t i1,
            const MatrixView& y) const {
    static thread_local Scratch memory;
    const std::int64_t ld = tile.ld, count = i1 - i0;
    S* const sums = memory.get<S>((count + w) * 2 * ld);
    S* const more = sums + (count + w) * ld;
    bool begun = false;
    // multiply_to(to) computes a product, which is added to those before.
    const auto add = [&](auto&& multiply_to) {
      S* const to = begun ? more : sums;
      if (left.transposed && tile.tokens() < ld) std::fill_n(to, count * ld, S{0});
      multiply_to(to);
      for (std::int64_t at = 0; begun && at < count * ld; at += w)
        store(sums + at, structmat::load(sums + at) + structmat::load(more + at));
      begun = true;
    };
    const auto by_panel = [&](const auto& a, std::int64_t k, const S* b, S* to) {
      using TA = std::remove_const_t<std::remove_pointer_t<decltype(a.data)>>;
      multiply_range(Product<TA, S, S>{count, ld, k, rows_from(a, i0), {b, ld, false}, to, ld}, 0,
                     count, 0, ld);
    };
    if (base.data != nullptr)
      add([&](S* to) {
        with_base([&](const auto& a) {
          if (a.transposed)
            by_tokens(tile, row_of<T>(x, tile.t0), x.row_stride, a, n, i0, i1, to, ld, true);
          else
            by_panel(a, n, tile.panel, to);
        });
      });
    if (r > 0)
      add([&](S* to) {
        if (left.transposed)
          by_tokens(tile, tile.hidden, r, left, r, i0, i1, to, ld, true);
        else
          by_panel(left, r, tile.hidden, to);
      });
    if (columns() && !transposed)
      add([&](S* to) {
        by_panel(Operand<T>{sparse.values, column_count(), false}, column_count(), tile.gathered,
                 to);
      });
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
    if (columns() && transposed)
      scatter(tile, i0, i1, sums);
    else if (transposed)
      sparse.multiply_transposed(i0, i1, tile.panel, tile, sums);
    else if (!columns())
      sparse.multiply(i0, i1, tile.panel, tile, sums);
    store_transposed(sums, ld, count, tile.tokens(), row_of<T>(y, tile.t0) + i0, y.row_stride);
  }

  // One pass over the weights as they lie in memory.
  void few_tokens(const Context& context, const ConstMatrixView& x, const MatrixView& y,
                  const MatrixView& hidden_out) const {
    static thread_local Scratch memory;
    const std::int64_t tokens = x.rows, ld = n + w;
    S* const in = memory.get<S>(tokens * (ld + r + 1));
    S *const h = in + tokens * ld, *const zeros = h + tokens * r;
    for (std::int64_t t = 0; t < tokens; ++t) {
      S* const line = in + t * ld;
      convert(row_of<T>(x, t), line, n);
      std::fill_n(line + n, w, S{0});
      Vec<S> zero{};
      for (std::int64_t j = 0; j < n; j += w) zero = fma(structmat::load(line + j), Vec<S>{}, zero);
      zeros[t] = 0;
      for (int i = 0; i < w; ++i) zeros[t] += zero[i];
    }
    if (r > 0)
      few_rows<S, T, S>(context, tokens, r, n, in, ld, right.data, right.stride, nullptr, h, r);
    for (std::int64_t t = 0; hidden_out.data != nullptr && t < tokens; ++t)
      convert(h + t * r, row_of<T>(hidden_out, t), r);
    const std::int64_t numbers = sparse.pattern.nnz + m * r + (base.data != nullptr ? m * n : 0),
                       tasks = few_rows_tasks(context, tokens, numbers,
                                              numbers * static_cast<std::int64_t>(sizeof(T)));
    const std::int64_t unit = 16, step = (m / tasks / unit + 1) * unit;
    parallel_for(context, ceil_div(m, step), [&](std::int64_t task) {
      static thread_local Scratch own;
      const std::int64_t i0 = task * step, i1 = std::min(m, i0 + step), count = i1 - i0;
      S* const sums = own.get<S>(2 * tokens * count);
      S* const more = sums + tokens * count;
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t i = 0; i < count; ++i)
          sums[t * count + i] = zeros[t] + (bias == nullptr ? S{0} : S(to_float(bias[i0 + i])));
      const auto add = [&](const auto& a, std::int64_t k, const S* b, std::int64_t b_stride) {
        few_rows_range(tokens, k, b, b_stride, rows_from(a, i0).data, a.stride,
                       static_cast<const S*>(nullptr), more, count, 0, count);
        for (std::int64_t i = 0; i < tokens * count; ++i) sums[i] += more[i];
      };
      if (base.data != nullptr) with_base([&](const auto& a) { add(a, n, in, ld); });
      if (r > 0) add(left, r, h, r);
      sparse.multiply_few(i0, i1, tokens, in, ld, sums);
      for (std::int64_t t = 0; t < tokens; ++t)
        convert(sums + t * count, row_of<T>(y, t) + i0, count);
    });
  }

  // Tiles on threads of their own, or one after the other where they are few.
  void run(const Context& context, const ConstMatrixView& x, const MatrixView& y,
           const MatrixView& hidden_out) const {
    if (x.rows == 0) return;
    if (x.rows <= kFewTokens && !transposed && !right.transposed)
      return few_tokens(context, x, y, hidden_out);
    static thread_local Scratch memory;
    const std::int64_t k = column_count(), dense = r * (m + n) + (base.data != nullptr ? m * n : 0),
                       threads = threads_for(context, x.rows * (sparse.pattern.nnz + dense + n));
    Context lent = context;
    lent.threads = static_cast<int>(threads);
    const TokenTiles<S> tiles(x.rows, panel_vecs(std::min(n, sparse_slab_columns)));
    if (tiles.count % threads == 0 || tiles.count >= 4 * threads) {
      parallel_for(lent, tiles.count, [&](std::int64_t i) {
        static thread_local Scratch own;
        const Tile t = tile(tiles[i], 1, own);
        load(t, x, 0);
        hidden(t, x, 0, r, hidden_out);
        gather(t, x, 0, k);
        for (std::int64_t i0 = 0; i0 < m; i0 += chunk())
          rows(t, x, i0, std::min(m, i0 + chunk()), y);
      });
      return;
    }
    const auto in_parts = [&](std::int64_t size, std::int64_t unit, std::int64_t most,
                              auto&& body) {
      const std::int64_t step = std::min(most, (size / threads / unit + 1) * unit);
      parallel_for(lent, ceil_div(size, step), [&](std::int64_t part) {
        body(part * step, std::min(size, (part + 1) * step));
      });
    };
    for (std::int64_t i = 0; i < tiles.count; ++i) {
      const Tile t = tile(tiles[i], threads, memory);
      parallel_for(lent, threads, [&](std::int64_t part) { load(t, x, part); });
      // Whole vectors: what is stored transposed is read in squares of them.
      in_parts(r, w, r + w,
               [&](std::int64_t k0, std::int64_t k1) { hidden(t, x, k0, k1, hidden_out); });
      in_parts(k, kMicroRows, k + kMicroRows,
               [&](std::int64_t e0, std::int64_t e1) { gather(t, x, e0, e1); });
      in_parts(m, unit(), chunk(),
               [&](std::int64_t i0, std::int64_t i1) { rows(t, x, i0, i1, y); });
    }
  }
};

}  // namespace
}  // namespace structmat
