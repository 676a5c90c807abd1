# SPDX-License-Identifier: Apache-2.0
"""What a decomposition asks of a GPU's memory, and how lists share it: sizes beyond 2^31, on the
host."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

# The sizes by themselves: of the emulator nothing is called.
MAIN = r"""
#include "svd/svd_cuda.cu"
#include "svd/svd_lanes.h"
#include <cstdio>
#include "side_streams.cpp"
namespace emulate {
Block* current = nullptr;
void wait_for_block() {}
std::uint64_t wait_for_warp(unsigned, std::uint64_t, int) { return 0; }
void launch(std::function<void()>, dim3, dim3, std::size_t, bool) {}
}  // namespace emulate
namespace structmat {
void cuda::gemm(const Context&, const Gemm&, void*) {}
void fill_gaussian_cuda(const Context&, MatrixView, std::uint64_t, std::uint32_t) {}
}  // namespace structmat
using namespace structmat;

static void workspace(DType dtype, std::int64_t m, std::int64_t n, std::int64_t row_stride,
                      std::int64_t col_stride, std::int64_t rank) {
  SvdOptions options;
  options.rank = rank;
  const SvdPlan plan = plan_wide(m, n, options);
  StridedMatrixView b(nullptr, dtype, m, n, row_stride, col_stride);
  if (plan.swapped) b = {nullptr, dtype, n, m, col_stride, row_stride};
  std::printf("%zu %lld %lld %lld\n", randomized_svd_workspace_cuda(b, plan),
              (long long)plan.tall, (long long)plan.small, (long long)plan.basis());
}
static void lanes(const std::vector<std::int64_t>& entries, const std::vector<std::size_t>& bytes) {
  const SvdLanes found(entries, bytes);
  std::printf("%d %zu %zu :", found.lanes, found.bytes_of_lane, found.bytes);
  for (int lane : found.lane) std::printf(" %d", lane);
  std::puts("");
}

int main() {
  const std::int64_t one = 1;
  workspace(DType::f32, one << 17, one << 15, one << 15, 1, 64);
  workspace(DType::f32, one << 15, one << 17, one << 17, 1, 64);
  workspace(DType::f64, one << 34, 40, 40, 1, 4);
  workspace(DType::bf16, 50, one << 33, one << 33, 1, 8);
  workspace(DType::f32, one << 17, one << 15, one << 20, 3, 64);
  lanes({}, {});
  lanes({100, 50, 40, 30, 20, 10}, {1024, 512, 768, 256, 256, 256});
  lanes({100, one << 40, 50}, {512, 1 << 20, 256});
  lanes({one << 40, one << 26}, {1 << 20, 1 << 21});
}
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("workspace") / "program"
    folders = [f"-I{ROOT / f}" for f in ("csrc/include", "csrc/core", "tests/emulate")]
    flags = ["-std=c++20", "-O0", "-w", "-DSTRUCTMAT_EMULATE"]
    command = [COMPILER, *flags, *folders, "-x", "c++", "-", "-o", str(program)]
    subprocess.run(command, input=MAIN, text=True, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("index", "element", "converted"),
    [(0, 4, 0), (1, 4, 0), (2, 8, 0), (3, 4, 2**33), (4, 4, 2**24)],
)
def test_workspace(lines: list[str], index: int, element: int, converted: int) -> None:
    """O((m + n) l), and 2^24 entries or a row of A where that must be converted; never all of A."""
    found, tall, small, basis = map(int, lines[index].split())
    stored = element * (tall * (basis + 8) + small * (2 * basis + 8))
    wide = 0 if element == 8 else 8 * max(tall * basis // 2, small * basis)
    least = stored + wide + element * converted
    assert least <= found <= least + 2**27


def test_lanes(lines: list[str]) -> None:
    assert lines[5:] == [
        "1 0 0 :",
        "4 1024 4096 : 0 1 2 3 3 2",
        "2 512 1048576 : 0 -1 1",
        "1 0 2097152 : -1 -1",
    ]
