# SPDX-License-Identifier: Apache-2.0
"""bench/gesvdr.py hands cuSOLVER what it wants: against a library of the same signatures (those of
cusolverDn.h 12.0) that decomposes matrices with orthogonal columns."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from gesvdr import Gesvdr

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FAKE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
static int handle_of, params_of;
static bool wrong(void* h, void* p, signed char u, signed char v, int64_t m, int64_t n, int64_t k,
                  int64_t over, int64_t steps, int64_t lda, int64_t ldu, int64_t ldv) {
  return h != &handle_of || p != &params_of || u != 'S' || v != 'S' || m < n || k < 1 ||
         k + over >= n || steps != 2 || lda != m || ldu != m || ldv != n;
}
extern "C" {
int cusolverDnCreate(void** handle) { *handle = &handle_of; return 0; }
int cusolverDnCreateParams(void** params) { *params = &params_of; return 0; }
int cusolverDnSetStream(void*, void*) { return 0; }
int cusolverDnXgesvdr_bufferSize(void* h, void* p, signed char ju, signed char jv, int64_t m,
    int64_t n, int64_t k, int64_t over, int64_t steps, int ta, const void*, int64_t lda, int ts,
    const void*, int tu, const void*, int64_t ldu, int tv, const void*, int64_t ldv, int tc,
    size_t* device, size_t* host) {
  *device = 1000; *host = 77;
  if (ta != ts || ta != tu || ta != tv || ta != tc) return 3;
  return wrong(h, p, ju, jv, m, n, k, over, steps, lda, ldu, ldv) ? 3 : 0;
}
int cusolverDnXgesvdr(void* h, void* p, signed char ju, signed char jv, int64_t m, int64_t n,
    int64_t k, int64_t over, int64_t steps, int ta, void* A, int64_t lda, int ts, void* S, int tu,
    void* U, int64_t ldu, int tv, void* V, int64_t ldv, int tc, void* work, size_t device,
    void* host, size_t on_host, int* info) {
  if (ta != ts || ta != tu || ta != tv || ta != tc || ta != 1 || device != 1000 || on_host != 77)
    return 3;
  if (wrong(h, p, ju, jv, m, n, k, over, steps, lda, ldu, ldv)) return 3;
  auto *a = (double*)A, *s = (double*)S, *u = (double*)U, *v = (double*)V;
  for (int64_t j = 0; j < k; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < m; ++i) sum += a[j * lda + i] * a[j * lda + i];
    s[j] = std::sqrt(sum);
    for (int64_t i = 0; i < m; ++i) u[j * ldu + i] = a[j * lda + i] / s[j];
    for (int64_t i = 0; i < n; ++i) v[j * ldv + i] = i == j;
  }
  std::memset(A, 0xff, sizeof(double) * m * n);
  std::memset(work, 1, device);
  std::memset(host, 1, on_host);
  *info = k == 7 ? 5 : 0;
  return 0;
}
}
"""


@pytest.fixture(scope="module")
def gesvdr(tmp_path_factory: pytest.TempPathFactory) -> Gesvdr:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("gesvdr") / "libfake.so"
    command = [COMPILER, "-shared", "-fPIC", "-O0", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=FAKE, text=True, check=True)
    return Gesvdr(ctypes.CDLL(str(library)))


@pytest.mark.parametrize("wide", [False, True])
def test_factors_and_layout(gesvdr: Gesvdr, wide: bool) -> None:
    Q = torch.linalg.qr(torch.randn(23, 12, dtype=torch.float64)).Q
    A = torch.zeros(23, 30, dtype=torch.float64)[:, ::2][:, :12]  # other strides than its shape
    A.copy_(Q * torch.arange(12, 0, -1))
    kept, A = A.clone(), A.T if wide else A
    U, S, Vh = gesvdr(A, 5)
    assert U.shape == (A.shape[0], 5)
    assert Vh.shape == (5, A.shape[1])
    torch.testing.assert_close(S, torch.arange(12.0, 7.0, -1, dtype=torch.float64))
    left = (A - (U * S) @ Vh).norm()
    torch.testing.assert_close(left, torch.arange(1.0, 8.0, dtype=torch.float64).norm())
    assert torch.equal(A.T if wide else A, kept)


def test_failures(gesvdr: Gesvdr) -> None:
    A = torch.eye(20, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="info is 5"):
        gesvdr(A, 7)
    with pytest.raises(RuntimeError, match="bufferSize failed with cuSOLVER status 3"):
        gesvdr(A, 5, power_steps=3)
