# SPDX-License-Identifier: Apache-2.0
"""structmat._C: the core on NumPy arrays, against NumPy in float64 and the functions on tensors."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import UNIT

import structmat as sm
from structmat import _C

WIDE = [np.float32, np.float64]
EPS = {np.float16: 2 * UNIT[torch.float16], np.float32: 2.0**-23, np.float64: 2.0**-52}


def normal(*shape, dtype=np.float64):
    return np.random.standard_normal(shape).astype(dtype)


def layouts(A):
    """The same numbers with other strides: by columns, a slice, reversed, strided, unaligned."""
    m, n = A.shape
    slice_, strided = np.full((m + 2, n + 3), np.nan, A.dtype), np.full((m, 2 * n), np.nan, A.dtype)
    slice_[1:-1, 2:-1], strided[:, ::2] = A, A
    memory = np.frombuffer(b"x" + A.tobytes(), np.uint8)[1:]
    unaligned = memory.view(A.dtype).reshape(A.shape)
    reverse = np.ascontiguousarray(A[::-1, ::-1])[::-1, ::-1]
    return [A, np.asfortranarray(A), slice_[1:-1, 2:-1], strided[:, ::2], reverse, unaligned]


def close(found, want, dtype, factor=1.0):
    assert found.dtype == dtype
    assert found.shape == want.shape
    scale = np.abs(want).max() if want.size else 1.0
    assert np.abs(found - want).max(initial=0) <= factor * 64 * EPS[dtype] * scale


@pytest.mark.parametrize("dtype", WIDE)
def test_orthonormalize(dtype):
    Y = normal(50, 6, dtype=dtype)
    Y[:, 4] = Y[:, 1]
    for view in layouts(Y):
        Q, rank = _C.orthonormalize(view, seed=3, return_rank=True)
        assert rank == 5
        assert np.array_equal(Q, _C.orthonormalize(view, seed=3, threads=1))
        close(Q.T @ Q, np.eye(6), dtype)
        close((Q @ (Q.T @ Y)).astype(dtype), Y.astype(np.float64), dtype)
    Y = normal(50, 6, dtype=dtype)
    Q, R = np.linalg.qr(Y.astype(np.float64))
    close(_C.orthonormalize(Y), Q * np.sign(np.diag(R)), dtype)


@pytest.mark.parametrize("dtype", [*WIDE, np.float16])
def test_gram_matmul(dtype):
    A, X = normal(40, 9, dtype=dtype), normal(9, 3, dtype=dtype)
    wide = A.astype(np.float64)
    for view in layouts(A):
        for right in layouts(X):
            close(_C.gram_matmul(view, right), wide.T @ (wide @ X), dtype)
        Z, sums, norm = _C.gram_matmul(view, X, return_moments=True)
        assert np.array_equal(Z, _C.gram_matmul(view, X, threads=1))
        close(sums, wide.sum(0), np.float64)
        assert norm == pytest.approx(np.linalg.norm(wide), rel=1e-14)


@pytest.mark.parametrize("dtype", WIDE)
def test_range_step(dtype):
    A, Q = normal(40, 19, dtype=dtype), normal(19, 3, dtype=dtype)
    want_p, R = np.linalg.qr(A.astype(np.float64) @ Q)
    want_p *= np.sign(np.diag(R))
    want_b = A.T.astype(np.float64) @ want_p
    want_q, R = np.linalg.qr(want_b)
    for view in layouts(A):
        P, after, B = _C.range_step(view, Q)
        for found, want in ((P, want_p), (after, want_q * np.sign(np.diag(R))), (B, want_b)):
            close(found, want, dtype, factor=8)
    pairs = _C.range_step([A, A.T], (Q, P))
    assert all(map(np.array_equal, pairs[0], _C.range_step(A, Q)))
    assert all(map(np.array_equal, pairs[1], _C.range_step(A.T, P, threads=1)))
    assert _C.range_step([], []) == []


@pytest.mark.parametrize("dtype", WIDE)
def test_svd_tail(dtype):
    left, right = (np.linalg.qr(normal(n, 40))[0] for n in (60, 40))
    sigma = np.concatenate([np.linspace(2, 1, 36), [4e-3, 3e-3, 2e-3, 1e-3]])
    A = ((left * sigma) @ right.T).astype(dtype)
    for view in (*layouts(A), A.T):
        U, S, Vh, info = _C.svd_tail(view, 4, seed=1)
        assert np.abs(S - sigma[-4:]).max() <= 64 * EPS[dtype]
        assert np.abs(view @ Vh.T - U * S).max() <= 64 * EPS[dtype]
        assert np.abs(U.T @ U - np.eye(4)).max() <= 64 * EPS[dtype]
        assert np.abs(Vh @ Vh.T - np.eye(4)).max() <= 64 * EPS[dtype]
        assert info["rank"] == 4
        assert info["sweeps"] > 0
        assert info["norm"] == pytest.approx(np.linalg.norm(sigma), rel=1e-6)
    assert np.array_equal(_C.svd_tail(A, 4, threads=1)[0], _C.svd_tail(A, 4, threads=3)[0])


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("n", [20, 170], ids=["exact", "factor"])
def test_streaming_svd(dtype, n):
    rows = normal(400, 6) @ normal(6, n) + 3
    rows = rows.astype(dtype)
    whole = _C.StreamingSVD(n, 6, decay=0.999, center=True, dtype=dtype, seed=5)
    for part in np.split(rows, [1, 7, 130, 131, 300]):
        assert whole.update(np.asfortranarray(part)) is whole
    assert whole.rows_seen == 400
    weight = 0.999 ** np.arange(399, -1, -1.0)[:, None]
    mean = (weight**2 * rows).sum(0) / (weight**2).sum()
    A = weight * (rows - mean)
    want = np.linalg.svd(A, compute_uv=False)[:6]
    S, Vh, info = whole.result()
    close(S, want, dtype, factor=4)
    close(whole.mean, mean, dtype)
    close((A @ Vh.T @ Vh).astype(dtype), A, dtype, factor=4)
    assert S.dtype == Vh.dtype == dtype
    assert info["rank"] == 6
    assert info["sweeps"] == 1
    assert info["error"] < 1e-6

    parts = [
        _C.StreamingSVD(n, 6, decay=0.999, center=True, dtype=dtype, seed=5, threads=1).update(p)
        for p in (rows[:170], rows[170:])
    ]
    close(parts[0].merge(parts[1]).result()[0], want, dtype, factor=4)
    assert parts[0].rows_seen == 400
    assert parts[0].merge(parts[0]).rows_seen == 800

    # The class on tensors gives the same bits, and either takes the other's state.
    same = sm.linalg.StreamingSVD(
        n, 6, decay=0.999, center=True, dtype=torch.from_numpy(rows).dtype, seed=5
    )
    same.update(torch.from_numpy(rows))
    assert np.array_equal(S, same.result().S.numpy())
    assert np.array_equal(Vh, same.result().Vh.numpy())
    arrays = {name: value.numpy() for name, value in same.state_dict().items()}
    again = _C.StreamingSVD(n, 6, decay=0.999, center=True, dtype=dtype, seed=5)
    again.load_state_dict(arrays).update(rows[0])
    same.load_state_dict({k: torch.from_numpy(v) for k, v in whole.state_dict().items()})
    same.update(torch.from_numpy(rows[0]))
    assert np.array_equal(again.result()[1], same.result().Vh.numpy())


class Csr:
    """What SciPy's CSR matrices have."""

    format = "csr"

    def __init__(self, dense):
        self.shape = dense.shape
        row, self.indices = np.nonzero(dense)
        self.indptr = np.searchsorted(row, np.arange(len(dense) + 1)).astype(np.int32)
        self.data = dense[dense != 0]


def test_streaming_svd_takes_csr_rows():
    dense = normal(300, 11) * (normal(300, 11) > 0.5)
    found = _C.StreamingSVD(11, 4, dtype=dense.dtype).update(Csr(dense)).result()
    want = _C.StreamingSVD(11, 4, dtype=dense.dtype).update(dense).result()
    assert np.array_equal(found[0], want[0])
    bad = Csr(dense)
    bad.indices = bad.indices[::-1].copy()
    stream = _C.StreamingSVD(11, 4, dtype=dense.dtype)
    with pytest.raises(ValueError, match=r"StreamingSVD.update: rows are no CSR matrix"):
        stream.update(bad)
    bad.format = "csc"
    with pytest.raises(TypeError, match=r"StreamingSVD.update: sparse rows must be in CSR"):
        stream.update(bad)
    assert stream.rows_seen == 0


def test_streaming_svd_of_many_threads():
    stream = _C.StreamingSVD(8, 2, threads=1)
    rows = normal(50, 8, dtype=np.float32)
    threads = [threading.Thread(target=stream.update, args=(rows,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stream.rows_seen == 400
    want = np.linalg.svd(rows.astype(np.float64), compute_uv=False)[:2]
    close(stream.result()[0], want * 8**0.5, np.float32)


def test_streaming_svd_waits_without_the_gil():
    """A thread that polls must not hold the GIL while another, with the lock, wants it."""
    code = """
import gc, threading, time
import numpy as np
from structmat import _C

class Slow:
    def __init__(self): self.cycle = self
    def __del__(self): time.sleep(0.001)

stream = _C.StreamingSVD(8, 2).update(np.ones((5, 8), np.float32))
done = threading.Event()
def poll():
    while not done.is_set(): stream.rows_seen
thread = threading.Thread(target=poll)
thread.start()
gc.set_threshold(1, 1, 1)
for _ in range(50):
    Slow()
    stream.load_state_dict(stream.state_dict()).result()
done.set()
thread.join()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_randomized_svd_of_fields_and_lists():
    A = normal(12, 5)
    field = np.zeros(A.shape, [("a", "i1"), ("x", "f8")])
    field["x"] = A
    assert np.array_equal(_C.randomized_svd(field["x"], 3)[1], _C.randomized_svd(A, 3)[1])
    for found, want in zip(_C.randomized_svd((A, A.T), 5), (A, A.T), strict=True):
        close(found[1], np.linalg.svd(want, compute_uv=False), np.float64)
        assert found[3]["converged"] is True


def test_streaming_svd_loads_a_file(tmp_path):
    stream = _C.StreamingSVD(3, 2, dtype="d").update(normal(9, 3))
    np.savez(tmp_path / "state.npz", **stream.state_dict())
    with np.load(tmp_path / "state.npz") as state:
        again = _C.StreamingSVD(3, 2, dtype="d").load_state_dict(state)
    assert np.array_equal(again.result()[1], stream.result()[1])


def test_svd_tail_with_any_oversample():
    A = normal(9, 7)
    S = _C.svd_tail(A, 2, oversample=2**62)[1]
    close(S, np.linalg.svd(A, compute_uv=False)[-2:], np.float64)


ONES = np.ones((4, 3))
STREAM = _C.StreamingSVD(3, 2, dtype="d")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _C.orthonormalize(np.ones((2, 3))), ValueError, "orthonormalize: Y has shape"),
        (lambda: _C.orthonormalize(np.ones(3)), ValueError, "Y must have 2 dimensions, got 1"),
        (lambda: _C.orthonormalize([[1.0]]), TypeError, "Y must be an array, got list"),
        (lambda: _C.orthonormalize(ONES.astype(int)), TypeError, "Y must be float32.*got int64"),
        (lambda: _C.orthonormalize(ONES * np.nan), np.linalg.LinAlgError, "NaN or Inf"),
        (lambda: _C.gram_matmul(ONES, ONES), ValueError, "gram_matmul: A has shape"),
        (lambda: _C.gram_matmul(ONES, ONES.astype("f")), TypeError, "X is float32, wanted float64"),
        (lambda: _C.gram_matmul(ONES, ONES.astype(">f8")), TypeError, "X must be .* got >f8"),
        (lambda: _C.range_step(ONES, ONES.T), ValueError, "range_step: A has shape"),
        (lambda: _C.range_step([ONES], ONES), TypeError, "A must be an array, got list"),
        (lambda: _C.range_step([ONES], []), ValueError, "A is a list of 1, Q of 0"),
        (lambda: _C.range_step([ONES], [3]), TypeError, "item 0: Q must be an array, got int"),
        (lambda: _C.range_step(ONES * np.inf, ONES[:3, :1]), np.linalg.LinAlgError, "NaN or Inf"),
        (lambda: _C.svd_tail(ONES, 4), ValueError, "svd_tail: rank is 4, wanted 1 to 3"),
        (lambda: _C.svd_tail(ONES, 1, oversample=-1), ValueError, "oversample is -1"),
        (lambda: _C.svd_tail(ONES[:0], 1), ValueError, "svd_tail: A is empty"),
        (lambda: _C.svd_tail(ONES * np.nan, 1), np.linalg.LinAlgError, "svd_tail: A contains NaN"),
        (lambda: _C.randomized_svd(None, 1), TypeError, "A must be an array, got NoneType"),
        (lambda: _C.randomized_svd([[1.0]], 1), TypeError, "item 0: A must be an array, got list"),
        (lambda: _C.randomized_svd([ONES, ONES[:1]], 2), ValueError, "item 1: rank is 2, wanted"),
        (
            lambda: _C.randomized_svd([ONES, ONES * np.nan], 1),
            np.linalg.LinAlgError,
            "randomized_svd: item 1: A contains NaN",
        ),
        (lambda: _C.randomized_svd(ONES, 1, seed=2**63), ValueError, "seed is 9223372036854775808"),
        (lambda: _C.gaussian(2, 2, seed=-1), ValueError, "gaussian: seed is -1"),
        (lambda: _C.range_step([ONES], [ONES]), ValueError, "range_step: item 0: A has shape"),
        (lambda: STREAM.load_state_dict(3), TypeError, "state must be a mapping, got int"),
        (
            lambda: STREAM.load_state_dict(STREAM.state_dict() | {"rows_seen": np.array(-1)}),
            ValueError,
            "rows_seen is -1, wanted 0",
        ),
        (lambda: _C.StreamingSVD(3, 4), ValueError, "^StreamingSVD: rank is 4 of 3 columns"),
        (lambda: _C.StreamingSVD(3, 2, decay=0.0), ValueError, "decay is 0"),
        (lambda: _C.StreamingSVD(3, 2, dtype="i4"), TypeError, "dtype must be float32"),
        (lambda: STREAM.update(ONES[:, :2]), ValueError, r"rows have shape \(4, 2\), wanted"),
        (lambda: STREAM.update(ONES.astype("f")), TypeError, "rows are float32, wanted float64"),
        (lambda: STREAM.update(ONES / 0), np.linalg.LinAlgError, "rows contain NaN or Inf"),
        (lambda: STREAM.result(), ValueError, "StreamingSVD.result: no rows"),
        (lambda: STREAM.mean, ValueError, "StreamingSVD.mean: no rows"),
        (lambda: STREAM.merge(_C.StreamingSVD(3, 2)), TypeError, "other has dtype float32"),
        (
            lambda: STREAM.merge(_C.StreamingSVD(3, 1, dtype="d")),
            ValueError,
            "other has rank 1, wanted 2",
        ),
        (lambda: STREAM.load_state_dict({}), ValueError, "wanted the names"),
        (
            lambda: STREAM.load_state_dict(STREAM.state_dict() | {"mean": ONES[0] * np.nan}),
            ValueError,
            "mean contains NaN",
        ),
        (
            lambda: STREAM.load_state_dict(STREAM.state_dict() | {"factor": ONES}),
            ValueError,
            "factor has another shape",
        ),
        (
            lambda: STREAM.load_state_dict(STREAM.state_dict() | {"seed": np.array(3)}),
            ValueError,
            "the state has seed 3, wanted 0",
        ),
        (
            lambda: STREAM.load_state_dict(STREAM.state_dict() | {"buffer": ONES}),
            ValueError,
            "4 rows of 0 are in the buffer",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(error, match=message):
        call()
    assert STREAM.rows_seen == 0


def test_every_name_is_described_and_typed():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "numpy.md").read_text()
    stub = (root / "python" / "structmat" / "_C.pyi").read_text()
    for name in vars(_C):
        if name.startswith("_"):
            continue
        is_function = callable(getattr(_C, name)) and not name.endswith("Error")
        assert not is_function or f"`{name}(" in page, name
        assert re.search(rf"^(def |class )?{name}\b", stub, re.MULTILINE), name
