// SPDX-License-Identifier: Apache-2.0
// C = op(A) op(B) + bias of bfloat16 on the matrix unit (AMX): tiles of 16 x 32 times 32 x 16
// numbers, sums in fp32, results rounded once. Each element is one chain of tile products in the
// order of k: threads and tiling change no bit. Only where has_amx_bf16() says so; compiled with
// AVX-512. For files under structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include "product_simd.h"

#if defined(__AVX512BW__)
#include <immintrin.h>

namespace structmat {
namespace {

constexpr int kTileRows = 16, kTileDepth = 32;
constexpr std::int64_t kTileBytes = 1024, kTileNumbers = kTileBytes / 2;
constexpr std::int64_t kTileSlab = 1024;    // of k at a time
constexpr std::int64_t kTileColumns = 512;  // packed, with a slab: 1 MB, half of the level-2 cache

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

// Rows of A: tile t begins at data + t * tile_step, its next 32 columns `step` bytes on.
struct TileRows {
  const char* data;
  std::int64_t tile_step, stride, step;
};

// c (kRows x kCols tiles, stride in numbers) = init (c itself, or zero) + a b. b: for each tile of
// columns `steps` tiles.
template <int kRows, int kCols>
void tile_kernel(const TileRows& a, const char* b, std::int64_t steps, bool init, float* c,
                 std::int64_t c_stride) {
  float* const c1 = c + kTileRows * c_stride;
  const std::int64_t bytes = c_stride * 4;
  if (init) {
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
  const char *a0 = a.data, *a1 = a.data + a.tile_step;
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

// Sixteen lines of 32 numbers: lines i0 .. of an operand whose lines are contiguous along k, from
// k0 on; zeros beyond `lines` and `depth`.
inline void load_lines(const bfloat16* data, std::int64_t stride, int lines, int depth,
                       Vec<float> (&out)[16]) {
  const __mmask32 mask = depth >= 32 ? ~0u : (1u << depth) - 1;
  for (int i = 0; i < 16; ++i) {
    const __m512i line =
        i < lines ? _mm512_maskz_loadu_epi16(mask, data + i * stride) : _mm512_setzero_si512();
    std::memcpy(&out[i], &line, sizeof line);
  }
}
// The same numbers where lines are contiguous across: vector q has numbers 2 q and 2 q + 1 of each
// of 16 lines, side by side.
inline void load_pairs(const bfloat16* data, std::int64_t stride, int lines, int depth,
                       Vec<float> (&out)[16]) {
  const __mmask16 mask = static_cast<__mmask16>(lines >= 16 ? 0xffff : (1 << lines) - 1);
  const auto load = [&](int p) {
    return p < depth ? _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(mask, data + p * stride))
                     : _mm512_setzero_si512();
  };
  for (int q = 0; q < 16; ++q) {
    const __m512i pair = _mm512_or_si512(load(2 * q), _mm512_maskz_slli_epi32(0xffff, load(2 * q + 1), 16));
    std::memcpy(&out[q], &pair, sizeof pair);
  }
}
// A tile of A (16 lines along k) or of B (16 pairs of rows), from storage of either order.
inline void pack_tile(const bfloat16* data, std::int64_t stride, bool along_k, bool want_pairs,
                      int lines, int depth, char* to) {
  Vec<float> square[16];
  if (along_k)
    load_lines(data, stride, lines, depth, square);
  else
    load_pairs(data, stride, lines, depth, square);
  if (along_k == want_pairs) transpose<float>(square);
  std::memcpy(to, square, sizeof square);
}

// Rows [i0, i1) and columns [j0, j1) of C.
inline void multiply_tiles_range(const Product<bfloat16, bfloat16, bfloat16>& g, std::int64_t i0,
                                 std::int64_t i1, std::int64_t j0, std::int64_t j1) {
  static thread_local Scratch a_memory, b_memory, sum_memory;
  Scratch large;  // goes when the call ends
  const Tiles tiles;
  const std::int64_t rows = i1 - i0, row_tiles = ceil_div(rows, kTileRows);
  const std::int64_t columns = std::min(kTileColumns, ceil_div(j1 - j0, 16) * 16);
  const std::int64_t slab_steps = ceil_div(std::min(kTileSlab, g.k), kTileDepth);
  char* const b = b_memory.get<char>(columns / 16 * slab_steps * kTileBytes);
  const bool one_slab = g.k <= kTileSlab;
  const std::int64_t sum_stride = one_slab ? 32 : ceil_div(j1 - j0, 32) * 32 + 16;
  const std::int64_t numbers = one_slab ? 32 * 32 : ceil_div(row_tiles, 2) * 32 * sum_stride;
  float* const sums = (numbers > (std::int64_t{4} << 20) ? large : sum_memory).get<float>(numbers);
  float bias[32] = {};

  for (std::int64_t k0 = 0; k0 < g.k || k0 == 0; k0 += kTileSlab) {
    const std::int64_t depth = std::min(kTileSlab, g.k - k0), steps = ceil_div(depth, kTileDepth);
    const bool first = k0 == 0, last = k0 + kTileSlab >= g.k;
    const auto depth_at = [&](std::int64_t p) {
      return static_cast<int>(std::min<std::int64_t>(kTileDepth, depth - p * kTileDepth));
    };
    // Whole tiles of rows along k are read in place, all others packed.
    const bool in_place = !g.a.transposed && depth % kTileDepth == 0;
    const std::int64_t packed_from = in_place ? rows / 32 * 2 : 0;
    char* const a = a_memory.get<char>((row_tiles - packed_from + 1) * steps * kTileBytes);
    for (std::int64_t t = packed_from; t < row_tiles; ++t) {
      const std::int64_t i = i0 + t * kTileRows;
      const int lines = static_cast<int>(std::min<std::int64_t>(kTileRows, i1 - i));
      for (std::int64_t p = 0; p < steps; ++p) {
        const std::int64_t k = k0 + p * kTileDepth;
        pack_tile(g.a.data + (g.a.transposed ? k * g.a.stride + i : i * g.a.stride + k), g.a.stride,
                  !g.a.transposed, false, lines, depth_at(p),
                  a + ((t - packed_from) * steps + p) * kTileBytes);
      }
    }
    for (std::int64_t j = j0; j < j1; j += columns) {
      const std::int64_t cols = std::min(columns, j1 - j);
      for (std::int64_t q = 0; q < cols; q += 16) {
        const int lines = static_cast<int>(std::min<std::int64_t>(16, cols - q));
        for (std::int64_t p = 0; p < steps; ++p) {
          const std::int64_t k = k0 + p * kTileDepth;
          pack_tile(g.b.data + (g.b.transposed ? (j + q) * g.b.stride + k : k * g.b.stride + j + q),
                    g.b.stride, g.b.transposed, true, lines, depth_at(p),
                    b + (q / 16 * steps + p) * kTileBytes);
        }
      }
      for (std::int64_t t = 0; t < row_tiles; t += 2) {
        const std::int64_t i = t * kTileRows;
        const bool two = t + 1 < row_tiles;
        TileRows from;
        if (t < packed_from)
          from = {reinterpret_cast<const char*>(g.a.data + (i0 + i) * g.a.stride + k0),
                  kTileRows * g.a.stride * 2, g.a.stride * 2, 2 * kTileDepth};
        else
          from = {a + (t - packed_from) * steps * kTileBytes, steps * kTileBytes, 64, kTileBytes};
        for (std::int64_t q = 0; q < cols; q += 32) {
          float* const c = one_slab ? sums : sums + i * sum_stride + (j - j0) + q;
          const char* const panel = b + q / 16 * steps * kTileBytes;
          const bool wide = cols - q > 16;
          (two ? (wide ? tile_kernel<2, 2> : tile_kernel<2, 1>)
               : (wide ? tile_kernel<1, 2> : tile_kernel<1, 1>))(from, panel, steps, !first, c,
                                                                 sum_stride);
          if (!last) continue;
          const std::int64_t height = std::min<std::int64_t>(32, rows - i),
                             width = std::min<std::int64_t>(32, cols - q);
          if (g.c_transposed) {
            store_transposed(c, sum_stride, height, width, g.c + (j + q) * g.c_stride + i0 + i,
                             g.c_stride);
            continue;
          }
          if (g.bias != nullptr) convert(g.bias + j + q, bias, width);
          for (std::int64_t s = 0; s < height; ++s) {
            float line[32];
            for (int x = 0; x < 32; ++x) line[x] = c[s * sum_stride + x] + bias[x];
            convert(line, g.c + (i0 + i + s) * g.c_stride + j + q, width);
          }
        }
      }
    }
  }
}

inline void multiply_tiles(const Context& context, const Product<bfloat16, bfloat16, bfloat16>& g) {
  if (g.m == 0 || g.n == 0) return;
  Grid grid = grid_of<float>(g.m, g.n, g.k, thread_count(context));
  grid.row_step = ceil_div(grid.row_step, 32) * 32;
  grid.col_step = ceil_div(grid.col_step, 32) * 32;
  grid.row_tasks = ceil_div(g.m, grid.row_step);
  grid.col_tasks = ceil_div(g.n, grid.col_step);
  parallel_for(context, grid.row_tasks * grid.col_tasks, [&](std::int64_t task) {
    const std::int64_t i = task / grid.col_tasks * grid.row_step;
    const std::int64_t j = task % grid.col_tasks * grid.col_step;
    multiply_tiles_range(g, i, std::min(g.m, i + grid.row_step), j,
                         std::min(g.n, j + grid.col_step));
  });
}

}  // namespace
}  // namespace structmat
#endif
