// SPDX-License-Identifier: Apache-2.0
// What linear layers of block-diagonal factors share: their inputs in the type of the sums, their
// results with bias, activation and layout, and the gradients of their weights. For files under
// structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include "activation_simd.h"
#include "block_product_simd.h"

namespace structmat {
namespace {

// Tokens a tile: their hidden units stay in the level-2 cache, and the weights are read once for
// all of them.
constexpr std::int64_t kTokenTile = 48;

inline std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return ceil_div(a, b) * b;
}

// From one block's tokens times units to the next block's: an odd number of cache lines, as a row
// goes to all of them. 0.55 of the time of a power of two.
template <class S>
std::int64_t block_step(std::int64_t tokens, std::int64_t units) {
  return (ceil_div(tokens * units, kLanes<S>) | 1) * kLanes<S>;
}

// `tokens` in nearly equal tiles, as many for each thread.
struct TokenTiles {
  std::int64_t tokens, count;
  TokenTiles(std::int64_t tokens, std::int64_t threads)
      : tokens(tokens),
        count(std::min(round_up(ceil_div(tokens, kTokenTile), threads),
                       ceil_div(tokens, kBlockRows))) {}
  std::int64_t first(std::int64_t tile) const { return tokens * tile / count; }
};

template <class T>
const T* row_of(const ConstMatrixView& x, std::int64_t t) {
  return static_cast<const T*>(x.data) + t * x.row_stride;
}
template <class T>
T* row_of(const MatrixView& x, std::int64_t t) {
  return static_cast<T*>(x.data) + t * x.row_stride;
}

// Rows [t0, t1) of x in the type of the sums: in place, or a widened copy.
template <class S, class T>
struct WideRows {
  const S* data;
  std::int64_t stride;
  WideRows(const ConstMatrixView& x, std::int64_t t0, std::int64_t t1, Scratch& memory) {
    if constexpr (std::is_same_v<S, T>) {
      data = row_of<T>(x, t0);
      stride = x.row_stride;
    } else {
      stride = round_up(x.cols, kLanes<S>) + kLanes<S>;
      S* const to = memory.get<S>((t1 - t0) * stride);
      for (std::int64_t t = t0; t < t1; ++t)
        convert(row_of<T>(x, t), to + (t - t0) * stride, x.cols);
      data = to;
    }
  }
};

// Blocks side by side to be multiplied row by row of x, so that x is read and y written along its
// rows: 0.8 of the time of block by block. Their weights stay in the level-2 cache.
template <class F>
std::int64_t neighbours_of(const F& f) {
  constexpr std::int64_t kBytes = 256 << 10;
  return std::clamp<std::int64_t>(
      kBytes / f.number_bytes / std::max<std::int64_t>(f.packed_size, 1), 1, 64);
}

// A result of whole factors: block b's output o is column b * width + o, or, with `inner` > 1,
// (b / inner * width + o) * inner + b % inner.
template <class S, class T>
struct Output {
  MatrixView y;
  std::int64_t width, inner;
  const S* bias = nullptr;  // (blocks, width rounded up to whole vectors)
  Activation activation = Activation::none;
  std::int64_t neighbours = 1;  // blocks side by side that are computed together: see neighbours_of

  std::int64_t bias_step() const { return round_up(width, kLanes<S>); }

  // Results larger than the last cache are written past it.
  bool streams() const {
    return y.rows * y.cols * static_cast<std::int64_t>(sizeof(T)) >= (std::int64_t{32} << 20);
  }

  // The bias in the order of the blocks.
  void set_bias(const T* from, std::int64_t blocks, Scratch& memory) {
    if (from == nullptr) return;
    S* const to = memory.get<S>(blocks * bias_step());
    for (std::int64_t b = 0; b < blocks; ++b) {
      S* const line = to + b * bias_step();
      for (std::int64_t o = 0; o < width; ++o)
        convert(from + (b / inner * width + o) * inner + b % inner, line + o, 1);
      std::fill(line + width, line + bias_step(), S{0});
    }
    bias = to;
  }

  // Blocks that are computed together: those whose columns alternate, or some that are side by
  // side.
  std::int64_t group() const {
    return inner > 1 ? std::min<std::int64_t>(inner, kLanes<S>) : neighbours;
  }
  std::int64_t run(std::int64_t blocks) const { return inner > 1 ? inner : blocks; }
  std::int64_t groups(std::int64_t blocks) const {
    return blocks / run(blocks) * ceil_div(run(blocks), group());
  }
  struct Range {
    std::int64_t b0, b1;
  };
  Range range(std::int64_t index, std::int64_t blocks) const {
    const std::int64_t per = ceil_div(run(blocks), group()), first = index / per * run(blocks),
                       b0 = first + index % per * group();
    return {b0, std::min(b0 + group(), first + run(blocks))};
  }

  // Columns of blocks [b0, b1) of rows [t0, t1), from the rows at `a`.
  template <class F>
  void compute(const F& f, const S* a, std::int64_t lda, const Columns& from, std::int64_t t0,
               std::int64_t t1, Range blocks) const {
    static thread_local Scratch weights_memory, z_memory;
    const auto [b0, b1] = blocks;
    const auto weights = f.ready(b0, b1, from.step == 1 ? t1 - t0 : kFewRows + 1, weights_memory);
    const std::int64_t step = bias_step(), ldz = (b1 - b0) * step;
    const bool direct = std::is_same_v<S, T> && inner == 1;
    S* const z = direct ? nullptr : z_memory.get<S>(kBlockRows * ldz);
    for_row_blocks(t1 - t0, [&](std::int64_t r0, int rows) {
      const std::int64_t t = t0 + r0;
      for (std::int64_t b = b0; b < b1; ++b) {
        S* const to =
            direct ? reinterpret_cast<S*>(row_of<T>(y, t)) + b * width : z + (b - b0) * step;
        const Rows<S> block{a + from.base(b) + r0 * lda, lda, from.step};
        if (t + rows < t1) fetch_ahead(block, rows, f.depth.size);
        multiply_rows<S, T>(weights, b, block, rows, bias != nullptr ? bias + b * step : nullptr,
                            to, direct ? y.row_stride : ldz, !direct);
      }
      for (int r = 0; r < rows; ++r) {
        if (direct) {
          activate(activation, reinterpret_cast<S*>(row_of<T>(y, t + r)) + b0 * width,
                   (b1 - b0) * width);
          continue;
        }
        S* const line = z + r * ldz;
        activate(activation, line, ldz);
        T* const to = row_of<T>(y, t + r);
        if (inner == 1)
          for (std::int64_t b = b0; b < b1; ++b)
            convert(line + (b - b0) * step, to + b * width, width);
        else
          interleave(line, step, b1 - b0, to + b0 / inner * width * inner + b0 % inner);
      }
    });
  }

  // to[o * inner + b] = line[b * step + o] for `count` blocks.
  void interleave(const S* line, std::int64_t step, std::int64_t count, T* to) const {
    constexpr int w = kLanes<S>;
    for (std::int64_t o = 0; o < width; o += w) {
      Vec<S> square[w];
      for (int b = 0; b < w; ++b) square[b] = b < count ? load(line + b * step + o) : Vec<S>{};
      transpose<S>(square);
      const int height = static_cast<int>(std::min<std::int64_t>(w, width - o));
      for (int i = 0; i < height; ++i) {
        alignas(64) S out[w];
        store(out, square[i]);
        convert(out, to + (o + i) * inner, count == w ? w : count);
      }
    }
  }
};

// Tokens of one product for a gradient of weights: a block's x and dy stay in the level-1 cache.
// Sums over so many are added to the total, in order.
constexpr std::int64_t kGradientTokens = 64;

// sums[o] += of the rows of x (rows, ld), in the order of the rows.
template <class S>
void add_columns(const S* x, std::int64_t rows, std::int64_t ld, S* sums, bool begin) {
  for (std::int64_t o = 0; o < ld; o += kLanes<S>) {
    Vec<S> sum{};
    for (std::int64_t t = 0; t < rows; ++t) sum = sum + load(x + t * ld + o);
    store(sums + o, begin ? sum : load(sums + o) + sum);
  }
}

// Columns of blocks [b0, b1) of rows [t0, t1) of x: (block, token, width rounded up to vectors),
// zeros beyond `width`.
template <class S, class T>
void copy_blocks(const ConstMatrixView& x, std::int64_t t0, std::int64_t t1, const Columns& from,
                 std::int64_t b0, std::int64_t b1, std::int64_t width, S* to) {
  constexpr int w = kLanes<S>;
  const std::int64_t ld = round_up(width, w), block = block_step<S>(t1 - t0, ld),
                     whole = width / w * w;
  for (std::int64_t t = t0; t < t1; ++t, to += ld) {
    const T* const row = row_of<T>(x, t);
    if (from.step != 1 && from.inner_step == 1 && b1 - b0 == w &&
        b0 / from.inner == (b1 - 1) / from.inner) {  // the blocks' columns alternate
      for (std::int64_t o = 0; o < width; o += w) {
        Vec<S> square[w];
        for (int i = 0; i < w; ++i)
          square[i] =
              o + i < width ? load_wide<S>(row + from.base(b0) + (o + i) * from.step) : Vec<S>{};
        transpose<S>(square);
        for (int b = 0; b < w; ++b) store(to + b * block + o, square[b]);
      }
      continue;
    }
    for (std::int64_t b = b0; b < b1; ++b) {
      const T* const line = row + from.base(b);
      S* const out = to + (b - b0) * block;
      if (from.step == 1) {
        for (std::int64_t o = 0; o < whole; o += w) store(out + o, load_wide<S>(line + o));
        if (whole < width)
          store(out + whole, load_wide_part<S>(line + whole, static_cast<int>(width - whole)));
        continue;
      }
      for (std::int64_t o = 0; o < width; ++o) convert(line + o * from.step, out + o, 1);
      std::fill(out + width, out + ld, S{0});
    }
  }
}

// to[c] = sum over t of x[t,c]. Blocks of tokens are summed apart: the rounding grows with their
// number's square root.
template <class S, class T>
void column_sums(const Context& context, ConstMatrixView x, T* to) {
  constexpr std::int64_t kColumns = 128, kTokens = 256, w = kLanes<S>;
  parallel_for(context, ceil_div(x.cols, kColumns), [&](std::int64_t task) {
    static thread_local Scratch memory;
    const std::int64_t first = task * kColumns, cols = std::min(kColumns, x.cols - first),
                       ld = round_up(cols, w);
    S* const block = memory.get<S>((kTokens + 2) * ld + w);
    S* const sums = block + (kTokens + 1) * ld;
    for (std::int64_t t = 0; t < x.rows || t == 0; t += kTokens) {
      const std::int64_t end = std::min(t + kTokens, x.rows);
      copy_blocks<S, T>(x, t, end, Columns{1, 1, 0, 1}, first, first + 1, cols, block);
      add_columns(block, end - t, ld, sums, t == 0);
    }
    convert(sums, to + first, cols);
  });
}

// The gradients of the weights (rows, width) of blocks, over a chunk of tokens at a time: sums over
// tokens of a's row times x's width. `totals` (blocks, total_rows, width rounded up) are begun with
// the first chunk, column sums of x likewise where wanted. kPairs: by the machine's own products of
// pairs of bfloat16.
template <class S, class T, bool kPairs = false>
struct WeightGradients {
  ConstMatrixView x;
  Columns from;
  std::int64_t width, rows, total_rows;
  S *totals, *sums = nullptr;

  std::int64_t ld() const { return round_up(width, kLanes<S>); }

  // Blocks at a time: 4 KB of a row of x, or as many blocks as alternate in a vector.
  std::int64_t group(std::int64_t blocks, std::int64_t threads) const {
    if (from.step != 1) return std::min<std::int64_t>(kLanes<S>, from.inner);
    const std::int64_t fit = (std::int64_t{4} << 10) / sizeof(S) / std::max<std::int64_t>(ld(), 1);
    return std::clamp<std::int64_t>(std::min(fit, blocks / threads), 1, 64);
  }

  // Tokens [c0, c1) of x. a(b, t, count) are rows [t, t + count) of what goes with them, token by
  // token, for block b; t counts from c0. `in_place`: it copies nothing.
  template <class A>
  void add(std::int64_t c0, std::int64_t c1, std::int64_t b0, std::int64_t b1, bool in_place,
           A&& a) const {
    static thread_local Scratch memory;
    S* const copy = memory.get<S>((b1 - b0) * block_step<S>(kGradientTokens, ld()));
    for (std::int64_t t0 = c0; t0 < c1 || t0 == 0; t0 += kGradientTokens) {
      const std::int64_t t1 = std::min(t0 + kGradientTokens, c1), tokens = t1 - t0;
      copy_blocks<S, T>(x, t0, t1, from, b0, b1, width, copy);
      // While these are multiplied, what comes next is fetched: 0.92 of the time at 32 columns a
      // block.
      Ahead<false> x_ahead;
      if (t1 < c1 && from.step == 1 && from.inner == 1)
        x_ahead = Ahead<false>::of(row_of<T>(x, t1) + from.base(b0), x.row_stride,
                                   std::min(kGradientTokens, c1 - t1), (b1 - b0) * width);
      for (std::int64_t b = b0; b < b1; ++b) {
        S* const block = copy + (b - b0) * block_step<S>(tokens, ld());
        if (sums != nullptr) add_columns(block, tokens, ld(), sums + b * ld(), t0 == 0);
        if (totals == nullptr) continue;
        if constexpr (kPairs) pair_token_rows(block, tokens, ld());
        Ahead<false> a_ahead;
        if (in_place && b + 1 < b1) {
          const Rows<S> next = a(b + 1, t0 - c0, tokens);
          a_ahead = next.step == 1 ? Ahead<false>::of(next.data, next.row_stride, rows, tokens)
                                   : Ahead<false>::of(next.data, next.step, tokens, rows);
        }
        add_block(a(b, t0 - c0, tokens), tokens, block, totals + b * total_rows * ld(), t0 == 0,
                  [&](std::int64_t parts) {
                    x_ahead.fetch(parts * (b1 - b0));
                    a_ahead.fetch(parts);
                  });
      }
    }
  }

  template <class Fetch>
  void add_block(const Rows<S>& a, std::int64_t tokens, const S* block, S* total, bool begin,
                 Fetch&& fetch) const {
    const std::int64_t panel = panel_width<S>(width);
    const Rows<S> left = words_of(a, tokens);
    const std::int64_t words = kPairs ? token_words(tokens) : tokens;
    for (std::int64_t o = 0; o < width; o += panel) {
      const int vecs = static_cast<int>(ceil_div(std::min(panel, width - o), kLanes<S>));
      for_row_blocks(rows, [&](std::int64_t r0, int count) {
        fetch(ceil_div(rows, kBlockRows) * ceil_div(width, panel));
        S* const to = total + r0 * ld() + o;
        block_kernel_for<S, kPairs>(count, vecs)(
            words, {left.data + r0 * left.row_stride, left.row_stride, left.step}, block + o, ld(),
            begin ? nullptr : to, ld(), to, ld());
      });
    }
  }

  // Rows of `a` as the kernels multiply them: as they are, or as words.
  Rows<S> words_of(const Rows<S>& a, std::int64_t tokens) const {
    if constexpr (!kPairs) {
      return a;
    } else {
      static thread_local Scratch memory;
      constexpr std::int64_t w = kLanes<S>;
      if (a.step == 1) {
        const std::int64_t ld = round_up(token_words(tokens), w);
        S* const to = memory.get<S>(rows * ld);
        for (std::int64_t r = 0; r < rows; ++r)
          pair_tokens(a.data + r * a.row_stride, tokens, to + r * ld);
        return {to, ld, 1};
      }
      const std::int64_t ld = round_up(rows, w);
      S* const to = memory.get<S>(tokens * ld);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const S* const from = a.data + t * a.step;
        if (a.row_stride == 1)
          std::copy_n(from, rows, to + t * ld);
        else
          for (std::int64_t r = 0; r < rows; ++r) to[t * ld + r] = from[r * a.row_stride];
      }
      pair_token_rows(to, tokens, ld);
      return {to, 1, ld};
    }
  }
};

}  // namespace
}  // namespace structmat
