# SPDX-License-Identifier: Apache-2.0
"""Randomized SVD of sparse tensors and operators against torch.linalg.svd in double precision."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import UNIT
from test_svd import SPECTRA, matrix

import structmat as sm
from structmat.linalg import matrix_free, operands
from structmat.linalg.certificate import tail

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]
svd = sm.linalg.randomized_svd
ORTHOGONAL = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    torch.set_num_threads(1)  # the problems are small


class Operator:
    """A dense matrix that shows its products only, and counts them."""

    def __init__(self, A):
        self.A, self.shape, self.dtype, self.device = A, A.shape, A.dtype, A.device
        self.calls = 0

    def matmat(self, X):
        self.calls += 1
        return self.A @ X

    def rmatmat(self, Y):
        self.calls += 1
        return self.A.mT @ Y


def sparse(m, n, density, dtype=torch.float64, index=torch.int64):
    """Non-zeros of sizes that fall by columns, so that the spectrum decays; some rows are empty."""
    A = torch.randn(m, n, dtype=torch.float64) * (torch.rand(m, n) < density)
    A *= 10 / (10 + torch.arange(n))
    A[::7] = 0
    A = A.to(dtype).to_sparse_csr()
    return torch.sparse_csr_tensor(
        A.crow_indices().to(index), A.col_indices().to(index), A.values(), A.shape
    )


def verify(A, result, center=False, excess=0.02):
    """Shapes, order, orthogonality, signs, optimality, the reported error; gives the true one."""
    U, S, Vh = (factor.double() for factor in result)
    dtype, k = result.S.dtype, len(S)
    A = A.to_dense().double() if A.layout != torch.strided else A.double()
    A = A - A.mean(0) if center else A
    assert U.shape == (A.shape[0], k)
    assert Vh.shape == (k, A.shape[1])
    assert (S[1:] <= S[:-1]).all()
    assert (S >= 0).all()
    eye = torch.eye(k, dtype=torch.float64)
    assert (U.mT @ U - eye).abs().max() <= ORTHOGONAL[dtype]
    assert (Vh @ Vh.mT - eye).abs().max() <= ORTHOGONAL[dtype]
    assert (U.gather(0, U.abs().argmax(0)[None]) > 0).all()
    truth = torch.linalg.svdvals(A)
    norm = float(truth.norm())
    rounding = 64 * UNIT[dtype]
    error = float((A - (U * S) @ Vh).norm()) / (norm or 1)
    best = float(truth[k:].norm()) / (norm or 1)
    assert error <= (1 + excess) * best + rounding
    assert (S - truth[:k]).abs().max() <= excess * float(truth[0]) + 1e-300
    slack = 1.25 * max(error, rounding)
    assert result.info.error <= slack
    assert result.info.error >= error / 1.25 - rounding
    return error


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (9, 70), (1, 5), (5, 1)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_csr(shape, center, index):
    A = sparse(*shape, 0.2, index=index)
    if not A.values().numel():
        A = torch.ones(shape, dtype=torch.float64).to_sparse_csr()
    rank = min(6, *shape)
    result = svd(A, rank, center=center)
    verify(A, result, center, excess=0.05)
    values = A.values().clone()
    again = svd(A, rank, center=center)
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))
    assert torch.equal(A.values(), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_csr_of_small_types(dtype):
    A = sparse(90, 70, 0.2, dtype)
    result = svd(A, 8)
    assert result.U.dtype == torch.float32
    verify(A, result)


def test_csr_is_centred_far_from_the_origin():
    """Products lose what the mean is larger than the rest, the norm nothing."""
    dense = torch.randn(300, 40, dtype=torch.float64) + 1e4
    A = dense.to_sparse_csr()
    U, S, Vh = svd(A, 40, center=True)
    torch.testing.assert_close(
        (U * S) @ Vh, dense - dense.mean(0), rtol=0, atol=1e4 * 64 * UNIT[torch.float64]
    )
    operand = operands.csr(A, None).centred()
    expected = float((dense - dense.mean(0)).norm())
    assert abs(operand.norm() - expected) < 1e-9 * expected


def test_csr_in_parts():
    """Products longer than 32-bit indices reach are cut by rows; a long row stays whole."""
    A = sparse(60, 50, 0.3)
    X, Y = torch.randn(50, 3, dtype=torch.float64), torch.randn(60, 3, dtype=torch.float64)
    whole = operands.csr(A, None)
    for limit in (1, 10, 100):
        parts = operands.csr(A, None, limit)
        torch.testing.assert_close(parts.matmat(X), whole.matmat(X))
        torch.testing.assert_close(parts.rmatmat(Y), whole.rmatmat(Y))
        assert abs(parts.centred().norm() - whole.centred().norm()) < 1e-12


@pytest.mark.parametrize("nonzeros", [0, 1])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("target", [{"rank": 4}, {"rank": 40}, {"rtol": 0.1}, {"rtol": 1e-6}])
def test_csr_of_few_nonzeros(nonzeros, center, target):
    A = torch.zeros(50, 40, dtype=torch.float64)
    A[7, 30] = -3.0 * nonzeros
    A = A.to_sparse_csr()
    result = svd(A, **target, center=center)
    verify(A, result, center)
    assert result.info.converged
    assert result.info.rank == nonzeros
    assert float(result.S[0]) == pytest.approx(3 * nonzeros * ((49 / 50) ** 0.5 if center else 1))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator(spectrum, dtype):
    for m, n, center in ((130, 97, False), (97, 130, True)):
        A = matrix(m, n, spectrum, dtype)
        operator = Operator(A)
        result = svd(operator, 12, oversample=4, center=center)
        assert result.info.sweeps == 5
        assert operator.calls == 5 + center  # one column more for the norm of the mean
        verify(A, result, center, excess=0.1)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rtol", [0.3, 1e-2, 1e-5])
def test_tolerance(spectrum, dtype, rtol):
    """The rank is the least that meets the tolerance, or nearly: by exact norms and by probes."""
    for make, m, n, center in (
        (Operator, 97, 130, False),
        (torch.Tensor.to_sparse_csr, 130, 97, True),
    ):
        A = matrix(m, n, spectrum, dtype)
        result = svd(make(A), rtol=rtol, center=center)
        error = verify(A, result, center, excess=0.1)
        assert result.info.converged
        assert error <= rtol
        exact = A.double() - A.double().mean(0) if center else A.double()
        truth = torch.linalg.svdvals(exact)
        left = truth.square().flip(0).cumsum(0).flip(0).sqrt() / max(float(truth.norm()), 1e-300)
        least = max(1, int((left > rtol).sum()))
        assert least <= len(result.S) <= 1.1 * least + 1


@pytest.mark.parametrize("make", [torch.clone, torch.Tensor.to_sparse_csr, Operator])
@pytest.mark.parametrize("wide", [False, True])
def test_tolerance_far_from_the_origin(make, wide):
    """Means a hundred thousand times the rest: a dense tensor keeps the digits, others say so."""
    g = torch.Generator().manual_seed(0)
    m, n = (70, 100) if wide else (200, 60)
    A = torch.randn(m, 5, generator=g) @ torch.randn(5, n, generator=g)
    A = A + 0.01 * torch.randn(m, n, generator=g) + 1e5 * (1 + torch.rand(n, generator=g))
    U, S, Vh = result = matrix_free.randomized_svd(make(A), None, 8e-3, None, None, True, 0, None)
    exact = A.double() - A.double().mean(0)
    error = float((exact - (U.double() * S) @ Vh.double()).norm() / exact.norm())
    if make is torch.clone:
        assert result.info.converged
        assert error <= 8e-3
        assert error / 1.25 <= result.info.error <= 1.25 * error
    else:
        assert not result.info.converged
        assert result.info.error >= error / 1.25


def test_tolerance_that_rounding_forbids():
    for spectrum in ("slow", "rank 5", "exponential"):
        for make in (Operator, torch.Tensor.to_sparse_csr):
            result = svd(make(matrix(90, 70, spectrum, torch.float32)), rtol=1e-8)
            assert not result.info.converged
            assert result.info.error < 1e-5
    # the same numbers in float64 can meet it
    assert svd(Operator(matrix(90, 70, "rank 5")), rtol=1e-8).info.converged


def test_tolerance_counts_the_rounding_of_what_is_left_out():
    A = torch.zeros(20, 9)
    A[0, 0], A[1, 1] = 1, 1.8e-6  # 15 eps, and products err by some eps
    result = svd(Operator(A), rtol=2.2e-6)
    assert len(result.S) == 2
    assert result.info.converged


def test_tolerance_within_bounded_passes():
    A = matrix(400, 300, "slow")
    for sweeps in (2, 3, 4, 7):
        operator = Operator(A)
        result = svd(operator, rtol=0.3, sweeps=sweeps)
        assert operator.calls == result.info.sweeps <= sweeps
        assert not result.info.converged
        assert result.info.error > 0.3
    assert svd(Operator(A), rtol=0.3).info.converged
    wide = svd(Operator(A), rtol=0.7, oversample=40)  # rank and 40 columns more take two rounds
    assert wide.info.sweeps > svd(Operator(A), rtol=0.7).info.sweeps


def test_sweeps_and_oversample_are_honoured():
    A = matrix(200, 150, "slow")
    best = float(torch.linalg.svdvals(A)[10:].norm())

    def excess(**options):
        operator = Operator(A)
        U, S, Vh = result = svd(operator, 10, **options)
        assert result.info.sweeps == operator.calls == options["sweeps"]
        return float((A - (U * S) @ Vh).norm()) / best - 1

    errors = [excess(sweeps=sweeps, oversample=6) for sweeps in range(2, 9)]
    assert all(b < a for a, b in pairwise(errors))
    assert errors[-1] < 1e-3
    assert excess(sweeps=2, oversample=40) < excess(sweeps=2, oversample=6) / 2


def test_repeated_values_are_all_found():
    sigma = torch.tensor([3.0] * 9 + [1.0] * 9 + [1e-3] * 60, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(140, 78, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(90, 78, dtype=torch.float64)).Q
    result = svd(Operator(left * sigma @ right.mT), 18, oversample=2)
    torch.testing.assert_close(result.S, sigma[:18], rtol=1e-5, atol=0)


def test_seeds():
    A = Operator(matrix(120, 90, "slow"))
    one, two, other = svd(A, 5), svd(A, 5), svd(A, 5, seed=2)
    assert torch.equal(one.U, two.U)
    assert not torch.equal(one.U, other.U)
    before = torch.random.get_rng_state()
    svd(A, 5)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_stay_in_range(scale):
    A = (matrix(90, 70, "harmonic") * scale).float()
    for make in (Operator, torch.Tensor.to_sparse_csr):
        for target in ({"rank": 10}, {"rtol": 0.1}):
            U, S, Vh = result = svd(make(A), **target)
            U, S, Vh = U.double(), S.double() / scale, Vh.double()
            error = float((A.double() / scale - (U * S) @ Vh).norm()) / float(
                (A.double() / scale).norm()
            )
            assert result.info.error == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", [{"rank": 5}, {"rank": 60}, {"rtol": 0.1}])
def test_not_finite(bad, target):
    A = matrix(90, 60, "slow")
    A[40, 20] = bad
    for make in (Operator, torch.Tensor.to_sparse_csr):
        with pytest.raises(torch.linalg.LinAlgError, match="NaN or Inf"):
            svd(make(A), **target)


def test_bounds_hold_where_energies_cancel():
    """The bound from 8 probes lies above the truth in all but a thousandth of the cases."""
    low, off = 0, 0
    for trial in range(400):
        spread = (1, 3, 30)[trial % 3]  # directions of equal size that were missed
        probes = torch.randn(spread, 8, dtype=torch.float64) * 1e-6 / spread**0.5
        found = tail(1.0, None, probes.mT @ probes, UNIT[torch.float64])
        low += found.bound < 1e-12
        off += not 1 / 1.25**2 < found.estimate / 1e-12 < 1.25**2 and spread == 30
    assert low <= 3
    assert off <= 3


class Broken(Operator):
    """An operator whose answers go through `change`."""

    def __init__(self, A, change):
        super().__init__(A)
        self.change = change

    def matmat(self, X):
        return self.change(self.A @ X)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda Y: Y.numpy(), TypeError, "ndarray"),
        (lambda Y: Y.float(), TypeError, "float32, wanted torch.float64"),
        (lambda Y: Y[:-1], ValueError, r"\(19, .*wanted \(20, "),
        (lambda Y: Y.mT, ValueError, "wanted"),
        (lambda Y: Y.to("meta"), ValueError, "meta"),
        (lambda Y: Y.to_sparse_csr(), TypeError, "layout"),
    ],
)
def test_products_are_checked(change, error, says):
    with pytest.raises(error, match=says) as raised:
        svd(Broken(torch.randn(20, 9, dtype=torch.float64), change), 2)
    assert "A.matmat" in str(raised.value)


def test_products_may_reuse_their_buffer():
    class Reusing(Operator):
        def matmat(self, X):
            self.buffer = getattr(self, "buffer", torch.empty(0, dtype=X.dtype))
            return torch.mm(self.A, X, out=self.buffer.resize_(len(self.A), X.shape[1]))

    A = matrix(90, 70, "slow")
    assert torch.equal(svd(Reusing(A), 8).U, svd(Operator(A), 8).U)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ValueError, "neither"),
        ({"rank": 2, "rtol": 0.1}, ValueError, "both"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"rank": -1}, ValueError, "rank is -1"),
        ({"rank": 10}, ValueError, "1 to 9"),
        ({"rank": 2.0}, TypeError, "float"),
        ({"rank": True}, TypeError, "bool"),
        ({"rank": np.float64(2)}, TypeError, "float64"),
        ({"rank": torch.tensor(2.0)}, TypeError, "Tensor"),
        ({"rtol": 0.0}, ValueError, "rtol is 0.0"),
        ({"rtol": 1.0}, ValueError, "rtol is 1.0"),
        ({"rtol": float("nan")}, ValueError, "rtol is nan"),
        ({"rtol": "0.1"}, TypeError, "str"),
        ({"rank": 2, "sweeps": 1}, ValueError, "sweeps is 1"),
        ({"rank": 2, "oversample": -1}, ValueError, "oversample is -1"),
        ({"rank": 2, "seed": -1}, ValueError, "seed is -1"),
        ({"rank": 2, "center": 1}, TypeError, "center must be a bool"),
        ({"rank": 2, "group": "world"}, TypeError, "ProcessGroup"),
    ],
)
def test_wrong_arguments(options, error, says):
    A = torch.randn(20, 9)
    for make in (Operator, torch.Tensor.to_sparse_csr):
        with pytest.raises(error, match=says):
            svd(make(A), **options)


def test_integers_of_numpy():
    A = torch.randn(20, 9)
    two = np.int64(2)
    for make in (torch.clone, torch.Tensor.to_sparse_csr):
        for options in ({}, {"center": True}):
            got = svd(make(A), two, seed=two, oversample=two, sweeps=two, **options)
            assert torch.equal(got.S, svd(make(A), 2, seed=2, oversample=2, sweeps=2, **options).S)
    assert torch.equal(svd([A], two)[0].S, svd([A], 2)[0].S)


def test_wrong_matrices():
    eye = torch.eye(4)
    for A, error, says in (
        (np.eye(4), TypeError, "without matmat, rmatmat.*torch.from_numpy"),
        (None, TypeError, "NoneType"),
        (eye.to_sparse(), TypeError, "to_sparse_csr"),
        (eye.to_sparse_csc(), TypeError, "sparse_csc"),
        (eye.long().to_sparse_csr(), TypeError, "int64"),
        (eye[None].to_sparse_csr(), ValueError, "2 dimensions"),
        (torch.zeros(0, 4).to_sparse_csr(), ValueError, "empty"),
        (Operator(eye.half()), TypeError, "float16"),
        (Operator(eye[None]), ValueError, "shape"),
    ):
        with pytest.raises(error, match=says):
            svd(A, 2)
    wrong = torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2]), torch.tensor([0, 5]), torch.ones(2), (2, 3), check_invariants=False
    )
    with pytest.raises(ValueError, match="no valid CSR"):
        svd(wrong, 1)
    with pytest.raises(RuntimeError, match="detach"):
        svd(eye.to_sparse_csr().requires_grad_(), 2)
