# SPDX-License-Identifier: Apache-2.0
"""The emulator finds planted errors: a missing barrier, accesses out of range."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent / "emulate"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# Every thread hands its value to its neighbour through shared memory: blocks of 64, 3 blocks.
KERNEL = """
#include "device.h"
#include <cstdio>

__global__ void rotate(const float* in, float* out, int shift) {
  SM_DYNAMIC_SHARED(float, tile);
  const unsigned t = threadIdx.x;
  tile[t + shift] = in[blockIdx.x * blockDim.x + t];
  BARRIER;
  out[blockIdx.x * blockDim.x + t] = tile[(t + 1) % blockDim.x + shift];
}

int main() {
  float in[192], out[192];
  for (int i = 0; i < 192; ++i) in[i] = float(i);
  for (unsigned seed = 1; seed <= 4; ++seed) {
    emulate::seed = seed;
    SM_LAUNCH(rotate, 3, 64, 64 * sizeof(float), nullptr, in, out, SHIFT);
    for (int i = 0; i < 192; ++i)
      if (out[i] != float(i / 64 * 64 + (i + 1) % 64)) return std::puts("wrong"), 1;
  }
  return std::puts("right"), 0;
}
"""


def run(folder: Path, *flags: str, source: str = KERNEL) -> subprocess.CompletedProcess[str]:
    (folder / "planted.cpp").write_text(source)
    program = folder / "planted"
    options = ["-std=c++20", "-O1", "-g", "-DSTRUCTMAT_EMULATE", *flags]
    options += [f"-I{EMULATOR}", f"-I{EMULATOR.parent.parent / 'csrc/core/cuda'}"]
    sources = [folder / "planted.cpp", EMULATOR / "emulate.cpp"]
    subprocess.run([COMPILER, *options, *sources, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)


def test_correct_kernel(tmp_path: Path) -> None:
    assert run(tmp_path, "-DBARRIER=__syncthreads()", "-DSHIFT=0").stdout == "right\n"


def test_missing_barrier(tmp_path: Path) -> None:
    assert run(tmp_path, "-DBARRIER=", "-DSHIFT=0").stdout == "wrong\n"
