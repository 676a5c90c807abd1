// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

namespace structmat {

// The Euclidean norm of many numbers as scale * sqrt(sum): squares neither overflow nor vanish.
// Always inlined: files of several instruction sets include it (cmake/Simd.cmake).
struct Norm {
  double scale = 0, sum = 0;

  template <class T>
  [[gnu::always_inline]] inline void add(const T* data, std::int64_t count) {
    T largest = 0;
    bool nan = false;
    for (std::int64_t i = 0; i < count; ++i) {
      const T magnitude = std::abs(data[i]);
      largest = magnitude > largest ? magnitude : largest;
      nan |= data[i] != data[i];
    }
    if (nan) largest = std::numeric_limits<T>::quiet_NaN();
    if (largest == 0) return;
    // A float's square cannot leave double's range, so those share the scale 1.
    const double unit = sizeof(T) == 4 || !std::isfinite(largest) ? 1.0 : power_below(largest);
    double partial[8] = {};
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      for (int k = 0; k < 8; ++k) {
        const double value = static_cast<double>(data[i + k]) / unit;
        partial[k] += value * value;
      }
    for (; i < count; ++i) {
      const double value = static_cast<double>(data[i]) / unit;
      partial[0] += value * value;
    }
    double total = 0;
    for (double p : partial) total += p;
    add({unit, total});
  }
  [[gnu::always_inline]] inline void add(Norm other) {
    if (other.scale == 0) return;
    if (scale < other.scale || scale == 0) {
      const Norm mine = *this;  // not std::swap, which the linker may take from any file
      *this = other;
      other = mine;
    }
    if (other.scale > 0) sum += other.sum * (other.scale / scale) * (other.scale / scale);
  }
  [[gnu::always_inline]] inline double value() const { return scale * std::sqrt(sum); }

  [[gnu::always_inline]] static inline double power_below(double x) {
    return std::ldexp(1.0, std::ilogb(x));
  }
};

}  // namespace structmat
