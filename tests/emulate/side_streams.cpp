// SPDX-License-Identifier: Apache-2.0
// The emulator runs everything at once: it knows no streams.
#include "cuda/side_streams.h"

namespace structmat::cuda {

SideStreams::SideStreams(void* main, int count)
    : main_(main), side_(static_cast<std::size_t>(count > 1 ? count - 1 : 0), main) {}
void SideStreams::join() {}
SideStreams::~SideStreams() = default;

}  // namespace structmat::cuda
