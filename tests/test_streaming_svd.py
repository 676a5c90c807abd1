# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.StreamingSVD against the SVD, in double precision, of the matrix the rows stand for."""

import warnings
from itertools import pairwise

import pytest
import torch
from reference import LAYOUTS, UNIT, make, streamed_rows

import structmat as sm

ORTHOGONAL = {torch.float32: 1e-6, torch.float64: 1e-13}
# Second moments (one chunk is 128 rows), and a factor (32 rows, folded with 32 more).
EXACT, WIDE = (24, 3), (135, 2)
kinds = pytest.mark.parametrize(("n", "rank"), [EXACT, WIDE], ids=["exact", "wide"])
decays = pytest.mark.parametrize("decay", [1.0, 0.97])
# Each eigenvalue problem takes the emulator seconds: it has a few tests of its own.
thorough = pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)
emulated = pytest.mark.parametrize("backend", ["cuda-emulated"], indirect=True)
centers = pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])


def rows_of(m, n, dtype=torch.float32, device="cpu", power=-1.0, offset=2.0):
    """Rows with singular values that fall like i^power, about a mean."""
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    scale = torch.arange(1, n + 1, dtype=torch.float64)[:, None] ** power
    rows = torch.randn(m, n, dtype=torch.float64) @ (scale * basis) + offset * basis[n // 2]
    return rows.to(dtype).to(device)


def stream(rows, rank, block=None, **settings):
    state = sm.linalg.StreamingSVD(
        rows.shape[1], rank, dtype=rows.dtype, device=rows.device, **settings
    )
    for part in rows.split(block or max(len(rows), 1)):
        assert state.update(part) is state
    return state


def verify(state, rows, excess=1e-6, estimate=1e-4):
    """Shapes, order, orthogonality, signs, values, error and its estimate."""
    A, mean = streamed_rows(rows, state.decay, state.center)
    U, S, Vh = result = state.result()
    k, n = state.rank, state.n_features
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    unit = UNIT[dtype]
    assert U is None
    assert S.shape == (k,)
    assert Vh.shape == (k, n)
    assert S.dtype == Vh.dtype == state.mean.dtype == dtype
    assert state.rows_seen == len(rows)
    S, Vh = S.cpu().double(), Vh.cpu().double()
    assert (S[1:] <= S[:-1]).all()
    assert (S >= 0).all()
    assert (Vh @ Vh.T - torch.eye(k)).abs().max() <= ORTHOGONAL[dtype]
    assert (Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all()
    largest = A.abs().max().item() or 1.0
    torch.testing.assert_close(
        state.mean.cpu().double(), mean, rtol=8 * unit, atol=8 * unit * rows.abs().max().item()
    )
    A, S = A / largest, S / largest
    sigma = torch.linalg.svdvals(A)
    sigma = torch.cat([sigma, sigma.new_zeros(n)])
    norm = A.norm().item() or 1.0
    best = sigma[k:].norm().item() / norm
    error = (A - A @ Vh.T @ Vh).norm().item() / norm
    floor = 1e-6 if dtype == torch.float32 else 1e-7  # roots of rounding in float64 moments
    assert error <= best * (1 + excess) + 16 * unit
    assert (S - sigma[:k] <= (8 * unit + floor) * sigma[0]).all()
    info = result.info
    assert error * (1 - 1e-6) - 16 * unit <= info.error <= error * (1 + estimate) + floor
    assert info.sweeps == 1
    assert info.rank <= k
    return result


@thorough
@kinds
@decays
@centers
@pytest.mark.parametrize("count", [1, 5, 130, 300])
def test_against_the_svd_of_all_rows(backend, dtype, n, rank, decay, center, count):
    rows = rows_of(count, n, dtype, backend.device)
    wide = n == WIDE[0]
    verify(
        stream(rows, rank, 37, decay=decay, center=center),
        rows,
        excess=2e-3 if wide else 1e-6,
        estimate=3e-2 if wide else 1e-4,
    )


@thorough
@kinds
@centers
def test_result_does_not_depend_on_the_blocks(backend, n, rank, center):
    rows = rows_of(270, n, device=backend.device)
    states = [stream(rows, rank, block, center=center, decay=0.99) for block in (270, 64, 1, 129)]
    rowwise = sm.linalg.StreamingSVD(n, rank, center=center, decay=0.99, device=backend.device)
    for row in rows:
        rowwise.update(row)
    strided = sm.linalg.StreamingSVD(n, rank, center=center, decay=0.99, device=backend.device)
    strided.update(rows.repeat_interleave(2, 1)[:, ::2]).result()
    wanted = states[0].state_dict()
    for state in (*states[1:], rowwise, strided):
        for name, value in state.state_dict().items():
            assert torch.equal(value, wanted[name]), name
        assert torch.equal(state.result().Vh, states[0].result().Vh)


@thorough
@kinds
def test_asking_for_results_changes_nothing(backend, n, rank):
    rows = rows_of(150, n, device=backend.device)
    asked = sm.linalg.StreamingSVD(n, rank, device=backend.device)
    for part in rows.split(40):
        verify(asked.update(part), rows[: asked.rows_seen], excess=2e-3, estimate=3e-2)
    assert torch.equal(asked.result().Vh, stream(rows, rank).result().Vh)


@thorough
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, dtype, layout):
    rows = make(140, 20, dtype=dtype, device=backend.device, layout=layout)
    kept = rows.clone()
    verify(stream(rows, 4, 133, center=True), rows)
    assert torch.equal(rows, kept)


@emulated
@centers
def test_emulated_moments(backend, dtype, center):
    """Full chunks in place and from the buffer, sparse rows, merging, results."""
    rows = rows_of(300, 9, dtype)
    state = stream(rows[:3], 2, center=center, decay=0.97)
    verify(state.update(rows[3:262]).update(rows[262:]), rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        sparse = sm.linalg.StreamingSVD(9, 2, center=center, decay=0.97, dtype=dtype)
        sparse.update(rows[:200].to_sparse_csr()).update(rows[200:].t().contiguous().t())
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, state.state_dict()[name]), name
    parts = [stream(rows[a:b], 2, center=center, decay=0.97) for a, b in ((0, 150), (150, 300))]
    verify(parts[0].merge(parts[1]), rows)
    kept = state.state_dict()
    with pytest.raises(torch.linalg.LinAlgError, match="rows contain NaN or Inf"):
        state.update(torch.full((200, 9), torch.nan, dtype=dtype))
    assert all(torch.equal(value, kept[name]) for name, value in state.state_dict().items())


@emulated
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e30), (torch.float64, 1e200), (torch.float64, 1e-200)]
)
def test_emulated_scale(backend, dtype, scale):
    rows = (rows_of(200, 7, torch.float64) * scale).to(dtype)
    rows[:140] /= 1e10
    state = stream(rows, 2, center=True)
    verify(state, rows)
    verify(state.merge(stream(rows / 1e5, 2, center=True)), torch.cat([rows, rows / 1e5]))


@emulated
def test_emulated_wide_rows(backend):
    """A factor: folded, merged, decomposed. Rows of few directions leave less to rotate."""
    n, rank = WIDE
    rows = torch.randn(72, 4, dtype=torch.float64) @ torch.randn(4, n, dtype=torch.float64)
    parts = [stream(part, rank, center=True, decay=0.99) for part in (rows[:36], rows[36:])]
    verify(parts[0].merge(parts[1]), rows, excess=2e-3, estimate=3e-2)


@thorough
@centers
def test_rounding_is_not_lost_energy(backend, center):
    """Every fold leaves some, which would add up to an error of 1e-6 after 330."""
    n, rank = WIDE
    rows = torch.randn(640, 2, dtype=torch.float64) @ torch.randn(2, n, dtype=torch.float64)
    state = stream((rows + 3).to(backend.device), rank, center=center)
    assert float(state._facts[0]) == 0


@emulated
def test_emulated_rounding_is_not_lost_energy(backend):
    """Two folds, the second a small one for time."""
    n, rank = WIDE
    rows = torch.randn(34, 1, dtype=torch.float64) @ torch.randn(1, n, dtype=torch.float64)
    assert float(stream(rows, rank)._folded("test")[3][0]) == 0


@emulated
def test_emulated_forgetting(backend):
    rows = torch.randn(300, 5, dtype=torch.float64)
    rows[0] *= 1e170
    verify(stream(rows, 2, decay=0.05, center=True), rows)
    parts = [stream(part, 2, decay=0.05) for part in rows.split(150)]
    verify(parts[0].merge(parts[1]), rows)
    rows[:] = torch.cat([rows[1:11], torch.zeros(290, 5, dtype=torch.float64)])
    result = verify(stream(rows, 2, decay=0.1), rows)
    assert result.info.rank == 2


@emulated
def test_emulated_value_out_of_range(backend):
    state = stream(torch.full((130, 5), 3e38), 2)
    with pytest.raises(torch.linalg.LinAlgError, match="exceeds the range"):
        state.result()


@thorough
@kinds
@decays
@centers
def test_merging_in_any_order(backend, n, rank, decay, center):
    rows = rows_of(300, n, device=backend.device)
    bounds = [0, 3, 140, 141, 230, 300]  # less than a chunk, more, one row
    settings = {"decay": decay, "center": center}

    def parts():
        return [stream(rows[a:b], rank, **settings) for a, b in pairwise(bounds)]

    a, b, c, d, e = parts()
    left = a.merge(b).merge(c).merge(d).merge(e)
    a, b, c, d, e = parts()
    right = a.merge(b.merge(c.merge(d.merge(e))))
    a, b, c, d, e = parts()
    tree = a.merge(b).merge(c.merge(d).merge(e))
    whole = stream(rows, rank, **settings)
    wide = n == WIDE[0]
    for merged in (left, right, tree):
        verify(merged, rows, excess=5e-3 if wide else 1e-6, estimate=5e-2 if wide else 1e-4)
        tolerance = 2e-3 if wide else 1e-6
        torch.testing.assert_close(merged.result().S, whole.result().S, rtol=tolerance, atol=0)
        verify(
            merged.update(rows[:50]),
            torch.cat([rows, rows[:50]]),
            excess=5e-3 if wide else 1e-6,
            estimate=5e-2 if wide else 1e-4,
        )


@thorough
@kinds
def test_merging_with_nothing_and_with_oneself(backend, n, rank):
    rows = rows_of(140, n, device=backend.device)
    wanted = stream(rows, rank).result()
    empty = sm.linalg.StreamingSVD(n, rank, device=backend.device)
    assert torch.equal(stream(rows, rank).merge(empty).result().Vh, wanted.Vh)
    assert torch.equal(empty.merge(stream(rows, rank)).result().Vh, wanted.Vh)
    state = stream(rows, rank)
    verify(state.merge(state), torch.cat([rows, rows]), excess=2e-3, estimate=3e-2)


@thorough
@kinds
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_sparse_rows(backend, dtype, n, rank, index):
    rows = rows_of(200, n, dtype, backend.device)
    rows[torch.rand(200, n, device=backend.device) > 0.1] = 0
    rows[17] = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        sparse = rows.to_sparse_csr()
        sparse = torch.sparse_csr_tensor(
            sparse.crow_indices().to(index),
            sparse.col_indices().to(index),
            sparse.values(),
            rows.shape,
            check_invariants=False,
        )
        dense = stream(rows, rank, center=True).state_dict()
        once = sm.linalg.StreamingSVD(n, rank, center=True, dtype=dtype, device=backend.device)
        once.update(sparse)
        parts = sm.linalg.StreamingSVD(n, rank, center=True, dtype=dtype, device=backend.device)
        parts.update(rows[:30]).update(rows[30:90].to_sparse_csr()).update(rows[90:])
        for state in (once, parts):
            for name, value in state.state_dict().items():
                assert torch.equal(value, dense[name]), name


@thorough
@kinds
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
        (torch.float16, 6e3),
        (torch.bfloat16, 1e30),
    ],
    ids=str,
)
def test_scale(backend, n, rank, dtype, scale):
    rows = (rows_of(140, n, torch.float64, offset=0.5) * scale).to(dtype).to(backend.device)
    state = stream(rows, rank, 50, center=True)
    verify(state, rows, excess=2e-3, estimate=3e-2)
    other = stream(rows, rank, center=True)
    verify(state.merge(other), torch.cat([rows, rows]), excess=2e-3, estimate=3e-2)


@thorough
@kinds
def test_scales_that_change(backend, n, rank):
    """Each chunk of float64 rows is larger than all before it, or smaller."""
    sizes = torch.logspace(-190, 190, 300, dtype=torch.float64)[:, None]
    for scale in (sizes, sizes.flip(0)):
        rows = (torch.randn(300, n, dtype=torch.float64) * scale).to(backend.device)
        verify(stream(rows, rank, 64), rows, excess=2e-3, estimate=3e-2)
        parts = [stream(rows[:140], rank), stream(rows[140:], rank)]
        verify(parts[0].merge(parts[1]), rows, excess=2e-3, estimate=3e-2)


@thorough
@kinds
@centers
def test_degenerate(backend, n, rank, center):
    for rows in (
        torch.zeros(140, n),
        torch.ones(140, n),
        torch.eye(n)[:1].repeat(150, 1),
        torch.randn(140, 1) @ torch.randn(1, n),
        torch.full((33, n), -1e-38),
    ):
        verify(stream(rows.to(backend.device), rank, 60, center=center), rows)


@thorough
@kinds
def test_rank_beyond_the_rows(backend, n, rank):
    rows = torch.randn(1, n, device=backend.device)
    result = verify(stream(rows, rank), rows)
    assert result.info.rank == 1
    assert result.S[1:].abs().max() <= 1e-7 * result.S[0]


@thorough
def test_whole_rank(backend):
    rows = rows_of(150, 9, device=backend.device)
    result = verify(stream(rows, 9, center=True), rows)
    assert result.info.error == 0
    assert result.info.rank == 9


@thorough
def test_mean_far_from_the_origin(backend):
    """Second moments about the origin would lose all digits of the deviations."""
    rows = rows_of(300, 12, torch.float64, backend.device, offset=1e9)
    verify(stream(rows, 4, 50, center=True), rows, excess=1e-5, estimate=1e-4)


def test_wide_rows_keep_more_than_the_rank():
    """The error of a slow spectrum, with and without the rows beyond the rank."""
    rows = rows_of(1500, 300, power=-0.5)
    A, _ = streamed_rows(rows)
    state = stream(rows, 16, 100)
    verify(state, rows, excess=5e-3, estimate=5e-2)
    basis = torch.zeros(0, 300, dtype=torch.float64)
    for part in A.split(100):
        _, S, Vh = torch.linalg.svd(torch.cat([basis, part]), full_matrices=False)
        basis = S[:16, None] * Vh[:16]
    V = torch.linalg.svd(basis, full_matrices=False).Vh
    Vh = state.result().Vh.double()
    assert (A - A @ Vh.T @ Vh).norm() < (A - A @ V.T @ V).norm()
