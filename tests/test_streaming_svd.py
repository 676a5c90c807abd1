# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.StreamingSVD against the SVD, in double precision, of the matrix the rows stand for."""

import copy
import io
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


@thorough
def test_forgetting(backend):
    """Rows of another subspace fade; per row, hence whatever the blocks."""
    old, new = torch.eye(40)[:2].repeat(200, 1), torch.eye(40)[2:4].repeat(200, 1)
    state = sm.linalg.StreamingSVD(40, 2, decay=0.95, device=backend.device)
    state.update(old.to(backend.device)).update(new.to(backend.device))
    Vh = state.result().Vh.cpu()
    assert Vh[:, 2:4].square().sum() == pytest.approx(2, abs=1e-6)
    tiny = sm.linalg.StreamingSVD(40, 2, decay=1e-6, center=True, device=backend.device)
    verify(tiny.update(new.to(backend.device)), new)


@thorough
@kinds
@centers
def test_forgetting_what_is_large(backend, n, rank, center):
    """float64 rows are kept in a unit that fades with them: small ones after a giant count."""
    rows = torch.randn(3000, n, dtype=torch.float64, device=backend.device)
    rows[0] *= 1e170
    for decay, count in ((0.85, 3000), (0.85, 2405), (0.05, 140), (0.01, 130)):
        state = stream(rows[:count], rank, decay=decay, center=center)
        verify(state, rows[:count], excess=2e-3, estimate=3e-2)
        _, mean = streamed_rows(rows[:count], decay)
        torch.testing.assert_close(state.mean.cpu(), mean, rtol=1e-9, atol=1e-9 * mean.abs().max())
    parts = [stream(part, rank, decay=0.85, center=center) for part in rows.split(1700)]
    verify(parts[0].merge(parts[1]), rows, excess=2e-3, estimate=3e-2)
    rows = torch.cat([rows[:1] * 1e137, rows[1:130] * 1e-100, rows[130:300]])
    for count in (129, 130, 300):
        A, mean = streamed_rows(rows[:count], 1e-6)
        state = stream(rows[:count], rank, decay=1e-6)
        torch.testing.assert_close(state.mean.cpu(), mean, rtol=1e-9, atol=0)
        size = A[-1].abs().max()
        S = state.result().S.cpu()
        assert float(S[0] / size) == pytest.approx(float((A[-1] / size).norm()), rel=1e-9)


@thorough
@kinds
def test_forgetting_for_zeros(backend, n, rank):
    """Singular values far below the root of the least float64."""
    zeros = torch.zeros(540, n, dtype=torch.float64, device=backend.device)
    rows = torch.cat([rows_of(10, n, torch.float64, backend.device), zeros])
    result = verify(stream(rows, rank, decay=0.5), rows, excess=2e-3, estimate=3e-2)
    sigma = torch.linalg.svdvals(streamed_rows(rows, 0.5)[0] * 2.0**540)[:rank]
    torch.testing.assert_close(result.S.cpu() * 2.0**540, sigma, rtol=1e-6, atol=0)
    assert result.info.rank == rank
    lost = stream(rows.float(), rank, decay=0.5).result()
    assert lost.S.abs().max() == 0
    assert lost.info.rank == 0


@thorough
@pytest.mark.parametrize("n", [24, 135], ids=["exact", "wide"])
@centers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_is_that_of_the_rows(backend, n, center, dtype):
    rows = torch.randn(4000, 3, dtype=torch.float64) @ torch.randn(3, n, dtype=torch.float64)
    rows = (rows + (5 if center else 0)).to(dtype).to(backend.device)
    result = verify(stream(rows, 5, center=center), rows)
    assert result.info.rank == 3
    assert result.info.error <= 1e-6


@thorough
@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_leave_the_state(backend, dtype, n, rank, bad):
    state = stream(rows_of(140, n, dtype, backend.device), rank)
    kept = state.state_dict()
    rows = rows_of(135, n, dtype, backend.device)
    for where in ((0, 0), (134, n - 1), (70, 9)):
        spoilt = rows.clone()
        spoilt[where] = bad
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            sparse = spoilt.to_sparse_csr()
        for wrong in (spoilt, spoilt.repeat_interleave(2, 1)[:, ::2], spoilt[where[0]], sparse):
            with pytest.raises(torch.linalg.LinAlgError, match="rows contain NaN or Inf"):
                state.update(wrong)
    after = state.state_dict()
    assert all(torch.equal(after[name], kept[name]) for name in kept)


@thorough
def test_value_out_of_range(backend):
    state = stream(torch.full((200, 50), 3e38, device=backend.device), 2)
    with pytest.raises(torch.linalg.LinAlgError, match="exceeds the range"):
        state.result()
    assert float(state.mean[0]) == pytest.approx(3e38)


@thorough
@kinds
def test_empty_block(backend, n, rank):
    state = stream(rows_of(40, n, device=backend.device), rank)
    kept = state.state_dict()
    state.update(torch.empty(0, n, device=backend.device))
    assert state.rows_seen == 40
    assert all(torch.equal(value, kept[name]) for name, value in state.state_dict().items())


@thorough
@kinds
@centers
def test_state_dict(backend, n, rank, center):
    rows = rows_of(300, n, device=backend.device)
    state = stream(rows[:170], rank, center=center, decay=0.99)
    kept = state.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in kept.values())
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    again = stream(rows[200:], rank, center=center, decay=0.99)
    again.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(state)
    wanted = state.update(rows[170:]).result()
    for other in (again, copied):
        assert torch.equal(other.update(rows[170:]).result().Vh, wanted.Vh)
    assert kept["rows_seen"] == 170  # a copy


@kinds
def test_nothing_shares_memory_with_the_state(n, rank):
    rows = rows_of(256, n, torch.float64)  # nothing is buffered
    state = stream(rows, rank, center=True)
    mean, copied, wanted = state.mean, copy.copy(state), state.result()
    state.mean.fill_(7)
    copied.update(rows[:140])
    assert torch.equal(state.mean, mean)
    assert torch.equal(state.result().S, wanted.S)
    assert (state.rows_seen, copied.rows_seen) == (256, 396)


WRONG = {
    "n_features": (ValueError, "n_features 24, wanted 25", (25, 3), {}),
    "rank": (ValueError, "rank 3, wanted 4", (24, 4), {}),
    "decay": (ValueError, "decay 1.0, wanted 0.5", (24, 3), {"decay": 0.5}),
    "center": (ValueError, "center False, wanted True", (24, 3), {"center": True}),
    "seed": (ValueError, "seed 0, wanted 1", (24, 3), {"seed": 1}),
    "dtype": (TypeError, "dtype .*32, wanted .*64", (24, 3), {"dtype": torch.float64}),
}


@pytest.mark.parametrize("name", WRONG)
def test_states_that_do_not_match(name):
    error, message, sizes, settings = WRONG[name]
    theirs = stream(rows_of(140, 24), 3)
    mine = sm.linalg.StreamingSVD(*sizes, **settings)
    mine.update(torch.ones(150, sizes[0], dtype=mine.dtype))
    kept = mine.state_dict()
    with pytest.raises(error, match=message):
        mine.merge(theirs)
    with pytest.raises(error, match=message):
        mine.load_state_dict(theirs.state_dict())
    assert all(torch.equal(value, kept[key]) for key, value in mine.state_dict().items())


def test_states_that_are_none():
    state = stream(rows_of(140, 24), 3)
    kept = state.state_dict()
    with pytest.raises(TypeError, match="other must be a StreamingSVD, got int"):
        state.merge(3)
    good = state.state_dict()
    with pytest.raises(ValueError, match=r"missing \['mean'\], unknown \['man'\]"):
        state.load_state_dict(
            {**{k: v for k, v in good.items() if k != "mean"}, "man": good["mean"]}
        )
    with pytest.raises(TypeError, match="rank must be a tensor, got int"):
        state.load_state_dict(good | {"rank": 3})
    with pytest.raises(ValueError, match=r"mean has shape \(23,\), wanted \(24,\)"):
        state.load_state_dict(good | {"mean": good["mean"][1:]})
    with pytest.raises(TypeError, match=r"factor has dtype torch\.float32"):
        state.load_state_dict(good | {"factor": good["factor"].float()})
    for buffer, count in ((torch.zeros(128, 24), 140), (good["buffer"], 3), (torch.zeros(24), 140)):
        with pytest.raises(ValueError, match="buffer"):
            state.load_state_dict(good | {"buffer": buffer, "rows_seen": torch.tensor(count)})
    with pytest.raises(ValueError, match="rows_seen has 2 elements"):
        state.load_state_dict(good | {"rows_seen": torch.tensor([1, 2])})
    for wrong in (None, 3):
        with pytest.raises(TypeError, match="state must be a mapping"):
            state.load_state_dict(wrong)
    for count in (140.7, float("inf"), True):
        with pytest.raises(ValueError, match=r"rows_seen is .*, wanted an integer"):
            state.load_state_dict(good | {"rows_seen": torch.tensor(count)})
    with pytest.raises(ValueError, match="12 rows of 11 are in the buffer"):
        state.load_state_dict(good | {"rows_seen": torch.tensor(11)})
    for name in ("buffer", "factor", "mean", "facts"):
        spoilt = good[name].clone()
        spoilt.view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=f"{name} contains NaN or Inf"):
            state.load_state_dict(good | {name: spoilt})
        for other in (good[name].to("meta"), good[name].to_sparse()):
            with pytest.raises(TypeError, match=f"{name} must be dense"):
                state.load_state_dict(good | {name: other})
    for facts in ([-1.0, 0.0], [0.0, -1.0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="which no rows lead to"):
            state.load_state_dict(good | {"facts": torch.tensor(facts, dtype=torch.float64)})
    learnt = {name: good[name].clone().requires_grad_() for name in ("buffer", "factor")}
    assert not any(t.requires_grad for t in state.load_state_dict(good | learnt)._tensors())
    assert all(torch.equal(value, kept[key]) for key, value in state.state_dict().items())


BAD_ROWS = [
    (TypeError, "rows must be a tensor, got list", [[1.0]]),
    (TypeError, "rows are torch.float64, wanted torch.float32", torch.ones(2, 24).double()),
    (
        TypeError,
        "rows must be dense or CSR, got layout torch.sparse_coo",
        torch.eye(24).to_sparse(),
    ),
    (ValueError, r"rows have shape \(2, 23\), wanted \(b, 24\) or \(24,\)", torch.ones(2, 23)),
    (ValueError, r"shape \(23,\)", torch.ones(23)),
    (ValueError, r"shape \(\)", torch.tensor(1.0)),
    (ValueError, r"shape \(1, 2, 24\)", torch.ones(1, 2, 24)),
    (ValueError, "rows are on meta, wanted cpu", torch.ones(2, 24, device="meta")),
    (RuntimeError, "rows require grad", torch.ones(2, 24, requires_grad=True)),
]


@pytest.mark.parametrize(("error", "message", "rows"), BAD_ROWS, ids=[b[1][:25] for b in BAD_ROWS])
def test_bad_rows(error, message, rows):
    state = stream(rows_of(140, 24), 3)
    kept = state.state_dict()
    with pytest.raises(error, match=message):
        state.update(rows)
    assert all(torch.equal(value, kept[key]) for key, value in state.state_dict().items())


def test_bad_sparse_rows():
    state = stream(rows_of(140, 24), 3)
    kept = state.state_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        for columns in ([0, 24], [0, -1], [3, 3], [5, 2]):
            rows = torch.sparse_csr_tensor(
                torch.tensor([0, 2]),
                torch.tensor(columns),
                torch.ones(2),
                (1, 24),
                check_invariants=False,
            )
            with pytest.raises(ValueError, match="rows are no valid CSR tensor"):
                state.update(rows)
    assert all(torch.equal(value, kept[key]) for key, value in state.state_dict().items())


BAD_SETTINGS = [
    (ValueError, "n_features is 0", (0, 1), {}),
    (ValueError, "rank is 0, wanted 1 to n_features, 5", (5, 0), {}),
    (ValueError, "rank is -1", (5, -1), {}),
    (ValueError, "rank is 6", (5, 6), {}),
    (TypeError, "rank must be an integer, got float", (5, 2.0), {}),
    (TypeError, "n_features must be an integer, got str", ("5", 2), {}),
    (ValueError, "rank is 5000 of 40000 columns, wanted at most 4992", (40000, 5000), {}),
    (ValueError, "decay is 0", (5, 2), {"decay": 0}),
    (ValueError, "decay is 1.5", (5, 2), {"decay": 1.5}),
    (ValueError, "decay is nan", (5, 2), {"decay": float("nan")}),
    (TypeError, "decay must be a number", (5, 2), {"decay": "1"}),
    (TypeError, "center must be a bool", (5, 2), {"center": 1}),
    (ValueError, "seed is -1", (5, 2), {"seed": -1}),
    (TypeError, "dtype is torch.int64", (5, 2), {"dtype": torch.int64}),
]


@pytest.mark.parametrize(
    ("error", "message", "sizes", "settings"), BAD_SETTINGS, ids=[b[1][:25] for b in BAD_SETTINGS]
)
def test_bad_settings(error, message, sizes, settings):
    with pytest.raises(error, match=message):
        sm.linalg.StreamingSVD(*sizes, **settings)


def test_numpy_numbers():
    numpy = pytest.importorskip("numpy")
    state = sm.linalg.StreamingSVD(numpy.int64(5), numpy.int32(2), decay=numpy.float32(0.5))
    assert repr(state) == repr(sm.linalg.StreamingSVD(5, 2, decay=0.5))


def test_shapes_that_lapack_takes():
    shape = torch.ops.structmat.streaming_svd_shape
    assert shape(32766, 4992) == (32766, 128)
    assert shape(32767, 4992) == (10000, 10000)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_graphs_are_refused(backend):
    """A replay would write rows where those of the capture lay, and not count them."""
    rows = rows_of(140, 24, device=backend.device)
    state, other = stream(rows, 3), stream(rows, 3)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        rows = rows + 1
        for call in (lambda: state.update(rows), lambda: state.merge(other), state.result):
            with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
                call()
    assert state.rows_seen == 140


def test_no_rows():
    state = sm.linalg.StreamingSVD(5, 2)
    for ask in (state.result, lambda: state.mean):
        with pytest.raises(ValueError, match="no rows were seen yet"):
            ask()


@kinds
def test_same_bits_for_any_thread_count(threads, n, rank):
    rows = rows_of(700, n)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        state = stream(rows, rank, 64, center=True, decay=0.999)
        found.append((state.state_dict(), state.result()))
    for state, result in found[1:]:
        assert all(torch.equal(value, found[0][0][name]) for name, value in state.items())
        assert torch.equal(result.Vh, found[0][1].Vh)
        assert torch.equal(result.S, found[0][1].S)


@pytest.mark.parametrize(("n", "rank"), [(320, 32), (321, 32), (5000, 10), (4, 4)])
def test_memory_of_the_state_is_as_stated(n, rank):
    state = stream(torch.randn(200, n), rank)
    held = sum(t.untyped_storage().nbytes() for t in state._tensors())
    keep = (2 * rank + 16 + 15) // 16 * 16
    stated = 8 * n * n + 128 * n * 4 if n <= 4 * keep else (8 + 4) * keep * n
    assert held == stated + 8 * n + 16
    again = stream(torch.randn(400, n), rank)
    assert held == sum(t.untyped_storage().nbytes() for t in again._tensors())


def test_repr():
    assert repr(sm.linalg.StreamingSVD(5, 2, center=True)) == (
        "StreamingSVD(n_features=5, rank=2, decay=1.0, center=True, seed=0, dtype=torch.float32, "
        "device='cpu', rows_seen=0)"
    )


def test_opcheck():
    state = stream(rows_of(140, 24), 3)
    ops, facts = torch.ops.structmat, state._state()
    check = torch.library.opcheck
    check(ops.streaming_svd_update.default, (*facts, torch.ones(3, 24)))
    check(ops.streaming_svd_fold.default, facts)
    check(ops.streaming_svd_check.default, (torch.ones(3, 24),))
    other = [t.clone() for t in state._tensors()]
    check(ops.streaming_svd_merge.default, (*facts, *other, 140, 12))
    columns = (torch.tensor([0, 1, 3]), torch.tensor([5, 1, 2]), torch.ones(3))
    check(ops.streaming_svd_update_csr.default, (*facts, *columns))
    folded = (*state._folded("test"), *state._settings(), 140, 0)
    check(ops.streaming_svd_result.default, folded)


def test_operators_check_too():
    state = stream(rows_of(140, 24), 3)
    update = torch.ops.structmat.streaming_svd_update
    with pytest.raises(
        RuntimeError, match="rows are float32 of width 23, wanted float32 of width 24"
    ):
        update(*state._state(), torch.ones(2, 23))
    buffer, factor, mean, facts, *rest = state._state()
    with pytest.raises(
        RuntimeError, match=r"the factor is float64 \(23, 24\), wanted float64 \(24, 24\)"
    ):
        update(buffer, factor[1:], mean, facts, *rest, torch.ones(2, 24))
    with pytest.raises(RuntimeError, match="decay is 2"):
        update(buffer, factor, mean, facts, 3, 2.0, *rest[2:], torch.ones(2, 24))
    with pytest.raises(RuntimeError, match="rank is 25 of 24 columns"):
        torch.ops.structmat.streaming_svd_shape(24, 25)
