// SPDX-License-Identifier: Apache-2.0
// Matrix instructions and asynchronous copies on the emulator. Copies happen as late as they may,
// when their thread waits for them, so that a missing wait changes results.
#pragma once
#include "emulate.h"
#include "half.h"

namespace emulate {

// What the lanes of a warp show each other during one instruction.
struct Registers {
  unsigned a[32][4], b[32][2];
  const unsigned char* row[32];
};
inline Registers registers[32];

inline Registers& registers_of_warp() {
  const dim3 i = threadIdx, size = blockDim;
  return registers[(i.x + size.x * (i.y + size.y * i.z)) / 32];
}
inline unsigned short half_of(unsigned pair, int which) {
  return static_cast<unsigned short>(pair >> 16 * which);
}

}  // namespace emulate

namespace structmat::cuda {

template <int kBytes>
void copy(void* to, const void* from, int count) {
  if (reinterpret_cast<std::uintptr_t>(to) % kBytes != 0 || count < 0 || count > kBytes ||
      reinterpret_cast<std::uintptr_t>(from) % kBytes != 0)
    emulate::fail("a copy that is not aligned to its size");
  emulate::current->self->copies.push_back({to, from, count, kBytes});
}
inline void copy_commit() {
  auto& copies = emulate::current->self->copies;
  copies.push_back({nullptr, nullptr, 0, 0});
}
template <int kLeft>
void copy_wait() {
  auto& copies = emulate::current->self->copies;
  std::ptrdiff_t groups = std::count_if(copies.begin(), copies.end(),
                                        [](const emulate::Copy& copy) { return copy.bytes == 0; });
  auto copy = copies.begin();
  for (; groups > kLeft; ++copy) {
    if (copy->bytes == 0) {
      --groups;
      continue;
    }
    std::memset(copy->to, 0, static_cast<std::size_t>(copy->bytes));
    std::memcpy(copy->to, copy->from, static_cast<std::size_t>(copy->count));
  }
  copies.erase(copies.begin(), copy);
}

template <bool kTransposed>
void load_matrices(unsigned (&out)[4], const void* row) {
  emulate::Registers& warp = emulate::registers_of_warp();
  const int lane = emulate::current->self->lane, g = lane / 4, t = lane % 4;
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0)
    emulate::fail("a matrix whose rows are not aligned to 16 bytes");
  warp.row[lane] = static_cast<const unsigned char*>(row);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    unsigned short pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r = kTransposed ? 2 * t + e : g, c = kTransposed ? g : 2 * t + e;
      std::memcpy(&pair[e], warp.row[8 * i + r] + 2 * c, 2);
    }
    out[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
  }
  __syncwarp();
}

template <class T>
void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulate::Registers& warp = emulate::registers_of_warp();
  const int lane = emulate::current->self->lane, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) warp.a[lane][i] = a[i];
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, col = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, part = k / 8, which = k % 2;
      const T left{emulate::half_of(warp.a[row % 8 * 4 + holder][row / 8 + 2 * part], which)};
      const T right{emulate::half_of(warp.b[col * 4 + holder][part], which)};
      c[i] += to_float(left) * to_float(right);
    }
  }
  __syncwarp();
}

}  // namespace structmat::cuda
