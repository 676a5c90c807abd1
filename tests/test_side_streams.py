# SPDX-License-Identifier: Apache-2.0
"""Fork and join of streams, against a CUDA runtime that writes down what it is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

RUNTIME = r"""
#pragma once
#include <cstdio>
#include <map>
enum cudaError_t { cudaSuccess, broken };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum { cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1 };
using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
inline int streams = 0;
inline std::map<void*, bool> capturing;
inline cudaError_t wait_status = cudaSuccess;
inline const char* cudaGetErrorString(cudaError_t) { return "broken"; }
inline cudaError_t cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = (cudaEvent_t)0x1000;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) { std::puts("destroy"); return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
  *s = (cudaStream_t)(long)(flags == cudaStreamNonBlocking ? ++streams : -1);
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  *status = (cudaStreamCaptureStatus)capturing[s];
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t s) {
  std::printf("record %ld\n", (long)s);
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t, unsigned) {
  std::printf("wait %ld\n", (long)s);
  return wait_status;
}
"""
MAIN = r"""
#include "cuda/side_streams.cpp"
#include <stdexcept>
#include "error.cpp"
using structmat::cuda::SideStreams;
static void* const home = (void*)99;
int main() {
  { SideStreams none(home, 1); none.join(); std::printf("one: %d\n", none[0] == home); }
  {
    SideStreams three(home, 3);
    std::printf("work %ld %ld %ld\n", (long)three[0], (long)three[1], (long)three[2]);
    SideStreams other(home, 2);  // meanwhile: a stream of its own
    std::printf("work %ld\n", (long)other[1]);
    other.join();
    three.join();
  }
  std::puts("capture");
  capturing[(void*)1] = capturing[(void*)2] = true;
  {
    SideStreams three(home, 3);
    std::printf("work %ld %ld\n", (long)three[1], (long)three[2]);
    three.join();
  }
  std::puts("exception");
  try {
    SideStreams two(home, 2);
    throw std::runtime_error("x");
  } catch (const std::runtime_error&) {}
  std::puts("error");
  SideStreams two(home, 2);
  wait_status = broken;
  try { two.join(); } catch (const structmat::Error& e) { std::puts(e.what()); }
}
"""
WANTED = """
one: 1
record 99
wait 1
wait 2
work 99 1 2
record 99
wait 3
work 3
record 3
wait 99
record 1
wait 99
record 2
wait 99
destroy
destroy
capture
record 99
wait 3
wait 4
work 3 4
record 3
wait 99
record 4
wait 99
destroy
exception
record 99
wait 4
record 4
wait 99
destroy
error
record 99
wait 4
record 4
wait 99
structmat: cudaStreamWaitEvent failed: broken
record 4
wait 99
destroy
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_fork_and_join(tmp_path: Path) -> None:
    """A stream that a capture has taken along is not lent; the join comes after exceptions too."""
    (tmp_path / "cuda_runtime_api.h").write_text(RUNTIME)
    folders = [f"-I{f}" for f in (tmp_path, ROOT / "csrc/include", ROOT / "csrc/core")]
    program = tmp_path / "program"
    command = [str(COMPILER), "-std=c++20", *folders, "-x", "c++", "-", "-o", str(program)]
    subprocess.run(command, input=MAIN, text=True, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == WANTED.split("\n")[1:-1]
