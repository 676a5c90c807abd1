# SPDX-License-Identifier: Apache-2.0
"""The emulator runs correct kernels correctly and finds planted errors."""

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent / "emulate"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
Run = Callable[..., subprocess.CompletedProcess[str]]
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


# As ROTATE, by an asynchronous copy; nothing of it is there before its thread has waited.
COPY = """
#include "copy.h"
__global__ void kernel(const float* in, float* out) {
  SM_DYNAMIC_SHARED(float, tile);
  const unsigned t = threadIdx.x, i = blockIdx.x * 72 + t;
  structmat::cuda::copy<4>(tile + t, in + i, 4);
  structmat::cuda::copy_commit();
  WAIT;
  __syncthreads();
  out[i] = tile[(t + 1) % 72];
}
float expected(int block, int t) { return float(block * 72 + (t + 1) % 72); }
"""

# The product of two matrices of small integers, each number laid where the PTX ISA says
# (mma.m16n8k16), A read through ldmatrix and, for odd blocks, B through its transposing form.
MATRICES = """
#include "copy.h"
#include "mma.h"
using structmat::bfloat16;
bfloat16 number(int v) { return structmat::from_float<bfloat16>(float(v)); }
int left(int r, int k) { return r * 3 % 7 - k % 5; }
int right(int k, int c) { return k * 2 % 5 - c; }
__global__ void kernel(const float*, float* out) {
  alignas(16) __shared__ bfloat16 a[16][16], b[16][16];
  const int t = threadIdx.x, lane = t % 32, block = blockIdx.x;
  if (t < 32)
    for (int i = lane; i < 256; i += 32) {
      a[i / 16][i % 16] = number(left(i / 16, i % 16));
      const int k = block % 2 ? i / 16 : i % 16, c = block % 2 ? i % 16 : i / 16;
      b[i / 16][i % 16] = number(c < 8 ? right(k, c) : 0);
    }
  __syncthreads();
  if (t >= 32) { out[block * 72 + t] = 0; return; }
  unsigned x[4], y[4];
  structmat::cuda::load_matrices<false>(x, &a[lane % 16][lane / 16 * 8]);
  if (block % 2)
    structmat::cuda::load_matrices<true>(y, &b[lane / 8 % 2 * 8 + lane % 8][0]);
  else
    structmat::cuda::load_matrices<false>(y, &b[lane % 8][lane / 8 % 2 * 8]);
  float sum[4] = {};
  structmat::cuda::multiply_16x8x16<bfloat16>(sum, x, y[0], y[1]);
  // c1 of lane (group, in group) is C(group, 2 in group + 1), c2 is C(group + 8, 2 in group)
  out[block * 72 + t] = sum[1] + 1000 * sum[2];
}
float expected(int, int t) {
  if (t >= 32) return 0;
  float one = 0, two = 0;
  for (int k = 0; k < 16; ++k) {
    one += float(left(t / 4, k) * right(k, t % 4 * 2 + 1));
    two += float(left(t / 4 + 8, k) * right(k, t % 4 * 2));
  }
  return one + 1000 * two;
}
"""


# Hands its neighbour's value to the next block, all of which must have come. Nothing promises that
# arriving at the grid's barrier, or leaving it, is a barrier of the block as well.
TOGETHER = """
#include "grid_barrier.h"
#undef SM_LAUNCH
#define SM_LAUNCH SM_LAUNCH_TOGETHER
__global__ void kernel(const float* in, float* out) {
  SM_DYNAMIC_SHARED(float, tile);
  const unsigned t = threadIdx.x, block = blockIdx.x;
  tile[t] = in[block * 72 + t];
  out[block * 72 + t] = -1;
  structmat::cuda::GridBarrier barrier;
  if (ARRIVES) barrier.arrive();
  BARRIER;
  const float neighbour = tile[(t + 1) % 72];
  WAIT;
  out[(block + 1) % 3 * 72 + t] = neighbour;
}
float expected(int block, int t) { return float((block + 2) % 3 * 72 + (t + 1) % 72); }
"""


# Reads what all of the block wrote and then writes there; between the two the threads only leave
# the grid's barrier, before which some come late to the reading.
COME_AND_GO = """
#include "grid_barrier.h"
#undef SM_LAUNCH
#define SM_LAUNCH SM_LAUNCH_TOGETHER
__global__ void kernel(const float* in, float* out) {
  SM_DYNAMIC_SHARED(float, tile);
  const unsigned t = threadIdx.x, block = blockIdx.x;
  tile[t] = in[block * 72 + t];
  __syncthreads();
  structmat::cuda::GridBarrier barrier;
  barrier.arrive();
  float sum = 0;
  for (int i = 0; i < 72; ++i) sum += tile[i];
  barrier.wait();
  BARRIER;
  tile[t] = -1;
  out[block * 72 + t] = sum;
}
float expected(int block, int) { return float(block * 72 * 72 + 72 * 71 / 2); }
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Compiles a kernel and runs it, on an emulator that is compiled once."""
    folders = ("tests/emulate", "csrc/core/cuda", "csrc/core", "csrc/include")
    options = ["-std=c++20", "-O1", "-g", "-Wall", "-Werror", "-DSTRUCTMAT_EMULATE"]
    options += [f"-I{EMULATOR.parents[1] / folder}" for folder in folders]

    @cache
    def emulator(*sanitizer: str) -> list[Path]:
        folder = tmp_path_factory.mktemp("emulator")
        sources = EMULATOR / "emulate.cpp", EMULATOR / "fibre.cpp"
        compiler = [COMPILER, *options, *sanitizer, "-c", *sources]
        subprocess.run(compiler, check=True, cwd=folder)
        return [folder / f"{source.stem}.o" for source in sources]

    def run(kernel: str, *flags: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("planted")
        source, program = folder / "planted.cpp", folder / "planted"
        source.write_text(MAIN.format(kernel=kernel))
        sources = [source, *emulator(*(flag for flag in flags if flag in ASAN))]
        subprocess.run([COMPILER, *options, *flags, *sources, "-o", program], check=True)
        return subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)

    return run


@pytest.mark.parametrize("sanitizer", [(), ASAN], ids=["plain", "asan"])
@pytest.mark.parametrize("tile", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_correct_kernel(run: Run, tile: str, sanitizer: tuple[str, ...]) -> None:
    done = run(ROTATE, tile, BARRIER, "-DOFFSET=0", *sanitizer)
    assert done.stdout == "right\n"
    assert "ERROR" not in done.stderr


@pytest.mark.parametrize("sanitizer", [(), ASAN], ids=["plain", "asan"])
def test_partial_and_divided_warps(run: Run, sanitizer: tuple[str, ...]) -> None:
    done = run(SHUFFLE, *sanitizer)
    assert done.stdout == "right\n"
    assert "ERROR" not in done.stderr


@pytest.mark.parametrize("tile", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_missing_barrier(run: Run, tile: str) -> None:
    assert run(ROTATE, tile, "-DBARRIER=", "-DOFFSET=0").stdout == "wrong\n"


@pytest.mark.parametrize("tile", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_access_out_of_range_with_sanitizer(run: Run, tile: str) -> None:
    done = run(ROTATE, tile, BARRIER, "-DOFFSET=1", *ASAN)
    assert done.returncode != 0
    assert "overflow" in done.stderr or "out of bounds" in done.stderr
    assert "planted.cpp" in done.stderr


def test_write_past_shared_memory(run: Run) -> None:
    done = run(ROTATE, DYNAMIC, BARRIER, "-DOFFSET=1")
    assert "wrote past its 288 bytes of shared memory" in done.stdout


def test_shared_memory_is_poisoned_between_blocks(run: Run) -> None:
    assert run(STALE).stdout == "right\n"


def test_divergent_barrier(run: Run) -> None:
    assert "deadlock" in run(DIVERGENT).stdout


def test_shuffle_outside_its_mask(run: Run) -> None:
    assert "mask leaves out" in run(OUTSIDE_MASK).stdout


def test_copies_arrive_when_waited_for(run: Run) -> None:
    assert run(COPY, "-DWAIT=structmat::cuda::copy_wait<0>()").stdout == "right\n"
    assert run(COPY, "-DWAIT=structmat::cuda::copy_wait<1>()").stdout == "wrong\n"


def test_matrix_instructions(run: Run) -> None:
    assert run(MATRICES).stdout == "right\n"


def test_blocks_that_wait_for_each_other(run: Run) -> None:
    wait, arrives = "-DWAIT=barrier.wait()", "-DARRIVES=true"
    assert run(TOGETHER, BARRIER, wait, arrives).stdout == "right\n"
    assert run(TOGETHER, BARRIER, "-DWAIT=", arrives).stdout == "wrong\n"
    assert run(TOGETHER, "-DBARRIER=", wait, arrives).stdout == "wrong\n"
    assert "deadlock" in run(TOGETHER, BARRIER, wait, "-DARRIVES=block>0").stdout
    twice = "-DARRIVES=(barrier.arrive(),block==0&&t==0)"
    assert "arrives twice" in run(TOGETHER, BARRIER, wait, twice).stdout
    assert run(COME_AND_GO, BARRIER).stdout == "right\n"
    assert run(COME_AND_GO, "-DBARRIER=").stdout == "wrong\n"
