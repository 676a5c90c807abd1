// SPDX-License-Identifier: Apache-2.0
#include "cuda/side_streams.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <string>

#include "structmat/error.h"

namespace structmat::cuda {
namespace {

void check(cudaError_t status, const char* call) {
  STRUCTMAT_CHECK(status == cudaSuccess,
                  std::string("structmat: ") + call + " failed: " + cudaGetErrorString(status));
}

cudaStream_t stream_of(void* p) {
  return static_cast<cudaStream_t>(p);
}
cudaEvent_t event_of(void* p) {
  return static_cast<cudaEvent_t>(p);
}

// Streams that no call uses, by device. Making one takes longer than most calls, so they live as
// long as the process.
struct Pool {
  std::mutex mutex;
  std::map<int, std::vector<void*>> idle;
};
Pool& pool() {
  static Pool* const found = new Pool;  // never destroyed: the driver may be gone before
  return *found;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// A stream that took part in a capture belongs to it until that ends, whoever began it: work of
// another call would end up in its graph. (Each call within one capture thus makes streams anew.)
bool is_free(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(stream), &status), "cudaStreamIsCapturing");
  return status == cudaStreamCaptureStatusNone;
}

std::vector<void*> take(int count) {
  std::vector<void*> found;
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    std::vector<void*>& idle = pool().idle[current_device()];
    for (std::size_t i = idle.size(); i-- > 0 && static_cast<int>(found.size()) < count;)
      if (is_free(idle[i])) {
        found.push_back(idle[i]);
        idle.erase(idle.begin() + static_cast<std::ptrdiff_t>(i));
      }
  }
  while (static_cast<int>(found.size()) < count) {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    found.push_back(stream);
  }
  return found;
}

}  // namespace

SideStreams::SideStreams(void* main, int count) : main_(main) {
  if (count <= 1) return;
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  event_ = event;
  side_ = take(count - 1);
  check(cudaEventRecord(event, stream_of(main_)), "cudaEventRecord");
  for (void* side : side_)
    check(cudaStreamWaitEvent(stream_of(side), event, 0), "cudaStreamWaitEvent");
}

void SideStreams::join() {
  for (void* side : side_) {
    check(cudaEventRecord(event_of(event_), stream_of(side)), "cudaEventRecord");
    check(cudaStreamWaitEvent(stream_of(main_), event_of(event_), 0), "cudaStreamWaitEvent");
  }
  joined_ = true;  // where a join fails the destructor tries again, and keeps what cannot be joined
}

SideStreams::~SideStreams() {
  try {
    if (!joined_) join();
    const std::lock_guard<std::mutex> lock(pool().mutex);
    std::vector<void*>& idle = pool().idle[current_device()];
    idle.insert(idle.end(), side_.begin(), side_.end());
  } catch (...) {  // an error is on its way already, or the device is lost
  }
  if (event_ != nullptr) cudaEventDestroy(event_of(event_));
}

}  // namespace structmat::cuda
