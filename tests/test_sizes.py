# SPDX-License-Identifier: Apache-2.0
"""More than 2^31 elements, and elements more than 2^31 apart, in little memory: views that repeat a
vector, and files with holes. The large ones, called huge, have no part in the sanitizers' run."""

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import UNIT

import structmat as sm

SIDE = 46_400  # SIDE^2 > 2^31


def hankel():
    """``A[i, j] = v[i + j]``, v of two waves: rank 4; and V with ``A = V D V^T``."""
    i = torch.arange(2 * SIDE - 1, dtype=torch.float64)
    v = (torch.cos(0.01 * i) + 0.5 * torch.cos(0.37 * i)).float()
    t = i[:SIDE]
    V = torch.stack([f(w * t) for w in (0.01, 0.37) for f in (torch.cos, torch.sin)], 1)
    D = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    return v.as_strided((SIDE, SIDE), (1, 1)), V, D


def test_huge_randomized_svd():
    A, V, D = hankel()
    assert A.numel() > 2**31
    U, S, Vh = result = sm.linalg.randomized_svd(A, 4, sweeps=2, oversample=4)
    R = torch.linalg.qr(V).R
    truth = torch.linalg.svdvals((R * D) @ R.T)
    unit = UNIT[torch.float32]
    torch.testing.assert_close(S.double(), truth, rtol=32 * unit, atol=0)
    some = torch.arange(0, SIDE, 997)
    torch.testing.assert_close(
        (U[some] * S) @ Vh[:, some], A[some][:, some], rtol=0, atol=64 * unit
    )
    assert result.info.error <= 2 * unit + 1e-5


def test_huge_gram_matmul():
    A, V, D = hankel()
    X = torch.randn(SIDE, 2)
    Z = sm.linalg.gram_matmul(A, X)
    Y = V @ (D[:, None] * (V.T @ X.double()))
    Y = V @ (D[:, None] * (V.T @ Y))
    assert (Z - Y).norm() <= 1e-5 * Y.norm()


def sparse_file(path, m, n, places, values):
    """Rows `values` at `places` of a float16 .npy file that is a hole elsewhere."""
    with open(path, "wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (m, n)}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        file.truncate(begin + m * n * 2)
        for place, value in zip(places, values, strict=True):
            file.seek(begin + place * n * 2)
            file.write(value.numpy().tobytes())


def test_huge_file(tmp_path):
    n = 40_000
    m = 2**31 // n + 10
    places = [3, m // 2, m - 1]
    values = torch.randn(3, n).half()
    sparse_file(tmp_path / "A.npy", m, n, places, values)
    U, S, Vh = result = sm.linalg.svd_out_of_core(
        tmp_path / "A.npy", 3, sweeps=1, oversample=0, progress=False
    )
    assert U.shape == (m, 3)
    assert result.info.rank == 3
    torch.testing.assert_close((U[places] * S) @ Vh, values.float(), rtol=0, atol=1e-3)
    assert U.square().sum() - U[places].square().sum() <= 1e-10


def test_rows_seen_beyond_32_bits():
    """A stream of 2^40 rows goes on: the mean moves by as little as it should."""
    rows = torch.randn(300, 9, dtype=torch.float64)
    stream = sm.linalg.StreamingSVD(9, 2, center=True, dtype=torch.float64).update(rows[:256])
    state = stream.state_dict()
    state["rows_seen"] += 2**40
    again = sm.linalg.StreamingSVD(9, 2, center=True, dtype=torch.float64).load_state_dict(state)
    again.update(rows[256:])
    assert again.rows_seen == 2**40 + 300
    old = rows[:256].mean(0)
    new = rows[256:].mean(0)
    moved = (again.mean - old).norm()
    assert moved <= 1.01 * (new - old).norm() * 44 / 2**40 + 4e-16
    merged = stream.merge(again)
    assert merged.rows_seen == 2**40 + 556
    assert merged.result().S.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "cuda-emulated"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("order", ["rows", "columns", "neither"])
def test_elements_far_apart(backend, dtype, order, tmp_path):
    """The last ones lie more than 2^31 elements behind the first."""
    m, n = 34, 20
    step = 2**31 // m + 70_001
    strides, shape = {
        "rows": ((step, 1), (m, n)),
        "columns": ((1, step), (n, m)),
        "neither": ((step, 7), (m, n)),
    }[order]
    size = step * m + 200
    assert step * (m - 1) < 2**31 < size
    (tmp_path / "hole").touch()
    with open(tmp_path / "hole", "r+b") as file:
        file.truncate(size * dtype.itemsize)
    store = torch.from_file(str(tmp_path / "hole"), shared=True, size=size, dtype=dtype)
    A = store.as_strided(shape, strides)
    A.copy_(torch.randn(shape))
    truth, unit = torch.linalg.svdvals(A.double()), UNIT[dtype]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    error = 64 * UNIT[wide] * truth[0]
    assert (sm.linalg.randomized_svd(A, 20).S - truth[:20]).abs().max() <= error
    X = torch.randn(shape[1], 3).to(dtype)
    Z = A.double().T @ (A.double() @ X.double())
    assert (sm.linalg.gram_matmul(A, X) - Z).norm() <= 4 * unit * Z.norm()
    tall = A if order != "columns" else A.T
    Q = sm.linalg.orthonormalize(tall).double()
    assert (Q.T @ Q - torch.eye(n)).abs().max() <= 64 * UNIT[wide]
    assert (Q @ (Q.T @ tall.double()) - tall.double()).norm() <= error
    S = sm.linalg.StreamingSVD(shape[1], 3, dtype=dtype).update(A).result().S
    assert (S - truth[:3]).abs().max() <= error


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")
def test_empty_results_ask_for_no_large_pages():
    """Numbers that are none begin at address 0: what lies there is not theirs."""
    libc, size = ctypes.CDLL(None), 2 << 20
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fixed = 0x100000 | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # MAP_FIXED_NOREPLACE
    if libc.mmap(size, size, mmap.PROT_READ, fixed, -1, 0) != size:
        pytest.skip("the second 2 MB of addresses are in use")
    try:
        sm.ops.block_diagonal_linear(torch.ones(0, 2), torch.ones(1, 1 << 21, 2))
        facts = Path("/proc/self/smaps").read_text().split(f"{size:08x}-")[1]
        assert " hg" not in facts.split("VmFlags:")[1].split("\n")[0]
    finally:
        libc.munmap(size, size)
