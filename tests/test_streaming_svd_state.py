# SPDX-License-Identifier: Apache-2.0
"""The state of sm.linalg.StreamingSVD: forgetting, saving, what it refuses, what it promises."""

import copy
import io
import warnings

import pytest
import torch
from reference import streamed_rows
from test_streaming_svd import centers, kinds, rows_of, stream, thorough, verify

import structmat as sm


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


def test_states_on_other_devices():
    mine = stream(rows_of(140, 24), 3)
    kept = mine.state_dict()
    with pytest.raises(ValueError, match="other has device meta, wanted cpu"):
        mine.merge(sm.linalg.StreamingSVD(24, 3, device="meta"))
    assert all(torch.equal(value, kept[key]) for key, value in mine.state_dict().items())


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
    (TypeError, "rows are torch.complex64", torch.ones(2, 24, dtype=torch.complex64)),
    (TypeError, "rows are torch.int64", torch.ones(2, 24, dtype=torch.int64)),
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
    (TypeError, "dtype is torch.complex64", (5, 2), {"dtype": torch.complex64}),
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
