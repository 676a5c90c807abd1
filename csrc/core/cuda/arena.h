// SPDX-License-Identifier: Apache-2.0
// Device memory lent for a call, cut into pieces.
#pragma once
#include <cstddef>
#include <cstdint>

namespace structmat::cuda {

// The work space: counted without a base, handed out with one.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class U>
  U* take(std::int64_t count) {
    U* out = base_ == nullptr ? nullptr : reinterpret_cast<U*>(base_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(U) + 255) / 256 * 256;
    return out;
  }
  std::size_t used() const { return used_; }

 private:
  unsigned char* base_;
  std::size_t used_ = 0;
};

}  // namespace structmat::cuda
