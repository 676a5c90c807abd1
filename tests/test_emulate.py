# SPDX-License-Identifier: Apache-2.0
"""The emulator runs correct kernels correctly and finds planted errors."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent / "emulate"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

# Runs a kernel under four orders of its threads and compares with what CUDA would give.
MAIN = """
#include "device.h"
#include <cstdio>
#include <exception>
{kernel}
int main() try {{
  constexpr int kThreads = 72, kBlocks = 3, kCount = kThreads * kBlocks;
  float in[kCount], out[kCount];
  for (int i = 0; i < kCount; ++i) in[i] = float(i);
  for (unsigned seed = 1; seed <= 4; ++seed) {{
    emulate::seed = seed;
    SM_LAUNCH(kernel, kBlocks, kThreads, kThreads * sizeof(float), nullptr, in, out);
    for (int i = 0; i < kCount; ++i)
      if (out[i] != expected(i / kThreads, i % kThreads)) return std::puts("wrong"), 1;
  }}
  std::puts("right");
  return 0;
}} catch (const std::exception& e) {{
  std::puts(e.what());
  return 2;
}}
"""

# Every thread hands its value to its neighbour through shared memory.
ROTATE = """
__global__ void kernel(const float* in, float* out) {
  TILE;
  const unsigned t = threadIdx.x, i = blockIdx.x * 72 + t;
  tile[t + OFFSET] = in[i];
  BARRIER;
  out[i] = tile[(t + 1) % 72 + OFFSET];
}
float expected(int block, int t) { return float(block * 72 + (t + 1) % 72); }
"""
DYNAMIC = "-DTILE=SM_DYNAMIC_SHARED(float,tile)"
STATIC = "-DTILE=__shared__ float tile[72]"
BARRIER = "-DBARRIER=__syncthreads()"

# Sums over warps, of which the last has 8 threads, then over each warp's first half alone.
SHUFFLE = """
__global__ void kernel(const float* in, float* out) {
  const unsigned t = threadIdx.x, lane = t % 32, mask = t < 64 ? ~0u : 0xffu;
  float sum = in[t];
  for (int step = t < 64 ? 16 : 4; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
  float half = sum;
  if (t < 64 && lane < 16) half = __shfl_sync(0xffffu, float(lane), 5);
  const unsigned votes = __ballot_sync(mask, lane % 2);
  __syncthreads();
  out[blockIdx.x * 72 + t] = t < 64 && lane < 16 ? half : sum + float(votes & 0xfu);
}
float expected(int, int t) {
  if (t < 64 && t % 32 < 16) return 5.f;
  const int first = t / 32 * 32, count = t < 64 ? 32 : 8;
  return float(count * first + count * (count - 1) / 2 + 10);
}
"""

# Reads shared memory that no thread has written: what an earlier block left must not be seen.
STALE = """
__global__ void kernel(const float*, float* out) {
  __shared__ float seen;
  const float before = seen;
  __syncthreads();
  seen = 1.f;
  out[blockIdx.x * 72 + threadIdx.x] = before == 0.f || before == 1.f ? 1.f : 2.f;
}
float expected(int, int) { return 2.f; }
"""

DIVERGENT = """
__global__ void kernel(const float*, float* out) {
  if (threadIdx.x < 40) __syncwarp();
  else __syncthreads();
  out[0] = 0;
}
float expected(int, int) { return 0.f; }
"""

OUTSIDE_MASK = """
__global__ void kernel(const float* in, float* out) {
  out[threadIdx.x] = __shfl_sync(0xffffu, in[0], 0);
}
float expected(int, int) { return 0.f; }
"""


def run(folder: Path, kernel: str, *flags: str) -> subprocess.CompletedProcess[str]:
    source, program = folder / "planted.cpp", folder / "planted"
    source.write_text(MAIN.format(kernel=kernel))
    options = ["-std=c++20", "-O1", "-g", "-Wall", "-Werror", "-DSTRUCTMAT_EMULATE"]
    options += [f"-I{EMULATOR}", f"-I{EMULATOR.parent.parent / 'csrc/core/cuda'}", *flags]
    sources = [source, EMULATOR / "emulate.cpp"]
    subprocess.run([COMPILER, *options, *sources, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("sanitizer", [(), ASAN], ids=["plain", "asan"])
@pytest.mark.parametrize("tile", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_correct_kernel(tmp_path: Path, tile: str, sanitizer: tuple[str, ...]) -> None:
    done = run(tmp_path, ROTATE, tile, BARRIER, "-DOFFSET=0", *sanitizer)
    assert done.stdout == "right\n"
    assert "ERROR" not in done.stderr


@pytest.mark.parametrize("sanitizer", [(), ASAN], ids=["plain", "asan"])
def test_partial_and_divided_warps(tmp_path: Path, sanitizer: tuple[str, ...]) -> None:
    done = run(tmp_path, SHUFFLE, *sanitizer)
    assert done.stdout == "right\n"
    assert "ERROR" not in done.stderr


@pytest.mark.parametrize("tile", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_missing_barrier(tmp_path: Path, tile: str) -> None:
    assert run(tmp_path, ROTATE, tile, "-DBARRIER=", "-DOFFSET=0").stdout == "wrong\n"


@pytest.mark.parametrize("tile", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_access_out_of_range_with_sanitizer(tmp_path: Path, tile: str) -> None:
    done = run(tmp_path, ROTATE, tile, BARRIER, "-DOFFSET=1", *ASAN)
    assert done.returncode != 0
    assert "overflow" in done.stderr or "out of bounds" in done.stderr
    assert "planted.cpp" in done.stderr


def test_write_past_shared_memory(tmp_path: Path) -> None:
    done = run(tmp_path, ROTATE, DYNAMIC, BARRIER, "-DOFFSET=1")
    assert "wrote past its 288 bytes of shared memory" in done.stdout


def test_shared_memory_is_poisoned_between_blocks(tmp_path: Path) -> None:
    assert run(tmp_path, STALE).stdout == "right\n"


def test_divergent_barrier(tmp_path: Path) -> None:
    assert "deadlock" in run(tmp_path, DIVERGENT).stdout


def test_shuffle_outside_its_mask(tmp_path: Path) -> None:
    assert "mask leaves out" in run(tmp_path, OUTSIDE_MASK).stdout
