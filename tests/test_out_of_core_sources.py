# SPDX-License-Identifier: Apache-2.0
"""What svd_out_of_core is given: sources that change, fail or are none, buffers used again, NaN."""

import gc
import io
import sys
import threading
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_out_of_core import falling, rows_of, verify
from test_svd import matrix

import structmat as sm
from structmat.linalg.progress import Bar
from structmat.linalg.row_blocks import open_source, reading_ahead

svd = sm.linalg.svd_out_of_core
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


@pytest.fixture(autouse=True)
def _one_thread(threads):
    torch.set_num_threads(1)  # the problems are small


def changing(*sweeps):
    """A factory that gives other blocks in each sweep; the first call is a look at one block."""
    calls = iter([sweeps[0], *sweeps])
    return lambda: iter(next(calls))


def csr_of(A, column, scipy=False):
    """The last column index overwritten: one that is out of range makes it invalid."""
    block = A.to_sparse_csr()
    crow, col, values = block.crow_indices(), block.col_indices().clone(), block.values()
    col[-1] = column
    if not scipy:
        return torch.sparse_csr_tensor(crow, col, values, A.shape, check_invariants=False)
    found = pytest.importorskip("scipy.sparse").csr_matrix(A.numpy())
    found.indices[-1] = column
    return found


A, WIDE = torch.randn(8, 5), torch.randn(8, 6)


@pytest.mark.parametrize(
    ("blocks", "options", "error", "says"),
    [
        (lambda: changing([A, A], [A]), {}, ValueError, "sweep 2 has 8 rows, the first had 16"),
        (lambda: changing([A], [A, A]), {}, ValueError, "more than the 8 rows"),
        (lambda: changing([A, WIDE], [A]), {}, ValueError, "6 columns, wanted 5"),
        (lambda: changing([A], [WIDE]), {}, ValueError, "6 columns, wanted 5"),
        (lambda: changing([]), {}, ValueError, "no rows"),
        (lambda: changing([A[:0]]), {}, ValueError, "no rows"),
        (lambda: changing([A[:, :0]]), {}, ValueError, "no rows"),
        (lambda: changing([A[:1]], [A[:1]]), {}, ValueError, "rank is 2, wanted 1 to 1"),
        (lambda: changing([A.long()]), {}, TypeError, "int64"),
        (lambda: changing([A.cfloat()]), {}, TypeError, "complex64"),
        (lambda: changing([A.cfloat().numpy()]), {}, TypeError, "complex64, wanted native floats"),
        (lambda: changing([A]), {"dtype": torch.complex64}, TypeError, "complex64"),
        (lambda: changing([A, A.to("meta")]), {}, ValueError, "on meta, wanted cpu as the first"),
        (lambda: changing([A.to("meta")]), {}, ValueError, "on meta"),
        (lambda: changing([A]), {"device": "meta"}, ValueError, "on meta"),
        (lambda: changing([A[0]]), {}, ValueError, r"shape \(5,\)"),
        (lambda: changing([A.to_sparse()]), {}, TypeError, "layout"),
        (lambda: changing(["row"]), {}, TypeError, "str"),
        (lambda: changing([np.array([["a"]])]), {}, TypeError, "native floats"),
        (lambda: lambda: 3, {}, TypeError, "returned int"),
        (lambda: iter([A]), {}, TypeError, "ends after one sweep"),
        (lambda: A, {}, TypeError, "got Tensor"),
        (lambda: changing([A]), {"rank": 6}, ValueError, "1 to 5"),
        (lambda: changing([A]), {"rank": 0}, ValueError, "rank is 0"),
        (lambda: changing([A]), {"rank": 2.0}, TypeError, "float"),
        (lambda: changing([A]), {"rank": torch.tensor(3)}, TypeError, "rank must be .* got Tensor"),
        (lambda: changing([np.ma.masked_less(A.numpy(), 0)]), {}, TypeError, "masked array"),
        (lambda: changing([np.ones((4, 4), np.longdouble)]), {}, TypeError, "native floats"),
        (lambda: changing([csr_of(A, 5)]), {}, ValueError, "svd_out_of_core: .* no valid CSR"),
        (lambda: changing([csr_of(A, -1)]), {"center": True}, ValueError, "no valid CSR"),
        (
            lambda: changing([csr_of(A, 5, True)]),
            {},
            ValueError,
            "svd_out_of_core: .* no valid CSR",
        ),
        (lambda: changing([A]), {"sweeps": 0}, ValueError, "sweeps is 0"),
        (lambda: changing([A]), {"sweeps": 1, "center": True}, ValueError, "finds the mean"),
        (lambda: changing([A]), {"center": 1}, TypeError, "bool"),
        (lambda: changing([A]), {"seed": -1}, ValueError, "seed is -1"),
        (lambda: changing([A]), {"oversample": -1}, ValueError, "oversample"),
        (lambda: changing([A]), {"block_rows": 2}, ValueError, "for files"),
        (lambda: changing([A]), {"dtype": torch.float16}, TypeError, "float16"),
        (lambda: changing([A]), {"group": 1}, TypeError, "ProcessGroup"),
    ],
)
def test_wrong_sources(blocks, options, error, says):
    with pytest.raises(error, match=says):
        svd(blocks(), **({"rank": 2} | options))


def test_a_source_that_fails_is_heard_and_its_thread_ends():
    def blocks():
        yield A
        raise KeyError("the disk is gone")

    before = threading.active_count()
    with pytest.raises(KeyError, match="disk"):
        svd(blocks, 2)

    def endless():
        while True:
            yield A * torch.nan

    with pytest.raises(torch.linalg.LinAlgError, match="NaN or Inf"):
        svd(endless, 2)
    assert threading.active_count() == before


def test_a_failure_keeps_nothing_alive():
    class Blocks:
        def __call__(self):
            yield A
            yield A * torch.nan

    source = Blocks()
    alive = weakref.ref(source)
    gc.disable()
    try:
        svd(source, 2)
    except torch.linalg.LinAlgError:
        pass
    finally:
        del source
        found = alive()
        gc.enable()
    assert found is None


@pytest.mark.parametrize("kind", ["numpy", "torch", "csr", "scipy"])
def test_blocks_may_reuse_their_buffer(kind):
    A = matrix(96, 20, "slow")
    make = {
        "numpy": lambda part: part.numpy(),
        "torch": lambda part: part,
        "csr": torch.Tensor.to_sparse_csr,
        "scipy": lambda part: pytest.importorskip("scipy.sparse").csr_matrix(part.numpy()),
    }[kind]
    buffer = make(A[:8].clone())
    values = {"csr": lambda: buffer.values(), "scipy": lambda: buffer.data}.get(
        kind, lambda: buffer
    )()

    def blocks():
        for part in A.split(8):
            values[:] = (
                make(part).reshape(values.shape)
                if kind in ("numpy", "torch")
                else (part.reshape(values.shape))
            )
            yield buffer

    for _ in range(3):
        verify(A, svd(blocks, 4))


def test_scipy_blocks_stay_as_they_are():
    csr = pytest.importorskip("scipy.sparse").csr_matrix
    part = csr((np.ones(6), [2, 2, 1, 0, 1, 2], [0, 3, 4, 6]), (3, 3))
    svd(lambda: iter([part]), 1)
    assert part.nnz == 6
    assert part.indices.tolist() == [2, 2, 1, 0, 1, 2]


def test_blocks_are_read_in_the_stream_of_the_caller(monkeypatch):
    inside = threading.local()

    @contextmanager
    def enter(stream):
        inside.stream = stream
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the caller's on {device}")
    monkeypatch.setattr(torch.cuda, "stream", enter)

    def blocks():
        yield torch.ones(1, 1) * len(getattr(inside, "stream", ""))

    for device in ("cpu", "cuda:1"):
        with reading_ahead(open_source(blocks, None), torch.device(device)) as found:
            (block,) = found
        assert int(block) == (len("the caller's on cuda:1") if device == "cuda:1" else 0)


def test_default_device(tmp_path):
    A = matrix(40, 9, "slow")
    np.save(tmp_path / "A.npy", A.numpy())
    with torch.device("meta"):
        result = svd(tmp_path / "A.npy", 3)
    verify(A, result)


def test_a_row_that_turns_bad_is_found_in_the_last_reading():
    A = falling(120)
    calls = 0

    def blocks():
        nonlocal calls
        calls += 1
        return iter([A * torch.nan if calls == 3 else A])

    with pytest.raises(torch.linalg.LinAlgError, match="NaN or Inf"):
        svd(blocks, 90, sweeps=1, oversample=10)
    assert calls == 3  # a look, a sweep and one for what it lost


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("center", [False, True])
def test_not_finite(bad, center):
    A = matrix(90, 60, "slow")
    A[80, 20] = bad
    for blocks in (rows_of(A, 30), lambda: (part.to_sparse_csr() for part in A.split(30))):
        with pytest.raises(torch.linalg.LinAlgError, match="NaN or Inf"):
            svd(blocks, 3, center=center)


def test_bar_only_on_a_terminal_and_after_a_second(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def written(stream, wait, shown=True):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = Bar("reading", shown)
        bar._begin -= wait
        with bar:
            bar.restart("sweep 1")
            bar.advance(torch.ones(1000, 1000))
            bar.restart("sweep 2")
            bar.advance(torch.ones(500, 1000))
        return stream.getvalue()

    assert "sweep 2" in written(Terminal(), 2.0)
    assert written(Terminal(), 0.0) == ""
    assert written(io.StringIO(), 2.0) == ""
    assert written(Terminal(), 2.0, shown=False) == ""
