// SPDX-License-Identifier: Apache-2.0
// Products with the blocks of a block-diagonal matrix whose tokens lie in the lanes of vectors:
// weights are read as they lie, one at a time, whatever their strides, and a result's place is an
// address. Each element is one chain of additions in the order of the block's inputs. For files
// under structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include <type_traits>

#include "bfloat16_pairs_simd.h"
#include "block_linear_simd.h"

namespace structmat {
namespace {

#if defined(__AVX512F__)
constexpr int kLaneRows = 8, kLaneVecs = 3;  // 24 sums, 3 vectors of tokens, 1 weight
#elif defined(__AVX2__)
constexpr int kLaneRows = 6, kLaneVecs = 2;
#else
constexpr int kLaneRows = 4, kLaneVecs = 2;
#endif

// Tokens in equal tiles of whole vectors, as many for each thread.
struct LaneTiles {
  std::int64_t tokens, size, count;
  LaneTiles(std::int64_t tokens, std::int64_t threads, std::int64_t lanes) : tokens(tokens) {
    const std::int64_t least = std::max(round_up(ceil_div(tokens, kTokenTile), threads), threads);
    size = std::max(round_up(ceil_div(tokens, least), lanes), lanes);
    count = ceil_div(tokens, size);
  }
  std::int64_t first(std::int64_t tile) const { return std::min(tokens, tile * size); }
};

// Words of weights: word p of row r at data + r * row + p * step, in bytes.
struct Words {
  const char* data;
  std::int64_t row, step;
};

// to[r] (lanes) = add[r] + sum over p of word p of row r times line p of the panel (words, ld).
template <class S, class T, bool kPairs, int kRows, int kVecs>
void lanes_kernel(std::int64_t words, const Words& w, const S* panel, std::int64_t ld, const S* add,
                  bool round, S* const* to) {
  const char *w0 = w.data, *w4 = w.data + 4 * w.row;
  Vec<S> sum[kRows][kVecs] = {};
  for (std::int64_t p = 0; p < words; ++p) {
    Vec<S> value[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) value[v] = load(panel + v * kLanes<S>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const char* const base = r < 4 ? w0 : w4;
      S word;
      std::memcpy(&word, base + (r % 4) * w.row, sizeof word);
      const Vec<S> weight = broadcast_word<kPairs>(word);
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) sum[r][v] = multiply_add<kPairs>(value[v], weight, sum[r][v]);
    }
    w0 += w.step, w4 += w.step, panel += ld;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      Vec<S> total = sum[r][v];
      if (add != nullptr) total = total + broadcast(add[r]);
      if constexpr (std::is_same_v<T, bfloat16>)
        if (round) total = round_to_bfloat16(total);
      store(to[r] + v * kLanes<S>, total);
    }
}

template <class S>
using LanesKernel = void (*)(std::int64_t, const Words&, const S*, std::int64_t, const S*, bool,
                             S* const*);

template <class S, class T, bool kPairs, int... kIndex>
LanesKernel<S> lanes_kernel_for(int rows, int vecs, std::integer_sequence<int, kIndex...>) {
  static constexpr LanesKernel<S> table[] = {
      lanes_kernel<S, T, kPairs, kIndex / kLaneVecs + 1, kIndex % kLaneVecs + 1>...};
  return table[(rows - 1) * kLaneVecs + vecs - 1];
}

// A vector of words: the first `count` numbers at p, then zeros.
template <class S, class T, bool kPairs>
inline Vec<S> load_words(const T* p, std::int64_t count) {
  if constexpr (kPairs) {
    Vec<S> words{};
    if (count >= 2 * kLanes<S>)
      std::memcpy(&words, p, sizeof words);
    else
      std::memcpy(&words, p, static_cast<std::size_t>(count) * 2);
    return words;
  } else {
    return count >= kLanes<S> ? load_wide<S>(p) : load_wide_part<S>(p, static_cast<int>(count));
  }
}

// A factor as these products read it: in place, or, where its numbers must be widened, paired or
// have no regular strides, a copy, whole rows or whole columns as they lie. All blocks are copied
// by prepare(), or, where they meet one tile of tokens alone, each when it is multiplied.
template <class S, class T, bool kPairs>
struct LaneWeights {
  static constexpr int kNumbers = kWordNumbers<kPairs>;
  const T* data;
  Axis block, depth, width;
  const S* copy = nullptr;

  LaneWeights(const void* data, Axis block, Axis depth, Axis width)
      : data(static_cast<const T*>(data)), block(block), depth(depth), width(width) {}

  std::int64_t words() const { return ceil_div(depth.size, kNumbers); }
  std::int64_t copy_size() const { return words() * width.size; }
  bool in_place() const {
    if (!depth.regular() || !width.regular()) return false;
    return kPairs ? depth.contiguous() && depth.size % 2 == 0 : std::is_same_v<S, T>;
  }
  // Words of a row side by side, rather than those of a column.
  bool by_rows() const { return depth.contiguous() || !width.contiguous(); }

  Words operator()(std::int64_t b) const {
    constexpr std::int64_t size = sizeof(T), word = sizeof(S);
    if (in_place())
      return {reinterpret_cast<const char*>(data + block.at(b)), width.stride() * size,
              depth.stride() * size * kNumbers};
    const S* const words_of_block = copy != nullptr ? copy + b * copy_size() : copied(b);
    const char* const from = reinterpret_cast<const char*>(words_of_block);
    return by_rows() ? Words{from, words() * word, word} : Words{from, word, width.size * word};
  }

  void prepare(const Context& context, std::int64_t tokens, Scratch& memory) {
    if (in_place() || tokens <= kTokenTile) return;
    S* const to = memory.get<S>(block.size * copy_size());
    if (copy_size() == 0) return;
    copy = to;
    const std::int64_t group = std::max<std::int64_t>((64 << 10) / copy_size(), 1);
    parallel_for(context, ceil_div(block.size, group), [&](std::int64_t task) {
      for (std::int64_t b = task * group; b < std::min(block.size, (task + 1) * group); ++b)
        copy_block(b, to + b * copy_size());
    });
  }

 private:
  const S* copied(std::int64_t b) const {
    static thread_local Scratch memory;
    if (copy_size() == 0) return nullptr;  // weights without numbers may lie nowhere
    S* const to = memory.get<S>(copy_size());
    copy_block(b, to);
    return to;
  }

  void copy_block(std::int64_t b, S* to) const {
    by_rows() ? copy_lines(data + block.at(b), width, depth, to)
              : copy_columns(data + block.at(b), to);
  }

  void copy_lines(const T* from, const Axis& lines, const Axis& along, S* to) const {
    for (std::int64_t i = 0; i < lines.size; ++i, to += words()) {
      const T* const line = from + lines.at(i);
      using Number = std::conditional_t<kPairs, T, S>;
      Number* const numbers = reinterpret_cast<Number*>(to);
      if (along.contiguous())
        convert(line, numbers, along.size);
      else
        for (std::int64_t p = 0; p < along.size; ++p) convert(line + along.at(p), numbers + p, 1);
      if (kPairs && along.size % 2 != 0) numbers[along.size] = Number{};
    }
  }

  void copy_columns(const T* from, S* to) const {
    for (std::int64_t p = 0; p < depth.size; p += kNumbers, to += width.size) {
      const T* const low = from + depth.at(p);
      if constexpr (!kPairs) {
        convert(low, to, width.size);
      } else {
        const T* const high = p + 1 < depth.size ? from + depth.at(p + 1) : nullptr;
        for (std::int64_t o = 0; o < width.size; o += kLanes<S>) {
          const std::int64_t count = width.size - o;
          const Vec<S> words =
              pair_words(load_words<S, T, false>(low + o, count),
                         high != nullptr ? load_words<S, T, false>(high + o, count) : Vec<S>{});
          if (count >= kLanes<S>)
            store(to + o, words);
          else
            std::memcpy(to + o, &words, static_cast<std::size_t>(count) * sizeof(S));
        }
      }
    }
  }
};

// A panel of a block's inputs: word p of token t at data[p * ld + t], whole vectors of tokens.
// The rows of block b times it: row r's tokens go to place(r).
template <class S, class T, bool kPairs, bool kWrite, class Place>
void lanes_product(const LaneWeights<S, T, kPairs>& f, std::int64_t b, const S* panel,
                   std::int64_t ld, std::int64_t lanes, const S* add, bool round,
                   Ahead<kWrite> ahead, Place&& place) {
  const Words all = f(b);
  const std::int64_t vecs = lanes / kLanes<S>, groups = ceil_div(vecs, kLaneVecs),
                     rows = f.width.size, parts = ceil_div(rows, kLaneRows);
  for (std::int64_t i = 0; i < parts; ++i) {
    const std::int64_t r0 = rows * i / parts;
    const int count = static_cast<int>(rows * (i + 1) / parts - r0);
    S *line[kLaneRows], *to[kLaneRows];
    for (int r = 0; r < count; ++r) line[r] = place(r0 + r);
    // Late, or the cache loses them again: 0.98 of the time with gradients.
    if (i >= parts / 2) ahead.fetch(parts - parts / 2);
    // The rows after these, or the next block's first, where a row's words lie together.
    if (all.step == sizeof(S))
      for (std::int64_t r = r0 + count; r < r0 + 2 * count; ++r)
        for (std::int64_t at = 0; at < f.words() * all.step; at += 64)
          __builtin_prefetch(all.data + r * all.row + at);
    const Words words{all.data + r0 * all.row, all.row, all.step};
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t v0 = vecs * g / groups;
      for (int r = 0; r < count; ++r) to[r] = line[r] + v0 * kLanes<S>;
      lanes_kernel_for<S, T, kPairs>(count, static_cast<int>(vecs * (g + 1) / groups - v0),
                                     std::make_integer_sequence<int, kLaneRows * kLaneVecs>())(
          f.words(), words, panel + v0 * kLanes<S>, ld, add != nullptr ? add + r0 : nullptr, round,
          to);
    }
  }
}

// Columns of blocks [b0, b1) of `tokens` rows of x from row t0 on, as panels `panel_step` apart.
// Where columns alternate between blocks, at most a vector's lanes of them are taken.
template <class S, class T, bool kPairs>
void load_panels(const T* x, std::int64_t x_stride, std::int64_t tokens, const Columns& from,
                 std::int64_t b0, std::int64_t b1, std::int64_t depth, S* to, std::int64_t ld,
                 std::int64_t panel_step) {
  constexpr int w = kLanes<S>, numbers = kWordNumbers<kPairs>;
  const std::int64_t words = ceil_div(depth, numbers);
  for (std::int64_t t0 = 0; t0 < tokens; t0 += w) {
    const int rows = static_cast<int>(std::min<std::int64_t>(w, tokens - t0));
    const T* const first = x + t0 * x_stride;
    Vec<S> square[w];
    if (from.step == 1) {
      for (std::int64_t b = b0; b < b1; ++b) {
        const T* const block = first + from.base(b);
        for (std::int64_t p = 0; p < words; p += w) {
          for (int t = 0; t < w; ++t)
            square[t] = t < rows ? load_words<S, T, kPairs>(block + t * x_stride + p * numbers,
                                                            depth - p * numbers)
                                 : Vec<S>{};
          transpose<S>(square);
          S* const line = to + (b - b0) * panel_step + p * ld + t0;
          const int live = static_cast<int>(std::min<std::int64_t>(w, words - p));
          for (int i = 0; i < live; ++i) store(line + i * ld, square[i]);
        }
      }
      continue;
    }
    const T* const block = first + from.base(b0);
    const int blocks = static_cast<int>(b1 - b0);
    for (std::int64_t p = 0; p < words; ++p) {
      for (int t = 0; t < w; ++t) {
        square[t] = Vec<S>{};
        if (t >= rows) continue;
        const T* const at = block + t * x_stride + p * numbers * from.step;
        square[t] = load_words<S, T, false>(at, blocks);
        if constexpr (kPairs)
          square[t] = pair_words(square[t], 2 * p + 1 < depth
                                                ? load_words<S, T, false>(at + from.step, blocks)
                                                : Vec<S>{});
      }
      transpose<S>(square);
      for (int b = 0; b < blocks; ++b) store(to + b * panel_step + p * ld + t0, square[b]);
    }
  }
}

// to[i] <- a vector, or its first `count` numbers, rounded to T. `stream`: past the caches, where a
// whole line is written.
template <class S, class T>
inline void store_numbers(const Vec<S>& v, T* to, std::int64_t count, bool stream) {
  if constexpr (std::is_same_v<S, T>) {
    if (count >= kLanes<S>) {
#if defined(__AVX512F__)
      if (stream && reinterpret_cast<std::uintptr_t>(to) % 64 == 0)
        return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(v));
#endif
      return store(to, v);
    }
  }
  static_cast<void>(stream);
  alignas(64) S line[kLanes<S>];
  store(line, v);
  convert(line, to, std::min<std::int64_t>(count, kLanes<S>));
}

// Row t of y, columns of blocks [b0, b1) <- lane t of lines (block, width, ld) `block_step` apart.
template <class S, class T>
void store_panels(const S* z, std::int64_t ld, std::int64_t block_step, std::int64_t tokens,
                  const Columns& to, std::int64_t b0, std::int64_t b1, std::int64_t width, T* y,
                  std::int64_t y_stride, bool stream) {
  constexpr int w = kLanes<S>;
  for (std::int64_t t0 = 0; t0 < tokens; t0 += w) {
    const int rows = static_cast<int>(std::min<std::int64_t>(w, tokens - t0));
    T* const first = y + t0 * y_stride;
    Vec<S> square[w];
    if (to.step != 1) {  // columns alternate
      const int blocks = static_cast<int>(b1 - b0);
      for (std::int64_t o = 0; o < width; ++o) {
        for (int b = 0; b < w; ++b)
          square[b] = b < blocks ? load(z + b * block_step + o * ld + t0) : Vec<S>{};
        transpose<S>(square);
        T* const line = first + to.base(b0) + o * to.step;
        for (int t = 0; t < rows; ++t)
          store_numbers<S, T>(square[t], line + t * y_stride, blocks, false);
      }
      continue;
    }
    for (std::int64_t b = b0; b < b1; ++b) {
      const S* const lines = z + (b - b0) * block_step + t0;
      T* const line = first + to.base(b);
      std::int64_t o = 0;
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<T, bfloat16>)
        for (; o + 2 * w <= width; o += 2 * w) {
          for (int i = 0; i < w; ++i)
            square[i] = pair_words(round_to_bfloat16(load(lines + (o + 2 * i) * ld)),
                                   round_to_bfloat16(load(lines + (o + 2 * i + 1) * ld)));
          transpose<S>(square);
          for (int t = 0; t < rows; ++t)
            store_numbers<S, S>(square[t], reinterpret_cast<S*>(line + t * y_stride + o), w,
                                stream);
        }
#endif
      for (; o < width; o += w) {
        for (int i = 0; i < w; ++i)
          square[i] = o + i < width ? load(lines + (o + i) * ld) : Vec<S>{};
        transpose<S>(square);
        for (int t = 0; t < rows; ++t)
          store_numbers<S, T>(square[t], line + t * y_stride + o, width - o, stream);
      }
    }
  }
}

// Streamed stores are seen by others after this.
inline void finish_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// A block's inputs: line p, `ld` from the one before, has word p of all tokens side by side.
template <class S>
struct Panel {
  const S* data;
  std::int64_t ld;
};

// Rows [t0, t1) of a result, blocks `blocks`: those of f times panel(b, lanes).
template <class S, class T, bool kPairs, class PanelOf>
void lanes_output(const LaneWeights<S, T, kPairs>& f, std::int64_t t0, std::int64_t t1,
                  const Output<S, T>& out, const typename Output<S, T>::Range& blocks,
                  PanelOf&& panel_of) {
  static thread_local Scratch z_memory;
  const std::int64_t lanes = round_up(t1 - t0, kLanes<S>), step = block_step<S>(lanes, out.width);
  const auto [b0, b1] = blocks;
  const Columns to = out.inner > 1 ? Columns{out.inner, out.width * out.inner, 1, out.inner}
                                   : Columns{1, out.width, 0, 1};
  S* const z = z_memory.get<S>((b1 - b0) * step);
  for (std::int64_t b = b0; b < b1; ++b) {
    const Panel<S> panel = panel_of(b, lanes);
    S* const lines = z + (b - b0) * step;
    const auto ahead = Ahead<true>::of(row_of<T>(out.y, t0) + to.base(b), out.y.row_stride,
                                       out.inner > 1 || out.streams() ? 0 : t1 - t0, out.width);
    lanes_product<S, T, kPairs>(f, b, panel.data, panel.ld, lanes,
                                out.bias != nullptr ? out.bias + b * out.bias_step() : nullptr,
                                false, ahead, [&](std::int64_t o) { return lines + o * lanes; });
    activate(out.activation, lines, out.width * lanes);
  }
  store_panels<S, T>(z, lanes, step, t1 - t0, to, b0, b1, out.width, row_of<T>(out.y, t0),
                     out.y.row_stride, out.streams());
  if (out.streams()) finish_streams();
}

}  // namespace
}  // namespace structmat
