// SPDX-License-Identifier: Apache-2.0
// C = op(A) op(B) + bias of bfloat16 on the matrix unit (AMX): tiles of 16 x 32 times 32 x 16
// numbers, sums in fp32, results rounded once. Each element is one chain of tile products in the
// order of k: threads and tiling change no bit. The unit takes subnormal numbers for zero. Only at
// Simd::amx; compiled with AVX-512. For files under structmat_simd_sources (everything is in an
// anonymous namespace).
#pragma once
#include "product_simd.h"

#if defined(__AVX512BW__)
#include <immintrin.h>

namespace structmat {
namespace {

constexpr int kTileRows = 16, kTileDepth = 32;
constexpr std::int64_t kTileBytes = 1024;
// 32 rows of A times a slab of k are 32 KB, of the level-1 cache's 48, and a slab of B 1 MB, half
// of the level-2 cache. A kernel asks for 64 bytes a cycle, more than the latter gives for both.
constexpr std::int64_t kTileSlab = 512, kTileColumns = 1024;
// Rows of A are read in place for fewer columns: the copy costs as much as 32 of them.
constexpr std::int64_t kCopyColumns = 256;
// For as few tokens the weights, k-contiguous, become A and are read in place: 0.6 of the time at
// n = 4096. From 32 tokens on they are read more than once, and rows 8 KB apart share one set of
// the level-1 cache.
constexpr std::int64_t kFewRows = 16;

// The unit's tiles for as long as this lives: 0 to 3 sums, 4 and 5 of A, 6 and 7 of B.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {};
      std::uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = kTileRows;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#define SM_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t::)
#define SM_TILE_LOAD(t, p, stride)                                                \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(static_cast<const void*>(p)), \
               "r"(static_cast<std::int64_t>(stride))                             \
               : "memory")
#define SM_TILE_STORE(t, p, stride)                                              \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(static_cast<void*>(p)), \
               "r"(static_cast<std::int64_t>(stride))                            \
               : "memory")
#define SM_TILE_MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

// Two tiles of rows of A: the second begins `second` bytes on, the next 32 columns `step` bytes on.
struct TileRows {
  const char* data;
  std::int64_t second, stride, step;
};

// c (kRows x kCols tiles, stride in numbers) = a b, or c + a b. b: for each tile of columns `steps`
// tiles.
template <int kRows, int kCols>
void tile_kernel(const TileRows& a, const char* b, std::int64_t steps, bool add, float* c,
                 std::int64_t c_stride) {
  float* const c1 = c + kTileRows * c_stride;
  const std::int64_t bytes = c_stride * 4;
  if (add) {
    SM_TILE_LOAD(0, c, bytes);
    if constexpr (kCols > 1) SM_TILE_LOAD(1, c + 16, bytes);
    if constexpr (kRows > 1) SM_TILE_LOAD(2, c1, bytes);
    if constexpr (kRows > 1 && kCols > 1) SM_TILE_LOAD(3, c1 + 16, bytes);
  } else {
    SM_TILE_ZERO(0);
    SM_TILE_ZERO(1);
    SM_TILE_ZERO(2);
    SM_TILE_ZERO(3);
  }
  const char *a0 = a.data, *a1 = a.data + a.second;
  const char* b1 = b + steps * kTileBytes;
  for (std::int64_t p = 0; p < steps; ++p) {
    SM_TILE_LOAD(6, b, 64);
    SM_TILE_LOAD(4, a0, a.stride);
    SM_TILE_MULTIPLY(0, 4, 6);
    if constexpr (kCols > 1) {
      SM_TILE_LOAD(7, b1, 64);
      SM_TILE_MULTIPLY(1, 4, 7);
    }
    if constexpr (kRows > 1) {
      SM_TILE_LOAD(5, a1, a.stride);
      SM_TILE_MULTIPLY(2, 5, 6);
      if constexpr (kCols > 1) SM_TILE_MULTIPLY(3, 5, 7);
    }
    a0 += a.step, a1 += a.step;
    b += kTileBytes, b1 += kTileBytes;
  }
  SM_TILE_STORE(0, c, bytes);
  if constexpr (kCols > 1) SM_TILE_STORE(1, c + 16, bytes);
  if constexpr (kRows > 1) SM_TILE_STORE(2, c1, bytes);
  if constexpr (kRows > 1 && kCols > 1) SM_TILE_STORE(3, c1 + 16, bytes);
}

// Sixteen vectors of pairs of numbers, 1 KB: a tile, or one to be transposed as 16 x 16 pairs.
using Square = Vec<float>[16];

inline __mmask32 first_numbers(std::int64_t count) {
  return count >= 32 ? ~0u : (1u << count) - 1;
}
inline __m512i load_numbers(const bfloat16* from, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, from);
}

// Lines that lie along k: their next `depth` numbers, one line a vector.
inline void load_lines(const bfloat16* data, std::int64_t stride, std::int64_t lines,
                       std::int64_t depth, Square& out) {
  const __mmask32 mask = first_numbers(depth);
  for (int i = 0; i < 16; ++i) {
    const __m512i line = i < lines ? load_numbers(data + i * stride, mask) : _mm512_setzero_si512();
    std::memcpy(&out[i], &line, sizeof line);
  }
}

// Lines that lie across: vector q has numbers 2 q and 2 q + 1 of each line side by side, of lines 0
// to 15 in `low` and 16 to 31 in `high`.
inline void load_pairs(const bfloat16* data, std::int64_t stride, std::int64_t lines,
                       std::int64_t depth, Square& low, Square& high) {
  const __mmask32 mask = first_numbers(lines);
  // Words i of the two vectors, side by side: 32 is word 0 of the second.
  const __m512i side_by_side = _mm512_or_si512(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_maskz_slli_epi32(  // the plain one warns of uninitialised numbers in GCC 12
          0xffff, _mm512_set_epi32(47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35, 34, 33, 32),
          16));
  const __m512i upper = _mm512_add_epi16(side_by_side, _mm512_set1_epi16(16));
  const auto load = [&](int p) {
    return p < depth ? load_numbers(data + p * stride, mask) : _mm512_setzero_si512();
  };
  for (int q = 0; q < 16; ++q) {
    const __m512i even = load(2 * q), odd = load(2 * q + 1);
    const __m512i first = _mm512_permutex2var_epi16(even, side_by_side, odd);
    const __m512i second = _mm512_permutex2var_epi16(even, upper, odd);
    std::memcpy(&low[q], &first, sizeof first);
    std::memcpy(&high[q], &second, sizeof second);
  }
}

// 32 lines of A or of B^T over a slab of k, zeros beyond `lines` and `depth`: two times `steps`
// tiles. A tile of A has a line a vector, one of B (by_pairs) pairs of numbers of 16 lines.
inline void pack_tiles(const bfloat16* data, std::int64_t stride, bool along_k, bool by_pairs,
                       std::int64_t lines, std::int64_t depth, std::int64_t step,
                       std::int64_t steps, char* to) {
  const std::int64_t left = depth - step * kTileDepth;
  Square tiles[2];
  if (along_k) {
    data += step * kTileDepth;
    load_lines(data, stride, lines, left, tiles[0]);
    if (lines > 16) load_lines(data + 16 * stride, stride, lines - 16, left, tiles[1]);
  } else {
    load_pairs(data + step * kTileDepth * stride, stride, lines, left, tiles[0], tiles[1]);
  }
  for (int i = 0; i < (lines > 16 ? 2 : 1); ++i) {
    if (along_k == by_pairs) transpose<float>(tiles[i]);
    std::memcpy(to + (i * steps + step) * kTileBytes, tiles[i], sizeof tiles[i]);
  }
}

// to <- the first `count` of 32 sums, rounded.
inline void store_numbers(Vec<float> low, Vec<float> high, bfloat16* to, std::int64_t count) {
  __m512i out;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(low), "v"(high));
  _mm512_mask_storeu_epi16(to, first_numbers(count), out);
}

// C at (i, j) <- a block of sums of at most 32 x 32, plus the bias of its rows as they are stored.
inline void store_block(const Product<bfloat16, bfloat16, bfloat16>& g, std::int64_t i,
                        std::int64_t j, std::int64_t height, std::int64_t width, const float* sums,
                        std::int64_t stride) {
  float bias[32] = {};
  if (g.c_transposed) {
    if (g.bias != nullptr) convert(g.bias + i, bias, height);
    for (std::int64_t q = 0; q < width; q += 16) {
      Square low, high = {};
      for (int s = 0; s < 16; ++s) low[s] = load(sums + s * stride + q);
      transpose<float>(low);
      if (height > 16) {
        for (int s = 0; s < 16; ++s) high[s] = load(sums + (16 + s) * stride + q);
        transpose<float>(high);
      }
      for (std::int64_t s = 0; s < std::min<std::int64_t>(16, width - q); ++s)
        store_numbers(low[s] + load(bias), high[s] + load(bias + 16),
                      g.c + (j + q + s) * g.c_stride + i, height);
    }
    return;
  }
  if (g.bias != nullptr) convert(g.bias + j, bias, width);
  for (std::int64_t s = 0; s < height; ++s) {
    const float* line = sums + s * stride;
    store_numbers(load(line) + load(bias),
                  width > 16 ? load(line + 16) + load(bias + 16) : Vec<float>{},
                  g.c + (i + s) * g.c_stride + j, width);
  }
}

// Rows [i0, i1) and columns [j0, j1) of C.
inline void multiply_tiles_range(const Product<bfloat16, bfloat16, bfloat16>& g, std::int64_t i0,
                                 std::int64_t i1, std::int64_t j0, std::int64_t j1) {
  static thread_local Scratch a_memory, b_memory, sum_memory;
  const Tiles tiles;
  const std::int64_t rows = i1 - i0, columns = std::min(kTileColumns, ceil_div(j1 - j0, 32) * 32);
  const std::int64_t slab_tiles = ceil_div(std::min(kTileSlab, g.k), kTileDepth);
  char* const a = a_memory.get<char>(2 * slab_tiles * kTileBytes);
  char* const b = b_memory.get<char>(columns / 16 * slab_tiles * kTileBytes);
  // Between slabs sums wait here; the stride is no power of two.
  const bool one_slab = g.k <= kTileSlab;
  const std::int64_t sum_stride = one_slab ? 32 : columns + 16;
  float* const sums =
      sum_memory.get<float>(one_slab ? 32 * 32 : ceil_div(rows, 32) * 32 * sum_stride);

  for (std::int64_t j = j0; j < j1; j += columns) {
    const std::int64_t cols = std::min(columns, j1 - j);
    for (std::int64_t k0 = 0; k0 < g.k || k0 == 0; k0 += kTileSlab) {
      const std::int64_t depth = std::min(kTileSlab, g.k - k0), steps = ceil_div(depth, kTileDepth);
      const bool first = k0 == 0, last = k0 + kTileSlab >= g.k;
      const bfloat16* const b_from =
          g.b.data + (g.b.transposed ? j * g.b.stride + k0 : k0 * g.b.stride + j);
      const auto pack_b = [&](std::int64_t q, std::int64_t p) {
        pack_tiles(b_from + q * (g.b.transposed ? g.b.stride : 1), g.b.stride, g.b.transposed, true,
                   cols - q, depth, p, steps, b + q / 16 * steps * kTileBytes);
      };
      // As memory is read fastest: along the rows as they are stored.
      if (g.b.transposed) {
        for (std::int64_t q = 0; q < cols; q += 32)
          for (std::int64_t p = 0; p < steps; ++p) pack_b(q, p);
      } else {
        for (std::int64_t p = 0; p < steps; ++p)
          for (std::int64_t q = 0; q < cols; q += 32) pack_b(q, p);
      }
      for (std::int64_t i = 0; i < rows; i += 32) {
        const std::int64_t height = std::min<std::int64_t>(32, rows - i);
        const bfloat16* const a_from =
            g.a.data + (g.a.transposed ? k0 * g.a.stride + i0 + i : (i0 + i) * g.a.stride + k0);
        TileRows from{a, steps * kTileBytes, 64, kTileBytes};
        if (!g.a.transposed && cols < kCopyColumns && depth % kTileDepth == 0 && height % 16 == 0) {
          from = {reinterpret_cast<const char*>(a_from), kTileRows * g.a.stride * 2, g.a.stride * 2,
                  2 * kTileDepth};
        } else {
          for (std::int64_t p = 0; p < steps; ++p)
            pack_tiles(a_from, g.a.stride, !g.a.transposed, false, height, depth, p, steps, a);
        }
        for (std::int64_t q = 0; q < cols; q += 32) {
          float* const c = one_slab ? sums : sums + i * sum_stride + q;
          const std::int64_t width = std::min<std::int64_t>(32, cols - q);
          const auto kernel = height > 16 ? (width > 16 ? tile_kernel<2, 2> : tile_kernel<2, 1>)
                                          : (width > 16 ? tile_kernel<1, 2> : tile_kernel<1, 1>);
          kernel(from, b + q / 16 * steps * kTileBytes, steps, !first, c, sum_stride);
          if (last) store_block(g, i0 + i, j + q, height, width, c, sum_stride);
        }
      }
    }
  }
}

inline void multiply_tiles(const Context& context, Product<bfloat16, bfloat16, bfloat16> g) {
  if (g.m <= kFewRows && !g.a.transposed && g.b.transposed)
    g = {g.n,
         g.m,
         g.k,
         {g.b.data, g.b.stride, false},
         {g.a.data, g.a.stride, true},
         g.c,
         g.c_stride,
         g.bias,
         !g.c_transposed};
  for_blocks(context, g, 32, 32, [&](auto... range) { multiply_tiles_range(g, range...); });
}

}  // namespace
}  // namespace structmat
#endif
