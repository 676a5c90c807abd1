// SPDX-License-Identifier: Apache-2.0
// CPU scratch. In an anonymous namespace: files of several instruction sets include it
// (cmake/Simd.cmake).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace structmat {
namespace {

// Memory of a thread that grows and stays: a call allocates nothing once it has the size.
class Scratch {
 public:
  template <class S>
  S* get(std::int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(S) + 63) / 64 * 64 + 64;
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = 0;
      memory_.reset(std::aligned_alloc(64, bytes));
      if (!memory_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<S*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t bytes_ = 0;
};

}  // namespace
}  // namespace structmat
