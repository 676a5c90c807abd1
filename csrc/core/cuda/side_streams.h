// SPDX-License-Identifier: Apache-2.0
// Streams beside the caller's, for work that one at a time would leave most of the device idle.
#pragma once
#include <cstddef>
#include <vector>

namespace structmat::cuda {

// They begin after all work that is on `main` now; work put on `main` after their end comes after
// theirs. Fork and join are events, so that a graph capture of `main` takes them along.
class SideStreams {
 public:
  SideStreams(void* main, int count);  // `main` counts as the first
  SideStreams(const SideStreams&) = delete;
  SideStreams& operator=(const SideStreams&) = delete;
  ~SideStreams();
  void* operator[](int i) const { return i == 0 ? main_ : side_[static_cast<std::size_t>(i) - 1]; }
  // Their end. Without it the destructor joins them, as after an exception, and keeps errors to
  // itself.
  void join();

 private:
  void* main_;
  std::vector<void*> side_;
  void* event_ = nullptr;
  bool joined_ = false;
};

}  // namespace structmat::cuda
