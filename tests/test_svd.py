# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.randomized_svd against torch.linalg.svd in double precision."""

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import LAYOUTS, UNIT, make

import structmat as sm
from structmat import _C

SHAPES = [(1, 1), (1, 9), (9, 1), (7, 5), (33, 70), (130, 67), (97, 97)]
ORTHOGONAL = {torch.float32: 1e-5, torch.float64: 1e-13}
SPECTRA = {
    "slow": lambda i: i**-0.5,
    "harmonic": lambda i: 1 / i,
    "steep": lambda i: i**-2.0,
    "exponential": lambda i: torch.exp(-i / 4),
    "step": lambda i: torch.where(i <= 12, 1.0, 0.05),  # repeated more often than wanted
    "flat": lambda i: torch.ones_like(i),
    "rank 5": lambda i: (i <= 5).double(),
    "condition 1e12": lambda i: torch.logspace(0, -12, len(i), dtype=torch.float64),
    "condition 1e30": lambda i: torch.logspace(0, -30, len(i), dtype=torch.float64),
    "zero": torch.zeros_like,
}


def matrix(m, n, spectrum, dtype=torch.float64, scale=1.0):
    """A matrix of known singular values, times `scale`."""
    r = min(m, n)
    left = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q
    sigma = SPECTRA[spectrum](torch.arange(1, r + 1, dtype=torch.float64))
    return ((left * (scale * sigma)) @ right.T).to(dtype)


def verify(A, rank, result, excess=0.02):
    """Shapes, order, orthogonality, signs, singular values and error of a decomposition of A."""
    dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    eps = 2 * UNIT[dtype]
    A = A.detach().cpu().double()
    (m, n), k = A.shape, rank
    for factor, shape in zip(result, ((m, k), (k,), (k, n)), strict=True):
        assert factor.shape == shape
        assert factor.dtype == dtype
    U, S, Vh = (t.cpu().double() for t in result)
    assert (S[1:] <= S[:-1]).all()
    assert (S >= 0).all()
    for basis in (U.T @ U, Vh @ Vh.T):
        assert (basis - torch.eye(k)).abs().max() <= ORTHOGONAL[dtype]
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()

    largest = A.abs().max().item() or 1.0
    A, S = A / largest, S / largest
    sigma = torch.linalg.svdvals(A)
    norm = A.norm().item() or 1.0
    best = sigma[k:].norm().item() / norm
    error = (A - (U * S) @ Vh).norm().item() / norm
    rounding = 30 * eps
    assert error <= best * (1 + excess) + rounding
    assert (S - sigma[:k] <= rounding * sigma[0]).all()  # Ritz values are never too large
    # The estimate is the error, but for its floor.
    info = result.info
    assert info.error >= error * 0.8 - rounding
    assert info.error <= error * 1.25 + rounding
    assert info.rank <= k
    return error, best


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_layouts(backend, dtype, shape, layout):
    rank = min(3, *shape)
    A = make(*shape, dtype=dtype, device=backend.device, layout=layout)
    kept = A.clone()
    verify(A, rank, sm.linalg.randomized_svd(A, rank, oversample=3), excess=0.05)
    assert torch.equal(A, kept)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_spectra(backend, dtype, spectrum, wide):
    A = matrix(150, 90, spectrum, dtype).to(backend.device)
    A = A.T if wide else A
    result = sm.linalg.randomized_svd(A, 6, oversample=6)
    verify(A, 6, result)
    truth = torch.linalg.svdvals(A.cpu().double())[:6]
    bound = 150 * 2 * UNIT[dtype] * truth[0]
    if not ((truth > bound / 4) & (truth < 4 * bound)).any():
        assert result.info.rank == int((truth > bound).sum())


@pytest.mark.parametrize(
    "A",
    [
        torch.eye(60),
        torch.ones(70, 50),
        torch.randn(70, 6, generator=torch.Generator().manual_seed(0)).repeat(1, 8),
        torch.block_diag(torch.eye(3), torch.zeros(60, 50)),
        torch.diag(torch.tensor([1.0, *[1e-20] * 49])),
        torch.full((50, 40), -1e-38),
        torch.randn(1, 50, generator=torch.Generator().manual_seed(1)).expand(64, 50),
    ],
    ids=["identity", "ones", "duplicates", "block", "tiny", "near underflow", "expanded"],
)
@pytest.mark.parametrize("sweeps", [2, 5])
def test_degenerate(backend, A, sweeps):
    A = A.to(backend.device)
    verify(A, 8, sm.linalg.randomized_svd(A, 8, oversample=4, sweeps=sweeps))


@pytest.mark.parametrize("rank", [1, 20, 37, 40])
def test_large_ranks(backend, rank):
    A = matrix(60, 40, "slow").to(backend.device)
    verify(A, rank, sm.linalg.randomized_svd(A, rank), excess=0.05)


def test_complete_basis_is_exact(backend):
    A = matrix(40, 30, "slow").to(backend.device)
    U, S, Vh = result = sm.linalg.randomized_svd(A, 10, oversample=20)
    u, s, vh = torch.linalg.svd(A.cpu(), full_matrices=False)
    assert result.info.sweeps == 2
    torch.testing.assert_close(S.cpu(), s[:10], rtol=1e-13, atol=0)
    sign = (u[:, :10] * U.cpu()).sum(0).sign()
    torch.testing.assert_close(U.cpu(), u[:, :10] * sign, rtol=0, atol=1e-11)
    torch.testing.assert_close(Vh.cpu(), vh[:10] * sign[:, None], rtol=0, atol=1e-11)
    best = (s[10:].norm() / s.norm()).item()
    assert abs(result.info.error - best) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
        (torch.float16, 6e4),
        (torch.bfloat16, 1e30),
    ],
    ids=str,
)
def test_scale(backend, dtype, scale):
    A = matrix(90, 60, "harmonic", dtype, scale).to(backend.device)
    verify(A, 6, sm.linalg.randomized_svd(A, 6, oversample=4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (39, 52), (20, 7)])
def test_non_finite(backend, dtype, bad, where):
    A = make(40, 53, dtype=dtype, device=backend.device)
    A[where] = bad
    with pytest.raises(torch.linalg.LinAlgError, match="A contains NaN or Inf"):
        sm.linalg.randomized_svd(A, 4, oversample=2)
    *factors, facts = torch.ops.structmat.randomized_svd(A, 4, 2, None, 0, False)
    assert all(t.isnan().all() for t in (*factors, facts[:4]))
    assert facts[4] == 0
    info = sm.linalg.SVDInfo(facts)
    assert (info.rank, info.sweeps, str(info.error)) == (0, 0, "nan")


def test_singular_value_out_of_range(backend):
    A = torch.full((60, 50), 3e38, device=backend.device)  # sigma_1 = 1.6e40
    with pytest.raises(torch.linalg.LinAlgError, match="exceeds the range"):
        sm.linalg.randomized_svd(A, 3)
    # the products stay in range, the projected matrix does not
    A = torch.full((2000, 1500), 3e35, device=backend.device)
    with pytest.raises(torch.linalg.LinAlgError, match="exceeds the range"):
        sm.linalg.randomized_svd(A, 3)
    A = 1.7e308 * torch.eye(4, dtype=torch.float64, device=backend.device)
    with pytest.raises(torch.linalg.LinAlgError, match="the norm"):
        sm.linalg.randomized_svd(A, 2)


@pytest.mark.parametrize("kilobytes", [2, 8, 16])
def test_gpus_with_less_shared_memory(emulated_library, monkeypatch, kilobytes):
    """Smaller groups of rows, or rows left in global memory."""
    if emulated_library is None:
        pytest.skip("structmat was built without STRUCTMAT_EMULATE")
    monkeypatch.setenv("STRUCTMAT_EMULATE_SHARED", str(kilobytes << 10))
    A = matrix(90, 70, "harmonic", torch.float32)
    *factors, facts = torch.ops.structmat_emulated.randomized_svd(A, 20, 10, None, 0, False)
    result = sm.linalg.SVDResult(*factors)
    result.info = sm.linalg.SVDInfo(facts)
    verify(A, 20, result)


def test_rows_of_every_magnitude(backend):
    """Squares of the smallest underflow next to the largest."""
    A = torch.diag(torch.logspace(0, -36, 37)).to(backend.device)
    S = sm.linalg.randomized_svd(A, 5).S.cpu()
    torch.testing.assert_close(S, torch.logspace(0, -4, 5), rtol=1e-5, atol=0)


def test_sweeps_are_made_and_reported(backend):
    torch.manual_seed(3)
    A = matrix(200, 150, "slow").to(backend.device)
    excess = []
    for sweeps in range(2, 9):
        result = sm.linalg.randomized_svd(A, 10, oversample=6, sweeps=sweeps)
        assert result.info.sweeps == sweeps
        error, best = verify(A, 10, result, excess=0.3)
        excess.append(error / best - 1)
    assert all(later < earlier for earlier, later in pairwise(excess))
    assert excess[3] < 0.01  # the default, 5
    assert excess[6] < 1e-3


def test_a_block_holds_repeated_values():
    """More equal singular values than a narrow Krylov block has columns: none may be missed."""
    A = matrix(400, 300, "step")
    _, S, _ = sm.linalg.randomized_svd(A, 12)
    torch.testing.assert_close(S, torch.ones_like(S), rtol=1e-6, atol=0)


def test_against_svd_lowrank():
    """Never a larger error than torch's randomized SVD with its own oversampling and 6 passes."""
    for spectrum in ("slow", "harmonic", "steep", "exponential"):
        A = matrix(600, 500, spectrum)
        U, S, V = torch.svd_lowrank(A, q=40, niter=2)
        theirs = (A - (U[:, :30] * S[:30]) @ V[:, :30].T).norm()
        U, S, Vh = sm.linalg.randomized_svd(A, 30)
        assert (A - (U * S) @ Vh).norm() <= theirs * (1 + 1e-12)


ESTIMATED = {
    "i^-1/2": lambda i: i**-0.5,
    "1/i": lambda i: 1 / i,
    "i^-2": lambda i: i**-2.0,
    "exp(-i/20)": lambda i: torch.exp(-i / 20),
    "exp(-i/2)": lambda i: torch.exp(-i / 2),
    "step": lambda i: torch.where(i <= 10, 1.0, 1e-3).double(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_estimate_is_the_error(dtype):
    """Of 1,002 problems at least 99 % within a factor 1.25, where the error is above rounding."""
    i = torch.arange(1, 61, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, 60, dtype=torch.float64)).Q for n in (90, 60))
    ratios = []
    for spectrum in ESTIMATED.values():
        A = ((left * spectrum(i)) @ right.T).to(dtype)
        for seed in range(167):  # the sketch is Gaussian: other bases would tell nothing new
            rank, sweeps = (3, 6, 10, 15)[seed % 4], (None, 2, 3, 4, 6)[seed % 5]
            U, S, Vh = result = sm.linalg.randomized_svd(A, rank, sweeps=sweeps, seed=seed)
            error = (A.double() - (U.double() * S.double()) @ Vh.double()).norm() / A.norm()
            if error > 100 * UNIT[dtype]:
                ratios.append(result.info.error / error.item())
    ratios = torch.tensor(ratios)
    assert len(ratios) > 800
    assert ((ratios > 0.8) & (ratios < 1.25)).double().mean() >= 0.99


@pytest.mark.parametrize("tail", [0.0, 0.01, 0.3])
def test_copies_that_narrow_blocks_hide(tail):
    """64 equal singular values, where blocks of 32 columns find 32 of each."""
    i = torch.arange(1, 301, dtype=torch.float64)
    sigma = torch.where(i <= 64, 1.0, tail * (i - 64).clamp(min=1) ** -0.5)
    left, right = (torch.linalg.qr(torch.randn(n, 300, dtype=torch.float64)).Q for n in (400, 300))
    for rank in (64, 80):
        _, S, _ = result = sm.linalg.randomized_svd((left * sigma) @ right.T, rank)
        torch.testing.assert_close(S[:64], torch.ones(64, dtype=S.dtype), rtol=1e-3, atol=0)
        torch.testing.assert_close(S[64:], sigma[64:rank], rtol=0.15, atol=1e-12)
        assert result.info.sweeps in (9, 10, 14, 15)  # 5 more where the result was not trusted


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("sweeps", [3, 4])
def test_sparse_start(wide, sweeps):
    """Singular vectors along coordinates, the worst case of a sparse random matrix, are found as
    well as any others: three sweeps begin with its product with A^T, four with A."""
    n, k = 900, 20
    i = torch.arange(1, n + 1, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for _ in range(2))
    best = (i[k:] ** -1.0).sum().sqrt()

    def excess(A):
        A = A.T if wide else A
        U, S, Vh = sm.linalg.randomized_svd(A, k, sweeps=sweeps)
        return ((A - (U * S) @ Vh).norm() / best - 1).item()

    assert excess(torch.diag(i**-0.5)[:, torch.randperm(n)]) <= 1.6 * excess(
        (left * i**-0.5) @ right.T
    )


@pytest.mark.parametrize("rank", [8, 24])
def test_equal_values_along_coordinates(rank):
    """A sparse start must tell any two coordinates apart, however alike their rows of it are."""
    sigma = torch.cat([torch.ones(rank), 0.5 * torch.arange(1, 300 - rank + 1) ** -0.25]).double()
    for seed in (*range(20), 218, 251, 276, 329, 495):
        S = sm.linalg.randomized_svd(torch.diag(sigma), rank, seed=seed).S
        torch.testing.assert_close(S, torch.ones_like(S), rtol=0.01, atol=0)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("fall", [2.0, 25.0, 40.0, 5e3, 9e3, 2e4, 1e6])
def test_float_vectors_of_any_fall(fall, wide):
    """The vectors on the side of T: from T^T T up to a fall of 1e4, then from a basis of T."""
    shape, k = ((90, 400) if wide else (400, 90)), 12
    left = torch.linalg.qr(torch.randn(shape[0], 60, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 60, dtype=torch.float64)).Q
    sigma = torch.logspace(0, -math.log10(fall), k, dtype=torch.float64)
    sigma = torch.cat([sigma, torch.full((48,), sigma[-1].item() / 50, dtype=torch.float64)])
    A = ((left * sigma) @ right.T).float()
    result = sm.linalg.randomized_svd(A, k)
    verify(A, k, result)
    relative = (result.S.double() / sigma[:k] - 1).abs()
    # the matrix itself is rounded by 6e-8 of its largest entries
    assert (relative <= 1e-6 + 1e-6 * fall).all()


@pytest.mark.parametrize("power", [2, 3])
def test_float_digits_of_fast_decay(power):
    """LAPACK's SVD of the projected matrix in single precision would err by up to 700 eps."""
    i = torch.arange(1, 561, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, 560, dtype=torch.float64)).Q for n in (700, 560))
    A = ((left * i**-power) @ right.T).float()
    U, S, Vh = result = sm.linalg.randomized_svd(A, 128)
    error = (A.double() - (U.double() * S.double()) @ Vh.double()).norm() / A.norm()
    best = (i[128:] ** (-2.0 * power)).sum().sqrt() / (i ** (-2.0 * power)).sum().sqrt()
    assert error <= 1.01 * best + 20 * UNIT[torch.float32]
    assert 0.8 <= result.info.error / error <= 1.25


def test_seed(backend):
    A = make(60, 50, device=backend.device)
    first, again, other = (
        sm.linalg.randomized_svd(A, 4, oversample=3, seed=s).U for s in (1, 1, 2**63 - 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_same_bits_for_any_thread_count(threads):
    for A in (torch.randn(5000, 130), torch.randn(400, 700).T, torch.randn(3000, 90).bfloat16()):
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sm.linalg.randomized_svd(A, 20))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_numpy_gives_the_same_bits(dtype):
    for A in (torch.randn(70, 50), torch.randn(50, 70).T, torch.randn(90, 120)[::2, 1::3]):
        A = A.to(dtype)
        wanted = sm.linalg.randomized_svd(A, 7, seed=3)
        U, S, Vh, info = _C.randomized_svd(A.numpy(), 7, seed=3)
        for ours, theirs in zip((U, S, Vh), wanted, strict=True):
            assert np.array_equal(ours, theirs.numpy())
        assert info["error"] == wanted.info.error
        assert info["rank"] == wanted.info.rank
        assert info["sweeps"] == wanted.info.sweeps


def test_numpy_reads_any_strides():
    A = np.random.default_rng(0).standard_normal((40, 30))
    _, S, _, _ = _C.randomized_svd(A, 5, oversample=25)
    for view in (A[::-1], A[:, ::-1], A.T[::-1, ::-1], np.asfortranarray(A)):
        np.testing.assert_allclose(_C.randomized_svd(view, 5, oversample=25)[1], S, rtol=1e-12)


def test_numpy_errors():
    with pytest.raises(np.linalg.LinAlgError, match="A contains NaN or Inf"):
        _C.randomized_svd(np.full((4, 3), np.nan), 2)
    for rank in (4, 10**14, 0, -1):
        with pytest.raises(ValueError, match=f"rank is {rank}, wanted 1 to 3"):
            _C.randomized_svd(np.ones((4, 3)), rank)
    with pytest.raises(ValueError, match=r"A is empty, shape \(0, 3\)"):
        _C.randomized_svd(np.ones((0, 3)), 1)
    with pytest.raises(TypeError, match="must be float32, float64 or float16, got int64"):
        _C.randomized_svd(np.ones((4, 3), np.int64), 1)
    with pytest.raises(TypeError, match="must be float32, float64 or float16, got >f2"):
        _C.randomized_svd(np.ones((4, 3), ">f2"), 1)


def test_numpy_arrays_from_other_processes():
    """Their dtype equals NumPy's own, but is another object."""
    A = np.random.default_rng(0).standard_normal((40, 30))
    copy = pickle.loads(pickle.dumps(A))
    assert np.array_equal(_C.randomized_svd(copy, 5)[1], _C.randomized_svd(A, 5)[1])
    assert _C.gaussian(2, 3, dtype=np.dtype("f8", copy=True)).dtype == np.float64


def test_transforms_are_refused():
    A = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match=r"no rule for torch\.func transforms"):
        torch.func.jvp(lambda A: sm.linalg.randomized_svd(A, 2).S, (A,), (A,))


BAD = [
    (TypeError, "A is a float without shape", {"A": 1.0}),
    (TypeError, "A is torch.int64, wanted one of torch.float32", {"A": torch.ones(4, 3).long()}),
    (TypeError, "A is torch.complex64", {"A": torch.ones(4, 3, dtype=torch.complex64)}),
    (TypeError, "A has layout", {"A": torch.ones(4, 3).to_sparse()}),
    (ValueError, "A must have at least 2 dimensions, got 1", {"A": torch.ones(4)}),
    (ValueError, "wanted one of rank and rtol, got neither", {"rank": None}),
    (ValueError, "wanted one of rank and rtol, got both", {"rtol": 0.1}),
    (ValueError, r"A is empty, shape \(0, 3\)", {"A": torch.ones(0, 3)}),
    (ValueError, r"A is empty, shape \(4, 0\)", {"A": torch.ones(4, 0)}),
    (ValueError, r"rank is 0, wanted 1 to 3 for A of shape \(4, 3\)", {"rank": 0}),
    (ValueError, "rank is -2", {"rank": -2}),
    (ValueError, "rank is 4, wanted 1 to 3", {"rank": 4}),
    (TypeError, "rank must be an integer, got float", {"rank": 2.0}),
    (ValueError, "oversample is -1", {"oversample": -1}),
    (ValueError, "sweeps is 1, wanted at least 2", {"sweeps": 1}),
    (ValueError, "seed is -1", {"seed": -1}),
    (ValueError, "seed is 9223372036854775808", {"seed": 2**63}),
]


@pytest.mark.parametrize(("error", "message", "changed"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad_input(error, message, changed):
    arguments = {"A": torch.ones(4, 3), "rank": 2} | changed
    with pytest.raises(error, match=message):
        sm.linalg.randomized_svd(**arguments)


def test_operator_checks_too():
    operator = torch.ops.structmat.randomized_svd
    with pytest.raises(RuntimeError, match="rank is 4, wanted 1 to 3"):
        operator(torch.ones(4, 3), 4, None, None, 0, False)
    with pytest.raises(RuntimeError, match="A must be float32"):
        operator(torch.ones(4, 3).long(), 1, None, None, 0, False)


def test_no_grad_accepts_parameters():
    weight = torch.nn.Linear(12, 9).weight
    with torch.no_grad():
        verify(weight, 4, sm.linalg.randomized_svd(weight, 4))


def test_opcheck():
    for A in (torch.randn(12, 9), torch.randn(9, 12, dtype=torch.float64).T, torch.eye(6).half()):
        torch.library.opcheck(
            torch.ops.structmat.randomized_svd.default, (A, 3, None, None, 0, False)
        )


def test_compile(backend):
    def low_rank(A):
        U, S, Vh = result = sm.linalg.randomized_svd(A, 3, seed=1)
        return (U * S) @ Vh, result

    A = torch.randn(20, 30, device=backend.device)
    compiled = torch.compile(low_rank, fullgraph=True, backend="aot_eager")
    product, result = compiled(A)
    eager, wanted = low_rank(A)
    torch.testing.assert_close(product, eager)
    assert all(map(torch.equal, result, wanted))
    assert result.info.error == wanted.info.error


def test_result_is_a_triple_with_facts():
    result = sm.linalg.randomized_svd(torch.eye(8), 2)
    assert isinstance(result, tuple)
    assert len(result) == 3
    assert result.info.converged
    assert repr(result.info).startswith("SVDInfo(rank=2, sweeps=2, error=0.866")


def test_residuals_bound_singular_values():
    A = matrix(90, 60, "slow")
    A = A + 2.0
    for center in (False, True):
        result = sm.linalg.randomized_svd(A, 20, sweeps=3, center=center)
        found = result.residuals(A, center=center)
        U, S, Vh = result
        B = A - A.mean(0) if center else A
        wanted = torch.maximum((B @ Vh.T - U * S).norm(dim=0), (B.T @ U - Vh.T * S).norm(dim=0))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)
        distance = (S[:, None] - torch.linalg.svdvals(B)).abs().amin(1)
        assert (distance <= found + 1e-12).all()
        assert found[-1] > 1e-3  # with 3 sweeps the last ones are not determined
    with pytest.raises(ValueError, match=r"A has shape \(60, 90\), the factors \(90, 20\)"):
        result.residuals(A.T)
    with pytest.raises(
        TypeError, match=r"residuals: A is torch.float32, the factors torch.float64"
    ):
        result.residuals(A.float())
    with pytest.raises(TypeError, match=r"residuals: A is a ndarray"):
        result.residuals(A.numpy())


def test_matrices_without_numbers():
    A = matrix(9, 8, "slow")
    for other in ("A.npy", b"A.npy"):
        with pytest.raises(TypeError, match=r"A is a .* svd_out_of_core reads files"):
            sm.linalg.randomized_svd(other, 8)
    for other in (A.to("meta"), [A.to("meta")]):
        with pytest.raises(ValueError, match=r"A(\[0\])? is on meta"):
            sm.linalg.randomized_svd(other, 8)
    with pytest.raises(ValueError, match="A is on meta"):
        sm.linalg.randomized_svd(A.to("meta"), rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "n"), [(193, 97), (961, 5), (20_000, 200), (100, 30_000)], ids=str)
def test_equal_rows(m, n, dtype):
    """Sums of equal addends round alike: what projection leaves points the same way again."""
    rounding = (60 if dtype == torch.float32 else 300) * UNIT[dtype]
    cases = [torch.full((m, n), 0.1), torch.randn(1, n).expand(m, n)]
    cases += [torch.eye(3, n)[torch.arange(m) % 3], torch.randn(m, 1).expand(m, n)]
    for A in cases:
        A, k = A.to(dtype), min(8, n)
        result = sm.linalg.randomized_svd(A, k)
        U, S, Vh = (factor.double() for factor in result)
        left, right = (t.numpy().astype(np.longdouble) for t in (U, Vh.T))  # double would round too
        for basis in (left.T @ left, right.T @ right):
            assert np.abs(basis - np.eye(k)).max() <= ORTHOGONAL[dtype]
        error = (A.double() - (U * S) @ Vh).norm() / A.double().norm()
        assert error <= rounding
        assert error - rounding <= result.info.error <= 1e3 * UNIT[dtype]
