# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.randomized_svd of dense matrices to a tolerance, and centred, against torch.linalg.svd
in double precision."""

import numpy as np
import pytest
import torch
from reference import LAYOUTS, UNIT, make
from test_svd import ORTHOGONAL, SPECTRA, matrix
from test_svd_batch import assert_same

import structmat as sm
from structmat import _C

svd = sm.linalg.randomized_svd
WIDE = [torch.float32, torch.float64]


def exact(A, center):
    A = A.detach().cpu().double()
    if not center:
        return A
    A = A - A[0]  # whose mean has not the rounding of a large one
    return A - A.mean(0)


def verify(A, result, center=False, excess=0.05):
    """Orthogonality, signs, order, optimality and the reported error; gives the true one."""
    U, S, Vh = (factor.cpu().double() for factor in result)
    dtype, k, B = result.S.dtype, len(S), exact(A, center)
    assert (U.shape, Vh.shape) == ((len(B), k), (k, B.shape[1]))
    assert dtype == (torch.float64 if A.dtype == torch.float64 else torch.float32)
    assert (S[1:] <= S[:-1]).all()
    assert (S >= 0).all()
    for basis in (U.T @ U, Vh @ Vh.T):
        assert (basis - torch.eye(k)).abs().max() <= ORTHOGONAL[dtype]
    assert (U.gather(0, U.abs().argmax(0)[None]) > 0).all()
    scale = float(B.abs().max()) or 1.0
    truth = torch.linalg.svdvals(B / scale)
    norm = float(truth.norm()) or 1.0
    error = float((B / scale - (U * (S / scale)) @ Vh).norm()) / norm
    rounding = 60 * UNIT[dtype]
    assert error <= (1 + excess) * float(truth[k:].norm()) / norm + rounding
    assert (S / scale - truth[:k]).max() <= rounding * (float(truth[0]) or 1)
    assert error / 1.25 - rounding <= result.info.error <= 1.25 * error + rounding
    return error


def least_rank(A, rtol, center):
    sigma = torch.linalg.svdvals(exact(A, center))
    left = sigma.square().flip(0).cumsum(0).flip(0).sqrt()
    return max(1, int((left > rtol * sigma.norm()).sum()))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 5), (33, 54), (54, 33)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_centred(backend, dtype, shape, layout):
    A = make(*shape, dtype=dtype, device=backend.device, layout=layout)
    A += 3
    kept = A.clone()
    rank = min(3, *shape)
    result = svd(A, rank, center=True)
    verify(A, result, center=True)
    assert torch.equal(A, kept)
    if shape[0] > 1:
        assert (result.U.double().mean(0).abs() < 1e-5).all() or result.info.rank < rank


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_a_mean_a_million_times_the_rest(backend, dtype, wide, layout):
    """It leaves nothing of its rounding: neither in the factors nor in the norm."""
    m, n = (18, 50) if wide else (50, 18)
    A = torch.randn(m, 4, dtype=torch.float64) @ torch.randn(4, n, dtype=torch.float64)
    A += 0.01 * torch.randn(m, n) + 1e6 * (1 + torch.rand(n))
    A = A.to(dtype).to(backend.device)
    A = A.T.contiguous().T if layout == "transposed" else A
    tolerance = 100 * UNIT[torch.float32] if dtype == torch.float32 else 1e-11
    for target in ({"rank": 3}, {"rank": 18}, {"rtol": 0.1}):
        result = svd(A, **target, center=True)
        verify(A, result, center=True)
        sigma = torch.linalg.svdvals(exact(A, True))[: len(result.S)]
        assert (result.S.cpu().double() - sigma).abs().max() <= tolerance * sigma[0]


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16], ids=str)
def test_equal_rows_leave_nothing(backend, dtype):
    A = (torch.randn(1, 30) * 1e3 + 0.1).to(dtype).to(backend.device).expand(45, 30)
    for target in ({"rank": 2}, {"rtol": 1e-3}):
        result = svd(A, **target, center=True)
        assert not result.S.any()
        assert (result.info.rank, result.info.error, result.info.converged) == (0, 0, True)
        verify(A, result, center=True)


def test_centred_blocks_of_both_kinds(threads):
    """Narrow blocks, several tiles, any number of threads; batches and lists bit for bit."""
    for A in (matrix(1500, 400, "slow") + 5, matrix(300, 700, "harmonic").float().T + 5):
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(svd(A, 64, center=True))
        assert_same(*results)
        assert results[0].info.sweeps > 5
        verify(A, results[0], center=True)
    A = [make(20, 30), make(40, 10, dtype=torch.bfloat16), make(30, 20).double().T]
    for result, a in zip(svd(A, [2, 3, 4], center=True), A, strict=True):
        assert_same(result, svd(a, result.S.numel(), center=True))
    batch = svd(torch.stack([A[0], A[2].float()]), 2, center=True)
    assert torch.equal(batch.U[1], svd(A[2].float(), 2, center=True).U)


def test_centred_gradients():
    A = (matrix(14, 9, "exponential") + 2).requires_grad_()
    for loss in (lambda U, S, Vh: S.sum(), lambda U, S, Vh: (U[:, 0] * U[:, 1]).abs().sum()):
        found = torch.autograd.grad(loss(*svd(A, 3, center=True)), A)[0]
        U, S, Vh = torch.linalg.svd(A - A.mean(0), full_matrices=False)
        wanted = torch.autograd.grad(loss(U[:, :3], S[:3], Vh[:3]), A)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    found = torch.autograd.grad(svd(A, rtol=0.5, center=True).S[0], A)[0]
    wanted = torch.autograd.grad(torch.linalg.svdvals(A - A.mean(0))[0], A)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    results = svd([A, A.detach()], 2, center=True)
    assert [r.S.requires_grad for r in results] == [True, False]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16, torch.float16], ids=str)
def test_tolerance(spectrum, dtype):
    """Never met on paper only, at the least rank or nearly; small matrices end complete."""
    for m, n, center in ((300, 200, False), (120, 260, True)):
        A = matrix(m, n, spectrum, torch.float64)
        A = ((A + 1) if center else A).to(dtype)
        for rtol in (0.5, 0.1, 1e-3, 1e-6):
            result = svd(A, rtol=rtol, center=center)
            error = verify(A, result, center)
            rounding = 16 * 2 * UNIT[result.S.dtype]
            if result.info.converged:
                assert error <= rtol
                least = least_rank(A, rtol, center)
                if least < 0.9 * min(m, n):  # else the tail may be as small as rounding
                    assert least <= len(result.S) <= 1.1 * least + 1
            else:
                assert rtol <= 2 * rounding


def test_tolerances_on_every_back_end(backend):
    """By growth over two blocks, by exact norms and by probes; complete; within bounded passes."""
    A = matrix(150, 130, "exponential", torch.float32).to(backend.device)
    for rtol, center in ((0.3, False), (1e-4, True)):
        result = svd(A, rtol=rtol, center=center)
        assert result.info.converged
        assert verify(A, result, center) <= rtol
        assert len(result.S) <= 1.1 * least_rank(A, rtol, center) + 1
    result = svd(A, rtol=1e-6, sweeps=3)
    assert result.info.sweeps == 2
    assert not result.info.converged
    assert result.info.error > 1e-6
    A = matrix(40, 30, "slow").to(backend.device).T
    for rtol in (0.3, 1e-13):
        result = svd(A, rtol=rtol)
        assert result.info.converged
        assert verify(A, result) <= rtol
    assert not svd(A.float(), rtol=1e-9).info.converged


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_an_exact_rank_takes_two_passes(dtype):
    A = torch.zeros(2000, 1000, dtype=dtype)
    A[0, 0], A[7, 5] = 3, 2
    result = svd(A, rtol=0.1)
    assert result.info.sweeps == 2
    assert result.info.converged
    torch.testing.assert_close(result.S, torch.tensor([3, 2], dtype=dtype))


def test_growth():
    """A basis of many blocks, found in buffers that grow."""
    A = matrix(900, 800, "slow")
    for B in (A, A.T, A.float()):
        result = svd(B, rtol=0.4)
        assert result.info.converged
        assert verify(B, result) <= 0.4
        assert result.info.sweeps > 10
        assert len(result.S) <= 1.1 * least_rank(B, 0.4, False) + 1


def test_copies_beyond_a_block_are_found():
    i = torch.arange(1, 401, dtype=torch.float64)
    sigma = torch.where(i <= 90, 1.0, 0.1 * (i - 90).clamp(min=1) ** -0.5)
    left, right = (torch.linalg.qr(torch.randn(n, 400, dtype=torch.float64)).Q for n in (500, 400))
    A = (left * sigma) @ right.T
    result = svd(A, rtol=0.1)
    assert len(result.S) <= 92
    assert verify(A, result, excess=0.15) <= 0.1


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_tolerances_that_rounding_forbids(dtype):
    rtol = 1e-9 if dtype == torch.float32 else 1e-17
    for spectrum in ("slow", "rank 5", "exponential", "condition 1e30"):
        result = svd(matrix(120, 90, spectrum, dtype), rtol=rtol)
        assert not result.info.converged
        assert result.info.error <= 100 * UNIT[dtype]


def test_sweeps_bound_and_oversample_widens():
    A = matrix(400, 300, "slow")
    for sweeps in (2, 3, 4, 7):
        result = svd(A, rtol=0.3, sweeps=sweeps)
        assert result.info.sweeps in (sweeps, sweeps - 1)
        assert not result.info.converged
        assert result.info.error > 0.3
    plain, wide = svd(A, rtol=0.6), svd(A, rtol=0.6, oversample=100)
    assert wide.info.sweeps > plain.info.sweeps
    assert plain.info.converged
    assert wide.info.converged


def test_lists_to_a_tolerance():
    A = [matrix(90, 60, "harmonic"), matrix(20, 70, "slow", torch.float32), make(9, 8).half()]
    for result, a in zip(svd(A, rtol=0.2), A, strict=True):
        assert_same(result, svd(a, rtol=0.2))
        assert verify(a, result) <= 0.2
    A[1][3, 4] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError, match=r"A contains NaN or Inf \(A\[1\] of"):
        svd(A, rtol=0.2)
    with pytest.raises(ValueError, match="rank of its own"):
        svd(torch.stack([A[0], A[0]]), rtol=0.2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite(backend, bad):
    A = make(40, 53, device=backend.device)
    A[39, 7] = bad
    for target in ({"rank": 4}, {"rtol": 0.1}):
        for center in (False, True):
            with pytest.raises(torch.linalg.LinAlgError, match="A contains NaN or Inf"):
                svd(A, **target, center=center)
    *factors, facts = torch.ops.structmat.randomized_svd_to_tolerance(A, 0.1, None, None, 0, False)
    assert all(t.isnan().all() for t in (*factors, facts[:4]))
    assert facts[4:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
    ],
    ids=str,
)
def test_scale(backend, dtype, scale):
    A = matrix(50, 40, "harmonic", dtype, scale).to(backend.device)
    for center in (False, True):
        assert verify(A, svd(A, rtol=0.2, center=center), center) <= 0.2
        verify(A, svd(A, 6, center=center), center)


def test_same_bits_for_any_thread_count(threads):
    A = torch.randn(3000, 130)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(svd(A, rtol=0.7, center=True))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("dtype", [*WIDE, torch.float16], ids=str)
def test_numpy_gives_the_same_bits(dtype):
    for A in (torch.randn(70, 50), torch.randn(50, 70).T, torch.randn(90, 120)[::2, 1::3]):
        A = A.to(dtype)
        for options in ({"rank": 7, "center": True}, {"rtol": 0.4}, {"rtol": 0.4, "center": True}):
            wanted = svd(A, **options, seed=3)
            *factors, info = _C.randomized_svd(A.numpy(), **options, seed=3)
            for ours, theirs in zip(factors, wanted, strict=True):
                assert np.array_equal(ours, theirs.numpy())
            for fact in ("error", "rank", "sweeps", "converged"):
                assert info[fact] == getattr(wanted.info, fact)
    several = _C.randomized_svd([A.numpy(), A.numpy().T], 3)
    assert np.array_equal(several[1][1], svd(A.T, 3).S.numpy())
    with pytest.raises(ValueError, match="wanted one of rank and rtol, got neither"):
        _C.randomized_svd(A.numpy())
    with pytest.raises(ValueError, match="got both"):
        _C.randomized_svd(A.numpy(), 3, rtol=0.1)
    with pytest.raises(ValueError, match=r"rtol is 1\.0"):
        _C.randomized_svd(A.numpy(), rtol=1.0)
    with pytest.raises(np.linalg.LinAlgError, match="NaN or Inf"):
        _C.randomized_svd(np.full((4, 3), np.nan), rtol=0.1)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ValueError, "neither"),
        ({"rank": 2, "rtol": 0.1}, ValueError, "both"),
        ({"rtol": 0.0}, ValueError, "rtol is 0.0"),
        ({"rtol": 1.0}, ValueError, r"rtol is 1\.0"),
        ({"rtol": float("nan")}, ValueError, "rtol is nan"),
        ({"rtol": "0.1"}, TypeError, "str"),
        ({"rtol": 0.1, "sweeps": 1}, ValueError, "sweeps is 1"),
        ({"rtol": 0.1, "oversample": -1}, ValueError, "oversample is -1"),
        ({"rank": 2, "center": 1}, TypeError, "center must be a bool"),
    ],
    ids=str,
)
def test_wrong_arguments(options, error, says):
    with pytest.raises(error, match=says):
        svd(torch.randn(20, 9), **options)


def test_operators_check_too():
    operator = torch.ops.structmat.randomized_svd_to_tolerance
    with pytest.raises(RuntimeError, match=r"rtol is 1\.0"):
        operator(torch.ones(4, 3), 1.0, None, None, 0, False)
    with pytest.raises(RuntimeError, match="A must have 2 dimensions"):
        operator(torch.ones(2, 4, 3), 0.1, None, None, 0, False)


def test_opcheck():
    A = torch.randn(12, 9)
    operators = torch.ops.structmat
    torch.library.opcheck(operators.randomized_svd.default, (A, 3, None, None, 0, True))
    torch.library.opcheck(
        operators.randomized_svd_to_tolerance.default, (A, 0.3, None, None, 0, True)
    )


def test_compile_of_centring(backend):
    def product(A):
        U, S, Vh = svd(A, 3, center=True)
        return (U * S) @ Vh

    A = torch.randn(20, 30, device=backend.device)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(A), product(A))


@pytest.mark.parametrize("rtol", [0.1, 0.05])
def test_facts_of_several_blocks(rtol):
    """Bases of two to five blocks: the facts cover all of their singular values."""
    i = torch.arange(1, 401, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, 400, dtype=torch.float64)).Q for n in (600, 400))
    for power in (0.7, 1.0):
        A = (left * i**-power) @ right.T
        U, S, Vh = result = svd(A, rtol=rtol)
        error = ((A - (U * S) @ Vh).norm() / A.norm()).item()
        assert error / 1.25 <= result.info.error <= 1.25 * error
        assert error <= rtol
        assert result.info.rank == len(S)


@pytest.mark.parametrize("shape", [(5, 9), (4, 9), (9, 5), (8, 20)])
def test_gradients_where_centring_takes_the_last_value(shape):
    """Of m <= n rows less their mean the last singular vector on the left is that of ones."""
    A, W = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    A.requires_grad_()
    k = min(shape)
    U, S, Vh = svd(A, k, center=True)
    found = torch.autograd.grad(((U * S) @ Vh * W).sum(), A)[0]
    torch.testing.assert_close(found, W - W.mean(0), rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(svd(A, k, center=True).S[: k - 1].sum(), A)[0]
    wanted = torch.autograd.grad(torch.linalg.svdvals(A - A.mean(0))[: k - 1].sum(), A)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
